"""Whether patches keep their local meaning during a run: a segmentation probe, and the similarities of patches.

In long training k-NN accuracy can rise while dense features fall. The probe says how good patches are; the consistency
says how far the similarities between the patches of an image have moved from those of the best step so far.

Letters: B images, P patches, D width, C classes.
"""

from __future__ import annotations

import pathlib

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_vitreg.files import atomic_write
from modeling_vitreg.metrics import measure_areas


NUM_PATCHES = 64  # of an image, for the probe; the same of all images
_NUM_COMPARED = 32  # of them and of the images, for the similarities
_RIDGE = 1e-3  # of the mean eigenvalue of the features


def choose_patches(num_patches: int) -> Tensor:
    """Numbers of up to `NUM_PATCHES` patches that are looked at, in a fixed random order."""
    return torch.randperm(num_patches, generator=torch.Generator().manual_seed(0))[:NUM_PATCHES]


def classes_of_patches(masks: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """The most frequent class (B, P) in each patch of masks (B, height, width), int64."""
    rows, columns = patch_shape
    cells = masks.long().unfold(1, rows, rows).unfold(2, columns, columns)  # [B, rows, columns, r, c]
    return cells.flatten(3).flatten(1, 2).mode(dim=2).values


@torch.no_grad()
def probe_segmentation(patches: Tensor, classes: Tensor, *, num_classes: int) -> float:
    """Mean IoU of a linear probe of patches, fitted on images 0, 2, ... and measured on images 1, 3, ...

    standardise the channels;  W = argmin |X W - Y|^2 + r |W|^2, Y one-hot;  predict the largest score

    A ridge regression in closed form: a fraction of a second, and the same number each time. IoU is counted in
    patches, over the classes that occur.

    Args:
        patches: (B, P, D), normed.
        classes: (B, P), int64.
        num_classes: C.

    Raises:
        ValueError: fewer than 2 images.
    """
    if len(patches) < 2:
        raise ValueError(f"expected 2 images or more, one to fit and one to measure, got {len(patches)}")
    features = patches.cpu().double()
    known = features[::2].flatten(0, 1)  # [B P, D]
    center, scale = known.mean(dim=0), known.std(dim=0, correction=0).clamp(min=1e-12)
    known, tested = (known - center) / scale, (features[1::2] - center) / scale
    truth = F.one_hot(classes[::2].flatten(), num_classes).double()
    mean = truth.mean(dim=0)
    gram = known.mT @ known
    gram.diagonal().add_(_RIDGE * len(known))
    weights = torch.linalg.solve(gram, known.mT @ (truth - mean))  # [D, C]
    found = (tested @ weights + mean).argmax(dim=-1, keepdim=True)  # [B, P, 1]
    areas = measure_areas(found, classes[1::2, :, None], num_classes=num_classes).sum(dim=0)
    return (areas[0] / (areas[1] + areas[2] - areas[0])).nanmean().item()


@torch.no_grad()
def similarities(patches: Tensor) -> Tensor:
    """Cosines of the pairs of patches of each image, (B, P, D) -> float16 (B', P' (P' - 1) / 2), on the CPU."""
    tokens = F.normalize(patches[:_NUM_COMPARED, :_NUM_COMPARED].cpu().float(), dim=-1)
    first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], offset=1)
    return (tokens @ tokens.mT)[:, first, second].half()


def consistency(ours: Tensor, best: Tensor) -> float:
    """Mean over images of the correlation of two sets of similarities; images without a variation do not count."""
    ours, best = (values.double() - values.double().mean(dim=1, keepdim=True) for values in (ours, best))
    scale = ours.norm(dim=1) * best.norm(dim=1)
    correlations = (ours * best).sum(dim=1)[scale > 0] / scale[scale > 0]
    return correlations.mean().item() if len(correlations) else 0.0


class BestPatches:
    """The similarities of the best steps of a run, in a file beside its log.

    Best is the highest mean IoU of the probe. Which step that is comes from the log alone, so a run that was killed
    goes on with the same numbers; what a later look of the killed run left in the file is not used.

    Args:
        path: file of similarities by step.
        counts_start: whether the model before the first step may be the best: it was trained before.
    """

    def __init__(self, path: pathlib.Path, *, counts_start: bool):
        self._path, self._counts_start = path, counts_start
        try:
            self._known = load_file(path) if path.exists() else {}
        except (OSError, SafetensorError):
            self._known = {}

    def compare(self, records: list[dict], *, step: int, patches: Tensor, classes: Tensor, num_classes: int) -> dict:
        """Values for the log: `segmentation`, `patch_consistency` and `patch_best_step`.

        Args:
            records: of the log before this step.
            step: number of the step, -1 before the first.
            patches, classes, num_classes: see `probe_segmentation`.
        """
        score, own = probe_segmentation(patches, classes, num_classes=num_classes), similarities(patches)
        record = {"segmentation": score}
        if step < 0 and not self._counts_start:
            return record
        earlier = [each for each in records if "patch_best_step" in each and each["step"] < step]
        best_step = earlier[-1]["patch_best_step"] if earlier else step
        best = next((each["segmentation"] for each in earlier if each["step"] == best_step), -1.0)
        if score > best or str(best_step) not in self._known:
            best_step = step
            self._known[str(step)] = own
            with atomic_write(self._path) as part:
                save_file(self._known, part)
        found = consistency(own, self._known[str(best_step)])
        return record | {"patch_consistency": found, "patch_best_step": best_step}

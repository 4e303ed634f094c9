"""Linear segmentation: a linear head on patches that predicts the class of each pixel, and mean intersection over
union.

The metric is that of mmsegmentation, as in DINOv2: areas are summed over all images before the division, and a class
that occurs in neither mask nor prediction is ignored. Masks are compared at the image size of the encoder, in one
piece; DINOv2 slides a window over images of 512 pixels.

Letters: B images of a batch, I images, C classes, D width, S draws.

Source: Oquab et al. 2023, arXiv 2304.07193, section 7.4; open-mmlab/mmsegmentation, `evaluation/metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.metrics import check_masks
from modeling_vitreg.modeling_vitreg import LinearSegmentationHead

from .dense import Descent, fit_head, initialise
from .intervals import MetricValue, statistic_of_images


@dataclass(frozen=True)
class SegmentationSettings:
    """Training of the head. DINOv2 uses 40,000 steps of 16 images.

    Args:
        num_steps, batch_size, learning_rate: settings of AdamW with weight decay 1e-4 and linear decay.
    """

    num_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3

    @property
    def descent(self) -> Descent:
        """Settings of the optimiser, with the warm-up of DINOv2."""
        return Descent(self.num_steps, self.batch_size, self.learning_rate, weight_decay=1e-4, warmup_share=0.0375)


def fit_segmentation(
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    num_images: int,
    num_classes: int,
    settings: SegmentationSettings,
    ignore_index: int = 255,
    seed: int = 0,
    device: torch.device | str = "cpu",
    title: str | None = None,
) -> LinearSegmentationHead:
    """Train a head with the cross-entropy of the pixels.

    Args:
        read: function of image indices (B,) that returns normed patches (B, rows, columns, D) and masks
            (B, height, width).
        num_images: I.
        num_classes: C.
        settings: settings of the training.
        ignore_index: mask value of pixels to ignore.
        seed: random seed of the initial head and the order of the images.
        device: device to train on.
        title: title of a progress bar; None for no bar.

    Raises:
        ValueError: no image, or a class number of a mask is out of range.
    """
    width = read(torch.tensor([0]))[0].shape[-1]
    head = LinearSegmentationHead(width, num_classes)
    initialise(head.classifier, seed=seed)
    head.to(device)

    def loss_of(numbers: Tensor) -> Tensor:
        patches, masks = read(numbers)
        masks = masks.to(device).long()
        check_masks(masks, num_classes=num_classes, ignore_index=ignore_index)
        scores = head(patches.to(device).float(), tuple(masks.shape[1:]))
        # A sum, because the mean over a batch without valid pixels would be 0 / 0.
        total = F.cross_entropy(scores, masks, ignore_index=ignore_index, reduction="sum")
        return total / (masks != ignore_index).sum().clamp(min=1)

    fit_head(head, loss_of, num_images=num_images, descent=settings.descent, seed=seed, title=title)
    return head


def measure_segmentation(areas: Tensor, *, seed: int = 0) -> list[MetricValue]:
    """Metrics from areas (I, 3, C).

    mean_iou        mean over classes of intersection / (prediction + mask - intersection)
    mean_accuracy   mean over classes of intersection / mask
    pixel_accuracy  sum of intersections / sum of masks
    """
    statistics = {
        "mean_iou": lambda total: (total[:, 0] / (total[:, 1] + total[:, 2] - total[:, 0])).nanmean(dim=1),
        "mean_accuracy": lambda total: (total[:, 0] / total[:, 2]).nanmean(dim=1),
        "pixel_accuracy": lambda total: total[:, 0].sum(dim=1) / total[:, 2].sum(dim=1),
    }

    def of_weights(statistic: Callable) -> Callable:
        return lambda weights: statistic(torch.einsum("si,iac->sac", weights, areas))

    return [
        statistic_of_images(name, of_weights(statistic), num_images=len(areas), seed=seed)
        for name, statistic in statistics.items()
    ]

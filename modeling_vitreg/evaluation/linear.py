"""Linear probe of DINOv2: a sweep over learning rates and inputs, with all heads trained at once.

The head is chosen on a part of the training images and measured on the test images; DINOv2 chooses it on the test
images. Features are computed once, so there is no augmentation; DINOv2 trains on random crops and flips.

Letters: B images of a batch, I images, K heads that share an input, D width of the input, C classes.

Source: Oquab et al. 2023, arXiv 2304.07193 (facebookresearch/dinov2, `dinov2/eval/linear.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tqdm
from torch import Tensor

from modeling_vitreg.images.splits import hold_out, require_classes
from modeling_vitreg.metrics import average_precisions
from modeling_vitreg.settings import expect


LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_MOMENTUM = 0.9
_ROWS_AT_ONCE = 1024  # validation images per step, for all heads


@dataclass(frozen=True)
class LinearSettings:
    """Training of the heads. DINOv2 uses 12,500 steps of 1024 images.

    Args:
        learning_rates: values of the sweep for batches of 256 images; they scale with the batch size.
        num_layers: numbers of last layers whose class tokens are concatenated, with and without the mean patch.
        num_steps: steps of gradient descent; the learning rate falls to 0 along a cosine.
        batch_size: images per step; all images if there are fewer.
        validation_share: share of the training images on which the head is chosen.
    """

    learning_rates: tuple[float, ...] = LEARNING_RATES
    num_layers: tuple[int, ...] = (1, 4)
    num_steps: int = 1250
    batch_size: int = 256
    validation_share: float = 0.1

    def __post_init__(self):
        if not self.learning_rates:
            raise ValueError("expected one learning rate or more, got none")
        expect(self, "", learning_rates="(0, inf)", num_steps="[1, inf)", batch_size="[1, inf)")


@dataclass(frozen=True)
class LinearHead:
    """The chosen head.

    Args:
        input: name of its input.
        learning_rate: value of the sweep, not scaled.
        validation_accuracy: accuracy on the images that it was chosen on.
        classes: (C,), labels of the columns of `weight`.
        weight: (D, C).
        bias: (C,).
    """

    input: str
    learning_rate: float
    validation_accuracy: float
    classes: Tensor
    weight: Tensor
    bias: Tensor

    def scores(self, inputs: dict[str, Tensor]) -> Tensor:
        """Scores (I, C) of the inputs (I, D) by name."""
        return inputs[self.input].to(self.weight) @ self.weight + self.bias


def fit_linear(
    inputs: dict[str, Tensor],
    labels: Tensor,
    *,
    settings: LinearSettings,
    seed: int = 0,
    has_progress_bar: bool = False,
) -> LinearHead:
    """Train all heads of the sweep, and choose the best one on the validation images; of equal heads the first.

    Args:
        inputs: name to (I, D), which may be views of one tensor; heads are trained in their precision on their device.
        labels: (I,) integers, which need not be consecutive; or (I, C), 0 or 1 for each class: heads then learn one
            decision for each, and are chosen by mean average precision.
        settings: settings of the sweep.
        seed: random seed of the validation images, the initial heads and the order of the images.
        has_progress_bar: show a progress bar.

    Raises:
        ValueError: fewer than two classes or images, or all heads diverged.
    """
    classes = require_classes(labels) if labels.ndim == 1 else torch.arange(labels.shape[1])
    kept, held_out = hold_out(len(labels), share=settings.validation_share, seed=seed)
    targets = torch.searchsorted(classes, labels) if labels.ndim == 1 else labels.float()
    batches = [kept[batch] for batch in draw_batches(len(kept), settings=settings, seed=seed)]
    if has_progress_bar:
        batches = tqdm.tqdm(batches, unit="step", desc="linear")
    heads = train_heads(inputs, targets, batches, settings=settings, num_classes=len(classes), seed=seed)
    best = None
    for name, (weights, biases) in heads.items():
        accuracies = _accuracies(inputs[name], targets, held_out, weights=weights, biases=biases)
        for number, accuracy in enumerate(accuracies):
            has_diverged = not weights[number].isfinite().all()
            if not has_diverged and (best is None or accuracy > best.validation_accuracy):
                rate = settings.learning_rates[number]
                best = LinearHead(name, rate, accuracy, classes, weights[number], biases[number])
    if best is None:
        raise ValueError(f"all heads diverged: use learning rates below {min(settings.learning_rates):g}")
    return best


def _accuracies(inputs: Tensor, targets: Tensor, held_out: Tensor, *, weights: Tensor, biases: Tensor) -> list[float]:
    """Accuracy of each of the K heads on the held-out rows; mean average precision with lists of labels."""
    if targets.ndim == 2:
        rows = inputs[held_out.to(inputs.device)]
        scores = [(rows @ weight + bias).cpu() for weight, bias in zip(weights, biases)]
        return [average_precisions(own, targets[held_out]).nanmean().nan_to_num().item() for own in scores]
    num_right = torch.zeros(len(weights))
    for batch in held_out.split(_ROWS_AT_ONCE):
        scores = torch.einsum("bd,kdc->kbc", inputs[batch.to(inputs.device)], weights) + biases[:, None]
        num_right += (scores.argmax(dim=2).cpu() == targets[batch]).sum(dim=1)  # [K, B, C] -> [K]
    return (num_right.double() / len(held_out)).tolist()


def draw_batches(num_images: int, *, settings: LinearSettings, seed: int) -> list[Tensor]:
    """Image indices of each step: a new order in each epoch, without the incomplete last batch."""
    generator, size = torch.Generator().manual_seed(seed), min(settings.batch_size, num_images)
    batches = []
    while len(batches) < settings.num_steps:
        order = torch.randperm(num_images, generator=generator)
        batches.extend(order[: len(order) // size * size].split(size))
    return batches[: settings.num_steps]


def initial_heads(widths: dict[str, int], *, num_heads: int, num_classes: int, seed: int) -> dict[str, Tensor]:
    """Initial weights (K, D, C) for each input: normal with standard deviation 0.01. Biases start at 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(num_heads, width, num_classes).normal_(std=0.01, generator=generator)
        for name, width in widths.items()
    }


@torch.no_grad()
def train_heads(
    features: dict[str, Tensor],
    targets: Tensor,
    batches: Sequence[Tensor],
    *,
    settings: LinearSettings,
    num_classes: int,
    seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train K independent heads, one per learning rate, on each input with the same batches.

    for each step: gradient of the mean cross-entropy, or of the mean over images of the sum over classes of the binary
                   cross-entropy; velocity = 0.9 velocity + gradient
                   head -= learning rate x batch size / 256 x (1 + cos(pi step / steps)) / 2 x velocity

    Args:
        features: name to (I, D).
        targets: (I,), 0 ... C - 1; or (I, C), 0 or 1 each.
        batches: image indices of each step.
        settings, num_classes, seed: as in `fit_linear`.

    Returns:
        Name to weights (K, D, C) and biases (K, C).
    """
    sizes = {name: value.shape[1] for name, value in features.items()}
    initial = initial_heads(sizes, num_heads=len(settings.learning_rates), num_classes=num_classes, seed=seed)
    heads = {}
    for name, weights in initial.items():
        # The bias is one more row, whose input is always 1.
        rows = torch.cat([weights, torch.zeros_like(weights[:, :1])], dim=1).to(features[name])
        heads[name] = (rows, torch.zeros_like(rows))
    rates = torch.tensor(settings.learning_rates, dtype=torch.float64).view(-1, 1, 1)
    for step, batch in enumerate(batches):
        factor = len(batch) / 256 * (1 + math.cos(math.pi * step / len(batches))) / 2
        for name, (rows, velocity) in heads.items():
            inputs = features[name][batch.to(rows.device)]
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
            scores = torch.einsum("bd,kdc->kbc", inputs, rows)  # [B, D] -> [K, B, C]
            if targets.ndim == 2:
                error = scores.sigmoid() - targets[batch].to(scores)
            else:
                error = scores.softmax(dim=2)
                error[:, torch.arange(len(batch)), targets[batch]] -= 1
            velocity.mul_(_MOMENTUM).add_(torch.einsum("bd,kbc->kdc", inputs, error), alpha=1 / len(batch))
            rows -= (rates * factor).to(rows) * velocity
    return {name: (rows[:, :-1], rows[:, -1]) for name, (rows, _) in heads.items()}

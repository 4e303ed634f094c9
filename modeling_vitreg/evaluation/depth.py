"""Linear depth head of DINOv2 on patches and class token: a classifier of depth bins, and the errors of its depth.

The loss is the scale-invariant loss alone: the gradient loss of DINOv2 slices the wrong dimensions, and is zero for
the one or two images per device of its runs. Metrics are computed per image over its valid pixels, then averaged over
the images, as in the toolbox that DINOv2 uses.

Letters: B images of a batch, I images, D width, S draws.

Source: Oquab et al. 2023, arXiv 2304.07193, section 7.4; Bhat et al. 2020, arXiv 2011.14141 (bins);
zhyever/Monocular-Depth-Estimation-Toolbox, `depth/core/evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_vitreg.metrics import DEPTH_ERRORS
from modeling_vitreg.modeling_vitreg import LinearDepthHead, scale_invariant_loss

from .dense import Descent, fit_head, initialise
from .intervals import MetricValue, statistic_of_images


@dataclass(frozen=True)
class DepthSettings:
    """Training of the head. Published heads use 38,400 steps of 16 images.

    Args:
        num_steps, batch_size, learning_rate: settings of AdamW with weight decay 0.01; the learning rate rises for a
            third of the steps, then falls along a cosine.
        num_bins: number of depth bins.
        min_depth: depth of the first bin in metres; smaller depths are ignored. The last bin is `data.max_depth`.
    """

    num_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 5e-3
    num_bins: int = 256
    min_depth: float = 1e-3

    @property
    def descent(self) -> Descent:
        """Settings of the optimiser."""
        rates = {"weight_decay": 0.01, "warmup_share": 1 / 3, "is_cosine": True, "clip": 35.0}
        return Descent(self.num_steps, self.batch_size, self.learning_rate, **rates)


def join_class_token(patches: Tensor, class_tokens: Tensor | None) -> Tensor:
    """Features (B, rows, columns, 2 D): patches (B, rows, columns, D) and class token (B, D), concatenated if any."""
    if class_tokens is None:
        return patches
    return torch.cat([patches, class_tokens[:, None, None].expand_as(patches)], dim=-1)


def fit_depth(
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    num_images: int,
    max_depth: float,
    settings: DepthSettings,
    seed: int = 0,
    device: torch.device | str = "cpu",
    title: str | None = None,
) -> LinearDepthHead:
    """Train a head with the scale-invariant loss on pixels with 0 < depth <= `max_depth`.

    Args:
        read: function of image indices (B,) that returns features before the norm (B, rows, columns, D) and depths
            (B, height, width).
        num_images: I.
        max_depth: maximum depth in metres.
        settings, seed, device, title: as in `segmentation.fit_segmentation`.

    Raises:
        ValueError: no image.
    """
    width = read(torch.tensor([0]))[0].shape[-1]
    head = LinearDepthHead(width, num_bins=settings.num_bins, min_depth=settings.min_depth, max_depth=max_depth)
    initialise(head.classifier, seed=seed)
    head.to(device)

    def loss_of(numbers: Tensor) -> Tensor:
        features, depths = read(numbers)
        predicted = head(features.to(device).float(), tuple(depths.shape[1:]))
        return scale_invariant_loss(predicted, depths.to(device), max_depth=max_depth)

    fit_head(head, loss_of, num_images=num_images, descent=settings.descent, seed=seed, title=title)
    return head


def measure_depth(errors: Tensor, *, seed: int = 0) -> list[MetricValue]:
    """Means over the images of errors (I, errors); images without a valid pixel are ignored.

    Raises:
        ValueError: no image has a valid pixel.
    """
    errors = errors[~errors.isnan().any(dim=1)]
    if not len(errors):
        raise ValueError("expected depths in the valid range, got none in any image: check depth_scale and max_depth")

    def of_column(column: Tensor) -> Callable:
        return lambda weights: weights @ column / weights.sum(dim=1)

    return [
        statistic_of_images(name, of_column(errors[:, number]), num_images=len(errors), seed=seed)
        for number, name in enumerate(DEPTH_ERRORS)
    ]

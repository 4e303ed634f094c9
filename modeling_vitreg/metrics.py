"""What is measured of maps: areas of classes, from which intersection over union follows, and errors of depth.

Heads are trained and evaluated in several places; what a number means stands here.

Letters: B images of a batch, C classes.

Source: open-mmlab/mmsegmentation, `evaluation/metrics`; zhyever/Monocular-Depth-Estimation-Toolbox,
`depth/core/evaluation`, by both of which DINOv2 reports.
"""

from __future__ import annotations

import torch
from torch import Tensor


DEPTH_ERRORS = ("rmse", "abs_rel", "d1", "d2", "d3", "log10", "rmse_log", "silog", "sq_rel")


def measure_areas(predicted: Tensor, masks: Tensor, *, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Pixels of each class that both, the prediction, and the truth of each image have.

    Args:
        predicted: (B, height, width) class numbers.
        masks: the same, true; pixels of `ignore_index` do not count.
        num_classes: C.
        ignore_index: see `masks`.

    Returns:
        (B, 3, C) in float64: intersection, prediction, truth.

    Raises:
        ValueError: maps of different size, or a class that does not exist.
    """
    if predicted.shape != masks.shape:
        raise ValueError(f"expected maps of one shape, got {tuple(predicted.shape)} and {tuple(masks.shape)}")
    check_masks(masks, num_classes=num_classes, ignore_index=ignore_index)
    counts = []
    for own, truth in zip(predicted.flatten(1).long(), masks.flatten(1).long()):
        own, truth = own[truth != ignore_index], truth[truth != ignore_index]
        matrix = torch.bincount(truth * num_classes + own, minlength=num_classes**2).view(num_classes, num_classes)
        counts.append(torch.stack([matrix.diagonal(), matrix.sum(dim=0), matrix.sum(dim=1)]))
    return torch.stack(counts).double()


def check_masks(masks: Tensor, *, num_classes: int, ignore_index: int) -> None:
    """Refuse a mask with a class that does not exist.

    Raises:
        ValueError: the message names the class.
    """
    is_wrong = (masks != ignore_index) & ((masks < 0) | (masks >= num_classes))
    if is_wrong.any():
        raise ValueError(
            f"expected classes 0 ... {num_classes - 1} in a mask, or {ignore_index} where there is none, got "
            f"{masks[is_wrong][0].item()}"
        )


def depth_errors(predicted: Tensor, depths: Tensor, *, min_depth: float, max_depth: float) -> Tensor:
    """Errors of each image over its valid pixels, min_depth < d < max_depth; p is the predicted depth.

    rmse      sqrt(mean (p - d)^2)             d1, d2, d3  share with max(p / d, d / p) < 1.25, 1.25^2, 1.25^3
    abs_rel   mean |p - d| / d                 log10       mean |log10 p - log10 d|
    sq_rel    mean (p - d)^2 / d               rmse_log    sqrt(mean (log p - log d)^2)
    silog     100 sqrt(mean e^2 - (mean e)^2), e = log p - log d

    Args:
        predicted: (B, height, width), above 0.
        depths: the same, true.
        min_depth, max_depth: metres.

    Returns:
        (B, errors) in float64, in the order of `DEPTH_ERRORS`; NaN for an image without a valid pixel.

    Raises:
        ValueError: maps of different size, or a predicted depth that is not above 0.
    """
    if predicted.shape != depths.shape or not (predicted > 0).all():
        raise ValueError(
            f"expected maps of one shape and depths above 0, got {tuple(predicted.shape)} and {tuple(depths.shape)}, "
            f"and depths from {predicted.min().item() if predicted.numel() else None}"
        )
    return torch.stack([_errors(*pair, min_depth, max_depth) for pair in zip(predicted.double(), depths.double())])


def _errors(predicted: Tensor, depth: Tensor, min_depth: float, max_depth: float) -> Tensor:
    is_valid = (depth > min_depth) & (depth < max_depth)
    predicted, depth = predicted[is_valid], depth[is_valid]
    if not len(depth):
        return predicted.new_full((len(DEPTH_ERRORS),), torch.nan)
    error, ratio = predicted - depth, torch.maximum(predicted / depth, depth / predicted)
    logs = predicted.log() - depth.log()
    values = {
        "rmse": error.square().mean().sqrt(),
        "abs_rel": (error.abs() / depth).mean(),
        **{f"d{power}": (ratio < 1.25**power).double().mean() for power in (1, 2, 3)},
        "log10": (predicted.log10() - depth.log10()).abs().mean(),
        "rmse_log": logs.square().mean().sqrt(),
        "silog": 100 * (logs.square().mean() - logs.mean().square()).clamp(min=0).sqrt(),
        "sq_rel": (error.square() / depth).mean(),
    }
    return torch.stack([values[name] for name in DEPTH_ERRORS])


__all__ = ["DEPTH_ERRORS", "check_masks", "depth_errors", "measure_areas"]

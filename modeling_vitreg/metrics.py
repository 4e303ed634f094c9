"""Formulas of metrics, and the table `METRICS` that says how each one is named, written and compared.

Heads and features are evaluated in several places; all of them compute and describe their numbers by this module.
`hf_metrics` offers the same numbers as metrics of the library `evaluate`.

Letters: B images of a batch, C classes, M and N boxes. A box is (xmin, ymin, xmax, ymax) in pixels; the pixel in
column x spans x ... x + 1.

Source: open-mmlab/mmsegmentation, `evaluation/metrics`; zhyever/Monocular-Depth-Estimation-Toolbox,
`depth/core/evaluation`, the toolboxes that DINOv2 was evaluated with; Deselaers et al. 2010 (CorLoc).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


DEPTH_ERRORS = ("rmse", "abs_rel", "d1", "d2", "d3", "log10", "rmse_log", "silog", "sq_rel")
IOU_THRESHOLD = 0.5  # of CorLoc


@dataclass(frozen=True)
class MetricDescription:
    """How a metric is written and compared.

    Args:
        label: name for tables and figures.
        unit: "%" for shares, which are stored from 0 to 1; "m" for metres; empty for plain numbers.
        higher_is_better: whether larger values are better.
        hub_id: name on the Hugging Face Hub, None if it has none.
    """

    label: str
    unit: str = "%"
    higher_is_better: bool = True
    hub_id: str | None = None


# Keys are the names in reports, in the logs of training runs and in their summaries.
METRICS = {
    "top1": MetricDescription("top-1 accuracy", hub_id="accuracy"),
    "top5": MetricDescription("top-5 accuracy"),
    "accuracy": MetricDescription("accuracy", hub_id="accuracy"),
    "mean_average_precision": MetricDescription("mean average precision"),
    "knn": MetricDescription("k-NN accuracy"),
    "segmentation": MetricDescription("mean IoU of a probe on scenes"),
    "zero_shot": MetricDescription("zero-shot accuracy"),
    "mean_iou": MetricDescription("mean IoU", hub_id="mean_iou"),
    "mean_accuracy": MetricDescription("mean accuracy of classes"),
    "pixel_accuracy": MetricDescription("pixel accuracy"),
    "corloc": MetricDescription("CorLoc"),
    "rmse": MetricDescription("RMSE of depth", "m", higher_is_better=False),
    "abs_rel": MetricDescription("absolute relative error", "", higher_is_better=False),
    "d1": MetricDescription("depths within 25 %"),
    "d2": MetricDescription("depths within 56 %"),
    "d3": MetricDescription("depths within 95 %"),
    "log10": MetricDescription("log10 error", "", higher_is_better=False),
    "rmse_log": MetricDescription("RMSE of log depth", "", higher_is_better=False),
    "silog": MetricDescription("scale-invariant log error", "", higher_is_better=False),
    "sq_rel": MetricDescription("squared relative error", "m", higher_is_better=False),
}


def average_precisions(scores: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average precision of each class; its mean over classes, NaN left out, is mAP.

    AP = sum over thresholds t, from the highest score to the lowest, of (recall(t) - recall(t before)) precision(t)

    Equal scores share a threshold, as in scikit-learn's `average_precision_score`.

    Args:
        scores: (I, C), of images and classes.
        truth: (I, C), 1 where the class is in the image, else 0.
        weights: (S, I) of the images; None: each counts once, S = 1.

    Returns:
        (S, C) in float64; NaN for a class without a positive image.
    """
    weights = torch.ones(1, len(scores)) if weights is None else weights
    weights, found = weights.double(), []
    for own, positive in zip(scores.T, truth.T.double()):
        own, order = own.sort(descending=True)
        is_last = torch.cat([own[1:] != own[:-1], torch.ones(1, dtype=torch.bool)])  # of its threshold
        sums = weights[:, order].cumsum(1)[:, is_last]  # [S, thresholds]
        hits = (weights[:, order] * positive[order]).cumsum(1)[:, is_last]
        gains = hits.diff(dim=1, prepend=hits.new_zeros(len(hits), 1))
        precision = hits / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        found.append((gains * precision).sum(dim=1) / hits[:, -1])
    return torch.stack(found, dim=1)


def measure_areas(predicted: Tensor, masks: Tensor, *, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Number of pixels of each class in the intersection, in the prediction and in the ground truth of each image.

    Args:
        predicted: (B, height, width) class numbers.
        masks: ground truth of the same shape; pixels with `ignore_index` are not counted.
        num_classes: C.
        ignore_index: see `masks`.

    Returns:
        (B, 3, C) in float64: intersection, prediction, ground truth.

    Raises:
        ValueError: the shapes differ, or a class number is out of range.
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
    """Check the class numbers of a mask.

    Raises:
        ValueError: a class number is out of range; the message names it.
    """
    is_wrong = (masks != ignore_index) & ((masks < 0) | (masks >= num_classes))
    if is_wrong.any():
        raise ValueError(
            f"expected classes 0 ... {num_classes - 1} in a mask, or {ignore_index} for pixels to ignore, got "
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
        depths: ground truth of the same shape.
        min_depth, max_depth: range of valid depths in metres.

    Returns:
        (B, errors) in float64, in the order of `DEPTH_ERRORS`; NaN for an image without a valid pixel.

    Raises:
        ValueError: the shapes differ, or a predicted depth is not above 0.
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


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (M, N) of boxes (M, 4) and others (N, 4); 0 for pairs of empty boxes."""
    boxes, others = (np.asarray(part, dtype=np.float64).reshape(-1, 4) for part in (boxes, others))
    lower = np.maximum(boxes[:, None, :2], others[None, :, :2])  # [M, N, 2]
    upper = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (upper - lower).clip(min=0).prod(axis=-1)
    areas, other_areas = ((part[:, 2:] - part[:, :2]).prod(axis=-1) for part in (boxes, others))
    union = areas[:, None] + other_areas[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def best_iou(box: np.ndarray, truth: np.ndarray) -> float:
    """Largest IoU of a box (4,) with the true boxes (N, 4), 0 if there are none."""
    return float(box_iou(box, truth).max(initial=0.0))


def corloc(
    predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray], *, iou_threshold: float = IOU_THRESHOLD
) -> float:
    """CorLoc: share of images whose box has an IoU of `iou_threshold` or more with one of the true boxes.

    Args:
        predicted: one box (4,) per image.
        truth: the true boxes (N, 4) of each image.
        iou_threshold: from 0 to 1.

    Raises:
        ValueError: no images, or the numbers of boxes and images differ.
    """
    if len(predicted) != len(truth) or not len(truth):
        raise ValueError(f"expected one box for each of one or more images, got {len(predicted)} for {len(truth)}")
    return sum(best_iou(box, boxes) >= iou_threshold for box, boxes in zip(predicted, truth)) / len(truth)

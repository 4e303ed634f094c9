"""Metrics of the library `evaluate`, without network: `Accuracy().compute(predictions=..., references=...)`.

They take what `Trainer` and other loops of transformers hand over, and give the numbers that this package reports.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch

from modeling_vitreg.metrics import DEPTH_ERRORS, depth_errors, measure_areas


class Accuracy(evaluate.Metric):
    """Share of images, from 0 to 1, whose class (a number) is found."""

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("int64")
        return _info("Share of images whose class is found.", "a class number of each image", kind)

    def _compute(self, predictions: list, references: list) -> dict:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MeanIoU(evaluate.Metric):
    """Intersection over union, after areas were summed over all images; names are those of `mean_iou` of the library.

    `predictions` and `references` hold a map (height, width) of class numbers 0 ... `num_labels` - 1 for each image,
    of any size; pixels that are `ignore_index` in the reference, 255 unless told otherwise, do not count. A class
    that neither shows has NaN in `per_category_iou` and no part in `mean_iou`.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        return _info("Mean intersection over union.", "a map of class numbers of each image", kind)

    def _compute(self, predictions: list, references: list, num_labels: int, ignore_index: int = 255) -> dict:
        total = torch.zeros(3, num_labels, dtype=torch.float64)
        for own, truth in zip(predictions, references):
            pair = (torch.from_numpy(np.asarray(part).astype(np.int64))[None] for part in (own, truth))
            total += measure_areas(*pair, num_classes=num_labels, ignore_index=ignore_index)[0]
        found, predicted, true = total
        shares, accuracies = found / (predicted + true - found), found / true
        return {
            "mean_iou": shares.nanmean().item(),
            "mean_accuracy": accuracies.nanmean().item(),
            "overall_accuracy": (found.sum() / true.sum()).item(),
            "per_category_iou": shares.numpy(),
            "per_category_accuracy": accuracies.numpy(),
        }


class DepthErrors(evaluate.Metric):
    """Errors of depth, of each image over its pixels with `min_depth` < reference < `max_depth`, then their means.

    `predictions` and `references` hold a map (height, width) in metres for each image.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return _info(f"Errors of depth: {', '.join(DEPTH_ERRORS)}.", "a map of metres of each image", kind)

    def _compute(self, predictions: list, references: list, min_depth: float = 1e-3, max_depth: float = 10.0) -> dict:
        limits = {"min_depth": min_depth, "max_depth": max_depth}
        errors = [
            depth_errors(*(torch.from_numpy(np.asarray(part, np.float32))[None] for part in pair), **limits)
            for pair in zip(predictions, references)
        ]
        return dict(zip(DEPTH_ERRORS, torch.cat(errors).nanmean(dim=0).tolist()))


def _info(description: str, inputs: str, kind: object) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=f"predictions and references: {inputs}.",
        features=datasets.Features({"predictions": kind, "references": kind}),
    )


__all__ = ["Accuracy", "DepthErrors", "MeanIoU"]

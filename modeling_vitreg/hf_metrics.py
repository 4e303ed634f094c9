"""Metrics for the library `evaluate`, computed without network, by the formulas of `metrics`.

They take what `Trainer` and other loops of transformers pass to `compute_metrics`, and they combine with all metrics
of the library; `vitreg evaluate` computes its accuracies with `Accuracy`:

    >>> import evaluate
    >>> from modeling_vitreg.hf_metrics import Accuracy
    >>> accuracy = Accuracy()
    >>> accuracy.compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1])
    {'accuracy': 0.75}
    >>> def compute_metrics(prediction):  # for transformers.Trainer
    ...     return accuracy.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)
    >>> evaluate.combine([Accuracy(), evaluate.load("f1")])  # doctest: +SKIP
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch

from modeling_vitreg.metrics import DEPTH_ERRORS, IOU_THRESHOLD, corloc, depth_errors, measure_areas


class Accuracy(evaluate.Metric):
    """Share of images, from 0 to 1, whose class is predicted.

    `predictions` holds one class number for each image; or the class numbers of each image ranked by their scores, all
    lists of one length, and `top_k` the numbers of classes that count. The results are then named `top1`, `top5`, ...
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        ranked = datasets.Features({"predictions": datasets.Sequence(number), "references": number})
        single = datasets.Features({"predictions": number, "references": number})
        return _info("Share of correctly classified images.", "one class number per image", [single, ranked])

    def _compute(self, predictions: list, references: list, top_k: tuple[int, ...] = ()) -> dict:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if predictions.ndim == 1:
            return {"accuracy": float(np.mean(predictions == references))}
        is_right = predictions == references[:, None]  # [I, ranks]
        return {f"top{number}": float(is_right[:, :number].any(axis=1).mean()) for number in top_k or (1,)}


class MeanIoU(evaluate.Metric):
    """Intersection over union of areas summed over all images; the results are named as in the library's `mean_iou`.

    `predictions` and `references` hold one map (height, width) of class numbers 0 ... `num_labels` - 1 per image, of
    any size. Pixels whose reference is `ignore_index` (default 255) are not counted. A class that occurs in neither
    map has NaN in `per_category_iou` and is left out of `mean_iou`.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": kind, "references": kind})
        return _info("Mean intersection over union.", "one map of class numbers per image", features)

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
    """Errors of depth per image, over pixels with `min_depth` < reference < `max_depth`, averaged over the images.

    `predictions` and `references` hold one map (height, width) in metres per image.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        features = datasets.Features({"predictions": kind, "references": kind})
        return _info(f"Errors of depth: {', '.join(DEPTH_ERRORS)}.", "one map in metres per image", features)

    def _compute(self, predictions: list, references: list, min_depth: float = 1e-3, max_depth: float = 10.0) -> dict:
        limits = {"min_depth": min_depth, "max_depth": max_depth}
        errors = [
            depth_errors(*(torch.from_numpy(np.asarray(part, np.float32))[None] for part in pair), **limits)
            for pair in zip(predictions, references)
        ]
        return dict(zip(DEPTH_ERRORS, torch.cat(errors).nanmean(dim=0).tolist()))


class CorLoc(evaluate.Metric):
    """Share of images, from 0 to 1, whose box has an IoU of `iou_threshold` (default 0.5) or more with a true box.

    `predictions` holds one box (xmin, ymin, xmax, ymax) per image, `references` the list of its true boxes.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        features = datasets.Features({"predictions": box, "references": datasets.Sequence(box)})
        return _info(
            "Share of images whose predicted box matches an annotated box.",
            "per image, one predicted box and all annotated boxes",
            features,
        )

    def _compute(self, predictions: list, references: list, iou_threshold: float = IOU_THRESHOLD) -> dict:
        return {"corloc": corloc(predictions, references, iou_threshold=iou_threshold)}


def _info(description: str, inputs: str, features: object) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=f"predictions and references: {inputs}.",
        features=features,
    )

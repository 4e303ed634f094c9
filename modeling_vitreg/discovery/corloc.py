"""CorLoc as a metric of the library `evaluate`: `CorLoc().compute(predictions=..., references=...)`, without network.

Deselaers et al. 2010: an image counts where the predicted box overlaps one of the true boxes by half or more.
"""

from __future__ import annotations

import datasets
import evaluate

from .boxes import HIT, corloc


class CorLoc(evaluate.Metric):
    """Share of images, from 0 to 1, whose box overlaps a true box by `hit` or more, 0.5 unless told otherwise.

    `predictions` has one box (xmin, ymin, xmax, ymax) for each image, `references` the list of its true boxes.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        return evaluate.MetricInfo(
            description="Share of images whose predicted box overlaps one of the true boxes.",
            citation="Deselaers, Alexe, Ferrari: Localizing objects while learning their appearance. ECCV 2010.",
            inputs_description="predictions: one box for each image; references: the true boxes of each image.",
            features=datasets.Features({"predictions": box, "references": datasets.Sequence(box)}),
        )

    def _compute(self, predictions: list, references: list, hit: float = HIT) -> dict:
        return {"corloc": corloc(predictions, references, hit=hit)}


__all__ = ["CorLoc"]

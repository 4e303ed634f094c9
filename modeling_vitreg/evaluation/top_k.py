"""The classes of largest score, from which top-1 and top-5 accuracy are computed.

Letters: I images, C classes.
"""

from __future__ import annotations

from torch import Tensor


def rank_classes(scores: Tensor, *, classes: Tensor, num_best: int) -> Tensor:
    """The `num_best` classes (I, num_best) of largest score; of equal scores the first class comes first.

    Args:
        scores: (I, C).
        classes: (C,), labels of the columns.
        num_best: at most C.

    Raises:
        ValueError: the scores are not finite, or have another shape.
    """
    if scores.ndim != 2 or scores.shape[1] != len(classes):
        raise ValueError(f"expected scores (images, {len(classes)}), got {tuple(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError("expected finite scores, got NaN or infinity: a head diverged, lower its learning rate")
    order = scores.cpu().argsort(dim=1, descending=True, stable=True)[:, :num_best]
    return classes.cpu()[order]


def best_counts(num_classes: int) -> tuple[int, ...]:
    """Values of k for top-k accuracy: 1, and 5 if there are more than 5 classes."""
    return (1, 5) if num_classes > 5 else (1,)

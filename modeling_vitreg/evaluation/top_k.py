"""Right or wrong: whether the class of an image is among those of the largest scores.

Letters: I images, C classes.
"""

from __future__ import annotations

from torch import Tensor


def is_in_top(scores: Tensor, labels: Tensor, *, classes: Tensor, num_best: int = 1) -> Tensor:
    """Whether each image (I,) has its label among the `num_best` classes of largest score.

    Among equal scores the first class wins. A label that is none of the classes is never right.

    Args:
        scores: (I, C).
        labels: (I,).
        classes: (C,), labels of the columns.
        num_best: k.

    Raises:
        ValueError: scores that are not finite, or of another shape.
    """
    if scores.shape != (len(labels), len(classes)):
        raise ValueError(f"expected scores {(len(labels), len(classes))}, got {tuple(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError("expected finite scores, got NaN or infinity: a head diverged, lower its learning rate")
    order = scores.cpu().argsort(dim=1, descending=True, stable=True)[:, :num_best]
    return (classes.cpu()[order] == labels.cpu()[:, None]).any(dim=1)


def best_counts(num_classes: int) -> tuple[int, ...]:
    """Which k are worth a number: 1, and 5 where there are more than 5 classes."""
    return (1, 5) if num_classes > 5 else (1,)


__all__ = ["best_counts", "is_in_top"]

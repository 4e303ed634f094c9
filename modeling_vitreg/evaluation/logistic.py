"""Logistic regression on frozen features with a sweep over its regularisation, as in the transfer tasks of DINOv2.

DINOv2 uses cuML; scikit-learn minimises the same objective in float64.

Letters: I images, D width.

Source: Oquab et al. 2023, arXiv 2304.07193 (facebookresearch/dinov2, `dinov2/eval/log_regression.py`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tqdm
from torch import Tensor

from modeling_vitreg.images.splits import hold_out, require_classes
from modeling_vitreg.settings import expect


if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression


@dataclass(frozen=True)
class LogisticSettings:
    """Settings of the sweep; the defaults are those of DINOv2.

    Args:
        num_strengths: number of values of C between 10 ** `lowest` and 10 ** `highest`, logarithmically spaced.
        lowest, highest: exponents; C is the inverse strength of the penalty.
        max_steps: maximum number of L-BFGS steps.
        tolerance: stopping tolerance; the default is so small that `max_steps` decides in float64.
        validation_share: share of the training images on which C is chosen; the final fit uses all of them.
    """

    num_strengths: int = 45
    lowest: float = -6.0
    highest: float = 5.0
    max_steps: int = 1000
    tolerance: float = 1e-12
    validation_share: float = 0.1

    def __post_init__(self):
        expect(self, "", num_strengths="[1, inf)", max_steps="[1, inf)")

    @property
    def strengths(self) -> np.ndarray:
        """Values of C."""
        return 10 ** np.linspace(self.lowest, self.highest, self.num_strengths)


@dataclass(frozen=True)
class LogisticFit:
    """The final fit, the chosen C, its validation accuracy, and whether L-BFGS converged."""

    model: LogisticRegression
    strength: float
    validation_accuracy: float
    is_converged: bool


def fit_logistic(
    features: Tensor, labels: Tensor, *, settings: LogisticSettings, seed: int = 0, has_progress_bar: bool = False
) -> LogisticFit:
    """Choose C on the validation images, the smallest of equal values, and fit again on all images.

    Args:
        features: (I, D).
        labels: (I,) integers.
        settings: settings of the sweep.
        seed: random seed of the validation images.
        has_progress_bar: show a progress bar.

    Raises:
        ValueError: fewer than two classes in all images or in those that are not held out.
    """
    require_classes(labels)
    kept, held_out = hold_out(len(labels), share=settings.validation_share, seed=seed)
    require_classes(labels[kept])
    rows, targets = features.double().cpu().numpy(), labels.cpu().numpy()
    best, best_accuracy = None, -1.0
    for strength in tqdm.tqdm(settings.strengths, unit="fit", desc="logistic", disable=not has_progress_bar):
        model = fit_once(rows[kept], targets[kept], strength=strength, settings=settings)
        accuracy = float((model.predict(rows[held_out]) == targets[held_out]).mean())
        if accuracy > best_accuracy:
            best, best_accuracy = float(strength), accuracy
    model = fit_once(rows, targets, strength=best, settings=settings)
    return LogisticFit(model, best, best_accuracy, is_converged=bool(max(model.n_iter_) < settings.max_steps))


def fit_once(
    features: np.ndarray, labels: np.ndarray, *, strength: float, settings: LogisticSettings
) -> LogisticRegression:
    """Multinomial logistic regression by L-BFGS, with an L2 penalty of weight 1 / (2 C) on all but the bias."""
    # Imported here: the other tasks, and k-NN during training, do not need scikit-learn.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of steps is part of the protocol
        model = LogisticRegression(C=strength, max_iter=settings.max_steps, tol=settings.tolerance)
        return model.fit(features, labels)

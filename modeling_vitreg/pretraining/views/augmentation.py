"""Random changes of colour of a view, for `change_colors`.

Each class draws from torch's global generator what the transforms of torchvision v2 that it names draw, in their
order.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torchvision.transforms import v2

from .colors import change, gaussian_kernel


SIGMAS = (0.1, 2.0)  # of blurs, in pixels
THRESHOLD = 128  # of solarisation
NONE = change()
Changes = list[list[float]]


@dataclasses.dataclass(frozen=True)
class DinoColors:
    """DINO and DINOv2: RandomApply(ColorJitter), RandomGrayscale, RandomApply(GaussianBlur), RandomSolarize.

    Args:
        jitter: brightness, contrast, saturation, hue.
        jitter_probability, gray, blur, solarize: probabilities of the four; nothing is drawn for 0.
    """

    jitter: tuple[float, float, float, float]
    jitter_probability: float
    gray: float
    blur: float
    solarize: float

    def __call__(self) -> Changes:
        """7 changes."""
        is_jittered = any(self.jitter) and _happens(self.jitter_probability)
        changes = _draw_jitter(self.jitter) if is_jittered else [NONE] * 4
        changes.append(change("gray") if _happens(self.gray) else NONE)
        changes.append(_draw_blur() if _happens(self.blur) else NONE)
        changes.append(change("solarize", THRESHOLD) if _happens(self.solarize) else NONE)
        return changes


@dataclasses.dataclass(frozen=True)
class ThreeColors:
    """3-Augment of DeiT-III: RandomChoice of Grayscale, RandomSolarize and GaussianBlur, then ColorJitter.

    Args:
        jitter: brightness, contrast, saturation, hue.
    """

    jitter: tuple[float, float, float, float]

    def __call__(self) -> Changes:
        """5 changes."""
        choice = int(torch.multinomial(torch.full((3,), 1 / 3), 1))
        if choice == 1:
            torch.rand(1)  # RandomSolarize(p=1) draws too
        one = _draw_blur() if choice == 2 else (change("gray"), change("solarize", THRESHOLD))[choice]
        return [one, *_draw_jitter(self.jitter)]


@dataclasses.dataclass(frozen=True)
class RandomColors:
    """RandAugment (Cubuk et al. 2019) with two operations of magnitude 9; shears, shifts and turns are among them.

    Args:
        size: side of the views in pixels, on which shifts depend.
    """

    size: int

    def __call__(self) -> Changes:
        """2 changes."""
        changes = []
        for _ in range(2):
            changes_of_sign = self._operations[int(torch.randint(len(self._operations), ()))]
            is_negative = len(changes_of_sign) == 2 and torch.rand(()).item() <= 0.5
            changes.append(changes_of_sign[is_negative])
        return changes

    @functools.cached_property
    def _operations(self) -> list[Changes]:
        """The operations in torchvision's order, each for a positive and, if it has a sign, for a negative magnitude.

        Magnitude 9 is 9 / 30 of the largest.
        """
        share, signs = 9 / 30, (1, -1)
        shear, shift, turn = 0.3 * share, int(150 / 331 * self.size * share), math.radians(30 * share)
        factors = [1 + sign * 0.9 * share for sign in signs]
        bits, threshold = round(8 - 4 * share), 255 * (1 - share)
        cos, sin = math.cos(turn), math.sin(turn)
        maps = [
            [(1, sign * shear, sign * shear * self.size / 2, 0, 1, 0) for sign in signs],
            [(1, 0, 0, sign * shear, 1, sign * shear * self.size / 2) for sign in signs],
            [(1, 0, -sign * shift, 0, 1, 0) for sign in signs],
            [(1, 0, 0, 0, 1, -sign * shift) for sign in signs],
            [(cos, -sign * sin, 0, sign * sin, cos, 0) for sign in signs],
        ]
        return [
            [NONE],
            *[[change("affine", *matrix) for matrix in of_sign] for of_sign in maps],
            *[
                [change(name, factor) for factor in factors]
                for name in ("brightness", "saturation", "contrast", "sharpness")
            ],
            [change("posterize", 2.0 ** (8 - bits))],
            [change("solarize", threshold)],
            [change("autocontrast")],
            [change("equalize")],
        ]


def _happens(probability: float) -> bool:
    return probability > 0 and torch.rand(1).item() < probability


def _draw_blur() -> list[float]:
    return change("blur", *gaussian_kernel(torch.empty(1).uniform_(*SIGMAS).item()))


def _draw_jitter(jitter: tuple[float, float, float, float]) -> Changes:
    """Four changes in random order."""
    drawn = _color_jitter(jitter).make_params([])
    names = ("brightness", "contrast", "saturation", "hue")
    factors = [drawn[f"{name}_factor"] for name in names]
    return [NONE if factors[i] is None else change(names[i], factors[i]) for i in drawn["fn_idx"].tolist()]


@functools.lru_cache
def _color_jitter(jitter: tuple[float, float, float, float]) -> v2.ColorJitter:
    return v2.ColorJitter(*jitter)

"""The textures of solids, each a pattern of two colours in space."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .noise import cell_table, fraction, noise, scatter
from .vectors import column, dot


class Texture(NamedTuple):
    """A pattern that fills the space of a solid, as if it was carved from it: no seams, any shape."""

    frequency: float  # cells per unit
    is_aligned: bool  # with the axes of the solid
    weigh: Callable  # points [3, N] in cells, normals [3, N], share -> weight of the second colour [N], 0 to 1


def _dot_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    corner, middle = fraction(p) - 0.5, fraction(p + 0.5) - 0.5
    return np.minimum(dot(corner, corner), dot(middle, middle)) < (0.16 + 0.42 * share) ** 2


def _joint_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = np.abs(normal)
    is_flat = y > 1.33 * np.hypot(x, z)
    height = np.where(is_flat, p[2], p[1])
    along = np.where((x > z) & ~is_flat, p[2], p[0]) * 0.5 + np.floor(height) % 2 / 2
    return (fraction(height) < share * 0.45) | (fraction(along) < share * 0.22)


def _vein_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = p * np.float32(0.3)
    cloud = noise(x, y) + noise(y + 1.7, z) + noise(z, x + 2.9)
    return np.abs(np.sin(p[1] * 1.5 + cloud * 0.9)) ** (2 * share)


def _grain_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    wobble = np.sin(p[0] * 1.9 + 0.8 * np.sin(p[1])) + np.sin(p[2] * 2.3 + p[1] * 0.7)
    return fraction(np.hypot(p[0] - 8, p[2] - 8) + 0.22 * wobble + 0.45 * p[1]) ** (4 * share)


def _mosaic_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    """A tone for the nearest of points that are scattered over a lattice, one to a cube of it."""
    table, base = cell_table(), np.floor(p - 0.5)
    best, tone = np.full(p.shape[1], np.inf, np.float32), np.zeros(p.shape[1], np.float32)
    for corner in np.ndindex(2, 2, 2):
        cell = base + column(*corner)
        number = scatter(*cell)
        away = cell + 0.2 + 0.6 * table[:3, number] - p
        distance = dot(away, away)
        tone = np.where(distance < best, table[3, number], tone)
        best = np.minimum(distance, best)
    return tone


TEXTURES = {
    "striped": Texture(2.2, False, lambda p, normal, share: fraction(p[1]) < share),
    "checkered": Texture(2.3, True, lambda p, normal, share: np.floor(p).sum(0) % 2),
    "dotted": Texture(1.6, False, _dot_weight),
    "bricked": Texture(2.6, True, _joint_weight),
    "zigzag": Texture(
        2.0,
        False,
        lambda p, normal, share: fraction(p[1] + 1.6 * abs(fraction(0.7 * (p[0] + p[2])) - 0.5)) < share,
    ),
    "marbled": Texture(1.6, False, _vein_weight),
    "grained": Texture(2.8, False, _grain_weight),
    "mosaic": Texture(2.5, False, _mosaic_weight),
}


__all__ = ["TEXTURES", "Texture"]

"""Vectors, and the shapes of solids in the space in which they have unit size.

Vectors are columns (3, 1) or (3, N) of float32: x right, y up, z away from the camera.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def column(x: float, y: float, z: float) -> np.ndarray:
    """A vector (3, 1)."""
    return np.array([[x], [y], [z]], np.float32)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products (N,) or (1,) of vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def turn(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """frame @ points, in an order of additions that does not depend on a library of linear algebra."""
    x, y, z = points
    return frame[:, 0:1] * x + frame[:, 1:2] * y + frame[:, 2:3] * z


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Matrix (3, 3) that turns by roll about z, then by pitch about x, then by yaw about y."""
    (a, b, c), (d, e, f) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
    about_y = np.array([[a, 0, d], [0, 1, 0], [-d, 0, a]])
    about_x = np.array([[1, 0, 0], [0, b, -e], [0, e, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


_TUBE = 0.33  # radius of the tube of a ring whose outer radius is 1


class Quadric(NamedTuple):
    """The points with square · p² + linear · p < level: inside of a ball, of a cylinder, between two planes."""

    square: tuple[float, float, float]
    linear: tuple[float, float, float]
    level: float


class Shape(NamedTuple):
    """A solid of unit size around the origin: where quadrics intersect, or, without one, a ring."""

    size: float  # so that all look equally large
    radius: float  # of the ball around it
    support: Callable  # direction [3] -> largest direction · point
    quadrics: tuple[Quadric, ...] = ()

    def meet(self, origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
        """Smallest t >= 0 of origin (3, 1 or N) + t ray (3, N) inside, or infinity: (N,)."""
        if not self.quadrics:
            return _meet_ring(origin, ray)
        near, far = np.float32(0), np.float32(np.inf)
        ray_squared, mixed, origin_squared = ray * ray, origin * ray, origin * origin
        for square, linear, level in self.quadrics:
            a = _weigh(square, ray_squared)
            b = _weigh(square, mixed) + _weigh(linear, ray) / 2
            root = np.sqrt(b * b - a * (_weigh(square, origin_squared) + _weigh(linear, origin) - level))
            low, high = (-b - root) / a, (root - b) / a
            if min(square) < 0:  # a double cone, of which another quadric leaves the lower half
                low, high = np.minimum(low, high), np.maximum(low, high)
                is_steep, is_falling = a < 0, ray[1] < 0  # steeper than the cone: inside beyond one root
                low, high = (
                    np.where(is_steep, np.where(is_falling, high, -np.inf), low),
                    np.where(is_steep, np.where(is_falling, np.inf, low), high),
                )
            near, far = np.maximum(near, low), np.minimum(far, high)
        return np.where(near < far, near, np.inf).astype(np.float32)

    def normal(self, p: np.ndarray) -> np.ndarray:
        """Outward vectors (3, N) of any length at points (3, N) of the surface."""
        if not self.quadrics:
            inwards = 1 - (1 - _TUBE) / np.hypot(p[0], p[2])
            return np.stack([p[0] * inwards, p[1], p[2] * inwards])
        outside, normal = np.full(p.shape[1], -np.inf, np.float32), np.zeros_like(p)
        squared = p * p
        for square, linear, level in self.quadrics:
            value = _weigh(square, squared) + _weigh(linear, p) - level
            gradient = 2 * column(*square) * p + column(*linear)
            normal = np.where(value > outside, gradient, normal)
            outside = np.maximum(value, outside)
        return normal


def _weigh(weights: tuple[float, float, float], vectors: np.ndarray) -> np.ndarray:
    return sum(weight * axis for weight, axis in zip(weights, vectors) if weight)


def _meet_ring(origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """March by the distance to the ring, from where the ray enters a ball and a slab around it."""
    speed, middle = np.sqrt(dot(ray, ray)), -dot(origin, ray) / dot(ray, ray)
    half = np.sqrt(middle * middle - (dot(origin, origin) - 1) / (speed * speed))
    first, second = (-_TUBE - origin[1]) / ray[1], (_TUBE - origin[1]) / ray[1]
    start = np.maximum(np.maximum(middle - half, np.minimum(first, second)), 0)
    end = np.minimum(middle + half, np.maximum(first, second))
    t, found = start, np.full_like(start, np.inf)
    origin, waiting = np.broadcast_to(origin, ray.shape), np.flatnonzero(start < end)
    for _ in range(40):  # most arrive in 8; a ray that grazes the tube takes longest
        x, y, z = origin[:, waiting] + t[waiting] * ray[:, waiting]
        distance = np.hypot(np.sqrt(x * x + z * z) - (1 - _TUBE), y) - _TUBE
        t[waiting] += distance / speed[waiting]
        is_met = distance < 0.002
        found[waiting[is_met]] = t[waiting[is_met]]
        waiting = waiting[~is_met & (t[waiting] < end[waiting])]
    return found


def _width(v: np.ndarray) -> float:
    return float(np.hypot(v[0], v[2]))


def _length(v: np.ndarray) -> float:
    return float(np.sqrt(v @ v))


_SLAB = Quadric((0, 1, 0), (0, 0, 0), 1)
_CONE = Quadric((1, -0.25, 1), (0, 0.5, 0), 0.25)  # x² + z² < (1 - y)² / 4
SHAPES = {
    "ball": Shape(0.92, 1.00, _length, (Quadric((1, 1, 1), (0, 0, 0), 1),)),
    "cube": Shape(
        0.72,
        1.74,
        lambda v: np.abs(v).sum(),
        (Quadric((1, 0, 0), (0, 0, 0), 1), _SLAB, Quadric((0, 0, 1), (0, 0, 0), 1)),
    ),
    "cylinder": Shape(0.78, 1.42, lambda v: _width(v) + abs(v[1]), (Quadric((1, 0, 1), (0, 0, 0), 1), _SLAB)),
    "cone": Shape(0.98, 1.42, lambda v: max(v[1], _width(v) - v[1]), (_CONE, _SLAB)),
    "ring": Shape(1.05, 1.00, lambda v: (1 - _TUBE) * _width(v) + _TUBE * _length(v)),
    "lens": Shape(
        1.05,
        1.00,
        lambda v: 1.25 * _length(v) - 0.75 * abs(v[1]) if abs(v[1]) > 0.6 * _length(v) else _width(v),
        (Quadric((1, 1, 1), (0, 1.5, 0), 1), Quadric((1, 1, 1), (0, -1.5, 0), 1)),
    ),
    "pyramid": Shape(
        0.95,
        1.74,
        lambda v: max(v[1], abs(v[0]) + abs(v[2]) - v[1]),
        (_CONE._replace(square=(1, -0.25, 0)), _CONE._replace(square=(0, -0.25, 1)), _SLAB),
    ),
    "dome": Shape(
        1.02,
        1.12,
        lambda v: (_length(v) if v[1] > 0 else _width(v)) - v[1] / 2,
        (Quadric((1, 1, 1), (0, 1, 0), 0.75), _SLAB._replace(level=0.25)),
    ),
}

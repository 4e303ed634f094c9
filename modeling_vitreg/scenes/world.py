"""All that a scene consists of before it is rendered: camera, planes, solids, light, sky."""

from typing import NamedTuple

import numpy as np

from .backgrounds import Plane, build_planes
from .settings import SceneSettings
from .solids import Solid, place_solids
from .vectors import column, rotation


class Camera(NamedTuple):
    """A pinhole that sees 4 samples of each pixel."""

    position: np.ndarray  # [3, 1]
    axes: np.ndarray  # [3, 3], columns: right, down, forward
    focal: float  # samples
    shape: tuple[int, int]  # samples: rows, columns

    def rays(self, frame: np.ndarray, rows: range, columns: range) -> np.ndarray:
        """Directions (3, N) of a rectangle of samples in a frame (3, 3); each advances one metre of depth."""
        right, down, forward = (frame @ self.axes).T[..., None]  # 3 of [3, 1]
        x = (np.arange(columns.start, columns.stop) + 0.5 - self.shape[1] / 2) / self.focal
        y = (np.arange(rows.start, rows.stop) + 0.5 - self.shape[0] / 2) / self.focal
        across, along = (right * x).astype(np.float32), (down * y + forward).astype(np.float32)
        return (along[:, :, None] + across[:, None, :]).reshape(3, -1)  # [3, rows, columns] -> [3, N]

    def rectangle(self, centre: np.ndarray, radius: float) -> tuple[range, range]:
        """Rows and columns of the samples that may see a ball in front of the camera."""
        x, y, z = self.axes.T @ (centre - self.position)[:, 0]
        sides = []
        for offset, size in ((y, self.shape[0]), (x, self.shape[1])):
            angle, spread = np.arctan2(offset, z), np.arcsin(min(radius / np.hypot(offset, z), 1.0))
            edges = np.tan(np.clip([angle - spread, angle + spread], -1.5, 1.5)) * self.focal + size / 2
            sides.append(range(*np.clip([np.floor(edges[0]), np.ceil(edges[1])], 0, size).astype(int)))
        return sides[0], sides[1]

    def samples(self, grid: np.ndarray) -> list[np.ndarray]:
        """The 4 samples of each pixel: (..., N) -> 4 of (..., rows, columns) of the image."""
        grid = grid.reshape(*grid.shape[:-1], *self.shape)
        return [grid[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]


class World(NamedTuple):
    """A scene. Its surfaces have numbers: 0 the sky, then the planes, then the solids."""

    camera: Camera
    planes: list[Plane]  # the ground, then walls
    solids: list[Solid]
    light: np.ndarray  # [3, 1], towards it
    sun: np.ndarray  # [3, 1]: its colour
    ambient: np.ndarray  # [3, 1]
    zenith: np.ndarray  # [3, 1]: colour of the sky
    horizon: np.ndarray  # [3, 1]
    cloudiness: float

    @property
    def is_room(self) -> bool:
        """Whether there are walls and a lamp, instead of sky and sun."""
        return len(self.planes) > 1

    @property
    def first_solid(self) -> int:
        """Number of the surface of the first solid."""
        return 1 + len(self.planes)


def arrange(rng: np.random.Generator, settings: SceneSettings) -> World:
    """All that is left to chance, but for the words of the caption."""
    distance, height = rng.uniform(1.7, 2.5), rng.uniform(0.5, 1.6)
    rows, columns = settings.shape
    pitch = np.arctan2(height - rng.uniform(0.2, 0.4), distance)
    axes = rotation(0, pitch, rng.normal(0, 0.04)) * (1, -1, 1)
    camera = Camera(column(0, height, 0), axes, 2.5 * settings.zoom * (rows * columns) ** 0.5, (2 * rows, 2 * columns))
    warmth, azimuth, elevation = rng.uniform(-0.12, 0.16), rng.uniform(-2.0, 2.0), rng.uniform(0.5, 1.2)
    zenith = column(0.12, 0.25, 0.60) * rng.uniform(0.5, 1.2) + rng.uniform(0, 0.25)
    planes = build_planes(rng, distance)
    num_solids = int(rng.integers(1, settings.max_objects + 1))
    width = (columns / rows) ** 0.5 / settings.zoom
    solids = place_solids(rng, planes, num_solids=num_solids, distance=distance, width=width)
    return World(
        camera=camera,
        planes=planes,
        solids=solids,
        light=rotation(azimuth, elevation, 0).astype(np.float32) @ column(0, 0, -1),
        sun=column(1 + warmth, 1, 1 - warmth) * rng.uniform(0.75, 1.15),
        ambient=column(1 - warmth, 1, 1 + warmth) * rng.uniform(0.35, 0.6),
        zenith=zenith,
        horizon=0.45 * zenith + 0.42,
        cloudiness=rng.uniform(0, 1),
    )


__all__ = ["Camera", "World", "arrange"]

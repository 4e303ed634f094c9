"""The planes behind the solids: floor and walls of a room, or open ground; their looks and patterns."""

from typing import NamedTuple

import numpy as np

from .noise import cell_table, fraction, noise, scatter
from .vectors import column, rotation


# Looks of each background: its words in a caption, a colour that it varies around.
_GREY = (0.45, 0.45, 0.45)
LOOKS = {
    "floor": {
        "tiled": ("a tiled floor", _GREY),
        "planked": ("a wooden floor", (0.36, 0.20, 0.10)),
        "speckled": ("a carpet", _GREY),
        "plain": ("a concrete floor", _GREY),
    },
    "wall": {
        "plain": ("a plain wall", _GREY),
        "papered": ("a papered wall", _GREY),
        "brick": ("a brick wall", _GREY),
        "panelled": ("a panelled wall", _GREY),
    },
    "grass": {"grassy": ("the grass", (0.13, 0.26, 0.05))},
    "sand": {"rippled": ("the sand", (0.50, 0.38, 0.24))},
}


class Plane(NamedTuple):
    """A floor, a wall or open ground."""

    name: str
    look: str
    normal: np.ndarray  # [3, 1], towards the camera
    offset: float  # normal · point
    tangents: np.ndarray  # [2, 3]
    colour: np.ndarray  # [3, 1]
    accent: np.ndarray  # [3, 1]: what a unit of the pattern adds


def build_planes(rng: np.random.Generator, distance: float) -> list[Plane]:
    """The ground, then the walls behind the middle of a scene at `distance` metres; none under the open sky."""
    if rng.random() < 0.6:
        return _build_room(rng, distance)
    return [_lay_ground(rng, str(rng.choice(["grass", "sand"])))]


def _build_room(rng: np.random.Generator, distance: float) -> list[Plane]:
    turn = rng.uniform(-0.6, 0.6)
    wall = _lay_plane(rng, "wall", distance + rng.uniform(1.1, 2.8), rotation(turn, 0, 0))
    planes = [_lay_ground(rng, "floor"), wall]
    if rng.random() < 0.6:  # a corner
        facing = rotation(turn - np.copysign(np.pi / 2, turn), 0, 0).astype(np.float32)
        offset = -float(facing[2, 2]) * distance - rng.uniform(1.1, 2.2)  # beyond the middle of the scene
        planes.append(wall._replace(normal=-facing[:, 2:], tangents=facing.T[:2], offset=offset))
    return planes


def _lay_ground(rng: np.random.Generator, name: str) -> Plane:
    return _lay_plane(rng, name, 0, rotation(rng.uniform(0, 3), np.pi / 2, 0))


def _lay_plane(rng: np.random.Generator, name: str, distance: float, facing: np.ndarray) -> Plane:
    """A plane whose tangents and reversed normal are the columns of `facing` (3, 3)."""
    look = str(rng.choice(list(LOOKS[name])))
    spread = 0.25 if name == "wall" else 0.15
    colour = column(*LOOKS[name][look][1]) * np.exp(rng.normal(0, spread, (3, 1)) + rng.normal(0, 0.25))
    accent = colour * np.exp(rng.normal(0, 0.15, (3, 1))) * rng.uniform(0.08, 0.22) * rng.choice([-1, 1])
    facing, colour, accent = (array.astype(np.float32) for array in (facing, colour, accent))
    return Plane(name, look, -facing[:, 2:], -distance, facing.T[:2] * rng.uniform(0.7, 1.3), colour, accent)


def pattern(look: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pattern of a background at (u, v) in metres, (N,), about 0 with deviations of about 1."""
    table = cell_table()
    if look == "tiled":
        u, v = u * 2.5, v * 2.5
        is_joint = (fraction(u) < 0.05) | (fraction(v) < 0.05)
        return np.where(is_joint, np.float32(-2.5), table[0, scatter(np.floor(u), np.floor(v))] * 1.5)
    if look == "planked":
        row = np.floor(v * 6)
        board = np.floor(u * 0.7 + table[1, scatter(row)] * 8)
        streaks = noise(u * 0.15 + row, v * 2.5)
        return table[2, scatter(row, board)] * 2.4 + 0.5 * streaks - 2.0 * (fraction(v * 6) < 0.06)
    if look == "brick":
        row = np.floor(v * 7)
        along = u * 2.4 + row % 2 / 2
        is_joint = (fraction(v * 7) < 0.12) | (fraction(along) < 0.05)
        return np.where(is_joint, np.float32(2.2), table[3, scatter(row, np.floor(along))] * 1.5 - 0.7)
    if look == "panelled":
        return -2.5 * ((fraction(u) < 0.03) | (np.abs(v - 0.9) < 0.03)) - 1.5 * (v < 0.9) + 0.15 * noise(u, v)
    if look == "papered":
        return np.sin(u * 18) + 0.2 * noise(u, v)
    if look == "rippled":
        return 0.8 * np.sin(v * 22 + 2.2 * noise(u * 0.3, v * 0.3)) + 0.5 * noise(u, v)
    fine = {"plain": 0.3, "grassy": 3.0, "speckled": 4.0}[look]
    return noise(u * 0.2, v * 0.2) * 0.7 + noise(u * fine, v * fine) * min(fine / 4, 1)


__all__ = ["LOOKS", "Plane", "build_planes", "pattern"]

"""A scene before it is rendered: camera, planes, solids, light, sky."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .geometry import SHAPES, Shape, column, dot, rotation
from .settings import CLASSES, SceneSettings
from .shading import TEXTURES, Texture


class Camera(NamedTuple):
    """A pinhole camera with 4 samples per pixel."""

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
    """Draw everything random of a scene except the words of the caption."""
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


_COLOURS = {  # linear RGB
    "red": (0.62, 0.03, 0.04),
    "orange": (0.85, 0.24, 0.02),
    "yellow": (0.85, 0.60, 0.06),
    "green": (0.05, 0.34, 0.07),
    "teal": (0.02, 0.34, 0.36),
    "blue": (0.04, 0.12, 0.58),
    "purple": (0.24, 0.06, 0.46),
    "pink": (0.85, 0.28, 0.42),
    "brown": (0.20, 0.08, 0.03),
    "white": (0.82, 0.82, 0.79),
    "grey": (0.27, 0.27, 0.28),
    "black": (0.025, 0.025, 0.03),
}
_MATERIALS = ("matte", "glossy", "metallic")
_BRIGHTNESS = {name: np.log(np.dot(tint, (0.3, 0.6, 0.1))) for name, tint in _COLOURS.items()}
# Pairs that one can tell apart under any light.
_SECOND = {
    first: [name for name in _COLOURS if abs(_BRIGHTNESS[name] - brightness) > 0.9]
    for first, brightness in _BRIGHTNESS.items()
}
COLOUR_NAMES = tuple(f"{first} and {second}" for first, others in _SECOND.items() for second in others)


class Solid(NamedTuple):
    """A shape with a texture and a position."""

    category: int
    colours: tuple[str, str]
    material: str
    size: float  # metres
    radius: float  # of a ball around it, metres
    centre: np.ndarray  # [3, 1]
    frame: np.ndarray  # [3, 3]: from the world to its own space
    albedo: np.ndarray  # [2, 3, 1]
    cells: np.ndarray  # [3, 3]: from its own space to the cells of the texture
    phase: np.ndarray  # [3, 1]
    share: float  # of the second colour

    @property
    def shape(self) -> Shape:
        """The shape of unit size, in its own space."""
        return SHAPES[CLASSES[self.category][0]]

    @property
    def texture(self) -> Texture:
        """Over the cells of its own space."""
        return TEXTURES[CLASSES[self.category][1]]


def place_solids(
    rng: np.random.Generator, planes: list[Plane], *, num_solids: int, distance: float, width: float
) -> list[Solid]:
    """Solids around the middle of a scene of relative `width`; fewer than `num_solids` where no room is found."""
    solids = []
    for number in range(num_solids):
        solid = _cast_solid(rng, size=rng.uniform(0.15, 0.36) if number else rng.uniform(0.34, 0.48))
        for side, ahead in rng.uniform(-1, 1, (32, 2)):
            z = distance + (0.3 + ahead if number else 0.2 * ahead)
            x = side * width * 0.34 * z if number else side * min(width, 1) * 0.35
            placed = solid._replace(centre=solid.centre + column(x, 0, z))
            if not number or _is_free(placed, solids, planes):
                solids.append(placed)
                break
    return solids


def _is_free(solid: Solid, others: list[Solid], planes: list[Plane]) -> bool:
    """Whether a solid touches neither walls nor other solids, and hides others only in part."""
    x, _, z = solid.centre[:, 0]
    for other in others:
        other_x, _, other_z = other.centre[:, 0]
        is_apart = np.hypot(x - other_x, z - other_z) > solid.size + other.size
        if not is_apart or abs(x / z - other_x / other_z) < 0.45 * (solid.size / z + other.size / other_z):
            return False
    return all(dot(plane.normal, solid.centre)[0] - plane.offset > solid.radius for plane in planes[1:])


def _cast_solid(rng: np.random.Generator, *, size: float) -> Solid:
    """A solid of a random class, colour, material and pose that touches the ground below the origin."""
    category = int(rng.integers(len(CLASSES)))
    shape_name, texture_name = CLASSES[category]
    shape, texture = SHAPES[shape_name], TEXTURES[texture_name]
    tilt = rng.choice([0.0, np.pi / 2, rng.uniform(0, 1.3)], p=[0.6, 0.15, 0.25])
    pose = rotation(rng.uniform(0, 6.28), tilt, 0) @ rotation(rng.uniform(0, 6.28), 0, 0)
    extent = size * shape.size * rng.uniform(0.87, 1.15, 3)
    colours = _choose_colours(rng)
    albedo = np.array([_COLOURS[name] for name in colours])[..., None] * np.exp(rng.normal(0, 0.12, (2, 3, 1)))
    turn = np.eye(3) if texture.is_aligned else rotation(*rng.uniform(0, 6.28, 3))
    return Solid(
        category=category,
        colours=colours,
        material=_MATERIALS[rng.integers(3)],
        size=size,
        radius=shape.radius * extent.max(),
        centre=column(0, shape.support(extent * -pose[1]), 0),
        frame=(pose / extent).T.astype(np.float32),
        albedo=albedo.astype(np.float32),
        cells=(turn * texture.frequency * rng.uniform(0.85, 1.2)).astype(np.float32),
        phase=column(*rng.uniform(8, 9, 3)),
        share=rng.uniform(0.4, 0.6),
    )


def _choose_colours(rng: np.random.Generator) -> tuple[str, str]:
    first = str(rng.choice(list(_COLOURS)))
    return first, str(rng.choice(_SECOND[first]))

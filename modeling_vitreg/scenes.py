"""Rendered scenes with exact truth: data that needs no download.

A scene is one to several solids on the floor of a room or under the open sky. A class is a shape with a texture;
colour, material, size, pose, light, camera and background are chance. Colour says next to nothing about the class, and
shape alone or texture alone leaves three classes. Floor, wall, ground and sky are the large areas of like patches in
which artifacts of Vision Transformers appear. Truth: label, caption, boxes, instance mask, semantic mask, depth.

A scene is a function of (settings, index): no order, process or number of workers changes its bytes on one machine.
Another size renders the same arrangement. Splits are ranges of indices, or other seeds.

Letters: N samples of the image (4 to a pixel). Vectors are columns, x right, y up, z away from the camera, in metres;
a solid has a space of its own, in which its shape has unit size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image


if TYPE_CHECKING:
    import datasets


SHAPE_NAMES = ("ball", "cube", "cylinder", "cone", "ring", "lens", "pyramid", "dome")
TEXTURE_NAMES = ("striped", "checkered", "dotted", "bricked", "zigzag", "marbled", "grained", "mosaic")
# Each shape has three textures and each texture three shapes, so that neither alone names the class.
_CLASSES = tuple((shape, (shape + step) % 8) for shape in range(8) for step in (0, 1, 3))
CLASS_NAMES = tuple(f"{TEXTURE_NAMES[texture]} {SHAPE_NAMES[shape]}" for shape, texture in _CLASSES)
# Ids of the semantic mask: first the classes, then the background. 255 does not occur: every pixel has a meaning.
SEMANTIC_NAMES = (*CLASS_NAMES, "floor", "wall", "grass", "sand", "sky")
FARTHEST = 10.0  # metres: the depth of the sky, and of ground beyond

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
# Looks of each background: its words in a caption, a colour that it varies around.
_GREY = (0.45, 0.45, 0.45)
_LOOKS = {
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
_TUBE = 0.33  # radius of the tube of a ring whose outer radius is 1
_NUM_BLOCKS = 960  # shards of a stream: most numbers of nodes and workers divide it
_ENDLESS = 2**40  # scenes


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """What all scenes of a dataset have in common.

    Args:
        image_size: pixels, a side or (rows, columns), at least 16.
        max_objects: a scene has 1 to `max_objects` solids; at most 8.
        seed: 0 or a positive integer; another seed gives other scenes.

    Raises:
        ValueError: a value outside its range.
    """

    image_size: int | tuple[int, int] = 224
    max_objects: int = 4
    seed: int = 0

    def __post_init__(self):
        _require(
            len(self.shape) == 2 and all(_is_count(side) and side >= 16 for side in self.shape),
            f"image_size is a side or a pair (rows, columns) of at least 16 pixels, got {self.image_size!r}",
        )
        _require(
            _is_count(self.max_objects) and 1 <= self.max_objects <= 8,
            f"max_objects is an integer in 1 ... 8, got {self.max_objects!r}",
        )
        _require(_is_count(self.seed), f"seed is 0 or a positive integer, got {self.seed!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of an image as (rows, columns)."""
        return tuple(self.image_size) if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """An image and what is true of it. Objects are sorted by visible area; the first is the main object.

    Args:
        image: uint8 (rows, columns, 3).
        label: class of the main object, an index into `CLASS_NAMES`.
        caption: one or two sentences.
        boxes: float32 (objects, 4): xmin, ymin, xmax, ymax of the visible part in pixels. The pixel in column x spans
            x ... x + 1, so a box is as wide as xmax - xmin.
        categories: int64 (objects,), indices into `CLASS_NAMES`.
        instance_mask: uint8 (rows, columns): 0 is background, 1 the main object, 2 the next.
        semantic_mask: uint8 (rows, columns), indices into `SEMANTIC_NAMES`.
        depth: float32 (rows, columns): metres along the optical axis, at most `FARTHEST`.
    """

    image: np.ndarray
    label: int
    caption: str
    boxes: np.ndarray
    categories: np.ndarray
    instance_mask: np.ndarray
    semantic_mask: np.ndarray
    depth: np.ndarray


def render_scene(index: int, *, settings: SceneSettings) -> Scene:
    """Render scene number `index`. A pixel belongs to the nearest surface that one of its samples meets.

    Raises:
        ValueError: `index` is negative or not an integer.
    """
    _require(_is_count(index), f"the index of a scene is 0 or a positive integer, got {index!r}")
    rng = np.random.default_rng((settings.seed, index))
    world = _arrange(rng, settings)
    with np.errstate(all="ignore"):  # a ray that misses divides by zero, and then loses every comparison
        depth, surface = _trace(world)
        image = _paint(world, depth, surface)
    depths, surfaces = (_samples(samples, world.camera.shape) for samples in (depth, surface))
    depth, surface = depths[0], surfaces[0]
    for other_depth, other_surface in zip(depths[1:], surfaces[1:]):
        surface = np.where(other_depth < depth, other_surface, surface)
        depth = np.minimum(other_depth, depth)
    return _describe(rng, world, image, np.minimum(depth, FARTHEST), surface)


# Camera and rays -----------------------------------------------------------------------------------------------------


class _Camera(NamedTuple):
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


class _Plane(NamedTuple):
    name: str
    look: str
    normal: np.ndarray  # [3, 1], towards the camera
    offset: float  # normal · point
    tangents: np.ndarray  # [2, 3]
    colour: np.ndarray  # [3, 1]
    accent: np.ndarray  # [3, 1]: what a unit of the pattern adds


class _Solid(NamedTuple):
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


class _World(NamedTuple):
    camera: _Camera
    planes: list[_Plane]  # the ground, then walls
    solids: list[_Solid]
    light: np.ndarray  # [3, 1], towards it
    sun: np.ndarray  # [3, 1]: its colour
    ambient: np.ndarray  # [3, 1]
    zenith: np.ndarray  # [3, 1]: colour of the sky
    horizon: np.ndarray  # [3, 1]
    cloudiness: float

    @property
    def is_room(self) -> bool:
        return len(self.planes) > 1


def _arrange(rng: np.random.Generator, settings: SceneSettings) -> _World:
    distance, height = rng.uniform(1.7, 2.5), rng.uniform(0.5, 1.6)
    rows, columns = settings.shape
    pitch = np.arctan2(height - rng.uniform(0.2, 0.4), distance)
    axes = _rotation(0, pitch, rng.normal(0, 0.04)) * (1, -1, 1)
    camera = _Camera(_column(0, height, 0), axes, 2.5 * (rows * columns) ** 0.5, (2 * rows, 2 * columns))
    warmth, azimuth, elevation = rng.uniform(-0.12, 0.16), rng.uniform(-2.0, 2.0), rng.uniform(0.5, 1.2)
    zenith = _column(0.12, 0.25, 0.60) * rng.uniform(0.5, 1.2) + rng.uniform(0, 0.25)
    if rng.random() < 0.6:
        planes = _build_room(rng, distance)
    else:
        planes = [_lay_plane(rng, str(rng.choice(["grass", "sand"])), 0, _rotation(rng.uniform(0, 3), np.pi / 2, 0))]
    return _World(
        camera=camera,
        planes=planes,
        solids=_place_solids(rng, settings, distance, columns / camera.focal),
        light=_rotation(azimuth, elevation, 0).astype(np.float32) @ _column(0, 0, -1),
        sun=_column(1 + warmth, 1, 1 - warmth) * rng.uniform(0.75, 1.15),
        ambient=_column(1 - warmth, 1, 1 + warmth) * rng.uniform(0.35, 0.6),
        zenith=zenith,
        horizon=0.45 * zenith + 0.42,
        cloudiness=rng.uniform(0, 1),
    )


def _build_room(rng: np.random.Generator, distance: float) -> list[_Plane]:
    turn = rng.uniform(-0.6, 0.6)
    wall = _lay_plane(rng, "wall", distance + rng.uniform(1.0, 2.8), _rotation(turn, 0, 0))
    planes = [_lay_plane(rng, "floor", 0, _rotation(rng.uniform(0, 3), np.pi / 2, 0)), wall]
    if rng.random() < 0.6:  # a corner
        facing = _rotation(turn - np.copysign(np.pi / 2, turn), 0, 0).astype(np.float32)
        side = wall._replace(normal=-facing[:, 2:], tangents=facing.T[:2], offset=-rng.uniform(1.3, 2.6))
        planes.append(side)
    return planes


def _lay_plane(rng: np.random.Generator, name: str, distance: float, facing: np.ndarray) -> _Plane:
    """A plane whose tangents and reversed normal are the columns of `facing` (3, 3)."""
    look = str(rng.choice(list(_LOOKS[name])))
    spread = 0.25 if name == "wall" else 0.15
    colour = _column(*_LOOKS[name][look][1]) * np.exp(rng.normal(0, spread, (3, 1)) + rng.normal(0, 0.25))
    accent = colour * np.exp(rng.normal(0, 0.15, (3, 1))) * rng.uniform(0.08, 0.22) * rng.choice([-1, 1])
    facing, colour, accent = (array.astype(np.float32) for array in (facing, colour, accent))
    return _Plane(name, look, -facing[:, 2:], -distance, facing.T[:2] * rng.uniform(0.7, 1.3), colour, accent)


def _place_solids(rng: np.random.Generator, settings: SceneSettings, distance: float, width: float) -> list[_Solid]:
    solids = []
    for number in range(rng.integers(1, settings.max_objects + 1)):
        solid = _cast_solid(rng, size=rng.uniform(0.16, 0.38) if number else rng.uniform(0.34, 0.48))
        depths = distance + (rng.uniform(-0.5, 0.9, 24) if number else rng.uniform(-0.2, 0.2, 24))
        for x, z in zip(rng.uniform(-0.4, 0.4, 24) * depths * width, depths):
            is_free = True
            for other in solids:  # some occlusion, but never most of a solid
                other_x, _, other_z = other.centre[:, 0]
                apart, aside = np.hypot(x - other_x, z - other_z), abs(x / z - other_x / other_z)
                is_free &= apart > solid.size + other.size and aside > 0.5 * (solid.size / z + other.size / other_z)
            if is_free:
                solids.append(solid._replace(centre=solid.centre + _column(x, 0, z)))
                break
    return solids


def _cast_solid(rng: np.random.Generator, *, size: float) -> _Solid:
    """A solid of a random class, colour, material and pose that touches the ground below the origin."""
    category = int(rng.integers(len(_CLASSES)))
    shape, texture = _shape_and_texture(category)
    tilt = rng.choice([0.0, np.pi / 2, rng.uniform(0, 1.3)], p=[0.6, 0.15, 0.25])
    pose = _rotation(rng.uniform(0, 6.28), tilt, 0) @ _rotation(rng.uniform(0, 6.28), 0, 0)
    extent = size * shape.size * rng.uniform(0.87, 1.15, 3)
    colours = _choose_colours(rng)
    albedo = np.array([_COLOURS[name] for name in colours])[..., None] * np.exp(rng.normal(0, 0.12, (2, 3, 1)))
    turn = np.eye(3) if texture.is_aligned else _rotation(*rng.uniform(0, 6.28, 3))
    return _Solid(
        category=category,
        colours=colours,
        material=_MATERIALS[rng.integers(3)],
        size=size,
        radius=shape.radius * extent.max(),
        centre=_column(0, shape.support(extent * -pose[1]), 0),
        frame=(pose / extent).T.astype(np.float32),
        albedo=albedo.astype(np.float32),
        cells=(turn * texture.frequency * rng.uniform(0.85, 1.2)).astype(np.float32),
        phase=_column(*rng.uniform(8, 9, 3)),
        share=rng.uniform(0.4, 0.6),
    )


def _choose_colours(rng: np.random.Generator) -> tuple[str, str]:
    """Two colours that one can tell apart under any light."""
    brightness = {name: np.log(np.dot(tint, (0.3, 0.6, 0.1))) for name, tint in _COLOURS.items()}
    first = str(rng.choice(list(_COLOURS)))
    others = [name for name in _COLOURS if abs(brightness[name] - brightness[first]) > 0.9]
    return first, str(rng.choice(others))


def _trace(world: _World) -> tuple[np.ndarray, np.ndarray]:
    """Depth (N,) in metres and surface (N,): 0 the sky, then the planes, then the solids."""
    camera = world.camera
    rows, columns = (range(side) for side in camera.shape)
    rays = camera.rays(np.eye(3), rows, columns)
    depth, surface = np.full(rays.shape[1], 60, np.float32), np.zeros(rays.shape[1], np.uint8)
    for number, plane in enumerate(world.planes, start=1):
        towards = _dot(plane.normal, rays)
        t = (plane.offset - _dot(plane.normal, camera.position)) / towards
        is_met = (towards < 0) & ((t < depth) | (surface == 0))
        surface[is_met] = number
        np.copyto(depth, np.minimum(t, 60), where=is_met)  # ends the ground before its pattern overflows
    depth, surface = depth.reshape(camera.shape), surface.reshape(camera.shape)
    for number, solid in enumerate(world.solids, start=1 + len(world.planes)):
        rows, columns = camera.rectangle(solid.centre, solid.radius)
        corner = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        shape, _ = _shape_and_texture(solid.category)
        t = shape.meet(solid.frame @ (camera.position - solid.centre), camera.rays(solid.frame, rows, columns))
        is_met = t.reshape(len(rows), len(columns)) < depth[corner]
        surface[corner][is_met] = number
        depth[corner][is_met] = t[is_met.reshape(-1)]
    return depth.reshape(-1), surface.reshape(-1)


# Shapes --------------------------------------------------------------------------------------------------------------


class _Quadric(NamedTuple):
    """The points with square · p² + linear · p < level: inside of a ball, of a cylinder, between two planes."""

    square: tuple[float, float, float]
    linear: tuple[float, float, float]
    level: float


class _Shape(NamedTuple):
    """A solid of unit size around the origin: where quadrics intersect, or, without one, a ring."""

    size: float  # so that all look equally large
    radius: float  # of the ball around it
    support: Callable  # direction [3] -> largest direction · point
    quadrics: tuple[_Quadric, ...] = ()

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
            gradient = 2 * _column(*square) * p + _column(*linear)
            normal = np.where(value > outside, gradient, normal)
            outside = np.maximum(value, outside)
        return normal


def _weigh(weights: tuple[float, float, float], vectors: np.ndarray) -> np.ndarray:
    return sum(weight * axis for weight, axis in zip(weights, vectors) if weight)


def _meet_ring(origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """March by the distance to the ring, from where the ray enters a ball and a slab around it."""
    speed, middle = np.sqrt(_dot(ray, ray)), -_dot(origin, ray) / _dot(ray, ray)
    half = np.sqrt(middle * middle - (_dot(origin, origin) - 1) / (speed * speed))
    first, second = (-_TUBE - origin[1]) / ray[1], (_TUBE - origin[1]) / ray[1]
    start = np.maximum(np.maximum(middle - half, np.minimum(first, second)), 0)
    end = np.minimum(middle + half, np.maximum(first, second))
    found = np.full_like(start, np.inf)
    rays = np.flatnonzero(start < end)
    origin = np.broadcast_to(origin, ray.shape)[:, rays]
    t, end, ray, speed = start[rays], end[rays], ray[:, rays], speed[rays]
    for _ in range(16):
        x, y, z = origin + t * ray
        distance = np.hypot(np.sqrt(x * x + z * z) - (1 - _TUBE), y) - _TUBE
        t = t + distance / speed
    is_met = (np.abs(distance) < 0.01) & (t < end + 0.01)
    found[rays[is_met]] = t[is_met]
    return found


def _width(v: np.ndarray) -> float:
    return float(np.hypot(v[0], v[2]))


def _length(v: np.ndarray) -> float:
    return float(np.sqrt(v @ v))


_SLAB = _Quadric((0, 1, 0), (0, 0, 0), 1)
_CONE = _Quadric((1, -0.25, 1), (0, 0.5, 0), 0.25)  # x² + z² < (1 - y)² / 4
_SHAPES = {
    "ball": _Shape(0.92, 1.00, _length, (_Quadric((1, 1, 1), (0, 0, 0), 1),)),
    "cube": _Shape(
        0.72,
        1.74,
        lambda v: np.abs(v).sum(),
        (_Quadric((1, 0, 0), (0, 0, 0), 1), _SLAB, _Quadric((0, 0, 1), (0, 0, 0), 1)),
    ),
    "cylinder": _Shape(0.78, 1.42, lambda v: _width(v) + abs(v[1]), (_Quadric((1, 0, 1), (0, 0, 0), 1), _SLAB)),
    "cone": _Shape(0.98, 1.42, lambda v: max(v[1], _width(v) - v[1]), (_CONE, _SLAB)),
    "ring": _Shape(1.05, 1.00, lambda v: (1 - _TUBE) * _width(v) + _TUBE * _length(v)),
    "lens": _Shape(
        1.05,
        1.00,
        lambda v: 1.25 * _length(v) - 0.75 * abs(v[1]) if abs(v[1]) > 0.6 * _length(v) else _width(v),
        (_Quadric((1, 1, 1), (0, 1.5, 0), 1), _Quadric((1, 1, 1), (0, -1.5, 0), 1)),
    ),
    "pyramid": _Shape(
        0.95,
        1.74,
        lambda v: max(v[1], abs(v[0]) + abs(v[2]) - v[1]),
        (_CONE._replace(square=(1, -0.25, 0)), _CONE._replace(square=(0, -0.25, 1)), _SLAB),
    ),
    "dome": _Shape(
        1.02,
        1.12,
        lambda v: (_length(v) if v[1] > 0 else _width(v)) - v[1] / 2,
        (_Quadric((1, 1, 1), (0, 1, 0), 0.75), _SLAB._replace(level=0.25)),
    ),
}


def _shape_and_texture(category: int) -> tuple[_Shape, _Texture]:
    shape, texture = _CLASSES[category]
    return _SHAPES[SHAPE_NAMES[shape]], _TEXTURES[TEXTURE_NAMES[texture]]


# Textures ------------------------------------------------------------------------------------------------------------


class _Texture(NamedTuple):
    """A pattern that fills the space of a solid, as if it was carved from it: no seams, any shape."""

    frequency: float  # cells per unit
    is_aligned: bool  # with the axes of the solid
    weigh: Callable  # points [3, N] in cells, normals [3, N], share -> weight of the second colour [N], 0 to 1


@functools.cache
def _noise_table() -> np.ndarray:
    """Clouds (512, 512) that repeat in both directions, of variance 1: a spectrum that falls with the frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)) * 512
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    table = np.fft.irfft2(spectrum * (frequency > 0) / np.maximum(frequency, 3) ** 1.6)
    return (table / table.std()).clip(-2.5, 2.5).astype(np.float32)


@functools.cache
def _cell_table() -> np.ndarray:
    return np.random.default_rng(1).random((4, 1024), dtype=np.float32)


def _noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Clouds at (x, y), (N,); they repeat after 4 units."""
    return _noise_table()[(y * 128).astype(np.int32) & 511, (x * 128).astype(np.int32) & 511]


def _scatter(*cells: np.ndarray) -> np.ndarray:
    """A number in 0 ... 1023, without order, for each cell (N,)."""
    mixed = functools.reduce(lambda total, cell: total * 73 + cell.astype(np.int32), cells, np.int32(17))
    return ((mixed * np.int32(1103515245) + np.int32(12345)) >> 12) & 1023


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _dot_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    corner, middle = _fraction(p) - 0.5, _fraction(p + 0.5) - 0.5
    return np.minimum(_dot(corner, corner), _dot(middle, middle)) < (0.16 + 0.42 * share) ** 2


def _joint_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = np.abs(normal)
    is_flat = y > 1.33 * np.hypot(x, z)
    height = np.where(is_flat, p[2], p[1])
    along = np.where((x > z) & ~is_flat, p[2], p[0]) * 0.5 + np.floor(height) % 2 / 2
    return (_fraction(height) < share * 0.45) | (_fraction(along) < share * 0.22)


def _vein_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = p * np.float32(0.3)
    cloud = _noise(x, y) + _noise(y + 1.7, z) + _noise(z, x + 2.9)
    return np.abs(np.sin(p[1] * 1.5 + cloud * 0.9)) ** (2 * share)


def _grain_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    wobble = np.sin(p[0] * 1.9 + 0.8 * np.sin(p[1])) + np.sin(p[2] * 2.3 + p[1] * 0.7)
    return _fraction(np.hypot(p[0] - 8, p[2] - 8) + 0.22 * wobble + 0.45 * p[1]) ** (4 * share)


def _mosaic_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    """A tone for the nearest of points that are scattered over a lattice, one to a cube of it."""
    table, base = _cell_table(), np.floor(p - 0.5)
    best, tone = np.full(p.shape[1], np.inf, np.float32), np.zeros(p.shape[1], np.float32)
    for corner in np.ndindex(2, 2, 2):
        cell = base + _column(*corner)
        number = _scatter(*cell)
        away = cell + 0.2 + 0.6 * table[:3, number] - p
        distance = _dot(away, away)
        tone = np.where(distance < best, table[3, number], tone)
        best = np.minimum(distance, best)
    return tone


_TEXTURES = {
    "striped": _Texture(2.2, False, lambda p, normal, share: _fraction(p[1]) < share),
    "checkered": _Texture(2.3, True, lambda p, normal, share: np.floor(p).sum(0) % 2),
    "dotted": _Texture(1.6, False, _dot_weight),
    "bricked": _Texture(2.6, True, _joint_weight),
    "zigzag": _Texture(
        2.0,
        False,
        lambda p, normal, share: _fraction(p[1] + 1.6 * abs(_fraction(0.7 * (p[0] + p[2])) - 0.5)) < share,
    ),
    "marbled": _Texture(1.6, False, _vein_weight),
    "grained": _Texture(2.8, False, _grain_weight),
    "mosaic": _Texture(2.5, False, _mosaic_weight),
}


def _pattern(look: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pattern of a background at (u, v) in metres, (N,), about 0 with deviations of about 1."""
    table = _cell_table()
    if look == "tiled":
        u, v = u * 2.5, v * 2.5
        is_joint = (_fraction(u) < 0.05) | (_fraction(v) < 0.05)
        return np.where(is_joint, np.float32(-2.5), table[0, _scatter(np.floor(u), np.floor(v))] * 1.5)
    if look == "planked":
        row = np.floor(v * 6)
        board = np.floor(u * 0.7 + table[1, _scatter(row)] * 8)
        streaks = _noise(u * 0.15 + row, v * 2.5)
        return table[2, _scatter(row, board)] * 2.4 + 0.5 * streaks - 2.0 * (_fraction(v * 6) < 0.06)
    if look == "brick":
        row = np.floor(v * 7)
        along = u * 2.4 + row % 2 / 2
        is_joint = (_fraction(v * 7) < 0.12) | (_fraction(along) < 0.05)
        return np.where(is_joint, np.float32(2.2), table[3, _scatter(row, np.floor(along))] * 1.5 - 0.7)
    if look == "panelled":
        return -2.5 * ((_fraction(u) < 0.03) | (np.abs(v - 0.9) < 0.03)) - 1.5 * (v < 0.9) + 0.15 * _noise(u, v)
    if look == "papered":
        return np.sin(u * 18) + 0.2 * _noise(u, v)
    if look == "rippled":
        return 0.8 * np.sin(v * 22 + 2.2 * _noise(u * 0.3, v * 0.3)) + 0.5 * _noise(u, v)
    fine = {"plain": 0.3, "grassy": 3.0, "speckled": 4.0}[look]
    return _noise(u * 0.2, v * 0.2) * 0.7 + _noise(u * fine, v * fine) * min(fine / 4, 1)


# Light ---------------------------------------------------------------------------------------------------------------


class _Hits(NamedTuple):
    """Samples of one surface."""

    number: int  # of the surface
    points: np.ndarray  # [3, N]
    rays: np.ndarray  # [3, N]
    depth: np.ndarray  # [N]
    sunlit: np.ndarray  # [N], 0 or 1


def _paint(world: _World, depth: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Image uint8 (rows, columns, 3) of samples (N,)."""
    rays = world.camera.rays(np.eye(3), *(range(side) for side in world.camera.shape))
    points = rays * depth + world.camera.position
    sunlit = _cast_shadows(world, points, surface)
    colour = np.empty_like(points)
    for number in np.flatnonzero(np.bincount(surface)):
        mask = surface == number
        samples = np.flatnonzero(mask)
        hits = _Hits(int(number), *(array.take(samples, axis=-1) for array in (points, rays, depth, sunlit)))
        paint = _paint_solid if number > len(world.planes) else _paint_plane if number else _paint_sky
        for channel, values in zip(colour, paint(world, hits)):
            channel[mask] = values
    light = sum(_samples(colour, world.camera.shape)) / 4
    developed = 1 - np.exp(-1.45 * np.maximum(light, 0))  # like film: bright light never clips
    return np.ascontiguousarray(np.moveaxis(np.sqrt(developed) * 255 + 0.5, 0, -1).astype(np.uint8))


def _cast_shadows(world: _World, points: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Whether the sun reaches points (N,), 1 or 0. The samples of a pixel see different parts of it: soft edges."""
    rows, columns = world.camera.shape
    parts = np.array([[[0.6, -0.6], [1, -1]], [[1, 1], [-0.6, 0.6]], [[-0.6, 0.6], [-1, 1]]], np.float32) * 0.03
    suns = np.tile(world.light[:, :, None] + parts, (1, rows // 2, columns // 2)).reshape(3, -1)
    sunlit = np.ones(points.shape[1], np.float32)
    for number, solid in enumerate(world.solids, start=1 + len(world.planes)):
        aside = points - solid.centre
        towards = -_dot(world.light, aside)
        is_near = (_dot(aside, aside) - towards * towards < 1.2 * solid.radius**2) & (towards > 0)
        near = np.flatnonzero(is_near & (surface != number))
        shape, _ = _shape_and_texture(solid.category)
        origin, direction = (_turn(solid.frame, vectors.take(near, axis=1)) for vectors in (aside, suns))
        sunlit[near[shape.meet(origin, direction) < np.inf]] = 0
    return sunlit


def _illuminate(world: _World, hits: _Hits, normal: np.ndarray) -> np.ndarray:
    """Light (3, N) that arrives at a surface with normals (3, N) or (3, 1)."""
    openness = np.ones(hits.points.shape[1], np.float32)
    for number, solid in enumerate(world.solids, start=1 + len(world.planes)):
        if number != hits.number:
            away = solid.centre - hits.points
            squared = _dot(away, away)
            facing = np.maximum(_dot(normal, away), 0) / (squared * np.sqrt(squared))
            openness /= 1 + 1.2 * solid.size**2 * facing  # a ball of that size hides as much of the surroundings
    lambert = np.maximum(_dot(normal, world.light), 0) * hits.sunlit
    return world.ambient * (openness * (0.65 + 0.35 * normal[1])) + world.sun * lambert


def _paint_sky(world: _World, hits: _Hits) -> np.ndarray:
    x, y, z = hits.rays
    height = np.maximum(y, 0.02) / np.sqrt(_dot(hits.rays, hits.rays))
    cloud = _noise(x / (height + 0.15) * 0.25, z / (height + 0.15) * 0.25) + 2.5 * world.cloudiness - 1.8
    sky = world.horizon + (world.zenith - world.horizon) * np.minimum(height * 2.2, 1)
    return sky + (0.85 - sky) * (np.clip(cloud * 0.6, 0, 0.9) * np.minimum(height * 8, 1))


def _paint_plane(world: _World, hits: _Hits) -> np.ndarray:
    plane = world.planes[hits.number - 1]
    fading = 1 / (1 + (hits.depth / 6) ** 2)  # detail finer than a sample would flicker
    albedo = plane.colour + plane.accent * (_pattern(plane.look, *_turn(plane.tangents, hits.points)) * fading)
    colour = albedo * _illuminate(world, hits, plane.normal)
    if world.is_room:  # a lamp rather than the sun
        away = hits.points - world.solids[0].centre
        return colour * (1.1 / (1 + 0.06 * _dot(away, away)))
    return colour + (world.horizon - colour) * np.clip(hits.depth / 40, 0, 0.9)  # haze


def _paint_solid(world: _World, hits: _Hits) -> np.ndarray:
    solid = world.solids[hits.number - 1 - len(world.planes)]
    shape, texture = _shape_and_texture(solid.category)
    own = _turn(solid.frame, hits.points - solid.centre)
    own_normal = shape.normal(own)
    normal = _turn(solid.frame.T, own_normal)
    normal /= np.sqrt(_dot(normal, normal))
    weight = texture.weigh(_turn(solid.cells, own) + solid.phase, own_normal, solid.share)
    albedo = solid.albedo[0] + (solid.albedo[1] - solid.albedo[0]) * weight
    colour = albedo * _illuminate(world, hits, normal)
    if solid.material == "matte":
        return colour
    view = hits.rays / np.sqrt(_dot(hits.rays, hits.rays))
    facing = np.minimum(_dot(normal, view), 0)
    mirrored = view - 2 * facing * normal
    below, above = 0.7 * world.planes[0].colour, world.planes[-1].colour if world.is_room else world.horizon
    surroundings = below + (above - below) * np.clip(mirrored[1] * 2 + 0.5, 0, 1)
    highlight = np.maximum(_dot(mirrored, world.light), 0) * hits.sunlit
    if solid.material == "metallic":
        return colour * 0.45 + albedo * (surroundings * 0.9 + world.sun * 1.6 * highlight**12)
    fresnel = 0.05 + 0.5 * (1 + facing) ** 4
    return colour * 0.95 + fresnel * surroundings + 0.8 * highlight**60


# Truth ---------------------------------------------------------------------------------------------------------------


def _samples(grid: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
    """The 4 samples of each pixel: (..., N) -> 4 of (..., rows, columns)."""
    grid = grid.reshape(*grid.shape[:-1], *shape)
    return [grid[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _describe(
    rng: np.random.Generator, world: _World, image: np.ndarray, depth: np.ndarray, surface: np.ndarray
) -> Scene:
    first = 1 + len(world.planes)
    areas = np.bincount(surface.reshape(-1), minlength=first + len(world.solids))[first:]
    order = [int(number) for number in np.argsort(-areas, kind="stable") if areas[number]]
    solids = [world.solids[number] for number in order]
    instances, meanings = np.zeros(first + len(areas), np.uint8), np.zeros(first + len(areas), np.uint8)
    meanings[:first] = [SEMANTIC_NAMES.index(name) for name in ("sky", *(plane.name for plane in world.planes))]
    for rank, number in enumerate(order, start=1):
        instances[first + number], meanings[first + number] = rank, world.solids[number].category
    instance_mask = instances[surface]
    boxes = np.array([_box(instance_mask == rank) for rank in range(1, len(order) + 1)], np.float32)
    return Scene(
        image=image,
        label=solids[0].category,
        caption=_write_caption(rng, world, solids, boxes),
        boxes=boxes,
        categories=np.array([solid.category for solid in solids]),
        instance_mask=instance_mask,
        semantic_mask=meanings[surface],
        depth=depth,
    )


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _write_caption(rng: np.random.Generator, world: _World, solids: list[_Solid], boxes: np.ndarray) -> str:
    ground, *walls = world.planes
    place = f"on {_LOOKS[ground.name][ground.look][0]}"
    if rng.random() < 0.4:
        sky = "a cloudy sky" if world.cloudiness > 0.5 else "a clear sky"
        place += f" in front of {_LOOKS['wall'][walls[0].look][0]}" if walls else f" under {sky}"
    main, *others = (_name(rng, solid) for solid in solids)
    if others:
        others[0] = f"{_relate(world, solids, boxes)} {others[0]}"
    listed = " and ".join(filter(None, [", ".join(others[:-1]), *others[-1:]]))
    forms = (
        ("{main} {place}", "{place} there is {main}", "a picture of {main} {place}", "{main} rests {place}"),
        ("{main} {listed}, {place}", "{place}, {main} stands {listed}", "a picture of {main} {listed}, {place}"),
        ("{main} {listed}, all {place}", "{place} there is {main} {listed}", "{main} {place}, {listed}"),
    )[min(len(others), 2)]
    sentence = str(rng.choice(forms)).format(main=main, place=place, listed=listed)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _name(rng: np.random.Generator, solid: _Solid) -> str:
    size = "small " if solid.size < 0.25 else "large " if solid.size > 0.38 else ""
    colours, name = " and ".join(solid.colours), CLASS_NAMES[solid.category]
    words = (
        f"{size}{solid.material} {colours} {name}",
        f"{size}{colours} {name} that is {solid.material}",
        f"{size}{solid.material} {name} in {colours}",
    )[rng.integers(3)]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _relate(world: _World, solids: list[_Solid], boxes: np.ndarray) -> str:
    """How the main object lies relative to the next."""
    aside = (boxes[0, 0] + boxes[0, 2] - boxes[1, 0] - boxes[1, 2]) / world.camera.shape[1]
    if abs(aside) > 0.15:
        return "to the left of" if aside < 0 else "to the right of"
    return "in front of" if solids[0].centre[2, 0] < solids[1].centre[2, 0] else "behind"


# Datasets ------------------------------------------------------------------------------------------------------------


def make_scenes_dataset(num_scenes: int, *, settings: SceneSettings, start: int = 0) -> datasets.Dataset:
    """Scenes start ... start + num_scenes - 1 as a dataset that can be indexed.

    Columns: `index` and the fields of `Scene`. `image`, the masks and `depth` (mode "F", metres) are PIL images;
    `label` and `categories` know their names. The scenes are rendered once, under a progress bar, into the cache of
    the library `datasets` (HF_DATASETS_CACHE); a second call with the same arguments opens what the first wrote.

    Raises:
        ValueError: `num_scenes` is not positive or `start` is negative.
    """
    import datasets

    _check_range(num_scenes, start)
    blocks = _split(num_scenes, start)
    # A cache that outlives a change of this file would hold other scenes than the ones it promises.
    source = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    keywords = {"blocks": blocks, "settings": settings, "source": source}
    return datasets.Dataset.from_generator(_render_blocks, features=_features(), gen_kwargs=keywords)


def stream_scenes(
    *, settings: SceneSettings, start: int = 0, num_scenes: int | None = None
) -> datasets.IterableDataset:
    """Scenes start, start + 1, ... rendered when they are read; the columns are those of `make_scenes_dataset`.

    The range is cut into consecutive blocks, the shards of the stream: one process reads them in order, workers of a
    DataLoader and nodes share them. `state_dict` and `load_state_dict` resume without rendering what was read before.

    Args:
        settings: size, number of objects, seed.
        start: index of the first scene.
        num_scenes: None for a stream that does not end.

    Raises:
        ValueError: `num_scenes` is not positive or `start` is negative.
    """
    import datasets

    num_scenes = _ENDLESS if num_scenes is None else num_scenes
    _check_range(num_scenes, start)
    stream = datasets.IterableDataset.from_generator(_count_blocks, gen_kwargs={"blocks": _split(num_scenes, start)})
    render = functools.partial(_render_row, settings=settings)
    return stream.map(render, features=_features())  # only numbers are skipped when a stream resumes


def _check_range(num_scenes: int, start: int) -> None:
    _require(_is_count(num_scenes) and num_scenes > 0, f"num_scenes is a positive integer, got {num_scenes!r}")
    _require(_is_count(start), f"start is 0 or a positive integer, got {start!r}")


def _split(num_scenes: int, start: int) -> list[tuple[int, int]]:
    num_blocks = min(_NUM_BLOCKS, num_scenes)
    edges = [start + num_scenes * block // num_blocks for block in range(num_blocks + 1)]
    return list(itertools.pairwise(edges))


def _count_blocks(blocks: list[tuple[int, int]]) -> Iterator[dict]:
    for first, end in blocks:
        for index in range(first, end):
            yield {"index": index}


def _render_blocks(blocks: list[tuple[int, int]], settings: SceneSettings, source: str) -> Iterator[dict]:
    for row in _count_blocks(blocks):
        yield _render_row(row, settings=settings)


def _render_row(row: dict, *, settings: SceneSettings) -> dict:
    scene = render_scene(row["index"], settings=settings)
    fields = vars(scene)
    images = {name: Image.fromarray(fields[name]) for name in ("image", "instance_mask", "semantic_mask", "depth")}
    return {**row, **fields, **images, "boxes": scene.boxes.tolist(), "categories": scene.categories.tolist()}


def _features() -> datasets.Features:
    from datasets import ClassLabel, Features, Image, Sequence, Value

    return Features(
        {
            "index": Value("int64"),
            "image": Image(),
            "label": ClassLabel(names=list(CLASS_NAMES)),
            "caption": Value("string"),
            "boxes": Sequence(Sequence(Value("float32"), length=4)),
            "categories": Sequence(ClassLabel(names=list(CLASS_NAMES))),
            "instance_mask": Image(),
            "semantic_mask": Image(),
            "depth": Image(),
        }
    )


# Checks and vectors --------------------------------------------------------------------------------------------------


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0


def _require(is_true: bool, message: str) -> None:
    if not is_true:
        raise ValueError(f"scenes: {message}.")


def _column(x: float, y: float, z: float) -> np.ndarray:
    return np.array([[x], [y], [z]], np.float32)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _turn(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """frame @ points, in an order of additions that does not depend on a library of linear algebra."""
    x, y, z = points
    return frame[:, 0:1] * x + frame[:, 1:2] * y + frame[:, 2:3] * z


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Turn by roll about z, then by pitch about x, then by yaw about y."""
    (a, b, c), (d, e, f) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
    about_y = np.array([[a, 0, d], [0, 1, 0], [-d, 0, a]])
    about_x = np.array([[1, 0, 0], [0, b, -e], [0, e, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


__all__ = [
    "CLASS_NAMES",
    "FARTHEST",
    "SEMANTIC_NAMES",
    "SHAPE_NAMES",
    "TEXTURE_NAMES",
    "Scene",
    "SceneSettings",
    "make_scenes_dataset",
    "render_scene",
    "stream_scenes",
]

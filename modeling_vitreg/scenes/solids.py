"""The solids of a scene: class, colours, material, pose and place."""

from typing import NamedTuple

import numpy as np

from .backgrounds import Plane
from .settings import CLASSES
from .shapes import SHAPES, Shape
from .textures import TEXTURES, Texture
from .vectors import column, dot, rotation


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
    """A shape with a texture: how it is made and where it stands."""

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
        """Of unit size, in its own space."""
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
    """Whether a solid stands clear of the walls and of the others, and hides no more than a part of them."""
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


__all__ = ["COLOUR_NAMES", "Solid", "place_solids"]

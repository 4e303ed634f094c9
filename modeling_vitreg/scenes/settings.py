"""Names of the parts of a scene, settings and presets of datasets, and the annotations of an image."""

import dataclasses

import numpy as np


SHAPE_NAMES = ("ball", "cube", "cylinder", "cone", "ring", "lens", "pyramid", "dome")
TEXTURE_NAMES = ("striped", "checkered", "dotted", "bricked", "zigzag", "marbled", "grained", "mosaic")
# Each shape has three textures and each texture three shapes, so that neither alone names the class.
CLASSES = tuple((SHAPE_NAMES[n], TEXTURE_NAMES[(n + step) % 8]) for n in range(8) for step in (0, 1, 3))
CLASS_NAMES = tuple(f"{texture} {shape}" for shape, texture in CLASSES)
# Ids of the semantic mask: first the classes, then the background. 255 does not occur: every pixel has a meaning.
SEMANTIC_NAMES = (*CLASS_NAMES, "floor", "wall", "grass", "sand", "sky")
# The named presets: one name is the same data in training, in every verb and on the card.
PRESETS = {
    "scenes": {"max_objects": 4, "zoom": 1.0},  # one to four objects in their surroundings, for boxes, masks and depth
    "scenes:single": {"max_objects": 1, "zoom": 1.6},  # one object that fills the image, for one label an image
}
FIRST_TEST_SCENE = 1_000_000  # index; training scenes are counted from 0
_LARGEST_SIDE = 224  # pixels: rendering larger scenes takes longer than most models
FARTHEST = 10.0  # metres: the depth of the sky, and of ground beyond


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """Settings that all scenes of a dataset share.

    Args:
        image_size: pixels, a side or (rows, columns), at least 16; one side is at most 4 times the other.
        max_objects: a scene has 1 to `max_objects` solids; at most 8.
        zoom: 1 shows the main object in its surroundings, 2 fills the image with it; from 0.5 to 2.
        seed: 0 or a positive integer; another seed gives other scenes.

    Raises:
        ValueError: a value outside its range.
    """

    image_size: int | tuple[int, int] = 224
    max_objects: int = 4
    zoom: float = 1.0
    seed: int = 0

    def __post_init__(self):
        require(
            len(self.shape) == 2 and all(is_count(side) and side >= 16 for side in self.shape),
            f"expected image_size to be a side or (rows, columns) of at least 16 pixels, got {self.image_size!r}",
        )
        require(
            max(self.shape) <= 4 * min(self.shape),
            f"expected the longer side of image_size to be at most 4 times the shorter, got {self.image_size!r}",
        )
        require(
            is_count(self.max_objects) and 1 <= self.max_objects <= 8,
            f"expected max_objects to be 1 ... 8, got {self.max_objects!r}",
        )
        require(0.5 <= self.zoom <= 2, f"expected zoom in [0.5, 2], got {self.zoom!r}")
        require(is_count(self.seed), f"expected seed to be 0 or a positive integer, got {self.seed!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels of an image as (rows, columns)."""
        return tuple(self.image_size) if isinstance(self.image_size, (tuple, list)) else (self.image_size,) * 2


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """An image and its annotations. Objects are sorted by visible area; the first is the main object.

    Args:
        image: uint8 (rows, columns, 3).
        label: class of the main object, an index into `CLASS_NAMES`.
        colours: the two colours of the main object, an index into `COLOUR_NAMES`.
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
    colours: int
    caption: str
    boxes: np.ndarray
    categories: np.ndarray
    instance_mask: np.ndarray
    semantic_mask: np.ndarray
    depth: np.ndarray


def is_scenes(source: object) -> bool:
    """Whether a source of images names a preset; paths do not.

    Raises:
        ValueError: it begins like a preset, and there is none of this name.
    """
    if not isinstance(source, str):
        return False
    if source.startswith("scenes:") and source not in PRESETS:
        raise ValueError(f"there are no scenes {source!r}; the presets are {', '.join(PRESETS)}")
    return source in PRESETS


def preset_settings(name: str, *, side: int, seed: int = 0) -> SceneSettings:
    """The settings of a preset for models that read images of `side` pixels.

    Scenes are a third larger than what a model reads, as photographs are, and at most 224 pixels.
    """
    size = max(16, min(side * 4 // 3, _LARGEST_SIDE))
    return SceneSettings(image_size=size, seed=seed, **PRESETS[name])


def describe_preset(name: str, settings: SceneSettings) -> str:
    """Name and size of rendered scenes, for reports and messages."""
    return f"{name} of {' x '.join(map(str, dict.fromkeys(settings.shape)))} pixels"


def is_count(value: object) -> bool:
    """Whether a value is 0 or a positive integer."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0


def require(is_true: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `is_true`."""
    if not is_true:
        raise ValueError(f"scenes: {message}.")

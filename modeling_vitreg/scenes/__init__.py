"""Rendered scenes with exact annotations: data that needs no download.

A scene is one to several solids on the floor of a room or under the open sky. A class is a shape with a texture;
colour, material, size, pose, light, camera and background are chance. Colour says next to nothing about the class, and
shape alone or texture alone leaves three classes. Floor, wall, ground and sky are the large areas of like patches in
which artifacts of Vision Transformers appear. Annotations: label, caption, boxes, instance and semantic mask, depth.

Presets: `scenes` has one to four objects in their surroundings, `scenes:single` one object that fills the image.

A scene is a function of (settings, index): no order, process or number of workers changes its bytes on one machine.
Another size of the same proportions renders the same arrangement. Splits are ranges of indices, or other seeds.

Letters: N samples of the image (4 to a pixel). Vectors are columns, x right, y up, z away from the camera, in metres;
a solid has a space of its own, in which its shape has unit size.
"""

from .dataset import make_scenes_dataset, stream_scenes
from .render import render_scene
from .settings import (
    CLASS_NAMES,
    FARTHEST,
    FIRST_TEST_SCENE,
    PRESETS,
    SEMANTIC_NAMES,
    SHAPE_NAMES,
    TEXTURE_NAMES,
    Scene,
    SceneSettings,
    describe_preset,
    is_scenes,
    preset_settings,
)
from .world import COLOUR_NAMES


__all__ = [
    "CLASS_NAMES",
    "COLOUR_NAMES",
    "FARTHEST",
    "FIRST_TEST_SCENE",
    "PRESETS",
    "SEMANTIC_NAMES",
    "SHAPE_NAMES",
    "TEXTURE_NAMES",
    "Scene",
    "SceneSettings",
    "describe_preset",
    "is_scenes",
    "make_scenes_dataset",
    "preset_settings",
    "render_scene",
    "stream_scenes",
]

"""Rendered scenes with their exact boxes, as a list that discovery takes."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from modeling_vitreg.images import AnnotatedImage
from modeling_vitreg.scenes import SceneSettings, render_scene


def annotated_scenes(indices: Iterable[int], *, settings: SceneSettings) -> list[AnnotatedImage]:
    """Scenes by their index."""
    scenes = {f"scene {index}": render_scene(index, settings=settings) for index in indices}
    return [
        AnnotatedImage(name, Image.fromarray(scene.image), boxes=scene.boxes.astype(np.float64))
        for name, scene in scenes.items()
    ]

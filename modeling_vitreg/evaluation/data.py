"""Images with what is true of them: a label, a semantic mask, depth; to train heads on, and to measure on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from modeling_vitreg.images import ImageSource, MapColumns, decode_image, decode_maps

from .provenance import shorten


@dataclass(frozen=True, eq=False)
class Example:
    """An image (RGB), its label, its mask of class numbers and its depth in metres; None for what nobody knows."""

    image: Image.Image
    label: int | None
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None


class LabelledImages:
    """Images that can be read by number.

    Args:
        images: with labels and maps or without.
        indices: of the images that count, in order; None: all.
    """

    def __init__(self, images: ImageSource, *, indices: np.ndarray | None = None):
        self._images = images
        self._indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._images.class_names

    @property
    def maps(self) -> MapColumns:
        """Where masks and depths are."""
        return self._images.maps

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with images, labels, maps and their order."""
        return shorten([self._images.fingerprint, self._indices.tolist()])

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, number: int) -> Example:
        """Decode an image and what is true of it.

        Raises:
            UnreadableImage: of `modeling_vitreg.images`; the image or a map is broken, or they differ in size.
        """
        raw = self._images.raw(int(self._indices[number]))
        image = decode_image(raw)
        return Example(image, raw["label"], **decode_maps(raw, size=image.size))

    def select(self, numbers: np.ndarray) -> LabelledImages:
        """Some of these images, by their numbers."""
        return LabelledImages(self._images, indices=self._indices[numbers])


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """What a model is evaluated on.

    Args:
        name: for reports.
        train: images that heads are trained on.
        test: images that are measured.
        mask_names: names of the classes of a mask; None: as many classes as the masks show.
        ignore_index: value of a mask that does not count.
        max_depth: metres, from which on depth does not count.
        revision: of the data, where known.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    mask_names: tuple[str, ...] | None = None
    ignore_index: int = 255
    max_depth: float = 10.0
    revision: str | None = None


__all__ = ["EvaluationData", "Example", "LabelledImages"]

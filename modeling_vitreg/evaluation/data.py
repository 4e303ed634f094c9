"""Images with what is true of them: a label, a semantic mask, depth, boxes; to train heads on, and to measure on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modeling_vitreg.discovery import AnnotatedImage, read_cell
from modeling_vitreg.images import DataOptions, ImageSource, UnreadableImage, decode_image, decode_maps
from modeling_vitreg.reports import short_hash


if TYPE_CHECKING:
    import datasets


# What older fingerprints called a format of boxes.
_LAYOUTS = {"auto": None, "xyxy": "corners", "xywh": "xywh", "cxcywh": "cxcywh"}
_SLACK = 0.05  # of the sides of an image, by which a box may reach out of it


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
        boxes: the dataset, of equal length, that holds the boxes of objects in `options.box_column`; None: unknown.
        indices: of the images that count, in order; None: all.
    """

    def __init__(
        self,
        images: ImageSource,
        *,
        boxes: datasets.Dataset | None = None,
        indices: np.ndarray | None = None,
    ):
        self._images = images
        self.box_column = None if boxes is None else images.options.box_column
        self._boxes = None if boxes is None else boxes.select_columns([self.box_column])  # reading one reads no image
        self._indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._images.class_names

    @property
    def options(self) -> DataOptions:
        """Columns and the meaning of their values."""
        return self._images.options

    @property
    def revision(self) -> str | None:
        """Commit of a dataset of the Hub, else None."""
        return self._images.revision

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with images, labels, maps and their order."""
        return short_hash([self._images.fingerprint, self._indices.tolist()])

    @functools.cached_property
    def box_fingerprint(self) -> str | None:
        """Sixteen letters that change with images, their order and any box; None without boxes."""
        if self._boxes is None:
            return None
        cells = self._boxes[self.box_column][:]
        boxes = [repr(cells[index]) for index in self._indices.tolist()]
        return short_hash([self._images.fingerprint, self._indices.tolist(), _LAYOUTS[self.options.box_format], boxes])

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

    def name_of(self, number: int) -> str:
        """Path of an image if it has one, else its number."""
        return self._images.name_of(int(self._indices[number]))

    def annotate(self, number: int) -> AnnotatedImage:
        """An image with its boxes, None where nobody has looked; opened later, and alone.

        Raises:
            ValueError: what the column holds are no boxes.
        """
        index = int(self._indices[number])
        boxes = read_cell(self._boxes[index][self.box_column], box_format=self.options.box_format)
        return AnnotatedImage(self._images.name_of(index), functools.partial(self._open, index, boxes), boxes)

    def select(self, numbers: np.ndarray) -> LabelledImages:
        """Some of these images, by their numbers."""
        return LabelledImages(self._images, boxes=self._boxes, indices=self._indices[numbers])

    def _open(self, index: int, boxes: np.ndarray | None) -> Image.Image:
        image = self._images.read(index)[0]
        ends = np.zeros(2) if boxes is None else boxes[:, 2:].max(axis=0, initial=0)
        if (ends > np.multiply(image.size, 1 + _SLACK)).any():  # corners that were taken for width and height?
            reach = f"a box reaches to {ends.tolist()} in an image of {image.width} x {image.height} pixels"
            raise UnreadableImage(self._images.name_of(index), f"{reach}: is the layout of the boxes another one?")
        return image


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
        revision: commit of a dataset of the Hub, else None.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    mask_names: tuple[str, ...] | None = None
    ignore_index: int = 255
    max_depth: float = 10.0
    revision: str | None = None


__all__ = ["EvaluationData", "Example", "LabelledImages"]

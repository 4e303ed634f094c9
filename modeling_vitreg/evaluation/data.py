"""Images with what is true of them: a label, a semantic mask, depth, boxes; to train heads on, and to measure on."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modeling_vitreg.discovery import AnnotatedImage, read_cell
from modeling_vitreg.images import ImageSource, UnreadableImage

from .provenance import shorten


if TYPE_CHECKING:
    import datasets


_NUM_SAMPLES = 64  # truths that enter a fingerprint
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
        images: with labels or without.
        truth: the dataset, of equal length, that holds the maps; None: there are none.
        mask_column: of class numbers.
        depth_column: of depths.
        depth_scale: metres of a unit of depth.
        box_column: of boxes of objects; see `modeling_vitreg.discovery.annotations`.
        box_layout: of a box, "xywh" or "corners"; None: as the column shows.
        indices: of the images that count, in order; None: all.

    Raises:
        ValueError: a column does not exist.
    """

    def __init__(
        self,
        images: ImageSource,
        *,
        truth: datasets.Dataset | None = None,
        mask_column: str | None = None,
        depth_column: str | None = None,
        depth_scale: float = 1.0,
        box_column: str | None = None,
        box_layout: str | None = None,
        indices: np.ndarray | None = None,
    ):
        self._images, self._truth, self._depth_scale = images, truth, depth_scale
        self.mask_column, self.depth_column = mask_column, depth_column
        self.box_column, self.box_layout = box_column, box_layout
        for name in filter(None, (mask_column, depth_column, box_column)):
            if truth is None or name not in truth.column_names:
                known = "no dataset" if truth is None else ", ".join(truth.column_names)
                raise ValueError(
                    f"expected a column {name!r} of {'boxes' if name == box_column else 'maps'}, got {known}"
                )
        self._maps = {name: truth.select_columns([name]) for name in (mask_column, depth_column) if name}
        self._boxes = truth.select_columns([box_column]) if box_column else None
        self._indices = np.arange(len(images)) if indices is None else np.asarray(indices)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._images.class_names

    @property
    def revision(self) -> str | None:
        """Commit of a dataset of the Hub, else None."""
        return self._images.revision

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with images, labels, their order and their maps, of which 64 are read."""
        spread = self._indices[:: max(len(self) // _NUM_SAMPLES, 1)][:_NUM_SAMPLES].tolist()
        columns = [name for name in (self.mask_column, self.depth_column) if name]
        maps = [self._sum_up(index, name) for index in spread for name in columns]
        return shorten([self._images.fingerprint, self._indices.tolist(), columns, self._depth_scale, maps])

    @functools.cached_property
    def box_fingerprint(self) -> str | None:
        """Sixteen letters that change with images, their order and any box; None without boxes."""
        if self._boxes is None:
            return None
        cells = self._boxes[self.box_column][:]
        boxes = [repr(cells[index]) for index in self._indices.tolist()]
        return shorten([self._images.fingerprint, self._indices.tolist(), self.box_layout, boxes])

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, number: int) -> Example:
        """Decode an image and what is true of it.

        Raises:
            UnreadableImage: of `modeling_vitreg.images`; the image or a map is broken, or they differ in size.
        """
        index = int(self._indices[number])
        image, label = self._images.read(index)
        maps = {}
        for kind, column in (("mask", self.mask_column), ("depth", self.depth_column)):
            if column:
                maps[kind] = self._map(index, column)
                if maps[kind].shape != image.size[::-1]:
                    sizes = f"{column} of shape {maps[kind].shape} for an image of {image.size[::-1]} pixels"
                    raise UnreadableImage(self._images.name_of(index), sizes)
        if "depth" in maps:
            maps["depth"] = maps["depth"].astype(np.float32) * np.float32(self._depth_scale)
        return Example(image, label, **maps)

    def annotate(self, number: int) -> AnnotatedImage:
        """An image with its boxes, None where nobody has looked; opened later, and alone.

        Raises:
            ValueError: what the column holds are no boxes.
        """
        index = int(self._indices[number])
        boxes = read_cell(self._boxes[index][self.box_column], layout=self.box_layout)
        return AnnotatedImage(self._images.name_of(index), functools.partial(self._open, index, boxes), boxes)

    def select(self, numbers: np.ndarray) -> LabelledImages:
        """Some of these images, by their numbers."""
        return LabelledImages(
            self._images,
            truth=self._truth,
            mask_column=self.mask_column,
            depth_column=self.depth_column,
            depth_scale=self._depth_scale,
            box_column=self.box_column,
            box_layout=self.box_layout,
            indices=self._indices[numbers],
        )

    def _open(self, index: int, boxes: np.ndarray | None) -> Image.Image:
        image = self._images.read(index)[0]
        ends = np.zeros(2) if boxes is None else boxes[:, 2:].max(axis=0, initial=0)
        if (ends > np.multiply(image.size, 1 + _SLACK)).any():  # corners that were taken for width and height?
            reach = f"a box reaches to {ends.tolist()} in an image of {image.width} x {image.height} pixels"
            raise UnreadableImage(self._images.name_of(index), f"{reach}: is the layout of the boxes another one?")
        return image

    def _sum_up(self, index: int, column: str) -> str:
        try:
            return hashlib.sha256(self._map(index, column).tobytes()).hexdigest()
        except UnreadableImage:
            return "unreadable"

    def _map(self, index: int, column: str) -> np.ndarray:
        try:
            return np.asarray(self._maps[column][index][column])
        except Exception as error:  # Pillow's plugins raise whatever they stumble upon
            name = self._images.name_of(index)
            raise UnreadableImage(name, f"{column}: {type(error).__name__}: {error}") from error


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

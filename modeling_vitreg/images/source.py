"""Images that can be indexed."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from .columns import MapColumns, find_columns, join_texts
from .decoding import decode_image
from .fingerprints import shorten, sum_up_content


if TYPE_CHECKING:
    import datasets


_NUM_SAMPLES = 256  # images whose size or bytes enter a fingerprint


class ImageSource:
    """Images that can be indexed: `len(source)`, `source.read(index)`.

    Args:
        dataset: of the library `datasets`.
        image_column: holds the images; None: the only column of type `Image`, or the one of a usual name.
        label_column: holds the classes; None: the only `ClassLabel`, or an integer column `label`, `labels` or `cls`.
        text_column: holds captions; None: captions are not read.
        maps: columns of maps; None: maps are not read.
        revision: commit of a dataset of the Hub, for reports.

    Raises:
        ValueError: a column does not exist, or the choice is not clear.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        maps: MapColumns | None = None,
        revision: str | None = None,
    ):
        self.revision = revision
        names = {"image": image_column, "label": label_column, "text": text_column}
        self._columns = find_columns(dataset.features, **names, maps=maps or MapColumns())
        self._dataset = self._columns.select(dataset)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._columns.class_names

    @property
    def maps(self) -> MapColumns:
        """Where the maps are."""
        return self._columns.maps

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode an image as RGB; with its label, None where it has none.

        Raises:
            UnreadableImage: see `decode_image`.
        """
        raw = self.raw(index)
        return decode_image(raw), raw["label"]

    def raw(self, index: int) -> dict:
        """An image as it was stored."""
        return self._columns.to_raw(self._dataset[index], fallback=f"image {index}")

    def texts(self) -> Iterator[str]:
        """All captions in order, several of an image joined, without an image being read.

        Raises:
            ValueError: the source was opened without a text column.
        """
        if not self._columns.text:
            raise ValueError("open_images: captions were asked for, but the source was opened without text_column")
        return map(join_texts, self._dataset[self._columns.text][:])

    def name_of(self, index: int) -> str:
        """Path of an image where it has one, else its number."""
        return self.raw(index)["name"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with the data, but not with the place or the time of a copy.

        They sum up the number of images, the class names, all labels, all paths below their common folder, and of at
        most 256 images spread over the whole the bytes (of a file: its size), with those of their maps.
        """
        labels = self._dataset[self._columns.label][:] if self._columns.label else None
        tables = self._dataset.select_columns(self._columns.image).with_format("arrow").iter(10_000)
        chunks = itertools.chain.from_iterable(table[self._columns.image].chunks for table in tables)
        paths = [path or "" for chunk in chunks for path in chunk.field("path").to_pylist()]
        ends = [os.path.dirname(path) for path in (min(paths, default=""), max(paths, default=""))]
        folder = os.path.commonpath(ends) if all(map(os.path.isabs, ends)) else ""
        paths = [path[len(folder) :] for path in paths]
        spread = sorted({len(self) * step // _NUM_SAMPLES for step in range(_NUM_SAMPLES)}) if len(self) else []
        raws = [self.raw(index) for index in spread]
        contents = [sum_up_content(raw) for raw in raws]
        facts = [self.class_names, labels, paths, contents]
        return shorten([*facts, *self._columns.sum_up_maps(raws)])


__all__ = ["ImageSource"]

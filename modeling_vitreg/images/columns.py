"""Where image, label, caption and maps of a row are, found by type and name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from .decoding import RawImage
from .labels import Labels, find_labels, holds_classes, holds_lists
from .messages import list_names
from .opened import OpenedDataset
from .options import DataOptions


if TYPE_CHECKING:
    import datasets


# Names under which a column wins over others of its kind.
_SIDES = ("width", "height")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the image, the label, the caption and the maps of a row are."""

    image: str
    labels: Labels
    text: str | None
    options: DataOptions
    sides: tuple[str, ...] = ()  # columns of the width and height that annotations are of

    def select(self, dataset: datasets.Dataset | datasets.IterableDataset):
        """Keep these columns, with images as they were stored."""
        from datasets import Image as ImageFeature

        maps = tuple(self.options.maps.values())
        others = (self.labels.column, self.text, self.options.box_column, *self.sides)
        kept = dataset.select_columns(list(dict.fromkeys(name for name in (self.image, *others, *maps) if name)))
        for name in (self.image, *maps):
            if name == self.image or isinstance(kept.features[name], ImageFeature):
                kept = kept.cast_column(name, ImageFeature(decode=False))
        return kept

    def to_raw(self, row: dict, *, fallback: str) -> RawImage:
        """The raw image of a row; `fallback` is its name if it has no path."""
        image = row[self.image] or {"bytes": None, "path": None}
        text = {"text": join_texts(row[self.text])} if self.text else {}
        raw = {**image, "label": self.labels.encode(row), "name": image["path"] or fallback, **text}
        if self.options.maps:
            raw |= {"maps": {kind: row[column] for kind, column in self.options.maps.items()}, "options": self.options}
        if self.options.box_column:
            size = tuple(row[side] for side in self.sides)
            raw |= {"boxes": row[self.options.box_column], "options": self.options}
            raw["annotated_size"] = size if size and all(size) else None
        return raw

    def hash_maps(self, raws: list[dict]) -> list:
        """The part of a dataset hash that covers maps; empty without maps."""
        if not self.options.maps:
            return []
        names = ("mask_column", "depth_column", "depth_scale", "reduce_labels")
        how = [getattr(self.options, name) for name in names]
        how += [self.options.mask_format] * (self.options.mask_format in ("binary", "voc"))
        return [how, [list(map(hash_map, raw["maps"].values())) for raw in raws]]


def join_texts(text: str | list[str] | None) -> str:
    """One caption; several of an image, one after the other."""
    return " ".join(text) if isinstance(text, list) else text or ""


def find_columns(opened: OpenedDataset, options: DataOptions) -> Columns:
    """The columns that are named, or else found.

    Raises:
        ValueError: a column does not exist, or the choice is not clear.
    """
    from datasets import Image as ImageFeature

    features = opened.dataset.features
    image, label, text = options.image_column, options.label_column, options.text_column
    maps = tuple(options.maps.values())
    for name in filter(None, (image, label, text, options.box_column, *maps)):
        if name not in features:
            raise ValueError(f"open_images: there is no column {name!r}; the columns are {list_names(features)}.")
    is_list = label and options.allows_label_lists and holds_lists(features[label])
    if label and not (is_list or holds_classes(features[label])):
        hint = ": expected one class for each image; lists are for settings.loss=multi_label and vitreg evaluate"
        hint = hint if holds_lists(features[label]) else ", not classes."
        raise ValueError(f"open_images: the column {label!r} holds {features[label]}{hint}")
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature) and name not in maps]
    if not images and not image:
        raise ValueError(
            f"open_images: expected a column of type Image, got {list_names(features)}. If one of them holds paths "
            "or the bytes of image files, name it: --columns image=NAME (image_column)."
        )
    best = images if len(images) == 1 else [name for name in _IMAGE_NAMES if name in images][:1]
    if not (image or best):
        raise ValueError(
            f"open_images: several columns qualify: {list_names(images)}; choose one with --columns image=NAME "
            "(image_column)."
        )
    read = (image or best[0], text, options.box_column, *maps)
    candidates = {name: kind for name, kind in features.items() if name == label or name not in read}
    is_sized = options.box_column and all("int" in getattr(features.get(side), "dtype", "") for side in _SIDES)
    labels = find_labels(opened, label, features=candidates)
    return Columns(image or best[0], labels, text, options, _SIDES if is_sized else ())


def hash_content(raw: dict) -> str | int | None:
    """Hash of the bytes of a stored image; the size of a file."""
    if raw["bytes"] is not None:
        return hashlib.sha256(raw["bytes"]).hexdigest()
    return os.path.getsize(raw["path"]) if raw["path"] and os.path.exists(raw["path"]) else None


def hash_map(value: dict | list | np.ndarray) -> str | int | None:
    """Hash of a map as it was stored, an image or an array."""
    if isinstance(value, dict):
        return hash_content(value)
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()

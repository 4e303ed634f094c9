"""Where image, label, caption and maps of a row are, found by type and name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from .messages import list_names
from .options import DataOptions


if TYPE_CHECKING:
    import datasets


# Names under which a column wins over others of its kind.
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the image, the label, the caption and the maps of a row are."""

    image: str
    label: str | None
    text: str | None
    class_names: tuple[str, ...] | None
    options: DataOptions
    sides: tuple[str, ...] = ()  # columns of the width and height that annotations are of

    def select(self, dataset: datasets.Dataset | datasets.IterableDataset):
        """Keep these columns, with images as they were stored."""
        from datasets import Image as ImageFeature

        maps = tuple(self.options.maps.values())
        others = (self.label, self.text, self.options.box_column, *self.sides)
        kept = dataset.select_columns(list(dict.fromkeys(name for name in (self.image, *others, *maps) if name)))
        for name in (self.image, *maps):
            if name == self.image or isinstance(kept.features[name], ImageFeature):
                kept = kept.cast_column(name, ImageFeature(decode=False))
        return kept

    def to_raw(self, row: dict, *, fallback: str) -> dict:
        """The raw image of a row; `fallback` is its name if it has no path."""
        image = row[self.image] or {"bytes": None, "path": None}
        label = row[self.label] if self.label else None
        # The Hub marks the hidden labels of a test set by -1.
        label = None if label is None or label < 0 else int(label)
        text = {"text": join_texts(row[self.text])} if self.text else {}
        raw = {**image, "label": label, "name": image["path"] or fallback, **text}
        if self.options.maps:
            raw |= {"maps": {kind: row[column] for kind, column in self.options.maps.items()}, "options": self.options}
        if self.options.box_column:
            size = tuple(row[side] for side in self.sides)
            raw |= {"boxes": row[self.options.box_column], "options": self.options}
            raw["annotated_size"] = size if size and all(size) else None
        return raw

    def sum_up_maps(self, raws: list[dict]) -> list:
        """What a fingerprint holds of maps, nothing where there are none."""
        if not self.options.maps:
            return []
        names = ("mask_column", "depth_column", "depth_scale", "reduce_labels")
        how = [getattr(self.options, name) for name in names]
        how += [self.options.mask_format] * (self.options.mask_format in ("binary", "voc"))
        return [how, [list(map(sum_up_map, raw["maps"].values())) for raw in raws]]


def join_texts(text: str | list[str] | None) -> str:
    """One caption; several of an image, one after the other."""
    return " ".join(text) if isinstance(text, list) else text or ""


def find_columns(features: datasets.Features, options: DataOptions) -> Columns:
    """The columns that are named, or else found.

    Raises:
        ValueError: a column does not exist, or the choice is not clear.
    """
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    image, label, text = options.image_column, options.label_column, options.text_column
    maps = tuple(options.maps.values())
    for name in filter(None, (image, label, text, options.box_column, *maps)):
        if name not in features:
            raise ValueError(f"open_images: there is no column {name!r}; the columns are {list_names(features)}.")
    integers = {name for name, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype}
    classes = {name for name, kind in features.items() if isinstance(kind, ClassLabel)}
    if label and label not in classes | integers:
        raise ValueError(f"open_images: the column {label!r} holds no classes but {features[label]}.")
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    images = [name for name in images if name not in maps]
    if not images and not image:
        raise ValueError(
            f"open_images: expected a column of type Image, got {list_names(features)}. If one of them holds paths "
            "or the bytes of image files, name it: --columns image=NAME (image_column)."
        )
    image = image or _choose(images, usual=_IMAGE_NAMES, kind="image")
    labels = [name for name in features if name in classes or (name in integers and name in _LABEL_NAMES)]
    label = label or (_choose(labels, usual=_LABEL_NAMES, kind="label") if labels else None)
    names = tuple(features[label].names) if label in classes else None
    sides = ("width", "height") if options.box_column and integers >= {"width", "height"} else ()
    return Columns(image, label, text, names, options, sides)


def _choose(names: list[str], *, usual: tuple[str, ...], kind: str) -> str:
    best = names if len(names) == 1 else [name for name in usual if name in names][:1]
    if not best:
        raise ValueError(
            f"open_images: several columns qualify: {list_names(names)}; choose one with --columns {kind}=NAME "
            f"({kind}_column)."
        )
    return best[0]


def sum_up_content(raw: dict) -> str | int | None:
    """Of a raw image its bytes, of a file its size."""
    if raw["bytes"] is not None:
        return hashlib.sha256(raw["bytes"]).hexdigest()
    return os.path.getsize(raw["path"]) if raw["path"] and os.path.exists(raw["path"]) else None


def sum_up_map(value: dict | list | np.ndarray) -> str | int | None:
    """Of a map as it was stored, an image or an array."""
    if isinstance(value, dict):
        return sum_up_content(value)
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


__all__ = ["Columns", "find_columns", "join_texts", "sum_up_content"]

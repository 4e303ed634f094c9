"""Conventions of the annotations of a dataset: the values of masks, the unit of depth, the format of boxes.

A sample of the images is checked before work starts. Clear findings complete the options and are reported in a
sentence; a contradiction is an error with the name of a file and its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .annotations import default_format, reaches_out, read_frame, to_xyxy
from .decoding import open_file
from .maps import UNKNOWN_CLASS, decode_map, is_grey, read_class_numbers, voc_palette
from .options import BOX_FORMATS, DataOptions


if TYPE_CHECKING:
    from .sources import ImageSource, ImageStream


NUM_LOOKED_AT = 64  # images
_TOO_MANY = 0.05  # share of annotations that may contradict the options; those are named one by one when they are read
_MANY_CLASSES, _MOST_CLASSES = 200, 1024  # found in masks, from where they are doubtful, or refused
_FEW = 0.01  # share from which on pixels that do not count are mentioned


def check_annotations(sources: Sequence[ImageSource | ImageStream]) -> list:
    """Parts of one dataset, with options completed and notes added; without columns of annotations, as they are.

    Raises:
        ValueError: see `find_conventions`.
    """
    options = sources[0].options
    if not (options.maps or options.box_column):
        return list(sources)
    raws = [raw for source in sources for raw in source.spread(NUM_LOOKED_AT // len(sources))]
    options, notes = find_conventions(raws, options)
    return [source.with_options(options, notes) for source in sources]


def find_conventions(raws: Iterable[dict], options: DataOptions) -> tuple[DataOptions, tuple[str, ...]]:
    """Complete options by what the annotations of some images show.

    Args:
        raws: raw images with their annotations.
        options: as they were given.

    Returns:
        The options to read the annotations with, and sentences about conventions and about images that do not count.

    Raises:
        ValueError: annotations that contradict the options, with the name of an image and its values.
    """
    raws, notes = list(raws), []
    if options.mask_column:
        options = _look_at_masks(raws, options, notes)
    if options.depth_column:
        _look_at_depth(raws, options, notes)
    if options.box_column:
        options = _look_at_boxes(raws, options, notes)
    return options, tuple(notes)


# Masks -------------------------------------------------------------------------------------------------------------


def _look_at_masks(raws: Sequence[dict], options: DataOptions, notes: list[str]) -> DataOptions:
    stored = {}  # name -> values of a mask, or its colours (colours, 3)
    for raw in raws:
        values = _try_decode(raw, "mask")
        if values is None:
            continue
        if _is_jpeg(raw["maps"]["mask"]):
            raise ValueError(
                f"{raw['name']}: the mask is a JPEG file, whose compression changes class numbers: store masks as PNG"
            )
        is_number = values.ndim == 2
        stored[raw["name"]] = (
            np.unique(values) if is_number else np.unique(values.reshape(-1, values.shape[-1]), axis=0)
        )
    if not stored:
        return options  # each is named when it is read
    if all(values.ndim == 1 or is_grey(values) for values in stored.values()):
        stored = {name: values if values.ndim == 1 else values[:, 0] for name, values in stored.items()}
    if options.mask_format == "auto":
        options = _find_mask_format(stored, options, notes)
    _check_classes(stored, options, notes)
    return options


def _find_mask_format(stored: dict[str, np.ndarray], options: DataOptions, notes: list[str]) -> DataOptions:
    colours = {name: values[:, :3] for name, values in stored.items() if values.ndim == 2}
    if colours:
        known = {tuple(colour) for colour in voc_palette().tolist()}
        for name, values in colours.items():
            strange = [tuple(colour) for colour in values.tolist() if tuple(colour) not in known]
            if strange:
                raise ValueError(
                    f"{name}: the mask holds colours such as {strange[0]}, expected one class number for each pixel: "
                    "store masks as images of class numbers (mode L or P), or in the colours of Pascal VOC"
                )
        notes.append("masks hold colours, which were read as the classes of Pascal VOC (data.mask_format=voc)")
        return replace(options, mask_format="voc")
    values = set(np.unique(np.concatenate(list(stored.values()))).tolist())
    if values == {0, UNKNOWN_CLASS} and options.num_classes in (0, 2) and not options.reduce_labels:
        notes.append(
            f"the {len(stored)} sampled masks hold 0 and 255 only: they are read as two classes, 255 as class 1 "
            "(data.mask_format=classes: 255 is an unknown class)"
        )
        return replace(options, mask_format="binary")
    return options


def _check_classes(stored: dict[str, np.ndarray], options: DataOptions, notes: list[str]) -> None:
    wrong, seen = {}, set()
    for name, values in stored.items():
        try:
            shape = (1, -1) if values.ndim == 1 else (-1, 1, values.shape[-1])
            seen |= set(np.unique(read_class_numbers(values.reshape(shape), options)).tolist())
        except Exception as error:
            wrong[name] = error
    if len(wrong) > _TOO_MANY * len(stored):
        name, error = next(iter(wrong.items()))
        raise ValueError(
            f"{name}: the mask {error}. So do {len(wrong)} of {len(stored)} sampled masks: check the number of "
            "classes (settings.num_classes, data.num_classes) and data.reduce_labels"
        )
    seen -= {UNKNOWN_CLASS}
    if not seen:
        raise ValueError(
            f"{next(iter(stored))}: the mask has no pixel with a class, like all {len(stored)} sampled masks: 255 is "
            f"an unknown class{', and so is 0 with data.reduce_labels' if options.reduce_labels else ''}"
        )
    num_classes = options.num_classes or max(seen) + 1
    if 2 * len(seen) < num_classes and len(seen) <= 8:
        found = ", ".join(map(str, sorted(seen)))
        notes.append(f"the {len(stored)} sampled masks hold {len(seen)} of {num_classes} classes: {found}")
    elif len(seen) == 1:
        notes.append(f"the {len(stored)} sampled masks hold class {min(seen)} alone")
    if not options.num_classes and len(seen) >= _MANY_CLASSES:
        found = f"the {len(stored)} sampled masks hold {len(seen)} different numbers, from {min(seen)} to {max(seen)}"
        what = "numbers of objects, smooth edges and depths look like this"
        if num_classes > _MOST_CLASSES:
            raise ValueError(f"{next(iter(stored))}: {found}: {what}. Give data.num_classes if they are classes")
        notes.append(f"{found}, which are read as classes: {what} too (data.num_classes)")


def _is_jpeg(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    with Image.open(open_file({**value, "name": "the map"})) as image:
        return image.format == "JPEG"


# Depth -------------------------------------------------------------------------------------------------------------


def _look_at_depth(raws: Sequence[dict], options: DataOptions, notes: list[str]) -> None:
    depths = {raw["name"]: values for raw in raws if (values := _try_decode(raw, "depth")) is not None}
    depths = {name: values if values.ndim == 2 else values[..., 0] for name, values in depths.items()}
    depths = {name: values.ravel().astype(np.float64) for name, values in depths.items()}
    if not depths:
        return
    first, values = next(iter(depths)), np.concatenate(list(depths.values())) * options.depth_scale
    known = values[np.isfinite(values) & (values > 0)]
    what = f"the {len(depths)} sampled depth maps"
    if not len(known):
        raise ValueError(f"{first}: expected depths above 0, got none in {what}")
    if len(known) < (1 - _FEW) * len(values):
        notes.append(f"{1 - len(known) / len(values):.1%} of the pixels of {what} have no depth")
    is_far, median = (known > options.max_depth).mean(), float(np.median(known))
    limit = f"max_depth, {options.max_depth:g} m (median {median:.4g} m)"
    if is_far > 0.5:
        hint = "".join(
            f"; {unit} would be {scale:g} (median {median / options.depth_scale * scale:.3g} m)"
            for unit, scale in (("centimetres", 0.01), ("the 1/256 m of KITTI", 1 / 256), ("millimetres", 0.001))
            if options.max_depth / 100 < median / options.depth_scale * scale < options.max_depth
        )
        raise ValueError(
            f"{first}: {is_far:.1%} of the depths of {what} lie beyond {limit}: check depth_scale "
            f"({options.depth_scale:g} metres per stored unit{hint}), or raise max_depth"
        )
    if is_far > _FEW:
        notes.append(f"{is_far:.1%} of the depths of {what} lie beyond {limit} and are ignored")
    if median < options.max_depth / 1000:
        notes.append(f"half of the depths of {what} are below {median:.3g} m: check depth_scale")


# Boxes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Boxes:
    """Boxes (objects, 4) as they are stored, and the sizes (width, height) that their image may have."""

    rows: np.ndarray
    sizes: tuple[tuple[int, int], ...]
    default: str

    def count_wrong(self, box_format: str, whole: int | None) -> int:
        """Boxes that reach out of their image, or have no area."""
        boxes = to_xyxy(self.rows, box_format)
        sizes = [(whole, whole)] if whole else self.sizes
        is_out = [all(reaches_out(box[None], size) for size in sizes) for box in boxes]
        return int((np.array(is_out, dtype=bool) | (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)).sum())


def _look_at_boxes(raws: Sequence[dict], options: DataOptions, notes: list[str]) -> DataOptions:
    found = [boxes for raw in raws if (boxes := _stored_boxes(raw)) is not None and len(boxes.rows)]
    if not found:
        return options
    highest = max(float(boxes.rows.max()) for boxes in found)
    shortest = min(min(boxes.sizes[0]) for boxes in found)
    for name, whole, is_likely in (
        ("relative", 1, shortest > 2),
        ("percent", 100, len(found) >= 4 and shortest > 200),
    ):
        if options.box_units == "auto" and 0 < highest <= whole and is_likely:
            options = replace(options, box_units=name)
            notes.append(
                f"no coordinate of a box is above {whole}: boxes are read as "
                f"{'fractions' if whole == 1 else 'percentages'} of width and height (data.box_units)"
            )
    total = sum(len(boxes.rows) for boxes in found)
    wrong = {
        name: sum(boxes.count_wrong(boxes.default if name == "auto" else name, options.box_whole) for boxes in found)
        for name in BOX_FORMATS
    }
    if options.box_format == "auto" and wrong["auto"] > _TOO_MANY * total:
        better = [name for name in BOX_FORMATS[1:] if not wrong[name]]
        if better:
            notes.append(
                f"boxes are read as {better[0]}: as {found[0].default}, {wrong['auto']} of {total} sampled boxes "
                "leave their image or have no area (data.box_format)"
            )
            return replace(options, box_format=better[0])
    elif options.box_format == "auto" and found[0].default == "xywh" and total >= 16 and not wrong["xyxy"]:
        notes.append(f"boxes are read as xywh, but all {total} sampled boxes fit xyxy too (data.box_format=xyxy)")
    return options


def _stored_boxes(raw: dict) -> _Boxes | None:
    """Boxes of a raw image whose header can be read; None where there are none."""
    cell = raw.get("boxes")
    if cell is None:
        return None
    rows = cell if isinstance(cell, list) else cell.get("bbox", []) if isinstance(cell, dict) else []
    rows = [row.get("bbox") if isinstance(row, dict) else row for row in rows]
    try:
        rows = np.array([row for row in rows if row is not None], dtype=np.float64).reshape(-1, 4)
        orientation, stored = read_frame(raw)
    except Exception:  # the error is reported when the image is read
        return None
    rows = rows[np.isfinite(rows).all(axis=1)]
    stated = raw.get("annotated_size")
    sizes = [stated] if stated else [stored, stored[::-1]] if orientation >= 5 else [stored]
    return _Boxes(rows, tuple(sizes), default_format(cell))


def _try_decode(raw: dict, kind: str) -> np.ndarray | None:
    """Stored values of a map; None for one that is missing or broken, which is named when it is read."""
    try:
        return decode_map(raw["maps"][kind])
    except Exception:
        return None

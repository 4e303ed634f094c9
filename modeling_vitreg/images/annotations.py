"""An image with its annotations, each compared with the image: label, mask, depth, boxes.

Annotations are often made on another copy of an image: before its EXIF turn, at another resolution, with relative
coordinates. Where sizes decide, the annotation is brought to the pixels of the decoded image, and a note says so.
Where an annotation contradicts its image, the image is unreadable, with its name and the values. What holds for a
whole dataset, such as the format of its boxes, is found by `conventions`.

| a cell of a column of boxes | a box, unless `box_format` says otherwise |
| --- | --- |
| {"bbox": [[x, y, width, height], ...], ...} | xywh, as COCO and most datasets of the Hub have it |
| [{"bbox": [x, y, width, height], ...}, ...] | the same |
| [[xmin, ymin, xmax, ymax], ...] | xyxy |

Boxes are in pixels, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .decoding import UnreadableImage, decode_image, open_file
from .maps import Contradiction, read_class_numbers, read_depth
from .options import DataOptions


_ORIENTATION = 0x0112  # EXIF tag
_SLACK = 0.05  # share of the sides of an image by which a box may reach beyond it
_SAME_ASPECT = 0.02  # relative difference of aspect ratios that rounding explains

TURNED = "the annotation was made before the EXIF rotation of the image, and was rotated with it"
UNCLEAR = (
    "the EXIF orientation rotates the image, and its size does not show whether the annotation was made before or "
    "after; after was assumed (otherwise: data.annotation_frame=stored)"
)
RESIZED = "a map of another resolution was resized to its image"
SCALED = "boxes of another resolution were scaled to their image"
DROPPED = "boxes without area, or with a value that is not finite, were left out"
CROWDS = "boxes of crowds were left out"


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """A decoded image and what is known about it; None for what is not annotated.

    Args:
        name: for messages and reports.
        image: upright; RGB unless other channels are asked for.
        label: class number.
        mask: class numbers, int32 (height, width), 255 where the class is unknown.
        depth: metres, float32 (height, width), 0 where the depth is unknown.
        boxes: xyxy in pixels of the image, float64 (objects, 4); (0, 4): the image has no object.
        notes: what was changed to bring annotation and image together.
    """

    name: str
    image: Image.Image
    label: int | None = None
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None
    boxes: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """Mask and depth, those that are there."""
        return {kind: value for kind in ("mask", "depth") if (value := getattr(self, kind)) is not None}


def read_annotated(raw: dict, *, num_channels: int = 3) -> AnnotatedImage:
    """Decode a raw image and its annotations.

    Args:
        raw: from a source that was opened with columns of annotations; without them there is only a label.
        num_channels: of the decoded image, 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        UnreadableImage: the image or a map is broken, or an annotation contradicts the image.
        ValueError: the column of boxes holds something else.
    """
    image, name = decode_image(raw, num_channels=num_channels), raw["name"]
    if not raw.get("maps") and raw.get("boxes") is None:
        return AnnotatedImage(name, image, raw["label"])
    options, notes = raw["options"], []
    frame = _Frame(raw, image.size, options.annotation_frame)
    found = {}
    for kind, value in raw.get("maps", {}).items():
        try:
            values = read_class_numbers(value, options) if kind == "mask" else read_depth(value, options, notes)
            found[kind] = frame.fit_map(values, notes)
        except Contradiction as problem:
            raise UnreadableImage(name, f"{kind} {problem}") from None
        except Exception as error:  # see `decode_image`
            raise UnreadableImage(name, f"{kind}: {type(error).__name__}: {error}") from error
    if raw.get("boxes") is not None:
        boxes = read_boxes(raw["boxes"], options, notes)
        try:
            found["boxes"] = frame.fit_boxes(boxes, raw.get("annotated_size"), options, notes)
        except Contradiction as problem:
            raise UnreadableImage(name, str(problem)) from None
    return AnnotatedImage(name, image, raw["label"], **found, notes=tuple(dict.fromkeys(notes)))


class NoteCounter:
    """Notes of images, counted; `counts` is JSON: note -> [number of images, name of the first]."""

    def __init__(self):
        self.counts: dict[str, list] = {}

    def add(self, name: str, notes: Sequence[str], *, number: int = 1) -> None:
        """Count the notes of an image, or of several of which this is the first."""
        for note in notes:
            self.counts.setdefault(note, [0, name])[0] += number

    def merge(self, counts: dict[str, list]) -> None:
        """Add the counts of other images."""
        for note, (number, name) in counts.items():
            self.add(name, [note], number=number)

    def lines(self, num_images: int) -> list[str]:
        """A sentence for each note, with its share of all images."""
        return [
            f"{number} of {num_images} images ({number / max(num_images, 1):.1%}, the first {name}): {note}"
            for note, (number, name) in self.counts.items()
        ]


class _Frame:
    """The pixels of a decoded image, and of its file before the EXIF turn.

    Args:
        raw: the image.
        size: (width, height) of the decoded image.
        choice: `DataOptions.annotation_frame`.
    """

    def __init__(self, raw: dict, size: tuple[int, int], choice: str):
        self.size, self.choice = size, choice
        self.orientation, self.stored_size = read_frame(raw)

    def fit_map(self, values: np.ndarray, notes: list[str]) -> np.ndarray:
        """A map (rows, columns) as large as the decoded image."""
        if values.ndim != 2:
            raise Contradiction(f"of shape {values.shape}, expected (rows, columns)")
        if self._is_stored(values.shape[::-1], notes):
            values = turn_map(values, self.orientation)
        if values.shape != self.size[::-1]:
            if not _has_aspect(values.shape[::-1], self.size):
                raise Contradiction(f"of shape {values.shape} for an image of {self.size[::-1]} pixels")
            notes.append(RESIZED)
            values = np.asarray(Image.fromarray(values).resize(self.size, Image.Resampling.NEAREST))
        return values

    def fit_boxes(
        self, boxes: np.ndarray, size: tuple[int, int] | None, options: DataOptions, notes: list[str]
    ) -> np.ndarray:
        """Boxes (objects, 4), xyxy, in pixels of the decoded image.

        Args:
            boxes: in pixels of an image of `size`, or in shares of its sides.
            size: (width, height) that the annotation states; None: unknown.
            options: units of the boxes.
            notes: grows.
        """
        whole = options.box_whole
        if size or not len(boxes):
            is_stored = self._is_stored(size or self.size, notes) if len(boxes) else False
        else:
            fits = (bool(whole) or not reaches_out(boxes, own) for own in (self.stored_size, self.size))
            is_stored = self._decide(*fits, notes)
        target = self.stored_size if is_stored else self.size
        stated = size or target
        if whole:
            boxes = boxes * np.tile(target, 2) / whole
        elif tuple(stated) != tuple(target) and len(boxes):
            if not _has_aspect(stated, target):
                raise Contradiction(
                    f"the annotation is for an image of {stated[0]} x {stated[1]} pixels, the image has "
                    f"{self.size[0]} x {self.size[1]}"
                )
            notes.append(SCALED)
            boxes = boxes * np.tile(np.divide(target, stated), 2)
        if reaches_out(boxes, target):
            raise Contradiction(
                f"a box reaches from {boxes[:, :2].min(axis=0).tolist()} to {boxes[:, 2:].max(axis=0).tolist()} in an "
                f"image of {target[0]} x {target[1]} pixels, beyond its edges: data.box_format may be wrong"
            )
        return turn_boxes(boxes, self.stored_size, self.orientation) if is_stored else boxes

    def _is_stored(self, size: Sequence[int], notes: list[str]) -> bool:
        """Whether an annotation of this size was made before the turn; equal sizes tell more than equal ratios."""
        for fits in (lambda own: tuple(size) == tuple(own), lambda own: _has_aspect(size, own)):
            if fits(self.stored_size) or fits(self.size):
                return self._decide(fits(self.stored_size), fits(self.size), notes)
        return self._decide(False, False, notes)

    def _decide(self, fits_stored: bool, fits_upright: bool, notes: list[str]) -> bool:
        if self.orientation == 1 or self.choice == "upright":
            return False
        if self.choice == "auto" and fits_stored:
            notes.append(UNCLEAR if fits_upright else TURNED)
        return self.choice == "stored" or (fits_stored and not fits_upright)


def read_frame(raw: dict) -> tuple[int, tuple[int, int]]:
    """EXIF orientation, 1 to 8, and (width, height) of the pixels as they are stored; only the header is read."""
    with Image.open(open_file(raw)) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return orientation if orientation in range(1, 9) else 1, image.size


def turn_map(values: np.ndarray, orientation: int) -> np.ndarray:
    """A map (rows, columns) turned as EXIF turns an image."""
    values = {2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 7: values[::-1, ::-1]}.get(
        orientation, values
    )
    if orientation in (5, 7):
        values = values.T
    elif orientation in (6, 8):
        values = np.rot90(values, -1 if orientation == 6 else 1)
    return np.ascontiguousarray(values)


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Boxes (objects, 4) in an image of (width, height) turned as EXIF turns the image."""
    (left, top, right, bottom), (width, height) = boxes.T, size
    if orientation in (2, 3):
        left, right = width - right, width - left
    if orientation in (3, 4):
        top, bottom = height - bottom, height - top
    if orientation in (6, 7):
        top, bottom = height - bottom, height - top
    if orientation in (7, 8):
        left, right = width - right, width - left
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    return np.stack([left, top, right, bottom], axis=1)


def reaches_out(boxes: np.ndarray, size: Sequence[int]) -> bool:
    """Whether a box (xyxy) reaches beyond an image of (width, height) by more than rounding explains."""
    limit = np.tile(size, 2) * _SLACK
    return bool((boxes < -limit).any() or (boxes > np.tile(size, 2) + limit).any())


def read_boxes(cell: dict | list, options: DataOptions, notes: list[str]) -> np.ndarray:
    """Boxes (objects, 4) of a cell, xyxy in its own units, without crowds and boxes that have no area.

    As in LOST, the corners of boxes with width and height in pixels are rounded to whole pixels.

    Args:
        cell: boxes of one image; see the table above.
        options: `box_format` and `box_units`.
        notes: grows.

    Raises:
        ValueError: the cell holds something else.
    """
    is_plain = isinstance(cell, list) and not any(isinstance(entry, dict) for entry in cell)
    try:
        rows = cell if is_plain else cell["bbox"] if isinstance(cell, dict) else [entry["bbox"] for entry in cell]
        crowds = (
            []
            if is_plain
            else cell.get("iscrowd")
            if isinstance(cell, dict)
            else [entry.get("iscrowd") for entry in cell]
        )
        is_crowd = [bool(mark) for mark in crowds or []] or [False] * len(rows)
        known = [row for row, is_left_out in zip(rows, is_crowd, strict=True) if row is not None and not is_left_out]
        boxes = np.array(known, dtype=np.float64).reshape(-1, 4)
        if len(boxes) != len(known):
            raise ValueError("a box has four numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found = sorted(cell) if isinstance(cell, dict) else type(cell).__name__
        raise ValueError(
            'expected boxes as {"bbox": [[x, y, width, height], ...]} or [[xmin, ymin, xmax, ymax], ...], got '
            f"{found}: {type(error).__name__}: {error}"
        ) from error
    box_format = default_format(cell) if options.box_format == "auto" else options.box_format
    boxes = to_xyxy(boxes, box_format)
    if box_format != "xyxy" and options.box_whole is None:
        boxes = boxes.round()
    has_area = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    notes += [CROWDS] * any(is_crowd) + [DROPPED] * (not has_area.all() or len(known) + sum(is_crowd) < len(rows))
    return boxes[has_area]


def default_format(cell: dict | list) -> str:
    """Format of the boxes of a cell, unless something else is known; see the table above."""
    return "xyxy" if isinstance(cell, list) and not any(isinstance(entry, dict) for entry in cell) else "xywh"


def to_xyxy(boxes: np.ndarray, box_format: str) -> np.ndarray:
    """Boxes (objects, 4) of a format as xyxy."""
    if box_format == "xyxy":
        return boxes
    starts = boxes[:, :2] - boxes[:, 2:] / 2 if box_format == "cxcywh" else boxes[:, :2]
    return np.concatenate([starts, starts + boxes[:, 2:]], axis=1)


def _has_aspect(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes (width, height) have one aspect ratio, up to rounding."""
    first, second = size[0] * other[1], size[1] * other[0]
    return abs(first - second) <= _SAME_ASPECT * max(first, second)

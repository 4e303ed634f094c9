"""Images with the boxes of their objects: COCO, Pascal VOC, a column of a dataset, rendered scenes; or without any.

| a cell of a column of boxes | a box |
| --- | --- |
| {"bbox": [[x, y, width, height], ...], ...} | of COCO, as in most datasets of the Hub |
| [{"bbox": [x, y, width, height], ...}, ...] | the same |
| [[xmin, ymin, xmax, ymax], ...] | its corners, as in rendered scenes |

All are in pixels, x to the right and y down. Where a dataset holds the other kind, `box_format` says so.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from modeling_vitreg.images import ImageSource, UnreadableImage, decode_image
from modeling_vitreg.images.options import BOX_FORMATS
from modeling_vitreg.scenes import SceneSettings, render_scene


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image with the boxes of its objects.

    Args:
        name: for reports.
        image: a PIL image, the path of one, or a function that makes one when it is needed.
        boxes: (objects, 4) in pixels; none where there is no object, and None where nobody has looked.
    """

    name: str
    image: Image.Image | str | os.PathLike | Callable[[], Image.Image]
    boxes: np.ndarray | None = None

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            UnreadableImage: of `modeling_vitreg.images`; the file is missing or broken, or the image has no pixel.
        """
        if isinstance(self.image, (str, os.PathLike)):
            return decode_image({"bytes": None, "path": os.fspath(self.image), "label": None, "name": self.name})
        image = self.image if isinstance(self.image, Image.Image) else self.image()
        if not image.width or not image.height:
            raise UnreadableImage(self.name, f"an image of {image.width} x {image.height} pixels")
        return image.convert("RGB")


def read_coco(annotations: str | os.PathLike, images: str | os.PathLike) -> list[AnnotatedImage]:
    """Images and boxes of a file of instances in the format of COCO, in the order of the file.

    As in LOST, crowds are left out and corners are rounded to whole pixels. Images without boxes are kept.

    Args:
        annotations: the JSON file.
        images: folder of the images.

    Raises:
        ValueError: the file is no JSON, or lacks `images`, `annotations`, a field of them, or an image of a box.
    """
    try:
        content = json.loads(pathlib.Path(annotations).read_text(encoding="utf-8"))
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
        boxes = {number: [] for number in names}
        for entry in content["annotations"]:
            if not entry.get("iscrowd", 0):
                left, top, width, height = entry["bbox"]
                boxes[entry["image_id"]].append([left, top, left + width, top + height])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{annotations}: expected a COCO file of instances; {type(error).__name__}: {error}"
        ) from error
    folder = pathlib.Path(images)
    return [AnnotatedImage(name, folder / name, _as_boxes(boxes[number]).round()) for number, name in names.items()]


def read_voc(
    annotations: str | os.PathLike, images: str | os.PathLike, *, has_hard: bool = True
) -> list[AnnotatedImage]:
    """Images and boxes of a folder of XML files in the format of Pascal VOC, sorted by name.

    VOC counts pixels from 1: the upper left corner is moved by one pixel, as in LOST.

    Args:
        annotations: folder of the XML files.
        images: folder of the images.
        has_hard: keep objects that are marked difficult or truncated; without them, images may have no box.

    Raises:
        ValueError: no XML file, or one that is no annotation.
    """
    paths = sorted(pathlib.Path(annotations).glob("*.xml"))
    if not paths:
        raise ValueError(f"{annotations}: expected a folder of XML files, got none")
    return [_read_voc_file(path, pathlib.Path(images), has_hard) for path in paths]


def read_annotations(annotations: str | os.PathLike, images: str | os.PathLike) -> list[AnnotatedImage]:
    """Images and boxes of a COCO file, which ends in .json, or else of a folder of VOC; arguments as in both."""
    read = read_coco if pathlib.Path(annotations).suffix == ".json" else read_voc
    return read(annotations, images)


def read_cell(cell: dict | list | None, *, box_format: str = "auto") -> np.ndarray | None:
    """Boxes (objects, 4) by their corners, of a cell of a column; see the table above.

    Like those of COCO, boxes with width and height have their corners rounded to whole pixels.

    Args:
        cell: of one image; None: nobody has looked.
        box_format: "xyxy", "xywh" or "cxcywh"; "auto": as in the table.

    Raises:
        ValueError: the cell holds something else, or there is no such format.
    """
    if cell is None:
        return None
    if box_format not in BOX_FORMATS:
        raise ValueError(f"expected box_format {', '.join(BOX_FORMATS)}, got {box_format!r}")
    is_plain = isinstance(cell, list) and not any(isinstance(entry, dict) for entry in cell)
    try:
        rows = cell if is_plain else cell["bbox"] if isinstance(cell, dict) else [entry["bbox"] for entry in cell]
        boxes = _as_boxes(rows)
        if len(boxes) != len(rows):
            raise ValueError("a box has four numbers")
    except (KeyError, TypeError, ValueError) as error:
        found = sorted(cell) if isinstance(cell, dict) else type(cell).__name__
        raise ValueError(
            'expected boxes as {"bbox": [[x, y, width, height], ...]} or [[xmin, ymin, xmax, ymax], ...], got '
            f"{found}: {type(error).__name__}: {error}"
        ) from error
    if box_format == "auto":
        box_format = "xyxy" if is_plain else "xywh"
    if box_format == "xyxy":
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError(f"expected boxes by their corners, got {rows[0]}: is the format xywh?")
        return boxes
    starts = boxes[:, :2] - boxes[:, 2:] / 2 if box_format == "cxcywh" else boxes[:, :2]
    return np.concatenate([starts, starts + boxes[:, 2:]], axis=1).round()


def read_scenes(indices: Sequence[int], *, settings: SceneSettings | None = None) -> list[AnnotatedImage]:
    """Rendered scenes with their exact boxes; each is rendered now, for its boxes, and again when it is opened."""
    settings = settings or SceneSettings()
    return [
        AnnotatedImage(f"scene {index}", functools.partial(_render, index, settings), _scene_boxes(index, settings))
        for index in indices
    ]


def read_source(source: ImageSource) -> list[AnnotatedImage]:
    """Images of `modeling_vitreg.images.open_images`, whose boxes nobody knows; opened one by one."""
    return [
        AnnotatedImage(source.name_of(index), functools.partial(_read, source, index)) for index in range(len(source))
    ]


def _read_voc_file(path: pathlib.Path, images: pathlib.Path, has_hard: bool) -> AnnotatedImage:
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
        objects = [
            [float(entry.find("bndbox").findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            for entry in root.iter("object")
            if has_hard or not any(entry.findtext(mark) == "1" for mark in ("difficult", "truncated"))
        ]
    except (xml.etree.ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected an annotation of Pascal VOC; {type(error).__name__}: {error}") from error
    name = root.findtext("filename") or f"{path.stem}.jpg"
    return AnnotatedImage(name, images / name, _as_boxes(objects) - [1, 1, 0, 0])


def _as_boxes(boxes: list) -> np.ndarray:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _render(index: int, settings: SceneSettings) -> Image.Image:
    return Image.fromarray(render_scene(index, settings=settings).image)


def _scene_boxes(index: int, settings: SceneSettings) -> np.ndarray:
    return render_scene(index, settings=settings).boxes.astype(np.float64)


def _read(source: ImageSource, index: int) -> Image.Image:
    return source.read(index)[0]


__all__ = [
    "AnnotatedImage",
    "read_annotations",
    "read_cell",
    "read_coco",
    "read_scenes",
    "read_source",
    "read_voc",
]

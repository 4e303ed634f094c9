"""Boxes of images in a folder, from files beside it: one COCO file, or a folder of Pascal VOC files."""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import re
import unicodedata
import xml.etree.ElementTree
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from .messages import list_names


if TYPE_CHECKING:
    import datasets


_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class _Entry:
    """Annotations of one image: boxes as the file has them, and (width, height) that it states.

    `stem` is the name of a VOC file without its suffix, which is right more often than the name written in it.
    """

    name: str
    size: tuple[int, int] | None = None
    boxes: list = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    stem: str = ""


def open_annotation_files(
    annotations: str | os.PathLike, images: str | os.PathLike, *, keep_difficult: bool = True
) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """A dataset with the columns `image`, `boxes`, `categories` (lists), `width` and `height`, in their order.

    Images that the annotations name and the folder lacks stay: reading them says so. An image without boxes stays too.

    Args:
        annotations: a COCO file (.json), or a folder of VOC files (.xml).
        images: folder of the images.
        keep_difficult: see `DataOptions`.

    Returns:
        The dataset, and sentences about what was corrected or left out.

    Raises:
        ValueError: no such file or folder, no annotations, or a name that leads out of the folder of the images.
    """
    import datasets

    annotations, folder = pathlib.Path(annotations), pathlib.Path(images)
    for path, is_there in ((annotations, annotations.exists()), (folder, folder.is_dir())):
        if not is_there:
            raise ValueError(f"{path}: no such {'folder of images' if path is folder else 'file of annotations'}")
    is_voc = annotations.is_dir()
    entries, notes, names = _read_voc(annotations, keep_difficult) if is_voc else _read_coco(annotations)
    files = _Files(folder)
    by_path = collections.defaultdict(list)
    for entry in entries:
        by_path[files.find(entry.name, entry.stem, source=annotations)].append(entry)
    content = collections.defaultdict(list)
    for path, own in by_path.items():
        boxes, crowds = ([item for entry in own for item in getattr(entry, name)] for name in ("boxes", "crowds"))
        width, height = next((entry.size for entry in own if entry.size), (None, None))
        cell = boxes if is_voc else {"bbox": boxes, "iscrowd": crowds}
        categories = list(dict.fromkeys(names.index(name) for entry in own for name in entry.categories))
        row = {"image": path, "boxes": cell, "categories": categories, "width": width, "height": height}
        for name, value in row.items():
            content[name].append(value)
    boxes = datasets.List(datasets.List(datasets.Value("float64"), length=4))
    cell = boxes if is_voc else {"bbox": boxes, "iscrowd": datasets.List(datasets.Value("bool"))}
    sides = {name: datasets.Value("int64") for name in ("width", "height")}
    classes = datasets.List(datasets.ClassLabel(names=names) if names else datasets.Value("int64"))
    features = datasets.Features({"image": datasets.Image(), "boxes": cell, "categories": classes, **sides})
    dataset = datasets.Dataset.from_dict(dict(content), features=features)
    return dataset, (*notes, *files.notes(by_path, num_entries=len(entries), source=annotations))


def _read_coco(path: pathlib.Path) -> tuple[list[_Entry], list[str], list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows put a mark in front
        if not isinstance(content, dict):
            raise ValueError(f"got a {type(content).__name__}, expected an object with 'images' and 'annotations'")
        entries: dict[str, _Entry] = {}
        for image in content["images"]:
            name, key = str(image["file_name"]), _key_of(image["id"])
            if (known := entries.setdefault(key, _Entry(name, _size_of(image)))).name != name:
                raise ValueError(f"the image id {key} stands for {known.name!r} and {name!r}")
        annotations, classes = content["annotations"], content.get("categories") or []
        names = {category["id"]: str(category.get("name", category["id"])) for category in classes}
        strays, missing = [], []
        for number, annotation in enumerate(annotations):
            entry, box = entries.get(_key_of(annotation["image_id"])), annotation.get("bbox")
            if entry is None:
                strays.append(annotation["image_id"])
                continue
            if annotation.get("category_id") in names:
                entry.categories.append(names[annotation["category_id"]])
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
                missing.append(annotation.get("id", number))
            else:
                entry.boxes.append(list(map(float, box)))
                entry.crowds.append(bool(annotation.get("iscrowd", 0)))
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a COCO file of instances; {type(error).__name__}: {error}") from error
    total, notes = len(annotations), []
    if total and len(strays) + len(missing) == total:
        raise ValueError(
            f"{path}: expected annotations with a bbox of four numbers and an image_id of images, got none: "
            f"of {total}, {len(strays)} name no image ({_first(strays)}), {len(missing)} have no such bbox "
            f"(id {_first(missing)})"
        )
    if strays:
        notes.append(f"{_share(strays, total, 'annotations')} name no image of {path.name}: image_id {_first(strays)}")
    if missing:
        notes.append(f"{_share(missing, total, 'annotations')} have no bbox of four numbers: id {_first(missing)}")
    if num_crowds := sum(sum(entry.crowds) for entry in entries.values()):
        notes.append(f"{num_crowds} of {total} boxes are of crowds and left out, as in LOST")
    return list(entries.values()), notes, list(dict.fromkeys(names.values()))


def _read_voc(folder: pathlib.Path, keep_difficult: bool) -> tuple[list[_Entry], list[str], list[str]]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".xml")
    if not paths:
        raise ValueError(f"{folder}: expected a folder of XML files, got none")
    found, broken, swapped = [], [], []
    for path in paths:
        try:
            entry = _read_voc_file(path, keep_difficult)
            upright = [[*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])] for box in entry.boxes]
            swapped += [path.name] * (upright != entry.boxes)
            entry.boxes = upright
            found.append(entry)
        except (xml.etree.ElementTree.ParseError, AttributeError, OverflowError, TypeError, ValueError) as error:
            broken.append(f"{path.name} ({type(error).__name__}: {error})")
    if not found:
        raise ValueError(f"{folder}: expected annotations of Pascal VOC, got none that can be read: {broken[0]}")
    notes = [f"{_share(broken, len(paths), 'files')} are not Pascal VOC annotations: {_first(broken)}"] * bool(broken)
    if swapped:
        notes.append(
            f"{_share(swapped, len(paths), 'files')} have boxes with xmin > xmax or ymin > ymax, which were "
            f"swapped: {_first(swapped)}"
        )
    # VOC counts pixels from 1; many tools that write its format count from 0, and then some box touches 0.
    first = min((min(box[:2]) for entry in found for box in entry.boxes), default=1)
    if first < 1:
        notes.append(f"boxes count pixels from 0, not from 1 as Pascal VOC does: the smallest coordinate is {first:g}")
    shift = 1 if first >= 1 else 0
    for entry in found:
        entry.boxes = [[left - shift, top - shift, right, bottom] for left, top, right, bottom in entry.boxes]
    return found, notes, sorted({name for entry in found for name in entry.categories})


def _read_voc_file(path: pathlib.Path, keep_difficult: bool) -> _Entry:
    root = xml.etree.ElementTree.parse(path).getroot()
    if root.tag != "annotation":
        raise ValueError(f"the root is <{root.tag}>, not <annotation>")
    objects = [
        item
        for item in root.iter("object")
        if keep_difficult or not any(item.findtext(mark) == "1" for mark in ("difficult", "truncated"))
    ]
    boxes = [[float(item.find("bndbox").findtext(side)) for side in _SIDES] for item in objects]
    categories = [text for item in objects if (text := (item.findtext("name") or "").strip())]
    sizes = {name: root.findtext(f"size/{name}") for name in ("width", "height")}
    name = (root.findtext("filename") or "").strip()
    return _Entry(name or path.stem, _size_of(sizes), boxes, categories=categories, stem=path.stem)


def _size_of(sizes: dict) -> tuple[int, int] | None:
    """(width, height) that a file states; tools that do not know it write 0 or nothing."""
    width, height = (int(float(sizes.get(name) or 0)) for name in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None


class _Files:
    """The images of a folder, found by the names that annotations give them."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self._changed, self._missing = folder, [], []

    @functools.cached_property
    def _paths(self) -> list[pathlib.Path]:
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        return [
            pathlib.Path(parent, name)
            for parent, folders, names in os.walk(self.folder, followlinks=True)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")
        ]

    @functools.cached_property
    def _by_name(self) -> dict[str, list[pathlib.Path]]:
        found = collections.defaultdict(list)
        for path in self._paths:
            found[_plain(path.name)].append(path)
            found[_plain(path.stem)].append(path)
        return found

    def find(self, name: str, stem: str = "", *, source: pathlib.Path) -> str:
        """Path of an image: as it is named, else the only one of this name in another folder or without its suffix.

        Raises:
            ValueError: the name leads out of the folder.
        """
        parts = pathlib.PurePosixPath(name.replace("\\", "/"))
        is_absolute = parts.is_absolute() or re.match(r"[A-Za-z]:/", str(parts)) is not None
        path = self.folder / parts.name if is_absolute else self.folder / parts
        leads_out = ".." in parts.parts or not parts.name
        if not leads_out and path.is_file():
            self._changed += [name] * is_absolute
            return os.fspath(path)
        near = self._by_name.get(_plain(parts.name)) or self._by_name.get(_plain(parts.stem))
        near = near or self._by_name.get(_plain(stem), [])
        if leads_out or (is_absolute and not near):
            raise ValueError(
                f"{source}: the image {name!r} points outside its folder {str(self.folder)!r}: name images by their "
                "path in this folder"
            )
        if len(near) == 1:
            self._changed.append(f"{name} is {near[0].relative_to(self.folder)}")
            return os.fspath(near[0])
        self._missing.append(name)
        return os.fspath(path)

    def notes(self, found: dict[str, list[_Entry]], *, num_entries: int, source: pathlib.Path) -> list[str]:
        """Sentences about names that were corrected, missing images, and images that no annotation names."""
        notes, doubles = [], [own[0].name for own in found.values() if len(own) > 1]
        if self._changed:
            share = _share(self._changed, num_entries, "names of images")
            notes.append(f"{share} were found with another suffix or folder: {_first(self._changed)}")
        if self._missing:
            share = _share(self._missing, num_entries, "annotated images")
            notes.append(f"{share} do not exist in {self.folder}: {_first(self._missing)}")
        if doubles:
            notes.append(f"{len(doubles)} images have several entries, whose boxes were joined: {_first(doubles)}")
        known = {os.path.normpath(path) for path in found}
        others = [path.name for path in self._paths if os.path.normpath(path) not in known]
        if others:
            share = _share(others, len(self._paths), "images")
            notes.append(
                f"{share} in {self.folder} have no annotation in {source.name} and are left out: {_first(others)}"
            )
        return notes


def _key_of(number: object) -> str:
    """An id as text: spreadsheets write 7 as 7.0, and some files as "7"."""
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _plain(name: str) -> str:
    """A name without the differences that copies between file systems make: case, and how accents are stored."""
    return unicodedata.normalize("NFC", name).lower()


def _share(part: list, total: int, what: str) -> str:
    return f"{len(part)} of {total} {what} ({len(part) / total:.1%})"


def _first(values: list) -> str:
    return list_names(values[:1]) + (" ..." if len(values) > 1 else "")

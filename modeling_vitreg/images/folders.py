"""A folder of images with its splits and classes, of shards, or of a dataset."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from .messages import choose_split, list_names
from .metadata import METADATA, holds_images, list_files, names_images, plain_path, read_metadata, read_table
from .opened import OpenedDataset
from .shards import names_shards, open_shards


if TYPE_CHECKING:
    import datasets


_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_DISK_SHARDS = 64  # of a stream over a dataset that is on disk
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__")
_TEXTS = (".md", ".txt", ".json", ".xml", ".yaml", ".yml", ".html", ".log", ".py")


def open_folder(folder: pathlib.Path, *, split: str, is_streaming: bool) -> OpenedDataset:
    """Open a folder by what it holds: a saved dataset, shards, parquet or arrow files, or images.

    Images in a folder without metadata: `train`, `validation` and `test` are splits; the folders in a split are
    classes, as for torchvision's `ImageFolder`. Folders that hold only one folder are passed through.

    Raises:
        ValueError: there is nothing of the kind, or no such split.
    """
    import datasets

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(plain_path(folder))
        saved = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        files = sorted(str(path) for path in folder.rglob("*.arrow"))
        return _choose(saved, split, folder, is_streaming, files=files)
    files, notes = _list_files(folder)
    images = [path for suffix, paths in files.items() if suffix in _image_suffixes() for path in paths]
    if shards := [path for paths in files.values() for path in paths if names_shards(path.lower())]:
        parts = _split_shards(folder, shards)
        opened = open_shards(choose_split(parts, split, source=str(folder)), split=split)
        return dataclasses.replace(opened, notes=[*opened.notes, *_leave_out(images, "images", "shards")])
    tables = files[".parquet"] + files[".arrow"]
    if images:
        tables = [path for path in tables if os.path.basename(path) not in METADATA]
        others = [] if any(map(holds_images, tables)) else tables
        tables = [] if others else tables
        notes += _leave_out(others, "tables without images", "images")
    if tables:
        notes = _leave_out(images, "images", "tables")
        if not any("::" in os.path.realpath(path) for path in tables):
            splits = datasets.load_dataset(str(folder.resolve()), streaming=is_streaming)
            return OpenedDataset(choose_split(splits, split, source=str(folder)), tables, splits=splits, notes=notes)
        splits = {name: read_table(paths) for name, paths in _split_shards(folder, tables).items()}
        return _choose(splits, split, folder, is_streaming, files=tables, notes=notes)
    if not images:
        found = ", ".join(f"{len(paths)} {suffix or 'without suffix'}" for suffix, paths in files.items() if paths)
        raise ValueError(
            f"open_images: expected images, .tar shards or parquet files in the folder {str(folder)!r}, got "
            f"{found or 'no files'}. Give the folder above the class folders or above the images."
        )
    notes += _unknown_files(files, len(images))
    metadata = [path for paths in files.values() for path in paths if os.path.basename(path) in METADATA]
    foreign = [path for path in metadata if not names_images(path)]
    notes += [f"{path} has no column file_name, or is not UTF-8, and was not read" for path in foreign]
    parts = _find_splits(folder, images)
    if split not in parts:
        choose_split(parts, split, source=str(folder))
    if len(metadata) > len(foreign):
        splits, more = _read_metadata(parts, [path for path in metadata if path not in foreign], images)
        return _choose(splits, split, folder, is_streaming, files=images, notes=notes + more)
    splits, origin, more = _read_class_folders(parts, images)
    notes += more.get(split, [])
    return _choose(splits, split, folder, is_streaming, files=images, label_origin=origin, notes=notes)


def _choose(splits: dict, split: str, folder: pathlib.Path, is_streaming: bool, *, files: list, **facts):
    dataset = choose_split(splits, split, source=str(folder))
    if not is_streaming:
        return OpenedDataset(dataset, splits=splits, **facts)
    stream = dataset.to_iterable_dataset(num_shards=max(1, min(_DISK_SHARDS, len(dataset))))
    return OpenedDataset(stream, files, **facts)


def _list_files(folder: pathlib.Path) -> tuple[dict[str, list[str]], list[str]]:
    """Sorted paths of the files below a folder by suffix, hidden ones left out, and notes on what was left out."""
    files, notes = collections.defaultdict(list), []
    for path in _walk(os.fspath(folder), frozenset(), notes):
        if path.isprintable() or path.encode("utf-8", "replace").decode() == path:
            files[os.path.splitext(path)[1].lower()].append(path)
        else:
            notes.append(f"{path!r} has a name that is not UTF-8 and is left out")
    return files, notes


def _walk(folder: str, ancestors: frozenset[str], notes: list[str]) -> Iterator[str]:
    place = os.path.realpath(folder)
    if place in ancestors:
        notes.append(f"{folder} links to a folder above it: it is left out")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        notes.append(f"{folder} could not be listed: {error.strerror}")
        return
    entries = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _SYSTEM_FOLDERS]
    if not entries:
        notes.append(f"the folder {folder} is empty")
    for entry in entries:
        if entry.is_file() or not os.path.exists(entry.path):  # a link to nothing is named when it is read
            yield os.path.join(folder, entry.name)
        elif not entry.is_dir():
            notes.append(f"{entry.path} is a pipe, socket or device and is left out")
    for entry in entries:
        if entry.is_dir():
            yield from _walk(os.path.join(folder, entry.name), ancestors | {place}, notes)


def _leave_out(paths: list[str], what: str, others: str) -> list[str]:
    """A note on files beside those that are read, if there are any."""
    shown = list_names(paths, num_shown=1)
    return [f"{len(paths)} {what} beside {others} are left out: {shown}"] if paths else []


def _unknown_files(files: dict[str, list[str]], num_images: int) -> list[str]:
    """A note on files that are no images by their suffixes; texts beside images are not mentioned."""
    known = {*_image_suffixes(), *_TEXTS, ".parquet", ".arrow"}
    others = {suffix: paths for suffix, paths in files.items() if suffix not in known}
    others = {
        suffix: [path for path in paths if os.path.basename(path) not in METADATA] for suffix, paths in others.items()
    }
    counts = {suffix: len(paths) for suffix, paths in others.items() if paths}
    if not counts:
        return []
    shown = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(counts.items()))
    total = sum(counts.values())
    return [f"{total} files beside {num_images} images have no suffix of an image that can be read: {shown}"]


def _image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _find_splits(folder: pathlib.Path, images: list[str]) -> dict[str, list[pathlib.Path]]:
    """Folders of each split.

    The library's own search would take a class called "bullet train" for a split and leave out the rest.
    """
    while True:
        parts = [pathlib.Path(path).relative_to(folder).parts for path in images]
        tops = {part[0] for part in parts}
        named = {top for top in tops if top.lower() in _SPLIT_NAMES}
        if named == tops or len(tops) > 1 or not any(len(part) > 2 for part in parts):
            break
        folder = folder / tops.pop()
    if not named or (len(named) == 1 and named != tops):
        return {"train": [folder]}
    if named != tops:
        raise ValueError(
            f"open_images: {str(folder)!r} holds the splits {list_names(named)} and beside them "
            f"{list_names(tops - named)}, so splits and classes cannot be told apart. Give one of these folders, or "
            "move the others away."
        )
    splits = collections.defaultdict(list)
    for name in sorted(named):
        splits[_SPLIT_NAMES[name.lower()]].append(folder / name)
    return dict(splits)


def _split_shards(folder: pathlib.Path, shards: list[str]) -> dict[str, list[str]]:
    """Shards of each split, which is a word of their names; without such words all are for training."""
    parts = collections.defaultdict(list)
    for path in shards:
        words = re.split(r"[-._ /\\]", os.path.relpath(path, folder).lower())
        found = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
        parts[found.pop() if len(found) == 1 else None].append(path)
    if None in parts and len(parts) > 1:
        raise ValueError(
            f"open_images: {str(folder)!r} holds shards of the splits {list_names(set(parts) - {None})} and beside "
            f"them {list_names(parts[None])}: move those away, or list the shards of one split by a glob"
        )
    return {split or "train": paths for split, paths in parts.items()}


def _read_metadata(
    parts: dict[str, list[pathlib.Path]], tables: list[str], images: list[str]
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """A dataset of each split, and notes; a row belongs to the split in whose folder its first image lies."""
    rows = read_metadata(sorted(tables))
    named = list_files(rows)
    others = [path for path in images if path not in named]
    share = f"{len(others)} of {len(images)} images ({len(others) / len(images):.1%})"
    notes = [f"{share} are not named in metadata and left out: {list_names(others, num_shown=1)}"] * bool(others)
    if "image" not in rows.column_names:
        return {"train": rows}, notes
    paths = [pathlib.Path((cell or {}).get("path") or "") for cell in rows.data.column("image").to_pylist()]
    filled = [path for path in paths if path.name]
    again = len(filled) - len(set(filled))
    notes += [f"{again} of {len(paths)} rows of metadata name an image that another row names"] * bool(again)
    splits = {}
    for name, folders in parts.items():
        chosen = [place for place, path in enumerate(paths) if any(map(path.is_relative_to, folders))]
        splits[name] = rows.select(chosen)
    lost = len(rows) - sum(map(len, splits.values()))
    return splits, notes + [
        f"{lost} of {len(paths)} rows of metadata name no image of a split and are left out"
    ] * bool(lost)


def _read_class_folders(splits: dict[str, list[pathlib.Path]], images: list[str]) -> tuple[dict, str, dict]:
    """A dataset of each split, where its labels come from, and notes on each split."""
    import datasets

    rows = {split: [] for split in splits}
    for path in sorted(images):
        for split, folders in splits.items():
            for folder in folders:
                if pathlib.Path(path).is_relative_to(folder):
                    parts = pathlib.Path(path).relative_to(folder).parts
                    # macOS stores accents apart, and a class may have both spellings.
                    name = unicodedata.normalize("NFC", parts[0]) if len(parts) > 1 else None
                    rows[split].append((path, name))
    names = [name for part in rows.values() for _, name in part]
    classes = sorted(set(names) - {None})
    num_outside = names.count(None)
    origin, notes = "folders", {}
    if len(classes) < 2 or num_outside * 2 > len(names):
        origin = "the images are not in class folders"
        if classes and num_outside:
            origin = f"{num_outside} of {len(names)} images are not in a class folder"
        content = {split: {"image": [path for path, _ in part]} for split, part in rows.items()}
        kinds = datasets.Features({"image": datasets.Image()})
    else:
        numbers = {name: number for number, name in enumerate(classes)} | {None: None}
        content = {
            split: {"image": [path for path, _ in part], "label": [numbers[name] for _, name in part]}
            for split, part in rows.items()
        }
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        for split, part in rows.items():
            missing = sorted(set(classes) - {name for _, name in part})
            if missing:
                notes[split] = [f"the split {split!r} has no image of the classes {list_names(missing)}"]
    return (
        {split: datasets.Dataset.from_dict(columns, features=kinds) for split, columns in content.items()},
        origin,
        notes,
    )

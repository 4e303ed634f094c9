"""A folder of images with its splits and classes, or of a dataset."""

from __future__ import annotations

import collections
import glob
import os
import pathlib

from PIL import Image

from .messages import choose_split, list_names


_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
_DISK_SHARDS = 64  # of a stream over a dataset that was saved to disk


def open_folder(folder: pathlib.Path, *, split: str, is_streaming: bool):
    """The dataset of a folder, with its files if it is a stream."""
    import datasets

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(folder))
        saved = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        dataset = choose_split(saved, split, source=str(folder))
        if not is_streaming:
            return dataset, []
        stream = dataset.to_iterable_dataset(num_shards=max(1, min(_DISK_SHARDS, len(dataset))))
        return stream, sorted(str(path) for path in folder.rglob("*.arrow"))
    files = _list_files(folder)
    if files[".tar"]:
        options = {"path": "webdataset", "data_dir": str(folder)}
        splits = datasets.load_dataset(**options, streaming=True)
        return choose_split(splits, split, source=str(folder)), files[".tar"]
    if files[".parquet"] or files[".arrow"]:
        splits = datasets.load_dataset(str(folder.resolve()), streaming=is_streaming)
        return choose_split(splits, split, source=str(folder)), files[".parquet"] + files[".arrow"]
    images = [path for suffix, paths in files.items() if suffix in _image_suffixes() for path in paths]
    if not images:
        found = ", ".join(f"{len(paths)} {suffix or 'without suffix'}" for suffix, paths in files.items() if paths)
        raise ValueError(
            f"open_images: expected images, .tar shards or parquet files in the folder {str(folder)!r}, got "
            f"{found or 'no files'}. Give the folder above the class folders or above the images."
        )
    parts = _find_splits(folder, images)
    if split not in parts:
        choose_split(parts, split, source=str(folder))
    patterns = {name: [f"{glob.escape(str(part))}/**" for part in paths] for name, paths in parts.items()}
    splits = datasets.load_dataset("imagefolder", data_files=patterns, streaming=is_streaming)
    return choose_split(splits, split, source=str(folder)), images


def _list_files(folder: pathlib.Path) -> dict[str, list[str]]:
    """Paths of the files below a folder by suffix, hidden ones left out, sorted."""
    files = collections.defaultdict(list)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith((".", "__")):
                files[os.path.splitext(name)[1].lower()].append(os.path.join(parent, name))
    return files


def _image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _find_splits(folder: pathlib.Path, images: list[str]) -> dict[str, list[pathlib.Path]]:
    """Folders of each split.

    The library's own search would take a class called "bullet train" for a split and leave out the rest.
    """
    tops = {pathlib.Path(path).relative_to(folder).parts[0] for path in images}
    named = tops & set(_SPLIT_FOLDERS)
    if not named or (len(named) == 1 and named != tops):
        return {"train": [folder]}
    if named != tops:
        raise ValueError(
            f"open_images: {str(folder)!r} holds the splits {list_names(named)} and beside them "
            f"{list_names(tops - named)}, so that it is not clear what is a split and what a class. Give one of these "
            "folders, or move the rest away."
        )
    parts = collections.defaultdict(list)
    for name in sorted(named):
        parts[_SPLIT_FOLDERS[name]].append(folder / name)
    return dict(parts)


__all__ = ["open_folder"]

"""Names that a user types for a model or for images: a path on this machine, or a name on the Hub.

Checked without importing a library and without asking the network, so that a typing error is answered at once.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import re


CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".pkl")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SHARDS = re.compile(r"\.tar$|[*?{\[]")


def is_hub_name(name: str) -> bool:
    """Whether a text has the form owner/name."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name


def check_model_name(name: str) -> str:
    """The folder or name that a model is loaded by; for the folder of a training run, its `model`.

    Raises:
        ValueError: there is no such folder, it holds no model, or the name is a checkpoint file.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        folder = next((place for place in (path, path / "model") if _holds_model(place)), None)
        if folder is None:
            raise ValueError(
                f"{name}: expected a folder with a config.json, and it has none. Convert a checkpoint of another "
                f"library first: vitreg convert {name} NEW_FOLDER"
            )
        return os.fspath(folder) if folder != pathlib.Path(name) else name
    if path.exists():
        is_checkpoint = path.suffix in CHECKPOINT_SUFFIXES and not (path.parent / "config.json").exists()
        remedy = f"Convert it first: vitreg convert {name} NEW_FOLDER" if is_checkpoint else "Give the folder it is in"
        raise ValueError(f"{name}: expected a folder of a model, got a file. {remedy}")
    if not name.startswith(("timm/", "timm:")):
        _check_absent(name, "model", "a folder with a config.json, a name on the Hub (owner/name) or timm/NAME")
    return name


def check_image_source(source: str) -> str:
    """The source as it was given, if it can be a source of images at all.

    Raises:
        ValueError: there is no such folder, or the name is a file.
    """
    path = pathlib.Path(source).expanduser()
    if source.partition(":")[0] == "scenes" or path.is_dir() or _SHARDS.search(source):
        return source
    if path.exists():
        raise ValueError(f"{source}: expected a folder of images or .tar shards, got a file. Give its folder")
    plain = source.partition("@")[0].partition(":")[0]
    _check_absent(plain, "folder of images", "a folder, .tar shards, a dataset on the Hub (owner/name) or scenes")
    return source


def suggest_path(path: str | os.PathLike) -> str:
    """The end of a message about a path that does not exist: the nearest name beside it, or the last folder."""
    path = pathlib.Path(path).expanduser()
    parent = next(parent for parent in path.parents if parent.is_dir())
    if near := _nearest_path(path):
        return f"Did you mean {os.fspath(near)!r}?"
    return f"The nearest folder is {str(parent.resolve())!r}."


def _check_absent(name: str, what: str, expected: str) -> None:
    """Let a name pass that can only be one of the Hub."""
    if is_hub_name(name) and _nearest_path(pathlib.Path(name)) is None:
        return
    raise ValueError(f"{name!r}: there is no such {what} here: expected {expected}. {suggest_path(name)}")


def _nearest_path(path: pathlib.Path) -> pathlib.Path | None:
    """An entry of the folder that a path would lie in with nearly its name; None if that folder does not exist."""
    path = path.expanduser()
    parent = next(parent for parent in path.parents if parent.is_dir())
    parts = path.relative_to(parent).parts
    if len(parts) > 1 and is_hub_name(os.fspath(path)):
        return None  # not even its owner is a folder here
    try:
        entries = sorted(os.listdir(parent))
    except OSError:
        return None
    near = difflib.get_close_matches(parts[0], entries, n=1)
    return parent / near[0] if near else None


def _holds_model(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


__all__ = ["CHECKPOINT_SUFFIXES", "check_image_source", "check_model_name", "is_hub_name", "suggest_path"]

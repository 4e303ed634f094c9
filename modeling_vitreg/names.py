"""Names in messages, and names that a user types for a model or for images: a path, or a name on the Hub.

The checks import no library and use no network, so typing errors are reported at once.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import re
from collections.abc import Iterable


CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz", ".pkl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARDS = re.compile(r"\.(tar|tar\.gz|tgz)$|[*?{\[]")
_ARCHIVES = (".zip", ".gz", ".7z", ".rar", ".bz2", ".xz", ".zst")


def list_first(names: Iterable[object], number: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def count_of(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it is not 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_hub_name(name: str) -> bool:
    """Whether a text can be owner/name on the Hub, and not a path: there is no folder of that owner here."""
    is_name = _HUB_NAME.fullmatch(name) is not None and not name.endswith(CHECKPOINT_SUFFIXES)
    return is_name and not os.path.isdir(name.split("/")[0])


def split_reduction(name: str) -> tuple[str, dict | None]:
    """The folder or name of MODEL@merge=NUMBER, and the `token_reduction` that it asks for; None without "@".

    Raises:
        ValueError: something else behind the "@".
    """
    folder, mark, text = name.rpartition("@")
    if not mark or "/" in text or pathlib.Path(name).expanduser().exists():
        return name, None
    key, _, number = text.partition("=")
    if key != "merge" or not number.isdecimal():
        raise ValueError(f"{name}: expected MODEL@merge=NUMBER, patches that each layer merges, got {text!r} behind @")
    return folder, {"kind": "merge", "per_layer": int(number)}


def check_model_name(name: str) -> str:
    """The folder or name that a model is loaded by; for the folder of a training run, its `model`.

    "@merge=NUMBER" behind a name stays there.

    Raises:
        ValueError: there is no such folder, it holds no model, or the name is a checkpoint file.
    """
    plain, reduction = split_reduction(name)
    if reduction:
        return check_model_name(plain) + name[len(plain) :]
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        folder = next((place for place in (path, path / "model") if _holds_model(place)), None)
        if folder is None:
            raise ValueError(
                f"{name}: expected a folder with a config.json, but it has no config.json. Convert a checkpoint of "
                f"another library first: vitreg convert {name} NEW_FOLDER"
            )
        return os.fspath(folder) if folder != pathlib.Path(name) else name
    if path.exists():
        is_checkpoint = path.suffix in CHECKPOINT_SUFFIXES and not (path.parent / "config.json").exists()
        remedy = f"Convert it first: vitreg convert {name} NEW_FOLDER" if is_checkpoint else "Give the folder it is in"
        raise ValueError(f"{name}: expected a folder of a model, got a file. {remedy}")
    if not name.startswith(("timm/", "timm:")):
        _check_absent(name, "model", "a folder with a config.json, a name on the Hub (owner/name) or timm/NAME")
    return name


def check_source_name(name: str | os.PathLike) -> None:
    """Check that a checkpoint to convert can exist; a path, in place of a text, is no name on the Hub.

    Raises:
        ValueError: there is no such file or folder.
    """
    text = os.fspath(name)
    if not pathlib.Path(text).expanduser().exists() and not text.startswith(("timm:", "timm/", "hf-hub:")):
        expected = "a folder of a model" if isinstance(name, pathlib.Path) else "a checkpoint, a folder, or timm:NAME"
        _check_absent(os.path.join(".", text) if isinstance(name, pathlib.Path) else text, "file or folder", expected)


def check_image_source(source: str) -> str:
    """The source as it was given, if it can be a source of images at all.

    Raises:
        ValueError: there is no such folder, or the name is a file.
    """
    path = pathlib.Path(source).expanduser()
    if source.partition(":")[0] == "scenes" or path.is_dir() or _SHARDS.search(source):
        return source
    if path.exists():
        remedy = "Unpack it, and give the folder" if path.suffix.lower() in _ARCHIVES else "Give its folder"
        raise ValueError(f"{source}: expected a folder of images or .tar shards, got a file. {remedy}")
    plain = source.partition("@")[0].partition(":")[0]
    _check_absent(plain, "folder of images", "a folder, .tar shards, a dataset on the Hub (owner/name) or scenes")
    return source


def suggest_path(path: str | os.PathLike) -> str:
    """The end of a message about a path that does not exist: the nearest name beside it, or the last folder."""
    path = pathlib.Path(path).expanduser()
    parent = next(parent for parent in path.parents if parent.is_dir())
    near = difflib.get_close_matches(path.relative_to(parent).parts[0], sorted(os.listdir(parent)), n=1)
    if near:
        return f"Did you mean {os.fspath(parent / near[0])!r}?"
    return f"The nearest folder is {str(parent.resolve())!r}."


def _check_absent(name: str, what: str, expected: str) -> None:
    """Let only names of the Hub pass."""
    if is_hub_name(name):
        return
    raise ValueError(f"{name!r}: there is no such {what} here: expected {expected}. {suggest_path(name)}")


def _holds_model(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))

"""Parts of messages about sources."""

from __future__ import annotations

import difflib
import os
import pathlib


EXPECTED = (
    'expected "scenes" or "scenes:single" (built in), a folder of images, WebDataset shards (.tar files: one, a '
    "folder, a glob or a brace list), "
    "a folder of a dataset (parquet, arrow), or a name on the Hub (owner/name, optionally with :configuration and "
    "@revision)"
)


class MissingSplit(ValueError):
    """A source has no split of this name."""


def choose_split(splits: dict, split: str, *, source: str):
    """One of the splits.

    Raises:
        MissingSplit: there is no such split.
    """
    if split not in splits:
        raise MissingSplit(f"open_images: {source!r} has no split {split!r}; it has {list_names(splits)}.")
    return splits[split]


def suggest(path: str) -> str:
    """The nearest path that exists, as the end of a message."""
    path = pathlib.Path(path).expanduser()
    parent = next(parent for parent in path.parents if parent.is_dir())
    name = path.relative_to(parent).parts[0]
    for near in difflib.get_close_matches(name, sorted(os.listdir(parent)), n=1):
        return f" Did you mean {str(parent / near)!r}?"
    return f" The nearest folder is {str(parent.resolve())!r}."


def show_name(name: str) -> str:
    """A name of other people on one line: control characters and broken Unicode are escaped."""
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)


def list_names(names, *, num_shown: int = 8) -> str:
    """The first names in quotes, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(map(repr, names[:num_shown])) + more

"""Parts of messages about sources."""

from __future__ import annotations

from modeling_vitreg.names import list_first


EXPECTED = (
    'expected "scenes" or "scenes:single" (built in), a folder of images, WebDataset shards (.tar files: one, a '
    "folder, a glob or a brace list), a folder of a dataset (parquet, arrow), or a name on the Hub (owner/name, "
    "optionally with :configuration and @revision)"
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


def show_name(name: str) -> str:
    """A name of other people on one line: control characters and broken Unicode are escaped."""
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)


def list_names(names, *, num_shown: int = 8) -> str:
    """The first names in quotes, and how many more there are."""
    return list_first(map(repr, sorted(map(str, names))), num_shown)

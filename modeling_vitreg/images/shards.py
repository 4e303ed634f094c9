"""WebDataset shards, by one name or many."""

from __future__ import annotations

import glob
import os
import re

from .messages import EXPECTED, list_names, suggest


def names_shards(source: str) -> bool:
    """Whether a source is given by names of shards."""
    return source.endswith((".tar", ".tar}"))


def expand(source: str) -> list[str]:
    """Paths of shards: "{00..12}" counts with leading zeros, "{a,b}" lists, "*", "?" and "[...]" match files."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", source)
    if found:
        first, last, listed = found.groups()
        count = range(int(first or 0), int(last or 0) + 1)
        values = listed.split(",") if listed else [str(number).zfill(len(first)) for number in count]
        return [path for value in values for path in expand(source[: found.start()] + value + source[found.end() :])]
    if "://" in source:
        return [source]
    path = os.path.expanduser(source)
    return [path] if os.path.exists(path) else sorted(glob.glob(path)) or [source]


def open_shards(shards: list[str], *, split: str):
    """A stream, and those of its files that lie here.

    Raises:
        ValueError: a shard does not exist.
    """
    import datasets

    local = [path for path in shards if "://" not in path]
    missing = [path for path in local if not os.path.exists(path)]
    if missing or not shards:
        raise ValueError(
            f"open_images: {EXPECTED}; got shards of which {len(missing)} of {len(shards)} do not exist: "
            f"{list_names(missing)}.{suggest(missing[0]) if missing else ''}"
        )
    stream = datasets.load_dataset("webdataset", data_files={split: shards}, streaming=True)
    return stream[split], local


__all__ = ["expand", "names_shards", "open_shards"]

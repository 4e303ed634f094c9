"""Tables beside images (metadata.csv, .jsonl, .parquet) that say which files each row is about.

The columns are those of `imagefolder` of the library datasets: `file_name` is the column `image`, `mask_file_name` the
column `mask`, and lists of files (`file_names`) are lists of images. Names are paths relative to the table, and none
leads out of its folder.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import pathlib
import posixpath
import re
from typing import TYPE_CHECKING

from modeling_vitreg.reports import short_hash

from .messages import list_names


if TYPE_CHECKING:
    import datasets


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_KINDS = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
_FILE_NAME = re.compile(r"(?:(.+)_)?file_name(s?)")


def names_images(table: str) -> bool:
    """Whether a table has a column of file names."""
    if table.endswith(".parquet"):
        return any(map(_FILE_NAME.fullmatch, read_table([table]).column_names))
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), []) if table.endswith(".csv") else json.loads(file.readline() or "{}")
    except (ValueError, OSError):
        return False
    return any(_FILE_NAME.fullmatch(str(name)) for name in names)


def holds_images(table: str) -> bool:
    """Whether a column of a table may hold the bytes of images."""
    import datasets

    try:
        kinds = _load_table([table], is_streaming=True).features
    except ValueError:  # it is named when it is read
        return True
    return any(
        isinstance(kind, (datasets.Image, dict)) or "binary" in getattr(kind, "dtype", "") for kind in kinds.values()
    )


def read_metadata(tables: list[str]) -> datasets.Dataset:
    """The rows of tables, with a column of images for each column of file names.

    Raises:
        ValueError: a table cannot be read, has other columns than the first, or names a file outside its folder.
    """
    import datasets

    parts = []
    for path in tables:
        table = read_table([path])
        rows = [_open_names(row, pathlib.Path(path)) for row in table.to_list()]
        parts.append(datasets.Dataset.from_list(rows, features=datasets.Features(_image_columns(table.features))))
        if parts[0].features != parts[-1].features:
            columns = [list_names(part.features) for part in (parts[0], parts[-1])]
            raise ValueError(f"open_images: {tables[0]} has the columns {columns[0]}, and {path} {columns[1]}")
    return datasets.concatenate_datasets(parts)


def read_table(paths: list[str]) -> datasets.Dataset:
    """The rows of files of one kind, as they are.

    Raises:
        ValueError: a file cannot be read.
    """
    return _load_table(paths, is_streaming=False)


def _load_table(paths: list[str], *, is_streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    kind = _KINDS[os.path.splitext(paths[0])[1].lower()]
    files = [glob.escape(plain_path(path)) for path in paths]
    try:
        return datasets.load_dataset(kind, data_files=files, split="train", streaming=is_streaming)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"open_images: {list_names(paths)} cannot be read: {type(cause).__name__}: {cause}"
        ) from error


def plain_path(path: str | os.PathLike) -> str:
    """A path without "::", which the library datasets takes for a chain of addresses: if need be that of a link."""
    import datasets

    path = os.path.abspath(path)
    if "::" not in path:
        return path
    link = pathlib.Path(datasets.config.HF_DATASETS_CACHE) / "links" / f"{short_hash(path)}{pathlib.Path(path).suffix}"
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return str(link)


def list_files(rows: datasets.Dataset) -> set[str]:
    """Paths of all files that the rows of `read_metadata` name."""
    import datasets

    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            found.add(value["path"])
        elif isinstance(value, (dict, list)):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    for name, kind in rows.features.items():
        if not isinstance(kind, datasets.Value):
            collect(rows.data.column(name).to_pylist())
    return found


def _image_columns(features: dict) -> dict:
    """Features with images in place of names of files."""
    import datasets

    columns = {}
    for name, kind in features.items():
        if found := _FILE_NAME.fullmatch(name):
            image = datasets.List(datasets.Image()) if found[2] else datasets.Image()
            columns[_column(found)] = image
        else:
            columns[name] = _image_columns(kind) if isinstance(kind, dict) else kind
    return columns


def _open_names(row: dict, table: pathlib.Path) -> dict:
    """A row with paths in place of names of files."""
    opened = {}
    for name, value in row.items():
        if found := _FILE_NAME.fullmatch(name):
            names = value if isinstance(value, list) else [value]
            paths = [None if one is None else _check_name(one, table) for one in names]
            opened[_column(found)] = paths if isinstance(value, list) else paths[0]
        else:
            opened[name] = _open_names(value, table) if isinstance(value, dict) else value
    return opened


def _column(found: re.Match) -> str:
    return (found[1] or "image") + found[2] * (found[1] is None)


def _check_name(name: object, table: pathlib.Path) -> str:
    path = posixpath.normpath(str(name).replace("\\", "/"))
    leads_out = re.match(r"/|[A-Za-z]:|\.\.(/|$)|\.$", path) or "://" in str(name)
    if not isinstance(name, str) or leads_out:
        raise ValueError(
            f"open_images: {table} names the file {name!r:.80}: expected a path inside {str(table.parent)!r}, "
            "relative to it"
        )
    return os.path.join(table.parent, path)

"""Log of a run as JSON lines, one object per line, which can be read during the run."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from modeling_vitreg.files import write_text


class JsonlLogger:
    """Append records to a file of JSON lines.

    Args:
        path: path of the file.
        keeps: which records of an existing file stay, such as those up to the state that a run continues from;
            None keeps none.
        is_writer: whether this process writes; the others read.
    """

    def __init__(self, path: pathlib.Path, *, keeps: Callable[[dict], bool] | None = None, is_writer: bool = True):
        self.path, self.is_writer = path, is_writer
        self.records = [record for record in read_jsonl(path) if keeps(record)] if keeps else []
        if is_writer:
            write_text(path, "".join(_line(record) for record in self.records))

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; values that JSON lacks (nan, inf) become text."""
        self.records.append(record)
        if self.is_writer:
            line = _line(record).encode()
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                except OSError as error:  # a full disk takes half a line
                    file.truncate(end)
                    raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """Records of a file, without a last line that was cut off; none if there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: dict[str, Any]) -> str:
    plain = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(plain) + "\n"

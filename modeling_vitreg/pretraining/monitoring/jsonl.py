"""The record of a run as JSON lines: one object a line, readable while the run goes on, and by everything."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from modeling_vitreg.files import write_text


class JsonlLogger:
    """Append records to a file of JSON lines.

    Args:
        path: of the file.
        last_step: of the state that the run goes on from: what a killed run wrote after it is dropped. -1 for none.
        is_writer: whether this process writes; the others read.
    """

    def __init__(self, path: pathlib.Path, *, last_step: int = -1, is_writer: bool = True):
        self.path, self.is_writer = path, is_writer
        self.records = [record for record in read_jsonl(path) if record.get("step", -1) <= last_step]
        if is_writer:
            write_text(path, "".join(_line(record) for record in self.records))

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; values that JSON lacks (nan, inf) become text."""
        self.records.append(record)
        if self.is_writer:
            with open(self.path, "a") as file:
                file.write(_line(record))


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


__all__ = ["JsonlLogger", "read_jsonl"]

"""Parts that a report leaves out, and the reasons: images that were not measured, and parts that failed."""

from __future__ import annotations

import logging
import os
import pathlib
import traceback
from collections.abc import Callable

from modeling_vitreg.files import DISK_ERRORS, write_text


_logger = logging.getLogger(__name__)


def list_left_out(images: dict, *, name: str = "images") -> list[str]:
    """Sentences about the images that a report leaves out, for pages and terminals; empty if there are none.

    Args:
        images: counts of a report: `num_unreadable`, `num_nonfinite`, and `unreadable`, `nonfinite` (the first ones).
        name: name of the images, such as "train images".
    """
    lines = []
    for key, words in (("unreadable", "could not be read"), ("nonfinite", "have features that are not finite")):
        number, named = images.get(f"num_{key}") or 0, images.get(key) or []
        if number:
            total = sum(images.get(f"num_{kind}") or 0 for kind in ("images", "unreadable", "nonfinite"))
            rest = f"; and {number - len(named)} more" if named and number > len(named) else ""
            lines.append(
                f"{number} of {total} {name} {words} and are left out: {'; '.join(named) or 'not named'}{rest}"
            )
    return lines


class Failures:
    """Tracebacks of the parts of a report that failed, while the others continue.

    A part that raises a ValueError or RuntimeError of this package does not apply, and its message is the reason. Any
    other error is a defect: the report holds its message, and `write` stores the traceback. An error of the disk ends
    the report, which could not be written either.

    Args:
        is_strict: raise defects at once, as tests do.
    """

    FILE = "errors.log"

    def __init__(self, *, is_strict: bool = False):
        self.is_strict, self.tracebacks = is_strict, {}

    def attempt(self, name: str, measure: Callable[[], dict]) -> dict:
        """The result of a part, or {"skipped": reason}."""
        try:
            return measure()
        except KeyboardInterrupt:
            return {"skipped": "stopped by hand"}
        except Exception as error:
            return {"skipped": self.note(name, error)}

    def note(self, name: str, error: Exception) -> str:
        """Remember the traceback of a defect; returns the reason for the report.

        Raises:
            Exception: `error` itself, if it is of the disk, or a defect and `is_strict`.
        """
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise error
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = pathlib.Path(last.filename).is_relative_to(pathlib.Path(__file__).parent)
        # An error of torch or NumPy in a line of ours has our file as its last frame, but no `raise` in that line.
        if isinstance(error, (ValueError, RuntimeError)) and is_ours and (last.line or "").startswith("raise"):
            return str(error)
        if self.is_strict:
            raise error
        self.tracebacks[name] = "".join(traceback.format_exception(error))
        _logger.warning("%s failed: %s: %s", name, type(error).__name__, error)
        return f"{type(error).__name__}: {error} (see {self.FILE})"

    def write(self, folder: str | os.PathLike) -> None:
        """Write the tracebacks to `errors.log` in a folder, or remove the file of an earlier report."""
        path = pathlib.Path(folder) / self.FILE
        if self.tracebacks:
            parts = [f"{name}\n{text}" for name, text in self.tracebacks.items()]
            write_text(path, "\n".join(parts))
        else:
            path.unlink(missing_ok=True)

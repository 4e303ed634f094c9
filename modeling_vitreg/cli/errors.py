"""Errors of users and of their files in one line; bugs of this package with their traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import traceback
from collections.abc import Iterator

import typer

from modeling_vitreg.files import DISK_ERRORS
from modeling_vitreg.network import causes_of


TRACEBACK = "VITREG_TRACEBACK"  # environment variable: show the traceback of every error
_PACKAGE = os.fspath(pathlib.Path(__file__).parents[1])
_OF_DISKS = (*DISK_ERRORS, errno.EACCES, errno.EPERM)
_EXPECTED = (ValueError, RuntimeError, OSError, MemoryError)  # errors that carry their own explanation


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error in one line and exit with 1, without a traceback.

    An error that a library raises on the user's files is reported with the name of the library. An error of another
    type that this package raises itself is a bug, so it keeps its traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get(TRACEBACK) or not (text := _describe(error)):
            raise
        typer.echo(text, err=True)
        raise typer.Exit(1) from None


def _describe(error: Exception) -> str:
    """The line for an error; empty for a bug of this package."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("modeling_vitreg"):
        return f"{error.name} is not installed, and this command needs it: pip install 'modeling-vitreg[analysis]'"
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.errno in _OF_DISKS:
            where = f"{cause.filename}: " if cause.filename else ""
            return f"{where}{os.strerror(cause.errno)}. Free some space, or choose another output; results are kept"
    if isinstance(error, _EXPECTED):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    deepest, ours = frames[-1], [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    if deepest.filename.startswith(_PACKAGE) or not ours:
        return ""
    library = _library_of(deepest.filename)
    return (
        f"{library} failed with {type(error).__name__}: {error}. A file of the model or of the data is probably "
        f"damaged or has an unexpected format: `vitreg doctor MODEL` checks a model. {TRACEBACK}=1 shows the traceback"
    )


def _library_of(file: str) -> str:
    parts = pathlib.Path(file).parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts[:-1] else pathlib.Path(file).stem

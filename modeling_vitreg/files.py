"""Files and folders that are whole or absent. Everything that replaces a file does it here.

A file or folder is written under a hidden name beside its place (`.NAME.HOST-PID.part`), flushed to the disk and
renamed. After an error, a full disk or a kill the old content is still there. The next writer of the same place
removes what killed processes of this machine left behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator, Sequence


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Write the path of the block; at its end the file replaces `path`, whose folder is made.

    Raises:
        OSError: the file cannot be written; `path` is as it was, and no temporary file is left.
    """
    path = pathlib.Path(path)
    with _errors_about(path):
        if path.exists() and not path.is_file():  # a rename would remove /dev/null
            raise OSError(errno.EINVAL, "Is no regular file, and cannot be replaced", str(path))
        part = _part_of(path)
        try:
            yield part
            _flush(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, files: Sequence[str] | None = None) -> Iterator[pathlib.Path]:
    """Fill the folder of the block; at its end it replaces `path`, which may be a folder with files.

    A mount point and the current folder cannot be replaced: the files move into them one by one.

    Args:
        path: folder to make; where a link leads to, if it is one.
        files: names of the files of the folder that move beside `path`, in place of the folder.

    Raises:
        OSError: the folder cannot be written; `path` is as it was, and no temporary file is left.
    """
    path = pathlib.Path(path)
    with _errors_about(path):
        path = pathlib.Path(os.path.realpath(path))
        if is_kept := path.is_dir() and (path.is_mount() or path.samefile(os.curdir)):
            path /= "files"
        part = _part_of(path)
        old = part.with_suffix(".old")
        part.mkdir()
        try:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    _flush(file)
            if files is not None or is_kept:
                for name in files or sorted(os.listdir(part)):
                    os.replace(part / name, path.parent / name)
                return
            if path.is_dir():
                os.replace(path, old)
            try:
                os.replace(part, path)
            except OSError:
                if old.is_dir():
                    os.replace(old, path)
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def to_json(content: object) -> str:
    """JSON with a line for each entry of a dictionary; a list without dictionaries is one line.

    Raises:
        TypeError, ValueError: a value that JSON lacks, such as a number that is not finite.
    """
    return _to_json(json.loads(json.dumps(content, allow_nan=False)), "\n")


def _to_json(value: object, start: str) -> str:
    inner = start + " "
    if isinstance(value, dict) and value:
        entries = (f"{inner}{json.dumps(name)}: {_to_json(item, inner)}" for name, item in value.items())
        return "{" + ",".join(entries) + start + "}"
    if isinstance(value, list) and _holds_dictionary(value):
        return "[" + ",".join(inner + _to_json(item, inner) for item in value) + start + "]"
    return json.dumps(value)


def _holds_dictionary(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_dictionary, value)))


def make_folder(path: str | os.PathLike) -> pathlib.Path:
    """Make a folder and those above it.

    Raises:
        OSError: it cannot be made; the message names a file of the same name.
    """
    path = pathlib.Path(path)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Is a file, but a folder is needed", str(place))
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(folder: str | os.PathLike) -> pathlib.Path:
    """Make a folder and write an empty file into it, so that hours of work do not end at a disk that is read-only.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = make_folder(folder)
    with _errors_about(folder):
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return folder


def checksum(path: str | os.PathLike) -> str:
    """CRC-32 of a file, 8 hexadecimal digits: detects damage, not manipulation."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _part_of(path: pathlib.Path) -> pathlib.Path:
    """The hidden name beside `path`, free to be written."""
    make_folder(path.parent)
    host = _host()
    for left in path.parent.glob(f".{_escaped(path.name)}.{host}-*"):
        match = re.fullmatch(rf"{host}-(\d+)\.(part|old)", left.name.removeprefix(f".{path.name}."))
        if match is None or (int(match[1]) != os.getpid() and _is_running(int(match[1]))):
            continue
        if match[2] == "old" and not path.exists():  # killed between the two renames of a folder
            os.replace(left, path)
        else:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.part")


def _host() -> str:
    return re.sub(r"\W", "", socket.gethostname())


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":  # where the question would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _flush(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _errors_about(path: pathlib.Path) -> Iterator[None]:
    """Errors of the disk as OSError under the name of the file that was to be written."""
    try:
        yield
    except OSError as error:
        # A copy names its source first.
        is_about = error.filename is None or f".{_host()}-{os.getpid()}." in f"{error.filename} {error.filename2}"
        if error.errno is None or not is_about:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # safetensors and torch.save tell of a full disk in classes of their own.
        text = str(error)
        if number := re.search(r"\(os error (\d+)\)", text):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        if "PytorchStreamWriter" in text or "inline_container" in text:
            raise OSError(errno.EIO, "Could not be written; the disk may be full", str(path)) from error
        raise

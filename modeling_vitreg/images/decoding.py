"""Images as they were stored become pixels, late, where a broken file can be reported and replaced."""

from __future__ import annotations

import io
from typing import TypedDict

from PIL import Image, UnidentifiedImageError

from modeling_vitreg.image_processing_vitreg import MODES, UnsupportedPixels, to_picture

from .messages import show_name
from .options import DataOptions


class RawImage(TypedDict, total=False):
    """An image as it was stored: its file, its label, and its name for messages."""

    bytes: bytes | None
    path: str | None
    label: int | None
    name: str
    text: str  # of a source that was opened with a column of captions
    maps: dict  # masks and depths, of a source that was opened with their columns
    boxes: dict | list  # of objects, likewise
    options: DataOptions  # how annotations are read, likewise


class UnreadableImage(Exception):
    """An image that cannot be decoded.

    Args:
        name: name of the image, for messages.
        reason: why it cannot be read.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{show_name(self.name)}: {self.reason}"


def decode_image(raw: RawImage, *, num_channels: int = 3) -> Image.Image:
    """Decode all pixels of a raw image, as `modeling_vitreg.image_processing_vitreg.to_picture` and every saved image
    processor do.

    Args:
        raw: a stored image of a source.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        UnreadableImage: the file is missing, empty, corrupt, truncated, of an unknown format or scale, or so large
            that Pillow takes it for a decompression bomb.
        ValueError: another number of channels; see `check_channels`.
    """
    check_channels(num_channels, reader="the caller of decode_image")
    name = raw["name"]
    try:
        with Image.open(open_file(raw)) as image:
            return to_picture(image, num_channels=num_channels)
    except UnreadableImage:
        raise
    except UnsupportedPixels as error:
        raise UnreadableImage(name, str(error)) from error
    except Image.DecompressionBombError as error:
        reason = f"decompression bomb? {error} Raise PIL.Image.MAX_IMAGE_PIXELS if the file can be trusted."
        raise UnreadableImage(name, reason) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, _describe_file(raw) or f"{type(error).__name__}: {error}") from error
    # Pillow's plugins raise errors of many kinds: OSError, SyntaxError, ValueError, struct.error, IndexError ...
    except Exception as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def _describe_file(raw: RawImage) -> str:
    """What a file is that Pillow does not know, where its first bytes tell."""
    file = open_file(raw)
    with open(file, "rb") if isinstance(file, str) else file as content:
        start = content.read(64).lstrip()
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "the file is a pointer of Git LFS, not the image: run git lfs pull"
    return "the file is a web page, not an image" if start[:5].lower() in (b"<html", b"<!doc") else ""


def check_channels(num_channels: int, *, reader: str) -> None:
    """Check that images can be opened with this number of channels, before any work is done.

    Args:
        num_channels: channels that the model reads.
        reader: name of the model, for the message.

    Raises:
        ValueError: another number than 1, 3 and 4.
    """
    if num_channels not in MODES:
        raise ValueError(
            f"{reader} expects images of {num_channels} channels, but image files have 1 (grey), 3 (RGB) or 4 (RGBA) "
            "channels: use a model of 1, 3 or 4 channels, or give tensors to the model itself"
        )


def open_file(raw: dict):
    """A file object or a path that Pillow opens."""
    if raw["bytes"] is not None:
        if not raw["bytes"]:
            raise UnreadableImage(raw["name"], "the file is empty")
        return io.BytesIO(raw["bytes"])
    if raw["path"] is None:
        raise UnreadableImage(raw["name"], "the dataset has no image in this row")
    if "://" not in raw["path"]:
        return raw["path"]
    from datasets.utils.file_utils import xopen

    with xopen(raw["path"], "rb") as file:
        return io.BytesIO(file.read())

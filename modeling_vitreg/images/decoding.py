"""Images and maps as they were stored become pixels, late, where a broken file can be reported and replaced."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


_HIDDEN_LABEL = 255  # of a mask: nobody knows the class


class UnreadableImage(Exception):
    """An image that cannot be decoded.

    Args:
        name: of the image, for messages.
        reason: what was wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(raw: dict) -> Image.Image:
    """Decode all pixels of a raw image, turned upright by its EXIF orientation, as RGB.

    Grey of 16 bits keeps its 8 upper bits; transparency is dropped, as the image processors of transformers do; of an
    animation the first frame is taken.

    Raises:
        UnreadableImage: the file is missing, empty, corrupt, truncated, of unknown format, or so large that Pillow
            takes it for a decompression bomb.
    """
    name = raw["name"]
    try:
        with Image.open(_open_file(raw)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnreadableImage:
        raise
    # Pillow's plugins raise whatever they stumble upon: OSError, SyntaxError, ValueError, struct.error, IndexError ...
    except Exception as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def decode_maps(raw: dict, *, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Decode the maps of a raw image.

    Args:
        raw: of a source that was opened with maps; without them there is nothing.
        size: width and height of the decoded image.

    Returns:
        `mask`, int32 class numbers, (height, width); `depth`, float32 in metres, (height, width).

    Raises:
        UnreadableImage: a map is missing, broken, or of another size.
    """
    maps = {}
    for kind, value in raw.get("maps", {}).items():
        try:
            maps[kind] = _decode_map(value)
        except Exception as error:  # see `decode_image`
            raise UnreadableImage(raw["name"], f"{kind}: {type(error).__name__}: {error}") from error
        if maps[kind].shape != size[::-1]:
            problem = f"{kind} of shape {maps[kind].shape} for an image of {size[::-1]} pixels"
            raise UnreadableImage(raw["name"], problem)
    if "mask" in maps:
        maps["mask"] = maps["mask"].astype(np.int32)
        if raw["reduce_labels"]:
            is_hidden = (maps["mask"] == 0) | (maps["mask"] == _HIDDEN_LABEL)
            maps["mask"] = np.where(is_hidden, np.int32(_HIDDEN_LABEL), maps["mask"] - 1)
    if "depth" in maps:
        maps["depth"] = maps["depth"].astype(np.float32) * np.float32(raw["depth_scale"])
    return maps


def _open_file(raw: dict):
    """A file object or a path that Pillow opens."""
    if raw["bytes"] is not None:
        if not raw["bytes"]:
            raise UnreadableImage(raw["name"], "the file is empty")
        return io.BytesIO(raw["bytes"])
    if raw["path"] is None:
        raise UnreadableImage(raw["name"], "there is no image in this place")
    if "://" not in raw["path"]:
        return raw["path"]
    from datasets.utils.file_utils import xopen

    with xopen(raw["path"], "rb") as file:
        return io.BytesIO(file.read())


def _decode_map(value: dict | list | np.ndarray) -> np.ndarray:
    if not isinstance(value, dict):
        return np.asarray(value)
    with Image.open(_open_file({**value, "name": "the map"})) as image:
        return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut everything above 255
        pixels = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode in ("P", "PA"):  # a palette with transparency goes through RGBA, or Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


__all__ = ["UnreadableImage", "decode_image", "decode_maps"]

"""From a decoded image to the pixels of a model, in bytes, and from bytes to normalised floats.

Bytes are a quarter of the floats: workers make them, and the device of the model normalises them.

Letters for shapes: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def crop_image(image: Image.Image, sides: tuple[int, int]) -> np.ndarray:
    """An image resized (bicubic) until its short side fits, and cut in the centre.

    Args:
        image: in the mode of the model.
        sides: (rows, columns) that are cut out.

    Returns:
        Bytes (C, rows, columns).
    """
    (width, height), (left, top, right, bottom) = _fit(image.width, image.height, sides)
    return _to_bytes(image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, right, bottom)))


def crop_map(values: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """A map (height, width) of int32 or float32, cut as `crop_image` cuts its image; the nearest pixel counts."""
    (width, height), (left, top, right, bottom) = _fit(values.shape[1], values.shape[0], sides)
    resized = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
    return resized[top:bottom, left:right].copy()


def shrink_image(image: Image.Image, longest_side: int | None) -> Image.Image:
    """An image whose longest side has at most `longest_side` pixels (bicubic); None: unchanged."""
    if longest_side is None or max(image.size) <= longest_side:
        return image
    sides = [max(round(side * longest_side / max(image.size)), 1) for side in image.size]
    return image.resize(sides, Image.Resampling.BICUBIC)


def pad_image(image: Image.Image, patch_shape: tuple[int, int]) -> np.ndarray:
    """Bytes (C, rows, columns) of an image, with zeros at the bottom and the right up to whole patches."""
    pixels = _to_bytes(image)
    rows, columns = (-side % patch for side, patch in zip(pixels.shape[1:], patch_shape))
    return np.pad(pixels, ((0, 0), (0, rows), (0, columns)))


def normalise(
    pixels: Tensor, *, mean: Sequence[float], std: Sequence[float], sizes: Sequence[tuple[int, int]] | None = None
) -> Tensor:
    """Bytes (B, C, rows, columns) as float32 of mean 0 and standard deviation 1, on their device.

    Args:
        pixels: uint8.
        mean, std: one value a channel, for pixels in 0 ... 1.
        sizes: (rows, columns) of each image without its padding, which becomes 0; None: no image is padded.
    """
    statistics = (torch.tensor(values, dtype=torch.float32, device=pixels.device) for values in (mean, std))
    mean, std = (values.view(-1, 1, 1) for values in statistics)
    values = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
    for image, (rows, columns) in zip(values, sizes or ()):
        image[:, rows:] = 0
        image[:, :, columns:] = 0
    return values


def _fit(width: int, height: int, sides: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """(width, height) to resize to, and (left, top, right, bottom) to cut out."""
    rows, columns = sides
    scale = max(rows / height, columns / width)
    width, height = max(round(width * scale), columns), max(round(height * scale), rows)
    left, top = (width - columns) // 2, (height - rows) // 2
    return (width, height), (left, top, left + columns, top + rows)


def _to_bytes(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # [rows, columns, C] -> [C, rows, columns]

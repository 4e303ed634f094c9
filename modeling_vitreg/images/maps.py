"""Masks and depth maps as they are stored, an image or an array, become class numbers and metres."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from .decoding import open_file
from .options import DataOptions


UNKNOWN_CLASS = 255  # in a mask
NOT_FINITE = "depths that are not finite count as unknown"
_MAX_CLASS = 2**15 - 1  # masks are stored as int16


class Contradiction(Exception):
    """An annotation that does not fit its image."""


def decode_map(value: dict | list | np.ndarray) -> np.ndarray:
    """Values of a map as it is stored, an image or an array: (rows, columns), or colours (rows, columns, 3 or 4)."""
    if isinstance(value, dict):
        with Image.open(open_file({**value, "name": "the map"})) as image:
            value = ImageOps.exif_transpose(image)
    elif value is None:
        raise Contradiction("is missing")
    values = np.asarray(value)
    if values.ndim == 3 and values.shape[-1] == 1:
        return values[..., 0]
    if values.ndim == 3 and values.shape[0] == 1 and values.shape[-1] > 4:
        return values[0]
    if values.ndim == 3 and values.shape[-1] in (2, 4) and (values[..., -1] == values.flat[-1]).all():
        values = values[..., :-1]  # transparency that is the same everywhere
    return values


def is_grey(colours: np.ndarray) -> bool:
    """Whether colours (..., channels) are one number each, stored several times."""
    return bool((colours == colours[..., :1]).all())


def read_class_numbers(value: dict | list | np.ndarray, options: DataOptions) -> np.ndarray:
    """Class numbers, int32 (rows, columns), 255 where the class is unknown, of a mask as it is stored."""
    values = decode_map(value)
    if values.ndim == 3 and options.mask_format == "voc":
        values = _read_voc_colours(values)
    elif values.ndim == 3 and is_grey(values):
        values = values[..., 0]
    elif values.ndim == 3:
        colour = tuple(values.reshape(-1, values.shape[-1])[0].tolist())
        raise Contradiction(f"holds colours such as {colour}, expected class numbers")
    if values.dtype.kind == "f":
        if not (np.nan_to_num(values, nan=-1, posinf=0.5) % 1 == 0).all():
            raise Contradiction("holds fractions, expected class numbers")
        values = np.nan_to_num(values, nan=-1)
    values = values.astype(np.int64)
    if options.mask_format == "binary":
        values = np.where(values == UNKNOWN_CLASS, 1, values)
    values = np.where(values == -1, UNKNOWN_CLASS, values)  # another usual mark of an unknown class
    if options.reduce_labels:
        is_known = (values != 0) & (values != UNKNOWN_CLASS)
        values = np.where(is_known, values - 1, UNKNOWN_CLASS)
    highest = options.num_classes - 1 if options.num_classes else _MAX_CLASS
    is_wrong = (values != UNKNOWN_CLASS) & ((values < 0) | (values > highest))
    if is_wrong.any():
        raise Contradiction(
            f"holds class {values[is_wrong][0]}: expected classes 0 ... {highest} in a mask, or {UNKNOWN_CLASS} where "
            "the class is unknown"
        )
    return values.astype(np.int32)


def read_depth(value: dict | list | np.ndarray, options: DataOptions, notes: list[str]) -> np.ndarray:
    """Metres, float32 (rows, columns), 0 where the depth is unknown."""
    values = decode_map(value)
    if values.ndim == 3:
        if not is_grey(values):
            raise Contradiction("holds colours, expected one number for each pixel")
        values = values[..., 0]
    values = values.astype(np.float32) * np.float32(options.depth_scale)
    if not np.isfinite(values).all():
        notes.append(NOT_FINITE)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return values


def voc_palette() -> np.ndarray:
    """Colours (256, 3) of the classes of Pascal VOC: the bits of a class number, spread over red, green and blue."""
    numbers, colours = np.arange(256), np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> channel) & 1) << (7 - bit)
        numbers = numbers >> 3
    return colours


def _read_voc_colours(colours: np.ndarray) -> np.ndarray:
    codes = colours[..., :3].astype(np.int64) @ [1 << 16, 1 << 8, 1]
    known = voc_palette() @ [1 << 16, 1 << 8, 1]
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], codes).clip(max=255)]
    is_unknown = known[places] != codes
    if is_unknown.any():
        colour = tuple(colours[is_unknown][0][:3].tolist())
        raise Contradiction(f"holds the colour {colour}, which Pascal VOC does not use")
    return places

"""Image files to 8-bit images, and image processors that read files this way. Saved with the weights.

The package's own reader (command line, training) calls `to_picture`, so that a file is one picture everywhere.
"""

from __future__ import annotations

import numpy as np
from transformers import BitImageProcessor, DPTImageProcessor, SegformerImageProcessor, __version__


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by number of channels
_DEPTHS = (8, 10, 12, 14, 16)  # bits that a camera or a scanner delivers
_ORIENTATION = 0x0112  # tag of EXIF
_IS_OLD = __version__.startswith("4.")  # its processors guess where the channels are, and know 1 and 3 only
_SLACK = 0.01  # by which floats may leave 0 ... 1, after resampling
_LOWEST_BRIGHT = 32  # floats whose maximum lies between 1 and this are on no known scale


class UnsupportedPixels(ValueError):
    """Pixels whose scale is unknown, or that would lose their content with 8 bits."""


def to_picture(image, *, num_channels: int = 3):
    """The upright picture of 8 bits a channel that a file shows.

    * It is turned as its EXIF orientation says. Of an animation the first frame is taken.
    * Grey integers of more than 8 bits are divided by a power of two: the smallest of 8, 10, 12, 14 and 16 bits that
      holds the largest pixel becomes 8 bits. The file does not say how many bits are used.
    * Grey floats within 0 ... 1 are multiplied by 255; larger ones are taken as integers.
    * Alpha is dropped unless four channels are asked for; palettes, CMYK and so on are converted by Pillow.

    Args:
        image: a `PIL.Image.Image` of any mode; it is not changed.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        UnsupportedPixels: NaN or infinity, integers beyond 16 bits or below 0, floats on no known scale, colour of 16
            bits whose upper bits are not used.
        ValueError: another number of channels.
    """
    from PIL import Image, ImageOps

    if num_channels not in MODES:
        raise ValueError(f"image files have 1, 3 or 4 channels; expected one of these numbers, got {num_channels}")
    is_deep_colour = image.mode not in ("I", "F") and not image.mode.startswith("I;") and _has_16_bits(image)
    if image.getexif().get(_ORIENTATION, 1) != 1:  # otherwise it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif is_deep_colour and np.asarray(image.convert("RGB")).max() < 2**6:  # Pillow keeps the upper 8 bits
        raise UnsupportedPixels(
            "a colour image with 16 bits per channel that uses 14 or fewer would turn dark: convert it to 8 bits "
            "per channel"
        )
    elif image.mode in ("P", "PA"):  # a palette with transparency goes through RGBA, or Pillow warns
        image = image.convert("RGBA")
    return image.convert(MODES[num_channels])


def _has_16_bits(image) -> bool:
    """Whether an image that was opened and not decoded yet is stored with 16 bits a channel."""
    modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in getattr(image, "tile", ()) if tile[3]]
    return any(isinstance(mode, str) and ";16" in mode for mode in modes)


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Grey pixels (rows, columns) of more than 8 bits, or floats, as uint8."""
    low, high = float(pixels.min()), float(pixels.max())
    is_float = pixels.dtype.kind == "f"
    if is_float and low >= -_SLACK and high <= 1 + _SLACK:
        return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if low < 0 or not high < 2**16 or (is_float and not high >= _LOWEST_BRIGHT):  # NaN fails each comparison
        raise UnsupportedPixels(
            f"{'float' if is_float else 'integer'} pixels from {low:g} to {high:g}: expected integers of 8 to 16 "
            "bits, or floats from 0 to 1; convert them"
        )
    depth = next(depth for depth in _DEPTHS if high < 2**depth)
    return (pixels / 2 ** (depth - 8)).astype(np.uint8)


class _PictureReader:
    """Put before an image processor: what it gets of Pillow is read by `to_picture` first."""

    _auto_class = "AutoImageProcessor"

    def preprocess(self, images, *args, **kwargs):
        """As in the class below it, for pictures of any mode and orientation."""
        num_channels = len(self.image_mean) if isinstance(self.image_mean, (list, tuple)) else 3
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        if _IS_OLD and num_channels not in (1, 3) and hasattr(first, "getexif"):
            kwargs.setdefault("input_data_format", "channels_last")
        return super().preprocess(self._read(images), *args, **kwargs)

    def to_dict(self) -> dict:
        """Its settings; the type is that of transformers, so that they load without this file too."""
        names = {cls.__name__: name for name, cls in PROCESSORS.items()}
        return {**super().to_dict(), "image_processor_type": names[type(self).__name__]}

    def _read(self, images):
        if isinstance(images, (list, tuple)):
            return [self._read(image) for image in images]
        if not hasattr(images, "getexif"):  # an array or a tensor
            return images
        num_channels = len(self.image_mean) if isinstance(self.image_mean, (list, tuple)) else 3
        picture = to_picture(images, num_channels=num_channels)
        return np.array(picture)[:, :, None] if num_channels == 1 else picture


class ViTWithRegistersImageProcessor(_PictureReader, BitImageProcessor):
    """`BitImageProcessor` for files of any depth, mode and orientation."""


class ViTWithRegistersSegmentationImageProcessor(_PictureReader, SegformerImageProcessor):
    """`SegformerImageProcessor` for files of any depth, mode and orientation; masks are left as they are."""


class ViTWithRegistersDepthImageProcessor(_PictureReader, DPTImageProcessor):
    """`DPTImageProcessor` for files of any depth, mode and orientation."""


PROCESSORS = {
    "BitImageProcessor": ViTWithRegistersImageProcessor,
    "SegformerImageProcessor": ViTWithRegistersSegmentationImageProcessor,
    "DPTImageProcessor": ViTWithRegistersDepthImageProcessor,
}


__all__ = ["MODES", "PROCESSORS", "UnsupportedPixels", "to_picture", *(cls.__name__ for cls in PROCESSORS.values())]

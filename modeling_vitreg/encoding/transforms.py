"""How a decoded image becomes the bytes that a model reads: cut to a square, or whole and padded to full patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modeling_vitreg.features.pixels import crop_image, crop_map, pad_image, shrink_image
from modeling_vitreg.modeling_vitreg import check_image_size


if TYPE_CHECKING:
    from modeling_vitreg.features import Encoder


@dataclasses.dataclass(frozen=True)
class Cut:
    """A transform for one encoder. Workers receive it, so it holds no model.

    Args:
        mode: mode of Pillow that the model reads.
        patch_shape: (rows, columns) of a patch in pixels.
        sides: (rows, columns) to cut out; None: the whole image is padded.
        longest_side: of a padded image, in pixels; None: unchanged.
    """

    mode: str
    patch_shape: tuple[int, int]
    sides: tuple[int, int] | None
    longest_side: int | None = None

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Bytes (C, rows, columns), and (rows, columns) of the image in them without padding."""
        if self.sides is not None:
            return crop_image(image.convert(self.mode), self.sides), self.sides
        image = shrink_image(image, self.longest_side)
        return pad_image(image.convert(self.mode), self.patch_shape), (image.height, image.width)

    def cut_maps(self, maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Mask and depth (height, width) of the image, cut in the same way; a padded image has none."""
        return {} if self.sides is None else {name: crop_map(values, self.sides) for name, values in maps.items()}


@dataclasses.dataclass(frozen=True)
class Crop:
    """Resize (bicubic) until the short side fits, and cut in the centre.

    Args:
        size: side of the square in pixels; None: the size of the encoder.
    """

    size: int | None = None

    def make(self, encoder: Encoder) -> Cut:
        """The transform for an encoder.

        Raises:
            ValueError: the size does not fit the patches, or image files have other channels than the encoder.
        """
        sides = tuple(encoder.image_size) if self.size is None else (self.size, self.size)
        check_image_size(sides, encoder.patch_shape)
        return Cut(encoder.image_mode, tuple(encoder.patch_shape), sides)


@dataclasses.dataclass(frozen=True)
class Pad:
    """The whole image, with zeros (after normalising) at the bottom and the right up to whole patches.

    Args:
        longest_side: longer images are resized (bicubic) to it; None: all are read at full resolution.
        batch_size: most images per forward pass, because they may be large; None: as many as in the pass.
    """

    longest_side: int | None = None
    batch_size: int | None = None

    def make(self, encoder: Encoder) -> Cut:
        """The transform for an encoder.

        Raises:
            ValueError: image files have other channels than the encoder.
        """
        return Cut(encoder.image_mode, tuple(encoder.patch_shape), None, self.longest_side)

"""Images in order, from any source; images that cannot be read are counted and named instead of raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.images import ImageSource, ImageStream, UnreadableImage, decode_image, open_images


_NUM_NAMED = 20  # unreadable images whose names are kept


@dataclass
class SampleReader:
    """One pass over a source: `for image, label, name in reader`.

    Args:
        images: an `ImageSource`, an `ImageStream`, a string for `open_images`, or an iterable of PIL images, or of
            pairs of an image and its label (or None).
        limit: maximum number of images to read, including unreadable ones; None for all.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
    """

    images: object
    limit: int | None = None
    num_channels: int = 3
    num_unreadable: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self):
        if isinstance(self.images, str):
            self.images = open_images(self.images)

    @property
    def total(self) -> int | None:
        """Number of images to read, None if the source does not know it."""
        if not hasattr(self.images, "__len__"):
            return self.limit
        return len(self.images) if self.limit is None else min(self.limit, len(self.images))

    def __iter__(self) -> Iterator[tuple[Image.Image, int | None, str]]:
        for number, read in enumerate(_readers(self.images, self.num_channels)):
            if self.limit is not None and number >= self.limit:
                return
            try:
                yield read()
            except UnreadableImage as error:
                self.num_unreadable += 1
                if len(self.unreadable) < _NUM_NAMED:
                    self.unreadable.append(str(error))


def _readers(images: object, num_channels: int) -> Iterator[Callable]:
    """A function for each image that decodes it, so that its failure does not end the pass."""
    if isinstance(images, ImageSource):
        for index in range(len(images)):
            yield lambda index=index: _decode(images.raw(index), num_channels)
    elif isinstance(images, ImageStream):
        for raw, state in images.examples(seed=0):
            if state["pass"] > 0:
                return
            yield lambda raw=raw: _decode(raw, num_channels)
    elif isinstance(images, Iterable):
        for number, entry in enumerate(images):
            yield lambda entry=entry, name=f"image {number}": _as_sample(entry, name, num_channels)
    else:
        raise ValueError(
            f"expected images from `open_images` or an iterable of PIL images, got {type(images).__name__}"
        )


def _decode(raw: dict, num_channels: int) -> tuple[Image.Image, int | None, str]:
    return decode_image(raw, num_channels=num_channels), raw["label"], raw["name"]


def _as_sample(entry: object, name: str, num_channels: int) -> tuple[Image.Image, int | None, str]:
    image, label = entry if isinstance(entry, tuple) else (entry, None)
    if not isinstance(image, Image.Image):
        raise UnreadableImage(name, f"expected a PIL image, got a {type(image).__name__}")
    try:
        return image.convert(MODES[num_channels]), label, name
    except Exception as error:  # Pillow's plugins raise errors of many classes
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


__all__ = ["SampleReader"]

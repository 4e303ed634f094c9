"""Images in order, from any source, with the broken ones counted instead of raised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from modeling_vitreg.images import ImageSource, ImageStream, UnreadableImage, decode_image, open_images


_NUM_NAMED = 20  # unreadable images whose names are kept


@dataclass
class SampleReader:
    """Reads one pass over a source: `for image, label in reader`.

    Args:
        images: an `ImageSource`, an `ImageStream`, a string for `open_images`, or an iterable of PIL images, or of
            pairs of an image and its label (or None).
        limit: most images that are read, unreadable ones included; None for all.
    """

    images: object
    limit: int | None = None
    num_unreadable: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self):
        if isinstance(self.images, str):
            self.images = open_images(self.images)

    @property
    def total(self) -> int | None:
        """Images that will be read, None where the source does not know."""
        if not hasattr(self.images, "__len__"):
            return self.limit
        return len(self.images) if self.limit is None else min(self.limit, len(self.images))

    def __iter__(self) -> Iterator[tuple[Image.Image, int | None]]:
        for number, read in enumerate(_readers(self.images)):
            if self.limit is not None and number >= self.limit:
                return
            try:
                yield read()
            except UnreadableImage as error:
                self.num_unreadable += 1
                if len(self.unreadable) < _NUM_NAMED:
                    self.unreadable.append(str(error))


def _readers(images: object) -> Iterator:
    """A function for each image that decodes it, so that its failure does not end the pass."""
    if isinstance(images, ImageSource):
        for index in range(len(images)):
            yield lambda index=index: images.read(index)
    elif isinstance(images, ImageStream):
        for raw, state in images.examples(seed=0):
            if state["pass"] > 0:
                return
            yield lambda raw=raw: (decode_image(raw), raw["label"])
    elif isinstance(images, Iterable):
        for number, entry in enumerate(images):
            yield lambda entry=entry, number=number: _as_pair(entry, number)
    else:
        raise ValueError(
            f"expected images from `open_images` or an iterable of PIL images, got {type(images).__name__}"
        )


def _as_pair(entry: object, number: int) -> tuple[Image.Image, int | None]:
    image, label = entry if isinstance(entry, tuple) else (entry, None)
    if not isinstance(image, Image.Image):
        raise UnreadableImage(f"image {number}", f"expected a PIL image, got a {type(image).__name__}")
    try:
        return image.convert("RGB"), label
    except Exception as error:  # Pillow's plugins raise whatever they stumble upon
        raise UnreadableImage(f"image {number}", f"{type(error).__name__}: {error}") from error


__all__ = ["SampleReader"]

"""Images from any source by one string: rendered scenes, a folder, WebDataset shards, a dataset of a disk or the Hub.

What is opened holds images as they were stored; `decode_image` turns one into pixels, late, where a broken file can be
reported and replaced. `ImageSource` can be indexed; `ImageStream` is read in order and remembers where it was.

A raw image is a dictionary: `bytes` (or None), `path` (or None), `label` (int or None) and `name` for messages; `text`
and `maps`, where a source was opened with them. Maps say something of each pixel: its class, or its depth.
"""

from .decoding import (
    RawImage,
    UnreadableImage,
    check_channels,
    decode_image,
    decode_maps,
    describe_unreadable,
)
from .hub import split_hub_name
from .open import OpenedDataset, open_dataset, open_images
from .options import DataOptions, parse_columns
from .sources import ImageSource, ImageStream, derive_seed


__all__ = [
    "DataOptions",
    "ImageSource",
    "ImageStream",
    "OpenedDataset",
    "RawImage",
    "UnreadableImage",
    "check_channels",
    "decode_image",
    "decode_maps",
    "derive_seed",
    "describe_unreadable",
    "open_dataset",
    "open_images",
    "parse_columns",
    "split_hub_name",
]

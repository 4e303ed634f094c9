"""Images from any source by one string: rendered scenes, a folder, WebDataset shards, a dataset of a disk or the Hub.

An opened source holds images as they were stored; `decode_image` turns one into pixels, late, where a broken file can
be reported and replaced. `ImageSource` can be indexed; `ImageStream` is read in order and remembers where it was.

A raw image is a dictionary: `bytes` (or None), `path` (or None), `label` (int or None) and `name` for messages; also
`text`, `maps` and `boxes`, where a source was opened with their columns. `read_annotated` decodes it with its
annotations, each compared with the image.
"""

from .annotations import AnnotatedImage, read_annotated
from .decoding import (
    RawImage,
    UnreadableImage,
    check_channels,
    decode_image,
)
from .hub import split_hub_name
from .labelled import LabelledData, open_data
from .messages import MissingSplit
from .open import OpenedDataset, open_dataset, open_images
from .options import SCENE_COLUMNS, DataOptions, parse_columns
from .sources import ImageSource, ImageStream, derive_seed


__all__ = [
    "SCENE_COLUMNS",
    "AnnotatedImage",
    "DataOptions",
    "ImageSource",
    "ImageStream",
    "LabelledData",
    "MissingSplit",
    "OpenedDataset",
    "RawImage",
    "UnreadableImage",
    "check_channels",
    "decode_image",
    "derive_seed",
    "open_data",
    "open_dataset",
    "open_images",
    "parse_columns",
    "read_annotated",
    "split_hub_name",
]

"""One pass over images: they are read once, encoded once, and handed to several consumers.

    counts = run_pass(encoder, images, consumers, settings=PassSettings(batch_size=64))

A consumer says what it `needs`, is updated batch by batch, and adds up over processes. The pass reads, cuts
and encodes the images, leaves out what cannot be read or encoded and says what it was, shows a progress bar, ends in
order on Ctrl-C, and splits the images among processes.
"""

from .consumer import Consumer, EncodedBatch, ImageFacts, Needs, Shard
from .images import ImageReader, read_all
from .one_pass import run_pass
from .settings import PassCounts, PassSettings
from .transforms import Crop, Pad


__all__ = [
    "Consumer",
    "Crop",
    "EncodedBatch",
    "ImageFacts",
    "ImageReader",
    "Needs",
    "Pad",
    "PassCounts",
    "PassSettings",
    "Shard",
    "read_all",
    "run_pass",
]

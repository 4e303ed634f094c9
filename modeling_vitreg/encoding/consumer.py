"""The contract between a pass over images and what is measured in it.

Letters for shapes: B images of a batch, N tokens, Q prefix tokens, H heads, D width.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from modeling_vitreg.features import Encoder, TokenFeatures

from .settings import PassCounts
from .transforms import Crop, Pad


if TYPE_CHECKING:
    from typing import Self


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a consumer reads of each batch. The needs of all consumers are united, so the model runs once for all.

    Args:
        features: pairs (layer, feature) as `extract_many` takes them; negative layers count from the end.
        attention: layers (from 1, or from -1 backwards) whose attention of the prefix tokens is needed for each image.
        outputs: further tensors (B, ...) by name, each made by a function of the encoder and the pixels.
        annotations: which of "mask", "depth" and "box" are read; labels always are.
        transform: how images become pixels. Consumers with different transforms share the decoded image.
    """

    features: tuple[tuple[int, str], ...] = ()
    attention: tuple[int, ...] = ()
    outputs: Mapping[str, Callable[[Encoder, Tensor], Tensor]] = dataclasses.field(default_factory=dict)
    annotations: tuple[str, ...] = ()
    transform: Crop | Pad = Crop()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFacts:
    """What is known about an image of a batch.

    Args:
        number: its place in the source, from 0.
        name: for messages and reports.
        label: class number, or None.
        original_size: (rows, columns) of the decoded image.
        size: (rows, columns) after the transform, without padding.
        boxes: xyxy in pixels of the decoded image (objects, 4); None: not annotated or not asked for.
    """

    number: int
    name: str
    label: int | None
    original_size: tuple[int, int]
    size: tuple[int, int]
    boxes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Images of one batch whose features are all finite, and what the model made of them, on its device.

    Args:
        encoder: the model.
        images: facts about each of the B images.
        pixels: (B, C, height, width), normalised, float32.
        features: by (layer, feature), with layers as numbers from 0.
        attention: (B, H, Q, N) of each layer, by its number.
        outputs: see `Needs`.
        maps: "mask" (B, height, width) int16 and "depth" float32, on the CPU, cut as the images are.
        autocast: makes the context in which the model runs, for a consumer that runs it again.
    """

    encoder: Encoder
    images: Sequence[ImageFacts]
    pixels: Tensor
    features: Mapping[tuple[int, str], TokenFeatures]
    attention: Mapping[int, Tensor]
    outputs: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]
    autocast: Callable[[], AbstractContextManager]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def numbers(self) -> Tensor:
        """(B,) int64 on the CPU: the place of each image in the source."""
        return torch.tensor([image.number for image in self.images], dtype=torch.int64)

    @property
    def labels(self) -> list[int | None]:
        """Class numbers of the images."""
        return [image.label for image in self.images]

    @property
    def names(self) -> list[str]:
        """Names of the images."""
        return [image.name for image in self.images]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple(side // patch for side, patch in zip(self.pixels.shape[2:], self.encoder.patch_shape))

    def tokens(self, layer: int = -1, feature: str = "token") -> TokenFeatures:
        """A feature of a layer that was needed; -1 is the last layer."""
        return self.features[layer % (self.encoder.num_layers + 1), feature]

    def count_first(self, number: int) -> int:
        """How many images of the batch are among the first `number` of the source; they come first in the batch."""
        return sum(image.number < number for image in self.images)

    def attend(self, layers: Sequence[int], *, first: int | None = None) -> list[Tensor]:
        """Attention (B, H, Q, N) of the prefix tokens for the `first` images (None: all), in a pass of its own."""
        with self.autocast():
            return self.encoder.prefix_attention(self.pixels[:first], layers=layers)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the images that was read to its end: the unit in which a consumer may store and resume.

    Args:
        index: number of the shard, from 0.
        numbers: places of its images in the source, with those that were left out.
        counts: what was read of it, and what was left out.
    """

    index: int
    numbers: range
    counts: PassCounts


class Consumer(abc.ABC):
    """Base class of what is measured in a pass. It never sees a file, a device or a process.

    A consumer must pickle, so that the first process can merge those of the others; an `Encoder` that it holds does
    not travel.

    Attributes:
        needs: what it reads of each batch; set it before the pass.
        name: for messages.
        skipped: why the pass dropped it after an error; None: it saw every batch.
    """

    needs: Needs = Needs()
    name: str = ""
    skipped: str | None = None

    @abc.abstractmethod
    def update(self, batch: EncodedBatch) -> None:
        """Add a batch."""

    def has_shard(self, index: int) -> bool:
        """Whether a shard was stored by an earlier pass, so that this consumer is not given its images.

        Called only for shards of this process; other processes may be writing theirs.
        """
        return False

    def end_shard(self, shard: Shard) -> None:  # noqa: B027 (few consumers store anything)
        """Store a shard, after all of its images were given to `update`. Called only with `shard_size`."""

    @abc.abstractmethod
    def merge(self, others: Sequence[Self]) -> None:
        """Add what the consumers of other processes saw, in order of rank."""

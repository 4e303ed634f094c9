"""Images of any source in numbered chunks: decoded, cut to bytes and stacked, in this process or in workers.

The process that owns the model lists the images; a worker decodes them. A stream is listed as the undecoded bytes of
its images. With several processes each lists all images and decodes the shards number rank, rank + size, ...

Letters for shapes: B images of a group, C channels.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import tqdm
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.images import (
    AnnotatedImage,
    ImageSource,
    ImageStream,
    UnreadableImage,
    open_images,
    read_annotated,
)
from modeling_vitreg.images.annotations import NoteCounter
from modeling_vitreg.workers import count_cores, ignore_interrupts, share, take

from .consumer import ImageFacts
from .settings import PassCounts, PassSettings
from .transforms import Cut


_NUM_CHANNELS = {mode: number for number, mode in MODES.items()}
_MOST_WORKERS = 16


@dataclasses.dataclass
class Group:
    """Images of a chunk whose cut pixels have equal shapes.

    Args:
        images: facts about each of the B images.
        pixels: bytes (B, C, rows, columns).
        maps: "mask" (B, rows, columns) int16 and "depth" float32.
    """

    images: list[ImageFacts]
    pixels: Tensor
    maps: dict[str, Tensor]

    def split(self, number: int) -> tuple[Group, Group]:
        """The first images, and the rest."""
        parts = slice(0, number), slice(number, None)
        return tuple(
            Group(self.images[part], self.pixels[part], {name: value[part] for name, value in self.maps.items()})
            for part in parts
        )

    @staticmethod
    def join(groups: Sequence[Group]) -> Group:
        """Images of the same shape together."""
        maps = {name: torch.cat([group.maps[name] for group in groups]) for name in groups[0].maps}
        images = [image for group in groups for image in group.images]
        return Group(images, torch.cat([group.pixels for group in groups]), maps)

    def pin_memory(self) -> Group:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        return Group(self.images, self.pixels.pin_memory(), self.maps)


@dataclasses.dataclass
class Chunk:
    """Images that were read together: consecutive ones of one shard.

    Args:
        shard: number of the shard.
        numbers: their places in the source.
        groups: for each transform, images of equal shapes.
        unreadable: by place, the name of an image and why it cannot be read.
        notes: what was done to bring images and annotations together.
    """

    shard: int
    numbers: range
    groups: list[list[Group]]
    unreadable: dict[int, str]
    notes: NoteCounter

    def pin_memory(self) -> Chunk:
        """The same in page-locked memory."""
        return dataclasses.replace(self, groups=[[group.pin_memory() for group in part] for part in self.groups])


class ImageReader:
    """Chunks of images in order: `for chunk in reader.read(...)`.

    Args:
        images: an `ImageSource`, an `ImageStream`, a string for `open_images`, a list of `AnnotatedImage`, or an
            iterable of PIL images, or of pairs of an image and its label (or None).
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        annotations: which of "mask", "depth" and "box" are read.

    Raises:
        ValueError: no source of images.
    """

    def __init__(self, images: object, *, num_channels: int = 3, annotations: Sequence[str] = ()):
        images = open_images(images) if isinstance(images, str) else images
        if isinstance(images, ImageSource):
            images = images.only(*annotations)
        elif not isinstance(images, (ImageStream, Iterable)) and not _is_sequence(images):
            raise ValueError(
                f"expected images from `open_images` or an iterable of PIL images, got {type(images).__name__}"
            )
        self.images, self.num_channels = images, num_channels

    def total(self, limit: int | None) -> int | None:
        """Number of images to read, None if the source does not know it."""
        if not hasattr(self.images, "__len__"):
            return limit
        return len(self.images) if limit is None else min(limit, len(self.images))

    def read(
        self,
        transforms: Sequence[Cut],
        settings: PassSettings,
        *,
        context: DistributedContext = SINGLE_PROCESS,
        is_done: Callable[[int], bool] = lambda shard: False,
        pin_memory: bool = False,
    ) -> Iterator[Chunk]:
        """Chunks of at most `batch_size` images.

        Args:
            transforms: how images become bytes, one after another.
            settings: batch size, workers, limit, and size of the shards (None: a shard is a batch).
            context: processes that share the images.
            is_done: whether a shard need not be read.
            pin_memory: put the bytes into page-locked memory.

        Raises:
            RuntimeError: a worker died.
        """
        source = self.images if _is_sequence(self.images) else None
        decoder = _Decoder(source, tuple(transforms), self.num_channels)
        loader = DataLoader(
            decoder,
            sampler=self._specs(settings, context, is_done),
            batch_size=None,
            num_workers=self._count_workers(settings, context),
            collate_fn=share,
            pin_memory=pin_memory,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # or it would draw from torch's global one
        )
        chunks = iter(loader)
        while True:
            try:
                chunk = take(chunks, reader="the reader of images")
            except StopIteration:
                return
            yield chunk

    def _count_workers(self, settings: PassSettings, context: DistributedContext) -> int:
        if not isinstance(self.images, (ImageSource, ImageStream)):
            return 0
        if settings.workers is not None:
            return settings.workers
        return min(max(count_cores() // context.size - 1, 0), _MOST_WORKERS)

    def _specs(
        self, settings: PassSettings, context: DistributedContext, is_done: Callable[[int], bool]
    ) -> Iterator[tuple[int, int, list]]:
        """Shard, first number and keys of each chunk of this process."""
        size, step = settings.shard_size or settings.batch_size, settings.batch_size
        keys = itertools.islice(self._keys(), settings.limit)
        for shard in itertools.count():
            # By the number alone: the shards that are done become more while others are still being chosen.
            if shard % context.size != context.rank or is_done(shard):
                if sum(1 for _ in itertools.islice(keys, size)) < size:
                    return
                continue
            end = (shard + 1) * size
            for start in range(shard * size, end, step):
                chunk = list(itertools.islice(keys, min(step, end - start)))
                if not chunk:
                    return
                yield shard, start, chunk

    def _keys(self) -> Iterator[Any]:
        """For each image what `_Decoder` finds it by: its index, or itself."""
        if isinstance(self.images, ImageStream):
            return (
                raw for raw, _ in itertools.takewhile(lambda pair: not pair[1]["pass"], self.images.examples(seed=0))
            )
        return iter(range(len(self.images)) if _is_sequence(self.images) else self.images)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """Makes a chunk from its specification, in a worker.

    Args:
        source: images that are found by an index; None: the keys are images.
        transforms, num_channels: as in `ImageReader`.
    """

    source: Any
    transforms: tuple[Cut, ...]
    num_channels: int

    def __getitem__(self, spec: tuple[int, int, list]) -> Chunk:
        shard, start, keys = spec
        unreadable, notes = {}, NoteCounter()
        cut = [collections.defaultdict(list) for _ in self.transforms]  # shape -> images
        for number, key in enumerate(keys, start):
            try:
                found = self._read(key, number)
            except UnreadableImage as problem:
                unreadable[number] = str(problem)
                continue
            notes.add(found.name, found.notes)
            for transform, by_shape in zip(self.transforms, cut):
                pixels, size = transform(found.image)
                maps = transform.cut_maps(found.maps)
                facts = ImageFacts(number, found.name, found.label, found.image.size[::-1], size, found.boxes)
                by_shape[pixels.shape].append((facts, pixels, maps))
        groups = [[_stack(images) for images in by_shape.values()] for by_shape in cut]
        return Chunk(shard, range(start, start + len(keys)), groups, unreadable, notes)

    def _read(self, key: Any, number: int) -> AnnotatedImage:
        if isinstance(self.source, ImageSource):
            return read_annotated(self.source.raw(key), num_channels=self.num_channels)
        entry = key if self.source is None else self.source[key]
        if isinstance(entry, AnnotatedImage):
            return entry
        if isinstance(entry, dict):
            return read_annotated(entry, num_channels=self.num_channels)
        image, label = entry if isinstance(entry, tuple) else (entry, None)
        name = f"image {number}"
        if not isinstance(image, Image.Image):
            raise UnreadableImage(name, f"expected a PIL image, got a {type(image).__name__}")
        try:
            return AnnotatedImage(name, image.convert(MODES[self.num_channels]), label)
        except Exception as error:  # Pillow's plugins raise errors of many classes
            raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def read_all(
    images: object,
    cut: Cut,
    settings: PassSettings,
    *,
    annotations: Sequence[str] = (),
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[Group | None, PassCounts]:
    """All images of this process in memory as bytes, for a program that keeps them; None if none can be read.

    Args:
        images: anything that `ImageReader` reads.
        cut: from `Crop(...).make(encoder)`, so that all have one shape.
        settings: batch size, workers, limit and progress bar.
        annotations: which of "mask" and "depth" are read.
        context: processes that share the images.
    """
    reader = ImageReader(images, num_channels=_NUM_CHANNELS[cut.mode], annotations=annotations)
    total, is_hidden = reader.total(settings.limit), not settings.has_progress_bar
    counts, groups = PassCounts(), []
    with tqdm.tqdm(total=total, unit="image", desc=settings.title, disable=is_hidden, leave=False, delay=2) as bar:
        for chunk in reader.read([cut], settings, context=context):
            groups += chunk.groups[0]
            counts.unreadable |= chunk.unreadable
            counts.notes.merge(chunk.notes.counts)
            bar.update(len(chunk.numbers) * context.size)
    counts.num_seen = sum(len(group.images) for group in groups)
    return (Group.join(groups) if groups else None), counts


def _stack(images: list[tuple[ImageFacts, np.ndarray, dict]]) -> Group:
    facts, pixels, maps = zip(*images)
    stacked = {name: torch.from_numpy(np.stack([each[name] for each in maps])) for name in maps[0]}
    if "mask" in stacked:
        stacked["mask"] = stacked["mask"].to(torch.int16)
    return Group(list(facts), torch.from_numpy(np.stack(pixels)), stacked)


def _is_sequence(images: object) -> bool:
    return hasattr(images, "__len__") and hasattr(images, "__getitem__")

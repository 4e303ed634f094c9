"""Images that can be indexed, and images that are read in order by a stream that remembers where it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modeling_vitreg.reports import short_hash

from .annotations import AnnotatedImage, read_annotated
from .columns import Columns, find_columns, hash_content, join_texts
from .decoding import RawImage, decode_image
from .labels import describe_labels
from .opened import OpenedDataset
from .options import DataOptions


if TYPE_CHECKING:
    import datasets


_NUM_SAMPLES = 256  # images whose size or bytes are hashed


class _Images:
    """What images of both kinds share: their columns, and sentences about their annotations."""

    _columns: Columns
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # sentences about files that are not read

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names, None where classes are numbers or there are none."""
        return self._columns.labels.names

    @property
    def has_label_lists(self) -> bool:
        """Whether an image has any number of classes: labels are 0 or 1 for each of them."""
        return self._columns.labels.are_lists

    @property
    def options(self) -> DataOptions:
        """Columns and the meaning of their values."""
        return self._columns.options

    def with_options(self, options: DataOptions, notes: Sequence[str] = ()) -> _Images:
        """The same images, with annotations read by other options of the same columns; with more notes."""
        changed = self._copy()
        changed._columns = dataclasses.replace(self._columns, options=options)
        changed.notes = (*self.notes, *notes)
        return changed

    def _copy(self) -> _Images:
        copied = copy.copy(self)
        for name in ("dataset_hash", "box_fingerprint", "labels"):
            copied.__dict__.pop(name, None)
        return copied


class ImageSource(_Images):
    """Images that can be indexed: `len(source)`, `source[index]` with all annotations, `source.read(index)` without.

    Args:
        dataset: a dataset of the library `datasets`, or what `open_dataset` returns.
        options: columns and the meaning of their values; None: image and label are found, nothing else is read.
        kind: what an image without a path is called, with its index.
        notes: sentences about the annotations, for people and reports.

    Attributes:
        revision: commit of a dataset of the Hub, else None.

    Raises:
        ValueError: a column does not exist, or the choice is not clear.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | OpenedDataset,
        *,
        options: DataOptions | None = None,
        kind: str = "image",
        notes: Sequence[str] = (),
    ):
        opened = dataset if isinstance(dataset, OpenedDataset) else OpenedDataset(dataset)
        self.revision, self.notes, self._kind = opened.revision, tuple(notes), kind
        self.left_out = tuple(opened.notes)
        self._columns = find_columns(opened, options or DataOptions())
        self._dataset = self._columns.select(opened.dataset)
        self._indices, self._whole = None, None

    def __len__(self) -> int:
        return len(self._dataset) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> AnnotatedImage:
        """Decode an image and its annotations.

        Raises:
            UnreadableImage: see `read_annotated`.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_annotated(self.raw(index))

    def select(self, indices: np.ndarray) -> ImageSource:
        """Some of these images, in this order."""
        selected = self._copy()
        selected._indices = np.asarray(indices) if self._indices is None else self._indices[indices]
        selected._whole = self if self._whole is None else self._whole
        return selected

    def only(self, *kinds: str) -> ImageSource:
        """The same images with some of their annotations, out of `mask`, `depth` and `box`; labels stay."""
        others = {f"{kind}_column": None for kind in ("mask", "depth", "box") if kind not in kinds}
        return self.with_options(dataclasses.replace(self.options, **others))

    def spread(self, number: int) -> list[dict]:
        """At most `number` raw images, spread over all of them."""
        indices = sorted({len(self) * step // number for step in range(number)}) if len(self) else []
        return [self.raw(index) for index in indices]

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode an image as RGB; with its label, None where it has none.

        Raises:
            UnreadableImage: see `decode_image`.
        """
        raw = self.raw(index)
        return decode_image(raw), raw["label"]

    def raw(self, index: int) -> RawImage:
        """An image as it was stored."""
        index = index if self._indices is None else int(self._indices[index])
        return self._columns.to_raw(self._dataset[index], fallback=f"{self._kind} {index}")

    @functools.cached_property
    def labels(self) -> list[int | None]:
        """Class numbers of all images in order; None where an image has none."""
        labels = self._columns.labels
        if labels.column is None:
            return [None] * len(self)
        values = self._dataset[labels.column][:]
        values = values if self._indices is None else [values[index] for index in self._indices.tolist()]
        return [labels.encode({labels.column: value}) for value in values]

    def describe_labels(self) -> str:
        """Lines to show before work starts: the classes, how they were found, what was left out."""
        return describe_labels(self._columns.labels, self.labels, self.left_out)

    def texts(self) -> Iterator[str]:
        """All captions in order, several of an image joined, without an image being read.

        Raises:
            ValueError: the source was opened without a text column.
        """
        if not self._columns.text:
            raise ValueError("open_images: captions were asked for, but the source was opened without text_column")
        return map(join_texts, self._dataset[self._columns.text][:])

    def name_of(self, index: int) -> str:
        """Path of an image where it has one, else its number."""
        return self.raw(index)["name"]

    @functools.cached_property
    def dataset_hash(self) -> str:
        """16-character hash of the data, which does not change with the place or the time of a copy.

        It covers the number of images, the class names, all labels, all paths below their common folder, and the bytes
        (the size of a file) of at most 256 images spread over the whole, with those of their maps.
        """
        if self._whole is not None:
            return short_hash([self._whole.dataset_hash, self._indices.tolist()])
        column = self._columns.labels.column
        labels = self._dataset[column][:] if column else None
        tables = self._dataset.select_columns(self._columns.image).with_format("arrow").iter(10_000)
        chunks = itertools.chain.from_iterable(table[self._columns.image].chunks for table in tables)
        paths = [path or "" for chunk in chunks for path in chunk.field("path").to_pylist()]
        if os.path.exists(min(paths, default="")):  # or the hash would know whether the folder was named from here
            paths = list(map(os.path.abspath, paths))
        ends = [os.path.dirname(path) for path in (min(paths, default=""), max(paths, default=""))]
        folder = os.path.commonpath(ends) if all(map(os.path.isabs, ends)) else ""
        paths = [path[len(folder) :] for path in paths]
        spread = sorted({len(self) * step // _NUM_SAMPLES for step in range(_NUM_SAMPLES)}) if len(self) else []
        raws = [self.raw(index) for index in spread]
        contents = [hash_content(raw) for raw in raws]
        facts = [self.class_names, labels, paths, contents]
        return short_hash([*facts, *self._columns.hash_maps(raws)])

    @functools.cached_property
    def box_fingerprint(self) -> str | None:
        """16-character hash of images, their order and all boxes; None without boxes."""
        options = self.options
        if not options.box_column:
            return None
        whole = self if self._whole is None else self._whole
        numbers = range(len(self)) if self._indices is None else self._indices.tolist()
        cells = self._dataset[options.box_column][:]
        how = {"auto": None, "xyxy": "corners"}.get(options.box_format, options.box_format)  # as older versions wrote
        others = [value for value in (options.box_units, options.annotation_frame) if value != "auto"]
        return short_hash([whole.dataset_hash, list(numbers), how, [repr(cells[index]) for index in numbers], *others])


class ImageStream(_Images):
    """Images that are read in order, without end, each pass in another one: `stream.examples(seed=0)`.

    Args:
        dataset: a stream of the library `datasets`, or what `open_dataset` returns.
        options: see `ImageSource`.
        block_size: images that are held undecoded and shuffled among each other.

    Attributes:
        revision: commit of a dataset of the Hub, else None.

    Raises:
        ValueError: a column does not exist, the choice is not clear, or `block_size` is not positive.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset | OpenedDataset,
        *,
        options: DataOptions | None = None,
        block_size: int = 1000,
    ):
        opened = dataset if isinstance(dataset, OpenedDataset) else OpenedDataset(dataset)
        if block_size < 1:
            raise ValueError(f"ImageStream: expected block_size to be a positive integer, got {block_size!r}.")
        if opened.dataset.features is None:
            raise ValueError(
                "ImageStream: expected a stream whose column types are known: pass `features` when you create it."
            )
        self._columns = find_columns(opened, options or DataOptions())
        self._dataset = self._columns.select(opened.dataset)
        self._block_size = block_size
        self.revision, self._files, self.left_out = opened.revision, tuple(opened.files), tuple(opened.notes)

    @functools.cached_property
    def dataset_hash(self) -> str:
        """16-character hash of names and sizes of local files, of the number of shards and of the first image."""
        files = [(os.path.basename(path), os.path.getsize(path)) for path in self._files]
        first = [self._columns.to_raw(row, fallback="") for row in itertools.islice(self._dataset, 1)]
        contents = [(os.path.basename(raw["name"]), hash_content(raw)) for raw in first]
        facts = [self.class_names, self._dataset.num_shards, files, contents]
        return short_hash([*facts, *self._columns.hash_maps(first)])

    def describe_labels(self) -> str:
        """Lines to show before work starts; see `ImageSource`."""
        return describe_labels(self._columns.labels, None, self.left_out)

    def spread(self, number: int) -> list[dict]:
        """The first raw images, at most `number`."""
        rows = itertools.islice(self._dataset, number)
        return [self._columns.to_raw(row, fallback=f"image {index}") for index, row in enumerate(rows)]

    def examples(
        self, *, seed: int, rank: int = 0, num_processes: int = 1, state: dict | None = None
    ) -> Iterator[tuple[dict, dict]]:
        """Raw images of one process, without end, each with the state to resume after it.

        In every pass each image is seen once, by one process. The order of the shards is drawn from (seed, pass), the
        order inside a block of consecutive images from (seed, rank, pass, block): unlike a shuffle buffer, which would
        be lost, a block is read again when a stream resumes.

        Args:
            seed: 0 or a positive integer, the same in all processes.
            rank: rank of this process.
            num_processes: among which the shards are split, or, if their number does not divide, the images.
            state: what came with an image of this process; the first image is the one after it. It can be stored as
                JSON and holds no image.

        Raises:
            ValueError: `rank` is not in 0 ... num_processes - 1, or `state` belongs to another seed or process.
            RuntimeError: this process has no image in a pass.
        """
        from datasets.distributed import split_dataset_by_node

        if not 0 <= rank < num_processes:
            raise ValueError(f"ImageStream: expected rank in 0 ... {num_processes - 1}, got {rank!r}.")
        owner = {"seed": seed, "rank": rank, "num_processes": num_processes}
        state = {**owner, "pass": 0, "block": 0, "offset": 0, "dataset": None} if state is None else state
        found = {name: state.get(name) for name in owner}
        if found != owner:
            raise ValueError(
                f"ImageStream: expected the state of {owner}, got one of {found}; a stream resumes only with the same "
                "seed, number of processes and rank."
            )
        return self._read(split_dataset_by_node(self._dataset, rank=rank, world_size=num_processes), owner, state)

    def _read(self, dataset: datasets.IterableDataset, owner: dict, state: dict) -> Iterator[tuple[dict, dict]]:
        number, block, offset, start = (state[name] for name in ("pass", "block", "offset", "dataset"))
        seed, rank = owner["seed"], owner["rank"]
        while True:
            dataset.set_epoch(derive_seed(seed, number))  # a pass that is not 0 shuffles the shards, with this as seed
            dataset.load_state_dict(start)
            rows = iter(dataset)
            while images := list(itertools.islice(rows, self._block_size)):
                following = dataset.state_dict()
                order = np.random.default_rng([seed, rank, number, block]).permutation(len(images))
                position = {**owner, "pass": number, "block": block, "dataset": start}
                for place in range(offset, len(images)):
                    fallback = f"image {order[place]} of block {block} of pass {number}"
                    raw = self._columns.to_raw(images[order[place]], fallback=fallback)
                    yield raw, {**position, "offset": place + 1}
                block, offset, start = block + 1, 0, following
            if block == 0:
                raise RuntimeError(
                    f"ImageStream: process {rank} of {owner['num_processes']} found no image in a whole pass. "
                    "Use fewer processes or check that the source holds images."
                )
            number, block, offset, start = number + 1, 0, 0, None


def derive_seed(*words: int) -> int:
    """A seed in 1 ... 2 ** 63 - 1 from integers, 0 or positive, of any size."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1)) or 1

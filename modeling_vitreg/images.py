"""Images from any source by one string: rendered scenes, a folder, WebDataset shards, a dataset of a disk or the Hub.

What is opened holds images as they were stored; `decode_image` turns one into pixels, late, where a broken file can be
reported and replaced. `ImageSource` can be indexed; `ImageStream` is read in order and remembers where it was.

A raw image is a dictionary: `bytes` (or None), `path` (or None), `label` (int or None) and `name` for messages; `text`
and `maps`, where a source was opened with them. Maps say something of each pixel: its class, or its depth.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageOps

from modeling_vitreg.network import is_of_network
from modeling_vitreg.scenes import SceneSettings, make_scenes_dataset


if TYPE_CHECKING:
    import datasets


# Names under which a column wins over others of its kind.
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls")
_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
# Name, configuration and revision; a revision may be a branch such as refs/pr/1.
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_EXPECTED = (
    'expected "scenes", a folder of images, WebDataset shards (.tar files: one, a folder, a glob or a brace list), '
    "a folder of a dataset (parquet, arrow), or a name on the Hub (owner/name, with :configuration and "
    "@revision where they are wanted)"
)
_HIDDEN_LABEL = 255  # of a mask: nobody knows the class
_NUM_SAMPLES = 256  # images whose size or bytes enter a fingerprint
_DISK_SHARDS = 64  # of a stream over a dataset that was saved to disk


@dataclasses.dataclass(frozen=True)
class MapColumns:
    """Where maps of an image are; a map is stored as an image, or as an array.

    Args:
        mask: column of class numbers, 255 where nobody knows the class; None: there is none.
        depth: column of depths; None: there is none.
        depth_scale: metres of a unit of depth, 0.001 for millimetres.
        reduces_labels: of the stored masks 0 says that nobody knows, and classes count from 1, as in ADE20k.
    """

    mask: str | None = None
    depth: str | None = None
    depth_scale: float = 1.0
    reduces_labels: bool = False

    def __post_init__(self):
        if not self.depth_scale > 0:
            raise ValueError(f"depth_scale is above 0, metres of a unit, got {self.depth_scale!r}")

    @property
    def named(self) -> dict[str, str]:
        """Columns by what they hold: `mask`, `depth`."""
        return {kind: column for kind, column in (("mask", self.mask), ("depth", self.depth)) if column}


class UnreadableImage(Exception):
    """An image that cannot be decoded.

    Args:
        name: of the image, for messages.
        reason: what was wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(raw: dict) -> Image.Image:
    """Decode all pixels of a raw image, turned upright by its EXIF orientation, as RGB.

    Grey of 16 bits keeps its 8 upper bits; transparency is dropped, as the image processors of transformers do; of an
    animation the first frame is taken.

    Raises:
        UnreadableImage: the file is missing, empty, corrupt, truncated, of unknown format, or so large that Pillow
            takes it for a decompression bomb.
    """
    name = raw["name"]
    try:
        with Image.open(_open_file(raw)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnreadableImage:
        raise
    # Pillow's plugins raise whatever they stumble upon: OSError, SyntaxError, ValueError, struct.error, IndexError ...
    except Exception as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def decode_maps(raw: dict, *, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Decode the maps of a raw image.

    Args:
        raw: of a source that was opened with maps; without them there is nothing.
        size: width and height of the decoded image.

    Returns:
        `mask`, int32 class numbers, (height, width); `depth`, float32 in metres, (height, width).

    Raises:
        UnreadableImage: a map is missing, broken, or of another size.
    """
    maps = {}
    for kind, value in raw.get("maps", {}).items():
        try:
            maps[kind] = _decode_map(value)
        except Exception as error:  # see `decode_image`
            raise UnreadableImage(raw["name"], f"{kind}: {type(error).__name__}: {error}") from error
        if maps[kind].shape != size[::-1]:
            problem = f"{kind} of shape {maps[kind].shape} for an image of {size[::-1]} pixels"
            raise UnreadableImage(raw["name"], problem)
    if "mask" in maps:
        maps["mask"] = maps["mask"].astype(np.int32)
        if raw["reduces_labels"]:
            is_hidden = (maps["mask"] == 0) | (maps["mask"] == _HIDDEN_LABEL)
            maps["mask"] = np.where(is_hidden, np.int32(_HIDDEN_LABEL), maps["mask"] - 1)
    if "depth" in maps:
        maps["depth"] = maps["depth"].astype(np.float32) * np.float32(raw["depth_scale"])
    return maps


def derive_seed(*words: int) -> int:
    """The seed in 1 ... 2 ** 63 - 1 that stands for a sequence of integers: 0 or positive, of any size."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1)) or 1


class ImageSource:
    """Images that can be indexed: `len(source)`, `source.read(index)`.

    Args:
        dataset: of the library `datasets`.
        image_column: holds the images; None: the only column of type `Image`, or the one of a usual name.
        label_column: holds the classes; None: the only `ClassLabel`, or an integer column `label`, `labels` or `cls`.
        text_column: holds captions; None: captions are not read.
        maps: columns of maps; None: maps are not read.
        revision: commit of a dataset of the Hub, for reports.

    Raises:
        ValueError: a column does not exist, or the choice is not clear.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        maps: MapColumns | None = None,
        revision: str | None = None,
    ):
        self.revision = revision
        names = {"image": image_column, "label": label_column, "text": text_column}
        self._columns = _find_columns(dataset.features, **names, maps=maps or MapColumns())
        self._dataset = self._columns.select(dataset)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._columns.class_names

    @property
    def maps(self) -> MapColumns:
        """Where the maps are."""
        return self._columns.maps

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """Decode an image as RGB; with its label, None where it has none.

        Raises:
            UnreadableImage: see `decode_image`.
        """
        raw = self.raw(index)
        return decode_image(raw), raw["label"]

    def raw(self, index: int) -> dict:
        """An image as it was stored."""
        return self._columns.to_raw(self._dataset[index], fallback=f"image {index}")

    def texts(self) -> Iterator[str]:
        """All captions in order, several of an image joined, without an image being read.

        Raises:
            ValueError: the source was opened without a text column.
        """
        if not self._columns.text:
            raise ValueError("open_images: captions were asked for, but the source was opened without text_column")
        return map(_join_texts, self._dataset[self._columns.text][:])

    def name_of(self, index: int) -> str:
        """Path of an image where it has one, else its number."""
        return self.raw(index)["name"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with the data, but not with the place or the time of a copy.

        They sum up the number of images, the class names, all labels, all paths below their common folder, and of at
        most 256 images spread over the whole the bytes (of a file: its size), with those of their maps.
        """
        labels = self._dataset[self._columns.label][:] if self._columns.label else None
        tables = self._dataset.select_columns(self._columns.image).with_format("arrow").iter(10_000)
        chunks = itertools.chain.from_iterable(table[self._columns.image].chunks for table in tables)
        paths = [path or "" for chunk in chunks for path in chunk.field("path").to_pylist()]
        ends = [os.path.dirname(path) for path in (min(paths, default=""), max(paths, default=""))]
        folder = os.path.commonpath(ends) if all(map(os.path.isabs, ends)) else ""
        paths = [path[len(folder) :] for path in paths]
        spread = sorted({len(self) * step // _NUM_SAMPLES for step in range(_NUM_SAMPLES)}) if len(self) else []
        raws = [self.raw(index) for index in spread]
        contents = [_sum_up_content(raw) for raw in raws]
        facts = [self.class_names, labels, paths, contents]
        return _shorten([*facts, *self._columns.sum_up_maps(raws)])


class ImageStream:
    """Images that are read in order, without end, each pass in another one: `stream.examples(seed=0)`.

    Args:
        dataset: a stream of the library `datasets`.
        image_column: see `ImageSource`.
        label_column: see `ImageSource`.
        text_column: see `ImageSource`.
        maps: see `ImageSource`.
        block_size: images that are held undecoded and shuffled among each other.
        files: local files of the stream, for the fingerprint.
        revision: see `ImageSource`.

    Raises:
        ValueError: a column does not exist, the choice is not clear, or `block_size` is not positive.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        text_column: str | None = None,
        maps: MapColumns | None = None,
        block_size: int = 1000,
        files: Sequence[str] = (),
        revision: str | None = None,
    ):
        if block_size < 1:
            raise ValueError(f"ImageStream: block_size is a positive integer, got {block_size!r}.")
        if dataset.features is None:
            raise ValueError("ImageStream: expected a stream that knows the types of its columns; give it `features`.")
        names = {"image": image_column, "label": label_column, "text": text_column}
        self._columns = _find_columns(dataset.features, **names, maps=maps or MapColumns())
        self._dataset = self._columns.select(dataset)
        self._block_size = block_size
        self.revision = revision
        self._files = tuple(files)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels, None where they have none."""
        return self._columns.class_names

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen letters that change with the data: names and sizes of local files, number of shards, first image."""
        files = [(os.path.basename(path), os.path.getsize(path)) for path in self._files]
        first = [self._columns.to_raw(row, fallback="") for row in itertools.islice(self._dataset, 1)]
        contents = [(os.path.basename(raw["name"]), _sum_up_content(raw)) for raw in first]
        facts = [self.class_names, self._dataset.num_shards, files, contents]
        return _shorten([*facts, *self._columns.sum_up_maps(first)])

    def examples(
        self, *, seed: int, rank: int = 0, num_processes: int = 1, state: dict | None = None
    ) -> Iterator[tuple[dict, dict]]:
        """Raw images of one process, without end, each with the state that goes on after it.

        In every pass each image is seen once, by one process. The order of the shards is drawn from (seed, pass), the
        order inside a block of consecutive images from (seed, rank, pass, block): unlike a shuffle buffer, which would
        be lost, a block is read again when a stream resumes.

        Args:
            seed: 0 or a positive integer, the same in all processes.
            rank: of this process.
            num_processes: among which the shards are split, or, if their number does not divide, the images.
            state: what came with an image of this process; the first image is the one after it. It can be stored as
                JSON and holds no image.

        Raises:
            ValueError: `rank` is not in 0 ... num_processes - 1, or `state` belongs to another seed or process.
            RuntimeError: this process has no image in a pass.
        """
        from datasets.distributed import split_dataset_by_node

        if not 0 <= rank < num_processes:
            raise ValueError(f"ImageStream: rank is in 0 ... {num_processes - 1}, got {rank!r}.")
        owner = {"seed": seed, "rank": rank, "num_processes": num_processes}
        state = {**owner, "pass": 0, "block": 0, "offset": 0, "dataset": None} if state is None else state
        found = {name: state.get(name) for name in owner}
        if found != owner:
            raise ValueError(
                f"ImageStream: expected the state of {owner}, got one of {found}; a stream resumes with the seed, the "
                "number of processes and in the process it was stopped with."
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


def open_images(
    source: str,
    *,
    split: str = "train",
    is_streaming: bool = False,
    block_size: int = 1000,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    maps: MapColumns | None = None,
    scenes: range = range(10_000),
    scene_settings: SceneSettings | None = None,
) -> ImageSource | ImageStream:
    """Open images by one string.

    | source | what is opened |
    | --- | --- |
    | "scenes" | rendered scenes, made once into the cache of the library `datasets` |
    | folder of images | class folders become labels; `train`, `validation` and `test` folders become splits |
    | .tar, a folder of them, "a-{000..012}.tar", "a-*.tar" | WebDataset shards: always a stream |
    | folder of a dataset | parquet or arrow files, or what `Dataset.save_to_disk` wrote |
    | "owner/name" or "owner/name:configuration" | a dataset of the Hub, as it is now |
    | the same with "@revision" behind it | as it was at a commit, a tag or a branch |

    What was opened says in `revision` which commit of the Hub it is; None where it is none of the Hub.

    Args:
        source: see the table. A path that exists goes before a name on the Hub; for a folder called scenes give
            "./scenes".
        split: which part. Shards that are listed (not a folder of them) are the split one asks for.
        is_streaming: read in order instead of preparing everything first: no index, no length, at once.
        block_size: images of a stream that are held undecoded and shuffled among each other.
        image_column: None: found by its type.
        label_column: None: found by its type or name; images without labels are fine.
        text_column: holds captions; None: they are not read.
        maps: columns of masks and depths; None: they are not read. Of scenes: `semantic_mask` and `depth`; of a folder
            of images: what its metadata.jsonl calls `mask_file_name`, for example, is the column `mask`.
        scenes: indices of the scenes; other ranges are other splits. Consecutive.
        scene_settings: None: 64 pixels a side.

    Raises:
        ValueError: there is no such source, split or column, or the choice is not clear.
        RuntimeError: the Hub could not be reached.
    """
    columns = {"image_column": image_column, "label_column": label_column, "text_column": text_column, "maps": maps}
    if source == "scenes":
        if split != "train" or is_streaming or scenes.step != 1:
            raise ValueError(
                'open_images: "scenes" has one split, "train", is never streamed and takes consecutive indices; got '
                f"split={split!r}, is_streaming={is_streaming}, scenes={scenes}. For other images give another range."
            )
        settings = scene_settings or SceneSettings(image_size=64)
        return ImageSource(make_scenes_dataset(len(scenes), settings=settings, start=scenes.start), **columns)
    opened = open_dataset(source, split=split, is_streaming=is_streaming)
    if opened.is_stream:
        options = {"block_size": block_size, "files": opened.files, "revision": opened.revision}
        return ImageStream(opened.dataset, **options, **columns)
    return ImageSource(opened.dataset, revision=opened.revision, **columns)


@dataclasses.dataclass(frozen=True)
class OpenedDataset:
    """A dataset with all its columns, as it was stored.

    Args:
        dataset: of the library `datasets`.
        files: local ones of a stream.
        revision: commit of a dataset of the Hub, else None.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    files: Sequence[str] = ()
    revision: str | None = None

    @property
    def is_stream(self) -> bool:
        """Whether it has no length and no index."""
        import datasets

        return isinstance(self.dataset, datasets.IterableDataset)


def open_dataset(source: str, *, split: str = "train", is_streaming: bool = False) -> OpenedDataset:
    """Open one split of a source as a dataset of the library `datasets`; rendered scenes have their own function.

    Args:
        source, split, is_streaming: as in `open_images`.

    Raises:
        ValueError: there is no such source, configuration, revision or split, or it holds nothing.
        RuntimeError: the Hub could not be reached.
    """
    if not source:
        raise ValueError(f"open_images: {_EXPECTED}; got {source!r}.")
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        opened = OpenedDataset(*_open_folder(path, split=split, is_streaming=is_streaming))
    elif _names_shards(source):
        opened = OpenedDataset(*_open_shards(_expand(source), split=split))
    elif path.exists():
        raise ValueError(f"open_images: {_EXPECTED}; got the file {source!r}. Give the folder that holds it.")
    else:
        opened = _open_hub(source, split=split, is_streaming=is_streaming)
    if not opened.is_stream and len(opened.dataset) == 0:
        raise ValueError(f"open_images: the split {split!r} of {source!r} holds no images.")
    return opened


def split_hub_name(source: str) -> tuple[str, str | None, str | None] | None:
    """Name, configuration and revision of "owner/name:configuration@revision"; None where it is no such name."""
    found = _HUB_NAME.fullmatch(source)
    return found.groups() if found else None


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Where the image, the label, the caption and the maps of a row are."""

    image: str
    label: str | None
    text: str | None
    class_names: tuple[str, ...] | None
    maps: MapColumns

    def select(self, dataset: datasets.Dataset | datasets.IterableDataset):
        """Keep these columns, with images as they were stored."""
        from datasets import Image as ImageFeature

        maps = tuple(self.maps.named.values())
        kept = dataset.select_columns([name for name in (self.image, self.label, self.text, *maps) if name])
        for name in (self.image, *maps):
            if name == self.image or isinstance(kept.features[name], ImageFeature):
                kept = kept.cast_column(name, ImageFeature(decode=False))
        return kept

    def to_raw(self, row: dict, *, fallback: str) -> dict:
        """The raw image of a row; `fallback` is its name if it has no path."""
        image = row[self.image] or {"bytes": None, "path": None}
        label = row[self.label] if self.label else None
        # The Hub marks the hidden labels of a test set by -1.
        label = None if label is None or label < 0 else int(label)
        text = {"text": _join_texts(row[self.text])} if self.text else {}
        raw = {**image, "label": label, "name": image["path"] or fallback, **text}
        if self.maps.named:
            raw["maps"] = {kind: row[column] for kind, column in self.maps.named.items()}
            raw |= {"depth_scale": self.maps.depth_scale, "reduces_labels": self.maps.reduces_labels}
        return raw

    def sum_up_maps(self, raws: list[dict]) -> list:
        """What a fingerprint holds of maps, nothing where there are none."""
        if not self.maps.named:
            return []
        return [dataclasses.astuple(self.maps), [list(map(_sum_up_map, raw["maps"].values())) for raw in raws]]


def _join_texts(text: str | list[str] | None) -> str:
    """One caption; several of an image, one after the other."""
    return " ".join(text) if isinstance(text, list) else text or ""


def _find_columns(
    features: datasets.Features, *, image: str | None, label: str | None, text: str | None, maps: MapColumns
) -> _Columns:
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    for name in filter(None, (image, label, text, *maps.named.values())):
        if name not in features:
            raise ValueError(f"open_images: there is no column {name!r}; the columns are {_list(features)}.")
    integers = {name for name, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype}
    classes = {name for name, kind in features.items() if isinstance(kind, ClassLabel)}
    if label and label not in classes | integers:
        raise ValueError(f"open_images: the column {label!r} holds no classes but {features[label]}.")
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    images = [name for name in images if name not in maps.named.values()]
    if not images and not image:
        raise ValueError(
            f"open_images: expected a column of type Image, got {_list(features)}. If one of them holds paths or the "
            "bytes of image files, name it with image_column."
        )
    image = image or _choose(images, usual=_IMAGE_NAMES, argument="image_column")
    labels = [name for name in features if name in classes or (name in integers and name in _LABEL_NAMES)]
    label = label or (_choose(labels, usual=_LABEL_NAMES, argument="label_column") if labels else None)
    return _Columns(image, label, text, tuple(features[label].names) if label in classes else None, maps)


def _choose(names: list[str], *, usual: tuple[str, ...], argument: str) -> str:
    best = names if len(names) == 1 else [name for name in usual if name in names][:1]
    if not best:
        raise ValueError(f"open_images: several columns qualify: {_list(names)}; choose one with {argument}.")
    return best[0]


def _open_file(raw: dict):
    """A file object or a path that Pillow opens."""
    if raw["bytes"] is not None:
        if not raw["bytes"]:
            raise UnreadableImage(raw["name"], "the file is empty")
        return io.BytesIO(raw["bytes"])
    if raw["path"] is None:
        raise UnreadableImage(raw["name"], "there is no image in this place")
    if "://" not in raw["path"]:
        return raw["path"]
    from datasets.utils.file_utils import xopen

    with xopen(raw["path"], "rb") as file:
        return io.BytesIO(file.read())


def _decode_map(value: dict | list | np.ndarray) -> np.ndarray:
    if not isinstance(value, dict):
        return np.asarray(value)
    with Image.open(_open_file({**value, "name": "the map"})) as image:
        return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut everything above 255
        pixels = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode in ("P", "PA"):  # a palette with transparency goes through RGBA, or Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _open_folder(folder: pathlib.Path, *, split: str, is_streaming: bool):
    """The dataset of a folder, with its files if it is a stream."""
    import datasets

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(folder))
        saved = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        dataset = _choose_split(saved, split, source=str(folder))
        if not is_streaming:
            return dataset, []
        stream = dataset.to_iterable_dataset(num_shards=max(1, min(_DISK_SHARDS, len(dataset))))
        return stream, sorted(str(path) for path in folder.rglob("*.arrow"))
    files = _list_files(folder)
    if files[".tar"]:
        options = {"path": "webdataset", "data_dir": str(folder)}
        splits = datasets.load_dataset(**options, streaming=True)
        return _choose_split(splits, split, source=str(folder)), files[".tar"]
    if files[".parquet"] or files[".arrow"]:
        splits = datasets.load_dataset(str(folder.resolve()), streaming=is_streaming)
        return _choose_split(splits, split, source=str(folder)), files[".parquet"] + files[".arrow"]
    images = [path for suffix, paths in files.items() if suffix in _image_suffixes() for path in paths]
    if not images:
        found = ", ".join(f"{len(paths)} {suffix or 'without suffix'}" for suffix, paths in files.items() if paths)
        raise ValueError(
            f"open_images: expected images, .tar shards or parquet files in the folder {str(folder)!r}, got "
            f"{found or 'no files'}. Give the folder above the class folders or above the images."
        )
    parts = _find_splits(folder, images)
    if split not in parts:
        _choose_split(parts, split, source=str(folder))
    patterns = {name: [f"{glob.escape(str(part))}/**" for part in paths] for name, paths in parts.items()}
    splits = datasets.load_dataset("imagefolder", data_files=patterns, streaming=is_streaming)
    return _choose_split(splits, split, source=str(folder)), images


def _list_files(folder: pathlib.Path) -> dict[str, list[str]]:
    """Paths of the files below a folder by suffix, hidden ones left out, sorted."""
    files = collections.defaultdict(list)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith((".", "__")):
                files[os.path.splitext(name)[1].lower()].append(os.path.join(parent, name))
    return files


def _image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _find_splits(folder: pathlib.Path, images: list[str]) -> dict[str, list[pathlib.Path]]:
    """Folders of each split.

    The library's own search would take a class called "bullet train" for a split and leave out the rest.
    """
    tops = {pathlib.Path(path).relative_to(folder).parts[0] for path in images}
    named = tops & set(_SPLIT_FOLDERS)
    if not named or (len(named) == 1 and named != tops):
        return {"train": [folder]}
    if named != tops:
        raise ValueError(
            f"open_images: {str(folder)!r} holds the splits {_list(named)} and beside them {_list(tops - named)}, so "
            "that it is not clear what is a split and what a class. Give one of these folders, or move the rest away."
        )
    parts = collections.defaultdict(list)
    for name in sorted(named):
        parts[_SPLIT_FOLDERS[name]].append(folder / name)
    return dict(parts)


def _names_shards(source: str) -> bool:
    return source.endswith((".tar", ".tar}"))


def _expand(source: str) -> list[str]:
    """Paths of shards: "{00..12}" counts with leading zeros, "{a,b}" lists, "*", "?" and "[...]" match files."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", source)
    if found:
        first, last, listed = found.groups()
        count = range(int(first or 0), int(last or 0) + 1)
        values = listed.split(",") if listed else [str(number).zfill(len(first)) for number in count]
        return [path for value in values for path in _expand(source[: found.start()] + value + source[found.end() :])]
    if "://" in source:
        return [source]
    path = os.path.expanduser(source)
    return [path] if os.path.exists(path) else sorted(glob.glob(path)) or [source]


def _open_shards(shards: list[str], *, split: str):
    import datasets

    local = [path for path in shards if "://" not in path]
    missing = [path for path in local if not os.path.exists(path)]
    if missing or not shards:
        raise ValueError(
            f"open_images: {_EXPECTED}; got shards of which {len(missing)} of {len(shards)} do not exist: "
            f"{_list(missing)}.{_suggest(missing[0]) if missing else ''}"
        )
    stream = datasets.load_dataset("webdataset", data_files={split: shards}, streaming=True)
    return stream[split], local


def _open_hub(source: str, *, split: str, is_streaming: bool) -> OpenedDataset:
    from datasets.exceptions import DatasetNotFoundError

    if split_hub_name(source) is None:
        raise ValueError(f"open_images: {_EXPECTED}; got {source!r}, which does not exist.{_suggest(source)}")
    try:
        builder = _find_builder(source)
        if not is_streaming:
            builder.download_and_prepare()
        splits = builder.as_streaming_dataset() if is_streaming else builder.as_dataset()
    except FileNotFoundError as error:
        is_missing = isinstance(error, DatasetNotFoundError)
        what = "exists neither here nor on the Hub" if is_missing else "could not be opened"
        words = f"{str(error).rstrip('.')}.{_suggest(source)}"
        raise ValueError(f"open_images: {_EXPECTED}; got {source!r}, which {what}: {words}") from error
    except Exception as error:
        if not (is_of_network(error) or isinstance(error, HfHubHTTPError)):
            raise
        raise RuntimeError(
            f"open_images: {source!r} is no path here, and the Hub did not answer: {error}.{_suggest(source)} "
            "If it is a dataset of the Hub, check the connection and HF_HUB_OFFLINE."
        ) from error
    revision = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    return OpenedDataset(_choose_split(splits, split, source=source), revision=revision)


def _find_builder(source: str) -> datasets.DatasetBuilder:
    """What the library knows of a dataset of the Hub before it reads one; `hash` is its commit."""
    import datasets

    name, configuration, revision = split_hub_name(source)
    if revision and os.path.isdir(name):  # which would win over the Hub, and has no revisions
        raise ValueError(f"open_images: {name!r} is a folder here, and has no revision {revision!r}: leave it out.")
    builder = datasets.load_dataset_builder(name, configuration, revision=revision)
    is_cached = type(builder).__module__.endswith(".cache")  # the Hub did not answer, and revisions do not count
    if revision and is_cached and builder.hash != revision:
        raise RuntimeError(
            f"open_images: the Hub did not answer for {source!r}, and the cache holds {name!r} at {builder.hash}: "
            "connect, or leave the revision out to take what the cache holds."
        )
    return builder


def _choose_split(splits: dict, split: str, *, source: str):
    if split not in splits:
        raise ValueError(f"open_images: {source!r} has no split {split!r}; it has {_list(splits)}.")
    return splits[split]


def _suggest(path: str) -> str:
    """The nearest path that exists, as the end of a message."""
    path = pathlib.Path(path).expanduser()
    parent = next(parent for parent in path.parents if parent.is_dir())
    name = path.relative_to(parent).parts[0]
    for near in difflib.get_close_matches(name, sorted(os.listdir(parent)), n=1):
        return f" Did you mean {str(parent / near)!r}?"
    return f" The nearest folder is {str(parent.resolve())!r}."


def _list(names, *, num_shown: int = 8) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(map(repr, names[:num_shown])) + more


def _sum_up_content(raw: dict) -> str | int | None:
    if raw["bytes"] is not None:
        return hashlib.sha256(raw["bytes"]).hexdigest()
    return os.path.getsize(raw["path"]) if raw["path"] and os.path.exists(raw["path"]) else None


def _sum_up_map(value: dict | list | np.ndarray) -> str | int | None:
    if isinstance(value, dict):
        return _sum_up_content(value)
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def _shorten(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


__all__ = [
    "ImageSource",
    "ImageStream",
    "MapColumns",
    "OpenedDataset",
    "UnreadableImage",
    "decode_image",
    "decode_maps",
    "derive_seed",
    "open_dataset",
    "open_images",
    "split_hub_name",
]

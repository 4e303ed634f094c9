"""WebDataset shards, by one name or many."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator

from modeling_vitreg.names import suggest_path

from .messages import EXPECTED, list_names
from .opened import OpenedDataset


_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
_NUMBERS = ("cls", "cls2", "index", "inx", "id")
_TEXTS = ("txt", "text", "transcript", "caption")
_NUM_SCANNED = 1000  # samples of the first shard that holds any, whose suffixes become columns
_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_logger = logging.getLogger(__name__)
_told: set[str] = set()  # shards whose samples without an image were counted


def names_shards(source: str) -> bool:
    """Whether a source is given by names of shards."""
    return source.removesuffix("}").endswith(_SUFFIXES)


def expand(source: str) -> list[str]:
    """Paths of shards: "{00..12}" counts with leading zeros, "{a,b}" lists, "*", "?" and "[...]" match files."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", source)
    if found:
        first, last, listed = found.groups()
        count = range(int(first or 0), int(last or 0) + 1)
        values = listed.split(",") if listed else [str(number).zfill(len(first)) for number in count]
        return [path for value in values for path in expand(source[: found.start()] + value + source[found.end() :])]
    if "://" in source:
        return [source]
    path = os.path.expanduser(source)
    return [path] if os.path.exists(path) else sorted(glob.glob(path)) or [source]


def open_shards(shards: list[str], *, split: str) -> OpenedDataset:
    """A stream over the samples of shards: consecutive files whose names agree up to the first dot.

    Columns are the suffixes in the first shard that holds any: images, numbers (`cls`, `index`, `id`), texts (`txt`,
    `caption`, and a `cls` of words) and arrays (`npy`). Images of several suffixes share the column `image`. A sample
    may lack any of them but the image; what comes without an image, such as a README, is left out.

    Raises:
        ValueError: a shard does not exist, the first one is damaged or holds no image, or a class is now a number, now
            a word.
    """
    import datasets

    local = [path for path in shards if "://" not in path]
    missing = [path for path in local if not os.path.exists(path)]
    if missing or not shards:
        raise ValueError(
            f"open_images: {EXPECTED}; got shards of which {len(missing)} of {len(shards)} do not exist: "
            f"{list_names(missing)}.{' ' + suggest_path(missing[0]) if missing else ''}"
        )
    first, samples = shards[0], []
    for shard in shards:
        if samples := list(itertools.islice(_read_samples(shard), _NUM_SCANNED)):
            first = shard
            break
    suffixes = sorted({suffix for sample in samples for suffix in sample} - {"__key__"})
    images = [suffix for suffix in suffixes if suffix in _IMAGES]
    if not images:
        found = f"files of the suffixes {list_names(suffixes)}" if suffixes else "no files"
        hint = ". The suffix of a file in a shard begins at the first dot of its name" * any(map(_is_map, suffixes))
        raise ValueError(f"open_images: expected images in the shard {first!r}, got {found}{hint}")
    kinds = {images[0] if len(images) == 1 else "image": datasets.Image()}
    kinds |= {suffix: datasets.Image() for suffix in suffixes if suffix not in images and _is_map(suffix)}
    numbers = tuple(suffix for suffix in suffixes if suffix in _NUMBERS and not _holds_words(samples, suffix))
    kinds |= {suffix: datasets.Value("int64") for suffix in numbers}
    kinds |= {
        suffix: datasets.Value("string")
        for suffix in suffixes
        if suffix in (*_TEXTS, *_NUMBERS) and suffix not in numbers
    }
    num_without = sum(not set(sample) & set(images) for sample in samples)
    notes = [f"{num_without} of the first {len(samples)} samples of {first} hold no image and are left out"]
    stream = datasets.IterableDataset.from_generator(
        _read_rows,
        features=datasets.Features(kinds),
        gen_kwargs={"shards": shards, "images": (*images, *_IMAGES), "columns": tuple(kinds), "numbers": numbers},
    )
    return OpenedDataset(stream, local, notes=notes if num_without else ())


def _read_rows(
    shards: list[str], images: tuple[str, ...], columns: tuple[str, ...], numbers: tuple[str, ...]
) -> Iterator[dict]:
    for shard in shards:
        num_without = 0
        for sample in _read_samples(shard):
            found = next((suffix for suffix in images if suffix in sample), None)
            if found is None:
                num_without += 1
                continue
            row = dict.fromkeys(columns)
            row[columns[0]] = {"path": f"{sample['__key__']}.{found}", "bytes": sample[found]}
            for suffix, content in sample.items():
                if suffix not in columns[1:]:
                    continue
                if _is_map(suffix):
                    row[suffix] = {"path": f"{sample['__key__']}.{suffix}", "bytes": content}
                elif suffix in numbers:
                    row[suffix] = _to_number(content, f"{shard}: {sample['__key__']}.{suffix}")
                elif suffix in (*_TEXTS, *_NUMBERS):
                    row[suffix] = content.decode("utf-8", "replace")
            yield row
        if num_without and shard not in _told:
            _told.add(shard)
            _logger.warning("%s: %d samples hold no image and are left out", shard, num_without)


def _read_samples(shard: str) -> Iterator[dict]:
    """Contents of files by suffix, with the `__key__` that they share."""
    sample = {}
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for entry in archive:
                folder, _, name = entry.name.rpartition("/")
                base, dot, suffix = name.partition(".")
                if not entry.isfile() or not base or not dot:
                    continue
                key = f"{folder}/{base}" if folder else base
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample |= {"__key__": key, suffix.lower(): archive.extractfile(entry).read()}
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"open_images: the shard {shard!r} is damaged: {type(error).__name__}: {error}") from error
    if sample:
        yield sample


def _open(shard: str):
    if "://" not in shard:
        return open(shard, "rb")
    from datasets.utils.file_utils import xopen

    return xopen(shard, "rb")


def _is_map(suffix: str) -> bool:
    """Whether a suffix such as mask.png or depth.npy is that of a map beside the image."""
    return ("." in suffix and suffix.rpartition(".")[2] in (*_IMAGES, "npy")) or suffix == "npy"


def _holds_words(samples: list[dict], suffix: str) -> bool:
    """Whether none of the files of a suffix holds a number, and some a word."""
    texts = [text for sample in samples if (text := sample.get(suffix, b"").strip())]
    return bool(texts) and not any(text.removeprefix(b"-").isdigit() for text in texts)


def _to_number(content: bytes, place: str) -> int | None:
    text = content.decode("utf-8", "replace").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise ValueError(f"open_images: {place} holds {text[:40]!r}, expected the number of a class") from None

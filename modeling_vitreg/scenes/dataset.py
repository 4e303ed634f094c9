"""Scenes as datasets of the library `datasets`: rendered once into its cache, or when they are read."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from .render import render_scene
from .settings import CLASS_NAMES, SceneSettings, is_count, require
from .world import COLOUR_NAMES


if TYPE_CHECKING:
    import datasets


_NUM_BLOCKS = 960  # shards of a stream: most numbers of nodes and workers divide it
_ENDLESS = 2**40  # scenes


def make_scenes_dataset(num_scenes: int, *, settings: SceneSettings, start: int = 0) -> datasets.Dataset:
    """Scenes start ... start + num_scenes - 1 as a dataset that can be indexed.

    Columns: `index` and the fields of `Scene`. `image`, the masks and `depth` (mode "F", metres) are PIL images;
    `label` and `categories` know their names. The scenes are rendered once, under a progress bar, into the cache of
    the library `datasets` (HF_DATASETS_CACHE); a second call with the same arguments opens what the first wrote.

    Raises:
        ValueError: `num_scenes` is not positive or `start` is negative.
    """
    import datasets

    _check_range(num_scenes, start)
    blocks = _split(num_scenes, start)
    # A cache that outlives a change of the renderer would hold other scenes than the ones it promises.
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    keywords = {"blocks": blocks, "settings": settings, "source": source}
    num_processes = min(os.cpu_count() or 1, 8) if num_scenes >= 500 else None  # starting them takes a while too
    return datasets.Dataset.from_generator(
        _render_blocks, features=_features(), gen_kwargs=keywords, num_proc=num_processes
    )


def stream_scenes(
    *, settings: SceneSettings, start: int = 0, num_scenes: int | None = None
) -> datasets.IterableDataset:
    """Scenes start, start + 1, ... rendered when they are read; the columns are those of `make_scenes_dataset`.

    The range is cut into consecutive blocks, the shards of the stream: one process reads them in order, workers of a
    DataLoader and nodes share them. `state_dict` and `load_state_dict` resume without rendering what was read before.

    Args:
        settings: size, number of objects, seed.
        start: index of the first scene.
        num_scenes: None for a stream that does not end.

    Raises:
        ValueError: `num_scenes` is not positive or `start` is negative.
    """
    import datasets

    num_scenes = _ENDLESS if num_scenes is None else num_scenes
    _check_range(num_scenes, start)
    stream = datasets.IterableDataset.from_generator(_count_blocks, gen_kwargs={"blocks": _split(num_scenes, start)})
    render = functools.partial(_render_row, settings=settings)
    return stream.map(render, features=_features())  # only numbers are skipped when a stream resumes


def _check_range(num_scenes: int, start: int) -> None:
    is_positive = is_count(num_scenes) and num_scenes > 0
    require(is_positive, f"expected num_scenes to be a positive integer, got {num_scenes!r}")
    require(is_count(start), f"expected start to be 0 or a positive integer, got {start!r}")


def _split(num_scenes: int, start: int) -> list[tuple[int, int]]:
    num_blocks = min(_NUM_BLOCKS, num_scenes)
    edges = [start + num_scenes * block // num_blocks for block in range(num_blocks + 1)]
    return list(itertools.pairwise(edges))


def _count_blocks(blocks: list[tuple[int, int]]) -> Iterator[dict]:
    for first, end in blocks:
        for index in range(first, end):
            yield {"index": index}


def _render_blocks(blocks: list[tuple[int, int]], settings: SceneSettings, source: str) -> Iterator[dict]:
    for row in _count_blocks(blocks):
        yield _render_row(row, settings=settings)


def _render_row(row: dict, *, settings: SceneSettings) -> dict:
    scene = render_scene(row["index"], settings=settings)
    fields = vars(scene)
    images = {name: Image.fromarray(fields[name]) for name in ("image", "instance_mask", "semantic_mask", "depth")}
    return {**row, **fields, **images, "boxes": scene.boxes.tolist(), "categories": scene.categories.tolist()}


def _features() -> datasets.Features:
    from datasets import ClassLabel, Features, Image, Sequence, Value

    return Features(
        {
            "index": Value("int64"),
            "image": Image(),
            "label": ClassLabel(names=list(CLASS_NAMES)),
            "colours": ClassLabel(names=list(COLOUR_NAMES)),
            "caption": Value("string"),
            "boxes": Sequence(Sequence(Value("float32"), length=4)),
            "categories": Sequence(ClassLabel(names=list(CLASS_NAMES))),
            "instance_mask": Image(),
            "semantic_mask": Image(),
            "depth": Image(),
        }
    )

"""Any source of images by one string."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from modeling_vitreg.scenes import SceneSettings, is_scenes, make_scenes_dataset, preset_settings

from .annotation_files import open_annotation_files
from .conventions import check_annotations
from .folders import open_folder
from .hub import open_hub
from .messages import EXPECTED
from .opened import OpenedDataset
from .options import COLUMNS, DataOptions
from .shards import expand, names_shards, open_shards
from .sources import ImageSource, ImageStream


def open_images(
    source: str,
    *,
    split: str = "train",
    is_streaming: bool = False,
    block_size: int = 1000,
    options: DataOptions | None = None,
    annotations: str | os.PathLike | None = None,
    scenes: range = range(10_000),
    scene_settings: SceneSettings | None = None,
) -> ImageSource | ImageStream:
    """Open images by one string.

    | source | what is opened |
    | --- | --- |
    | "scenes", "scenes:single" | rendered scenes, made once into the cache of `datasets` |
    | folder of images | class folders become labels; `train`, `validation` and `test` folders become splits |
    | .tar, a folder of them, "a-{000..012}.tar", "a-*.tar" | WebDataset shards: always a stream |
    | folder of a dataset | parquet or arrow files, or what `Dataset.save_to_disk` wrote |
    | "owner/name" or "owner/name:configuration" | a dataset of the Hub, as it is now |
    | the same with "@revision" after it | as it was at a commit, a tag or a branch |

    What was opened says in `revision` which commit of the Hub it is; None where it is none of the Hub.

    Args:
        source: see the table. A path that exists goes before a name on the Hub; for a folder called scenes give
            "./scenes".
        split: which part. Shards that are listed (not a folder of them) are the split one asks for.
        is_streaming: read in order instead of preparing everything first: no index, no length, at once.
        block_size: images of a stream that are held undecoded and shuffled among each other.
        options: columns and the meaning of their values; None: image and label are found, nothing else is read. Scenes
            have `semantic_mask`, `depth` and `boxes`; in a folder of images, what its metadata.jsonl calls
            `mask_file_name`, for example, is the column `mask`.
        annotations: boxes of the images in the folder `source`: a COCO file (.json), or a folder of VOC files (.xml).
        scenes: indices of the scenes; other ranges are other splits. Consecutive.
        scene_settings: None: settings of the preset, for models that read 48 pixels.

    Raises:
        ValueError: there is no such source, split or column, the choice is not clear, or annotations contradict the
            options.
        RuntimeError: the Hub could not be reached.
    """
    if annotations is not None:
        opened = _open_annotated(source, annotations, options or DataOptions())
    else:
        words = {"split": split, "is_streaming": is_streaming, "block_size": block_size, "options": options}
        opened = _open(source, **words, scenes=scenes, scene_settings=scene_settings)
    return check_annotations([opened])[0]


def _open_annotated(folder: str, annotations: str | os.PathLike, options: DataOptions) -> ImageSource:
    columns = [name for name in COLUMNS.values() if getattr(options, name) and name != "label_column"]
    if is_scenes(folder) or columns or options.label_column not in (None, "categories"):
        raise ValueError(
            "a file of annotations names the images of a folder itself: leave out columns, except label=categories"
        )
    dataset, notes = open_annotation_files(annotations, folder, keep_difficult=options.keep_difficult)
    return ImageSource(dataset, options=dataclasses.replace(options, box_column="boxes"), notes=notes)


def _open(
    source: str,
    *,
    split: str,
    is_streaming: bool,
    block_size: int,
    options: DataOptions | None,
    scenes: range,
    scene_settings: SceneSettings | None,
) -> ImageSource | ImageStream:
    if is_scenes(source):
        if split != "train" or is_streaming or scenes.step != 1:
            raise ValueError(
                f'open_images: {source!r} has one split, "train", is never streamed and takes consecutive indices; '
                f"got split={split!r}, is_streaming={is_streaming}, scenes={scenes}. For other images give another "
                "range."
            )
        settings = scene_settings or preset_settings(source, side=48)
        dataset = make_scenes_dataset(len(scenes), settings=settings, start=scenes.start)
        return ImageSource(dataset, options=options, kind="scene")
    opened = open_dataset(source, split=split, is_streaming=is_streaming)
    if opened.is_stream:
        return ImageStream(opened, options=options, block_size=block_size)
    return ImageSource(opened, options=options)


def open_dataset(source: str, *, split: str = "train", is_streaming: bool = False) -> OpenedDataset:
    """Open one split of a source as a dataset of the library `datasets`; rendered scenes have their own function.

    Args:
        source, split, is_streaming: as in `open_images`.

    Raises:
        ValueError: there is no such source, configuration, revision or split, or it holds nothing.
        RuntimeError: the Hub could not be reached.
    """
    if not source:
        raise ValueError(f"open_images: {EXPECTED}; got {source!r}.")
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        opened = open_folder(path, split=split, is_streaming=is_streaming)
    elif names_shards(source):
        opened = open_shards(expand(source), split=split)
    elif path.exists():
        raise ValueError(f"open_images: {EXPECTED}; got the file {source!r}. Give the folder that holds it.")
    else:
        opened = open_hub(source, split=split, is_streaming=is_streaming)
    if not opened.is_stream and len(opened.dataset) == 0:
        raise ValueError(f"open_images: the split {split!r} of {source!r} holds no images.")
    return opened

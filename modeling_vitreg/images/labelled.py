"""Images to train heads on and images to measure on, by one string.

| source | annotations |
| --- | --- |
| "scenes", "scenes:single" | label, semantic mask, depth and boxes, exact; held-out test images |
| folder with class folders | label |
| folder of images with a COCO file or a folder of VOC files | boxes |
| dataset on disk or on the Hub, "@revision" too | label; mask, depth and boxes where their columns are named |

Without a test split, a share of the images is held out by a seed.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import numpy as np

from modeling_vitreg.scenes import (
    FARTHEST,
    FIRST_TEST_SCENE,
    PRESETS,
    SEMANTIC_NAMES,
    SceneSettings,
    describe_preset,
    is_scenes,
    make_scenes_dataset,
)

from .conventions import check_annotations
from .messages import MissingSplit
from .open import open_dataset, open_images
from .options import SCENE_COLUMNS, DataOptions
from .sources import ImageSource
from .splits import hold_out


NUM_SCENES = (2000, 1000)  # training and test images, unless told otherwise
TEST_SHARE = 0.3
TEST_SPLITS = ("test", "validation")


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Images with annotations, in two parts.

    Args:
        name: for reports.
        train: images that heads are trained on.
        test: images that are measured on.
        mask_names: names of the classes of masks; None: as many classes as the masks show.
        ignore_index: value of mask pixels that are ignored.
        max_depth: metres; larger depths are ignored.
        revision: commit of a dataset of the Hub, else None.
    """

    name: str
    train: ImageSource
    test: ImageSource
    mask_names: tuple[str, ...] | None = None
    ignore_index: int = 255
    max_depth: float = 10.0
    revision: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the annotations, and about files that are not read."""
        parts = (self.train, self.test)
        return tuple(dict.fromkeys(note for part in parts for note in (*part.left_out, *part.notes)))


def open_data(
    source: str,
    *,
    options: DataOptions | None = None,
    image_size: int | tuple[int, int] = 64,
    split: str = "train",
    test_split: str | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    annotations: str | os.PathLike | None = None,
    seed: int = 0,
) -> LabelledData:
    """Open training and test images by one string; see the table above.

    Args:
        source: as in `open_images`, but no stream. The commit of a dataset of the Hub becomes the `revision`.
        options: columns and the meaning of their values. Scenes have all annotations in any case.
        image_size: side or (rows, columns) of rendered scenes in pixels; that of the encoder leaves them as they are.
        split: training split.
        test_split: None: `test`, else `validation`, else images held out of `split`.
        num_train: number of training images, drawn by the seed; None: all, or 2000 scenes.
        num_test: number of test images; None: all, or 1000 scenes.
        annotations: a COCO file (.json) or a folder of VOC files (.xml) with the boxes of the images in the folder
            `source`; all of these images are test images, for discovery alone, unless `label_column` is "categories".
        seed: random seed of draws and of the held-out images.

    Raises:
        ValueError: no such source, split or column, a stream, too few images, or annotations that contradict the
            options; see `conventions`.
        RuntimeError: the Hub could not be reached.
    """
    options = options or DataOptions()
    if is_scenes(source):
        columns = (options.image_column, options.mask_column, options.depth_column, options.box_column)
        if split != "train" or any((test_split, annotations, *columns)):
            raise ValueError(f"{source!r} have their own splits, columns and annotations: leave out these options")
        return _open_scenes(source, image_size, (num_train, num_test), options.label_column)
    options, test = dataclasses.replace(options, allows_label_lists=True), None
    if annotations is not None:
        if test_split:
            raise ValueError("a file of annotations names its images itself: leave out splits")
        train, others = open_images(source, annotations=annotations, options=options), []
        if not options.label_column:
            return LabelledData(source, train.select(np.arange(0)), _draw(train, num_test, seed))
    else:
        train, test = _open_part(source, split, options), _open_test(source, test_split, options)
        train, *others = check_annotations([train] if test is None else [train, test])
    if test is None:
        kept, held_out = hold_out(len(train), share=TEST_SHARE, seed=seed)
        parts = [train.select(kept.numpy()), train.select(held_out.numpy())]
    else:
        parts = [part.select(np.arange(len(part))) for part in (train, *others)]
    train, test = (_draw(part, number, seed) for part, number in zip(parts, (num_train, num_test)))
    return LabelledData(_name(source, test), train, test, max_depth=options.max_depth, revision=test.revision)


def _open_scenes(
    preset: str, image_size: int | tuple[int, int], counts: tuple, label_column: str | None
) -> LabelledData:
    settings, parts = SceneSettings(image_size=image_size, **PRESETS[preset]), []
    options = DataOptions(label_column=label_column or "label", allows_label_lists=True, **SCENE_COLUMNS)
    for number, default, start in zip(counts, NUM_SCENES, (0, FIRST_TEST_SCENE)):
        dataset = make_scenes_dataset(default if number is None else number, settings=settings, start=start)
        parts.append(ImageSource(dataset, options=options).select(np.arange(len(dataset))))
    name = describe_preset(preset, settings) + (f", labels: {label_column}" if label_column else "")
    return LabelledData(name, *parts, mask_names=SEMANTIC_NAMES, max_depth=FARTHEST)


def _open_test(source: str, split: str | None, options: DataOptions) -> ImageSource | None:
    for name in TEST_SPLITS if split is None else (split,):
        try:
            return _open_part(source, name, options)
        except MissingSplit:
            if split is not None:
                raise
    return None


def _open_part(source: str, split: str, options: DataOptions) -> ImageSource:
    opened = open_dataset(source, split=split)
    if opened.is_stream:
        notes = "".join(f"; {note}" for note in opened.notes)
        raise ValueError(f"expected data of known length, got a stream, {source!r}: save it as a dataset first{notes}")
    return ImageSource(opened, options=options)


def _name(source: str, images: ImageSource) -> str:
    """A dataset of the Hub without the revision that was asked for: the report has the commit."""
    return source.partition("@")[0] if images.revision else source


def _draw(part: ImageSource, number: int | None, seed: int) -> ImageSource:
    if number is None or number >= len(part):
        return part
    if number < 1:
        raise ValueError(f"expected one image or more to draw, got {number}")
    return part.select(np.sort(np.random.default_rng(seed).permutation(len(part))[:number]))

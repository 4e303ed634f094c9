"""What a model is evaluated on, by one string.

| source | truth |
| --- | --- |
| "scenes" | label, semantic mask and depth, exact; the test images lie far from those that one pretrains on |
| folder with class folders | label |
| folder of images with a COCO file or a folder of VOC files | boxes |
| dataset of a disk, or of the Hub, "@revision" too | label; mask, depth and boxes where their columns are named |

Without a split for the test, a share of the images is held out by a seed.
"""

from __future__ import annotations

import os

import numpy as np

from modeling_vitreg.discovery import read_annotations
from modeling_vitreg.images import DataOptions, ImageSource, open_dataset
from modeling_vitreg.images.options import COLUMNS
from modeling_vitreg.scenes import FARTHEST, SEMANTIC_NAMES, SceneSettings, make_scenes_dataset

from .data import EvaluationData, LabelledImages
from .splits import hold_out


FIRST_TEST_SCENE = 1_000_000
NUM_SCENES = (2000, 1000)  # to train on and to measure on, if nobody says
TEST_SHARE = 0.3
TEST_SPLITS = ("test", "validation")


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
) -> EvaluationData:
    """Open what a model is evaluated on, by one string; see the table above.

    Args:
        source: as in `modeling_vitreg.images.open_images`, but no stream. Of the Hub, the commit becomes the
            `revision` of the data.
        options: columns and the meaning of their values. Scenes have all annotations, whatever is named.
        image_size: of rendered scenes in pixels, a side or (rows, columns); that of the encoder leaves them as they
            are.
        split: to train on.
        test_split: to measure on; None: `test`, else `validation`, else images that are held out of `split`.
        num_train: images to train on, drawn by the seed; None: all, or 2000 scenes.
        num_test: images to measure on; None: all, or 1000 scenes.
        annotations: a COCO file (.json) or a folder of VOC files (.xml) with the boxes of the images in the folder
            `source`; all of these images are test images, for discovery alone.
        seed: of what is drawn and held out.

    Raises:
        ValueError: no such source, split or column, a stream, or too few images.
        RuntimeError: the Hub could not be reached.
    """
    options = options or DataOptions()
    if source == "scenes":
        columns = (options.image_column, options.mask_column, options.depth_column, options.box_column)
        if split != "train" or any((test_split, annotations, *columns)):
            raise ValueError('"scenes" have their own splits, images, maps and boxes: leave these options out')
        return _open_scenes(image_size, (num_train, num_test), options.label_column)
    if annotations is not None:
        if test_split or any(getattr(options, name) for name in COLUMNS.values()):
            raise ValueError("a file of annotations names its images itself: leave out columns and splits")
        return _open_annotated(source, annotations, num_test, seed)
    train, test = _open_part(source, split, options), _open_test(source, test_split, options)
    if test is None:
        kept, held_out = hold_out(len(train), share=TEST_SHARE, seed=seed)
        train, test = train.select(kept.numpy()), train.select(held_out.numpy())
    train, test = (_draw(part, number, seed) for part, number in ((train, num_train), (test, num_test)))
    return EvaluationData(_name(source, test), train, test, max_depth=options.max_depth, revision=test.revision)


def _open_scenes(image_size: int | tuple[int, int], counts: tuple, label_column: str | None) -> EvaluationData:
    settings, parts = SceneSettings(image_size=image_size), []
    options = DataOptions(
        image_column="image",
        label_column=label_column or "label",
        mask_column="semantic_mask",
        depth_column="depth",
        box_column="boxes",
    )
    for number, default, start in zip(counts, NUM_SCENES, (0, FIRST_TEST_SCENE)):
        dataset = make_scenes_dataset(default if number is None else number, settings=settings, start=start)
        parts.append(LabelledImages(ImageSource(dataset, options=options), boxes=dataset))
    size = " x ".join(map(str, dict.fromkeys(settings.shape)))
    name = f"scenes of {size} pixels, {label_column}" if label_column else f"scenes of {size} pixels"
    return EvaluationData(name, *parts, mask_names=SEMANTIC_NAMES, max_depth=FARTHEST)


def _open_annotated(folder: str, annotations: str | os.PathLike, num_test: int | None, seed: int) -> EvaluationData:
    """Images of a folder and their boxes of files, as a dataset like any other."""
    import datasets

    found = read_annotations(annotations, folder)
    content = {
        "image": [os.fspath(entry.image) for entry in found],
        "boxes": [entry.boxes.tolist() for entry in found],
    }
    box = datasets.Sequence(datasets.Sequence(datasets.Value("float64"), length=4))
    features = datasets.Features({"image": datasets.Image(), "boxes": box})
    dataset = datasets.Dataset.from_dict(content, features=features)
    images = LabelledImages(ImageSource(dataset, options=DataOptions(box_column="boxes")), boxes=dataset)
    return EvaluationData(folder, images.select(np.arange(0)), _draw(images, num_test, seed))


def _open_test(source: str, split: str | None, options: DataOptions) -> LabelledImages | None:
    for name in TEST_SPLITS if split is None else (split,):
        try:
            return _open_part(source, name, options)
        except ValueError as error:
            if split is not None or f"has no split {name!r}" not in str(error):
                raise
    return None


def _open_part(source: str, split: str, options: DataOptions) -> LabelledImages:
    opened = open_dataset(source, split=split)
    if opened.is_stream:
        raise ValueError(f"expected data of known length, got a stream, {source!r}: save it as a dataset first")
    images = ImageSource(opened.dataset, options=options, revision=opened.revision)
    return LabelledImages(images, boxes=opened.dataset if options.box_column else None)


def _name(source: str, images: LabelledImages) -> str:
    """Of the Hub without a revision that was asked for: the report has the commit."""
    return source.partition("@")[0] if images.revision else source


def _draw(part: LabelledImages, number: int | None, seed: int) -> LabelledImages:
    if number is None or number >= len(part):
        return part
    if number < 1:
        raise ValueError(f"expected one image or more to draw, got {number}")
    return part.select(np.sort(np.random.default_rng(seed).permutation(len(part))[:number]))


__all__ = ["FIRST_TEST_SCENE", "NUM_SCENES", "TEST_SHARE", "TEST_SPLITS", "open_data"]

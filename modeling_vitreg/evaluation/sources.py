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
from modeling_vitreg.images import ImageSource, MapColumns, open_dataset
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
    image_size: int | tuple[int, int] = 64,
    split: str = "train",
    test_split: str | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mask_column: str | None = None,
    depth_column: str | None = None,
    depth_scale: float = 1.0,
    reduces_labels: bool = False,
    max_depth: float = FARTHEST,
    box_column: str | None = None,
    box_layout: str | None = None,
    boxes: str | os.PathLike | None = None,
    seed: int = 0,
) -> EvaluationData:
    """Open what a model is evaluated on, by one string; see the table above.

    Args:
        source: as in `modeling_vitreg.images.open_images`, but no stream. Of the Hub, the commit becomes the
            `revision` of the data.
        image_size: of rendered scenes in pixels, a side or (rows, columns); that of the encoder leaves them as they
            are.
        split: to train on.
        test_split: to measure on; None: `test`, else `validation`, else images that are held out of `split`.
        num_train: images to train on, drawn by the seed; None: all, or 2000 scenes.
        num_test: images to measure on; None: all, or 1000 scenes.
        image_column, label_column: None: found by type or name.
        mask_column, depth_column: None: no such maps; scenes have both.
        depth_scale: metres of a unit of depth, 0.001 for millimetres.
        reduces_labels: 0 in a mask says that nobody knows, and classes count from 1, as in ADE20k.
        max_depth: metres, from which on depth does not count.
        box_column: None: no boxes; scenes have them. For what it may hold see `modeling_vitreg.discovery.annotations`.
        box_layout: of a box, "xywh" or "corners"; None: as the column shows.
        boxes: a COCO file (.json) or a folder of VOC files (.xml) with the boxes of the images in the folder `source`,
            all of which are measured on, by discovery alone.
        seed: of what is drawn and held out.

    Raises:
        ValueError: no such source, split or column, a stream, or too few images.
        RuntimeError: the Hub could not be reached.
    """
    if source == "scenes":
        if split != "train" or any((test_split, image_column, mask_column, depth_column, box_column, boxes)):
            raise ValueError('"scenes" have their own splits, images, maps and boxes: leave these options out')
        return _open_scenes(image_size, (num_train, num_test), label_column)
    if boxes is not None:
        if any((test_split, image_column, label_column, mask_column, depth_column, box_column)):
            raise ValueError("a file of boxes names its images itself: leave out columns and splits")
        return _open_annotated(source, boxes, num_test, seed)
    maps = MapColumns(mask_column, depth_column, depth_scale=depth_scale, reduces_labels=reduces_labels)
    columns = {"image_column": image_column, "label_column": label_column, "maps": maps}
    layout = {"box_column": box_column, "box_layout": box_layout}
    train, test = _open_part(source, split, columns, layout), _open_test(source, test_split, columns, layout)
    if test is None:
        kept, held_out = hold_out(len(train), share=TEST_SHARE, seed=seed)
        train, test = train.select(kept.numpy()), train.select(held_out.numpy())
    train, test = (_draw(part, number, seed) for part, number in ((train, num_train), (test, num_test)))
    return EvaluationData(_name(source, test), train, test, max_depth=max_depth, revision=test.revision)


def _open_scenes(image_size: int | tuple[int, int], counts: tuple, label_column: str | None) -> EvaluationData:
    settings, parts = SceneSettings(image_size=image_size), []
    columns = {"label_column": label_column or "label", "maps": MapColumns("semantic_mask", "depth")}
    for number, default, start in zip(counts, NUM_SCENES, (0, FIRST_TEST_SCENE)):
        dataset = make_scenes_dataset(default if number is None else number, settings=settings, start=start)
        images = ImageSource(dataset, image_column="image", **columns)
        parts.append(LabelledImages(images, boxes=dataset))
    size = " x ".join(map(str, dict.fromkeys(settings.shape)))
    name = f"scenes of {size} pixels, {label_column}" if label_column else f"scenes of {size} pixels"
    return EvaluationData(name, *parts, mask_names=SEMANTIC_NAMES, max_depth=FARTHEST)


def _open_annotated(folder: str, boxes: str | os.PathLike, num_test: int | None, seed: int) -> EvaluationData:
    """Images of a folder and their boxes of files, as a dataset like any other."""
    import datasets

    found = read_annotations(boxes, folder)
    content = {
        "image": [os.fspath(entry.image) for entry in found],
        "boxes": [entry.boxes.tolist() for entry in found],
    }
    box = datasets.Sequence(datasets.Sequence(datasets.Value("float64"), length=4))
    features = datasets.Features({"image": datasets.Image(), "boxes": box})
    dataset = datasets.Dataset.from_dict(content, features=features)
    images = LabelledImages(ImageSource(dataset), boxes=dataset)
    return EvaluationData(folder, images.select(np.arange(0)), _draw(images, num_test, seed))


def _open_test(source: str, split: str | None, columns: dict, layout: dict) -> LabelledImages | None:
    for name in TEST_SPLITS if split is None else (split,):
        try:
            return _open_part(source, name, columns, layout)
        except ValueError as error:
            if split is not None or f"has no split {name!r}" not in str(error):
                raise
    return None


def _open_part(source: str, split: str, columns: dict, layout: dict) -> LabelledImages:
    opened = open_dataset(source, split=split)
    if opened.is_stream:
        raise ValueError(f"expected data of known length, got a stream, {source!r}: save it as a dataset first")
    images = ImageSource(opened.dataset, revision=opened.revision, **columns)
    if layout["box_column"] is None:
        return LabelledImages(images)
    return LabelledImages(images, boxes=opened.dataset, **layout)


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

"""What the annotations of a whole dataset show before any work starts."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.images import DataOptions, read_annotated
from modeling_vitreg.images.conventions import find_conventions
from modeling_vitreg.images.maps import voc_palette


def _png(array, format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format)
    return {"bytes": stream.getvalue(), "path": None}


def _raws(kind, values):
    image = _png(np.zeros((8, 16, 3), np.uint8))
    return [{**image, "name": f"{number}.png", "maps": {kind: value}} for number, value in enumerate(values)]


def _masks(*values, num_images=4):
    random = np.random.default_rng(0)
    return [random.choice(np.array(values), (8, 16)) for _ in range(num_images)]


def _look(kind, values, **options):
    return find_conventions(_raws(kind, values), DataOptions(**{f"{kind}_column": kind}, **options))


def test_masks_of_0_and_255_are_two_classes_and_said_so():
    options, (note,) = _look("mask", _masks(0, 255))
    assert options.mask_format == "binary" and "hold 0 and 255 only" in note
    assert _look("mask", _masks(0, 255), num_classes=21)[0].mask_format == "auto"
    assert _look("mask", _masks(0, 255), mask_format="classes")[0].mask_format == "classes"
    assert _look("mask", _masks(0, 1, 255)) == (DataOptions(mask_column="mask"), ())


def test_colours_of_pascal_voc_are_understood_and_others_are_refused():
    colours = [_png(voc_palette()[mask].astype(np.uint8)) for mask in _masks(0, 1, 15)]
    options, notes = _look("mask", colours)
    assert options.mask_format == "voc" and "Pascal VOC" in notes[0]
    with pytest.raises(ValueError, match=r"0\.png: the mask holds colours such as \(7, 0, 9\)"):
        _look("mask", [_png(np.full((8, 16, 3), (7, 0, 9), np.uint8))])


@pytest.mark.parametrize(
    ("masks", "options", "words"),
    [
        (
            _masks(0, 1, 12),
            {"num_classes": 5},
            r"0\.png: the mask holds class 12: .* 0 \.\.\. 4 in.*4 of 4",
        ),
        (_masks(255), {}, "has no pixel with a class"),
        (_masks(0, 255), {"reduce_labels": True}, "and so is 0"),
        ([_png(np.zeros((8, 16), np.uint8), "JPEG")], {}, "is a JPEG file"),
    ],
)
def test_masks_that_contradict_the_options_are_named(masks, options, words):
    with pytest.raises(ValueError, match=words):
        _look("mask", masks, **options)


def test_classes_that_hardly_occur_are_mentioned():
    assert _look("mask", _masks(0, 128))[1] == ("the 4 sampled masks hold 2 of 129 classes: 0, 128",)


def test_masks_of_many_numbers_or_one_are_doubted():
    assert _look("mask", _masks(1))[1] == ("the 4 sampled masks hold class 1 alone",)
    grey = [np.arange(255, dtype=np.uint8).reshape(15, 17)]
    assert "hold 255 different numbers, from 0 to 254, which are read as classes" in _look("mask", grey)[1][0]
    assert _look("mask", grey, num_classes=255)[1] == ()
    objects = [np.arange(0, 30_000, 100).reshape(10, 30)]
    with pytest.raises(
        ValueError, match=r"0\.png: .* hold 300 different numbers, from 0 to 29900: numbers of objects"
    ):
        _look("mask", objects)


def _depths(low, high, num_images=3):
    return list(np.random.default_rng(0).uniform(low, high, (num_images, 8, 16)))


def test_depth_in_another_unit_is_refused_with_the_scale_to_type():
    with pytest.raises(ValueError, match=r"0\.png: 100\.0% of the depths .* depth_scale.*millimetres would be 0\.001"):
        _look("depth", _depths(1000, 9000))
    with pytest.raises(ValueError, match=r"centimetres would be 0\.01 .*; the 1/256 m of KITTI would be 0\.00390625"):
        _look("depth", _depths(100, 900))
    assert _look("depth", _depths(1000, 9000), depth_scale=0.001)[1] == ()
    assert "check depth_scale" in _look("depth", _depths(1, 9), depth_scale=0.001)[1][0]


def test_shares_of_depth_that_do_not_count_are_told():
    depths = _depths(1, 12)
    depths[0][:, :4] = np.nan
    unknown, far = _look("depth", depths)[1]
    assert unknown == "8.3% of the pixels of the 3 sampled depth maps have no depth"
    assert "lie beyond max_depth, 10 m" in far
    with pytest.raises(ValueError, match="expected depths above 0"):
        _look("depth", [np.zeros((8, 16))])


def _look_at_boxes(cells, **options):
    image = _png(np.zeros((80, 160, 3), np.uint8))
    raws = [{**image, "name": f"{number}.png", "boxes": cell} for number, cell in enumerate(cells)]
    return find_conventions(raws, DataOptions(box_column="boxes", **options))


def test_the_format_of_boxes_is_found_where_only_one_fits():
    wide = [[100, 50, 50, 20], [10, 10, 140, 60]]
    options, (note,) = _look_at_boxes([wide, wide])
    assert options.box_format == "xywh" and "as xyxy, 2 of 4 sampled boxes" in note
    plain = [[100, 50, 150, 70]]
    options, (note,) = _look_at_boxes([{"bbox": plain}] * 3)
    assert options.box_format == "xyxy" and "as xywh, 3 of 3 sampled boxes" in note
    assert _look_at_boxes([plain])[1] == () and _look_at_boxes([wide], box_format="xyxy")[0].box_format == "xyxy"


def test_relative_boxes_are_found():
    options, notes = _look_at_boxes([[[0.1, 0.1, 0.5, 0.9]], [[0.2, 0.3, 1.0, 1.0]]])
    assert (options.box_units, options.box_format) == (
        "relative",
        "auto",
    ) and "fractions of width and height" in notes[0]
    options, notes = _look_at_boxes([{"bbox": [[0.9, 0.9, 0.2, 0.2]]}] * 2)
    assert (options.box_units, options.box_format) == ("relative", "cxcywh") and len(notes) == 2


def test_boxes_in_percent_are_found_where_images_are_larger():
    image = _png(np.zeros((300, 400, 3), np.uint8))
    raws = [{**image, "name": f"{number}.png", "boxes": {"bbox": [[20, 40, 50, 60]]}} for number in range(4)]
    options, (note,) = find_conventions(raws, DataOptions(box_column="boxes"))
    assert options.box_units == "percent" and "no coordinate of a box is above 100" in note
    raw = {"label": None, "annotated_size": (400, 300), "options": options, **raws[0]}
    assert read_annotated(raw).boxes.tolist() == [[80, 120, 280, 300]]
    assert find_conventions(raws, DataOptions(box_column="boxes", box_units="pixels"))[1] == ()
    assert find_conventions(raws[:3], DataOptions(box_column="boxes"))[1] == ()  # too few to tell


def test_boxes_that_fit_two_formats_are_mentioned():
    _, (note,) = _look_at_boxes([{"bbox": [[10, 10, 60, 40], [5, 5, 50, 50]]}] * 8)
    assert note == "boxes are read as xywh, but all 16 sampled boxes fit xyxy too (data.box_format=xyxy)"
    assert _look_at_boxes([{"bbox": [[60, 10, 10, 40], [5, 5, 50, 50]]}] * 8)[1] == ()


def test_images_without_annotations_show_nothing():
    assert _look_at_boxes([None, []])[1] == ()
    assert _look("mask", [None, {"bytes": b"no", "path": None}])[1] == ()

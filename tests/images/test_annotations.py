"""Annotations beside their image: what sizes tell is brought together and noted, what contradicts is named."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.images import DataOptions, UnreadableImage, read_annotated
from modeling_vitreg.images.annotations import (
    CROWDS,
    DROPPED,
    RESIZED,
    SCALED,
    TURNED,
    UNCLEAR,
    NoteCounter,
    read_boxes,
    turn_boxes,
    turn_map,
)
from modeling_vitreg.images.maps import NOT_FINITE, voc_palette


WIDTH, HEIGHT = 12, 6  # as stored


def _file(array, *, orientation=1, format="PNG"):
    stream, image = io.BytesIO(), Image.fromarray(array)
    exif = image.getexif()
    if orientation != 1:
        exif[0x0112] = orientation
    image.save(stream, format, exif=exif)
    return {"bytes": stream.getvalue(), "path": None}


def _raw(*, orientation=1, width=WIDTH, height=HEIGHT, size=None, boxes=None, options=None, **maps):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[1:3, 2:5] = 200  # an object
    raw = {**_file(pixels, orientation=orientation), "label": 1, "name": "a.png"}
    raw |= {"options": DataOptions(**(options or {})), "boxes": boxes, "annotated_size": size}
    return raw | ({"maps": maps} if maps else {})


def _mask(height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8)
    mask[1:3, 2:5] = 1
    return mask


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_and_boxes_that_were_made_before_the_turn_lie_on_their_object(orientation):
    stated = {"boxes": {"bbox": [[2, 1, 3, 2]]}, "size": (WIDTH, HEIGHT), "options": {"annotation_frame": "stored"}}
    found = read_annotated(_raw(orientation=orientation, mask=_file(_mask()), **stated))
    is_object = np.asarray(found.image)[..., 0] > 100
    assert np.array_equal(found.mask == 1, is_object)
    rows, columns = np.nonzero(is_object)
    assert found.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert turn_map(_mask(), orientation).sum() == 6
    assert turn_boxes(np.array([[0, 0, WIDTH, HEIGHT]]), (WIDTH, HEIGHT), orientation)[0, 2:].tolist() == list(
        found.image.size
    )


@pytest.mark.parametrize(
    ("orientation", "size", "note"),
    [(6, (WIDTH, HEIGHT), TURNED), (6, (HEIGHT, WIDTH), None), (3, (WIDTH, HEIGHT), UNCLEAR), (1, None, None)],
)
def test_sizes_tell_when_an_annotation_was_made(orientation, size, note):
    found = read_annotated(_raw(orientation=orientation, size=size, boxes={"bbox": [[1, 1, 2, 2]]}))
    assert found.notes == ((note,) if note else ())


def test_boxes_without_a_stated_size_are_turned_where_they_fit_one_frame_only():
    found = read_annotated(_raw(orientation=6, boxes=[[8, 1, 12, 5]]))
    assert found.notes == (TURNED,) and found.boxes.tolist() == [[1, 8, 5, 12]]
    assert read_annotated(_raw(orientation=6, boxes=[[1, 1, 5, 5]])).notes == (UNCLEAR,)
    relative = read_annotated(_raw(orientation=6, boxes=[[0, 0, 0.5, 0.5]], options={"box_units": "relative"}))
    assert relative.notes == (UNCLEAR,) and relative.boxes.tolist() == [[0, 0, HEIGHT / 2, WIDTH / 2]]


def test_another_resolution_is_brought_to_the_image_and_another_shape_is_a_contradiction():
    half = read_annotated(_raw(mask=_file(_mask()[::2, ::2]), boxes={"bbox": [[1, 0.4, 2, 1]]}, size=(6, 3)))
    assert half.mask.shape == (HEIGHT, WIDTH) and half.boxes.tolist() == [[2, 0, 6, 2]]
    assert half.notes == (RESIZED, SCALED)
    with pytest.raises(UnreadableImage, match=r"a\.png: mask of shape \(12, 6\) for an image of \(6, 12\) pixels"):
        read_annotated(_raw(mask=_file(_mask(12, 6))))
    with pytest.raises(
        UnreadableImage, match=r"a\.png: the annotation is for an image of 9 x 9 pixels, .* has 12 x 6"
    ):
        read_annotated(_raw(boxes=[[0, 0, 3, 3]], size=(9, 9)))
    with pytest.raises(UnreadableImage, match=r"beyond its edges: data\.box_format may be wrong"):
        read_annotated(_raw(boxes=[[0, 0, 40, 3]]))


def test_cells_of_boxes_are_read_by_their_format_without_crowds_and_empty_boxes():
    plain, wide, notes = [[1, 2, 11, 22], [0, 0, 5, 5]], [[1, 2, 10, 20], [0, 0, 5, 5]], []
    middle = [[6, 12, 10, 20], [2.5, 2.5, 5, 5]]
    for cell, box_format in (
        (plain, "auto"),
        ({"bbox": wide, "category": [1, 2]}, "auto"),
        ([{"bbox": box} for box in wide], "auto"),
        ({"bbox": plain}, "xyxy"),
        (wide, "xywh"),
        (middle, "cxcywh"),
    ):
        assert read_boxes(cell, DataOptions(box_format=box_format), notes).tolist() == plain
    assert not notes and read_boxes({"bbox": [[0.4, 0.4, 10.3, 10]]}, DataOptions(), notes).tolist() == [
        [0, 0, 11, 10]
    ]
    assert read_boxes({"bbox": wide, "iscrowd": [0, 1]}, DataOptions(), notes).tolist() == plain[:1]
    assert read_boxes([[1, 1, 1, 5], [0, float("nan"), 3, 3], plain[0]], DataOptions(), notes).tolist() == plain[:1]
    assert notes == [CROWDS, DROPPED] and read_boxes([], DataOptions(), notes).shape == (0, 4)
    for cell in (7, {"boxes": plain}, [1, 2, 3, 4], [[1, 2, 3]], [{"box": [1, 2, 3, 4]}]):
        with pytest.raises(ValueError, match="expected boxes as"):
            read_boxes(cell, DataOptions(), notes)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (_file(_mask() * 255), {"mask_format": "binary"}),
        (_file(np.repeat(_mask()[..., None], 3, axis=2)), {}),  # grey, stored as colours
        (_file(voc_palette()[_mask()].astype(np.uint8)), {"mask_format": "voc"}),
        (_mask().astype(float).tolist(), {}),
        (_mask()[None], {}),
        (_mask() + 1, {"reduce_labels": True}),
        (_mask().astype(bool), {}),
    ],
)
def test_masks_of_every_kind_are_class_numbers(mask, options):
    assert np.array_equal(read_annotated(_raw(mask=mask, options=options)).mask, _mask())


def test_unknown_pixels_of_masks_are_marked_in_several_ways():
    for mark in (255, -1):
        found = read_annotated(_raw(mask=np.where(_mask() == 1, mark, 0))).mask
        assert np.array_equal(found == 255, _mask() == 1)


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [
        (_mask() * 7, {"num_classes": 5}, r"holds class 7: expected classes 0 \.\.\. 4 in a mask"),
        (_mask() * 0.5, {}, "holds fractions"),
        (_mask() * np.int64(70_000), {}, "holds class 70000"),
        (_mask() * np.int64(-7), {}, "holds class -7"),
        (_file(np.stack([_mask() * 9, _mask(), _mask()], axis=2)), {}, "holds colours such as"),
        (
            _file(np.stack([_mask() * 9, _mask(), _mask()], axis=2)),
            {"mask_format": "voc"},
            "which Pascal VOC does not use",
        ),
        (None, {}, "is missing"),
        ({"bytes": b"no", "path": None}, {}, "UnidentifiedImageError"),
    ],
)
def test_masks_that_cannot_be_are_named_with_their_value(mask, options, words):
    with pytest.raises(UnreadableImage, match=rf"a\.png: mask:? .*{words}"):
        read_annotated(_raw(mask=mask, options=options))


def test_depth_is_in_metres_and_zero_where_it_is_not_finite():
    depth = np.full((HEIGHT, WIDTH), 2500.0)
    depth[0, :3] = np.nan, np.inf, -np.inf
    found = read_annotated(_raw(depth=depth, options={"depth_scale": 0.001}))
    assert found.depth[0, :3].tolist() == [0, 0, 0] and found.depth[1, 0] == 2.5 and found.notes == (NOT_FINITE,)
    with pytest.raises(UnreadableImage, match="depth holds colours"):
        read_annotated(_raw(depth=_file(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))))


def test_notes_are_counted_with_their_share_and_first_image():
    notes, others = NoteCounter(), NoteCounter()
    notes.add("a.png", [TURNED])
    others.add("b.png", [TURNED, RESIZED])
    notes.merge(others.counts)
    assert notes.lines(8) == [
        f"2 of 8 images (25.0%, the first a.png): {TURNED}",
        f"1 of 8 images (12.5%, the first b.png): {RESIZED}",
    ]

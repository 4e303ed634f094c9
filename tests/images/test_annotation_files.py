"""COCO and Pascal VOC files as people have them, beside the images of a folder."""

import json
import unicodedata

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.images import DataOptions, UnreadableImage, open_images


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.JPG", "val/c.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(path, "JPEG")
    return tmp_path


def _coco(folder, images, annotations, *, name="boxes.json", encoding="utf-8"):
    content = {"images": images, "annotations": annotations}
    (folder / name).write_text(json.dumps(content), encoding=encoding)
    return folder / name


def _open(folder, annotations, **options):
    return open_images(str(folder / "images"), annotations=annotations, options=DataOptions(**options))


def _box(image, bbox=(10, 10, 20, 20), **others):
    return {"id": 7, "image_id": image, "bbox": bbox, **others}


def test_a_coco_file_with_a_mark_in_front_another_suffix_and_crowds_is_read(folder):
    images = [{"id": 2, "file_name": "b.JPG"}, {"id": "1", "file_name": "a.jpg"}]
    boxes = [_box(1, [10.4, 10, 20, 20.2], iscrowd=0), _box(1, [0, 0, 9, 9], iscrowd=1), _box(1)]
    source = _open(folder, _coco(folder, images, boxes, name="BOXES.JSON", encoding="utf-8-sig"))
    assert [source[number].name.rpartition("/")[2] for number in range(2)] == ["b.JPG", "a.jpg"]
    assert source[0].boxes.shape == (0, 4)  # annotated, without an object
    assert source[1].boxes.tolist() == [[10, 10, 30, 30]] * 2
    assert source.notes[0] == "1 of 3 boxes are of crowds and left out, as in LOST"
    assert "1 of 3 images (33.3%)" in source.notes[1] and "have no annotation in BOXES.JSON" in source.notes[1]


def test_names_without_suffix_or_with_another_folder_are_found_and_missing_images_named(folder):
    names = ["train2017/a.jpg", "b", "C.jpg", "/data/mine/a.jpg", "val\\c.jpg", "gone.jpg"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    source = _open(folder, _coco(folder, images, [_box(number) for number in range(6)]))
    assert len(source) == 4 and len(source[0].boxes) == 2  # a.jpg twice, c.jpg twice
    text = "\n".join(source.notes)
    assert "4 of 6 names of images (66.7%) were found with another suffix or folder" in text
    assert "2 images have several entries, whose boxes were joined" in text
    assert "1 of 6 annotated images (16.7%) do not exist" in text and "'gone.jpg'" in text
    with pytest.raises(UnreadableImage, match=r"gone\.jpg"):
        source[3]


@pytest.mark.parametrize("name", ["../secret.png", "val/../../secret.png", "/etc/secret.png", "C:\\secret.png", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(folder, name):
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    with pytest.raises(ValueError, match=r"boxes\.json: the image .* points outside its folder"):
        _open(folder, _coco(folder, [{"id": 1, "file_name": name}], [_box(1)]))


def test_annotations_without_image_or_box_are_counted(folder):
    boxes = [_box(1), _box(8), _box(1, None), _box(1, [1, 2, 3])]
    source = _open(folder, _coco(folder, [{"id": 1, "file_name": "a.jpg"}], boxes))
    assert len(source[0].boxes) == 1
    assert source.notes[0] == "1 of 4 annotations (25.0%) name no image of boxes.json: image_id '8'"
    assert source.notes[1].startswith("2 of 4 annotations (50.0%) have no bbox of four numbers: id '7'")
    with pytest.raises(ValueError, match="expected annotations with a bbox of four numbers"):
        _open(folder, _coco(folder, [{"id": 1, "file_name": "a.jpg"}], [_box(8)]))


def test_ids_are_matched_as_text_and_as_numbers_and_stand_for_one_image(folder):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2.0, "file_name": "b.JPG"}, {"id": 1, "file_name": "a.jpg"}]
    source = _open(folder, _coco(folder, images, [_box("1"), _box(1.0), _box(2), _box("2")]))
    assert [len(source[number].boxes) for number in range(2)] == [2, 2]
    images[2]["file_name"] = "val/c.jpg"
    with pytest.raises(ValueError, match=r"the image id 1 stands for 'a.jpg' and 'val/c.jpg'"):
        _open(folder, _coco(folder, images, [_box(1)]))
    with pytest.raises(ValueError, match=r"got none: of 3, 1 name no image \('9'\), 2 have no such bbox \(id '7'"):
        _open(folder, _coco(folder, images[:1], [_box(9), _box(1, ["1", 2, 3, 4]), _box(1, None)]))


def test_names_differ_in_how_accents_are_stored(folder):
    (folder / "images" / "a.jpg").rename(folder / "images" / unicodedata.normalize("NFD", "Café.jpg"))
    name = unicodedata.normalize("NFC", "café.jpg")
    source = _open(folder, _coco(folder, [{"id": 1, "file_name": name}], [_box(1)]))
    assert len(source[0].boxes) == 1 and "found with another suffix or folder" in source.notes[0]


NO_COCO = ["[1, 2]", "{}", "no json", '{"images": [{"id": 1}], "annotations": []}', "null", 200_000 * "["]
NO_COCO += ['{"images": [{"id": 1, "file_name": "a.jpg", "width": Infinity}], "annotations": []}']
_ONE = '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [1, 1, 5, %s]}]}'
NO_COCO += [_ONE % ("1" + 400 * "0")]


@pytest.mark.parametrize("content", NO_COCO, ids=range(len(NO_COCO)))
def test_a_file_that_is_no_coco_file_is_refused(folder, content):
    (folder / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=r"boxes\.json: expected a COCO file of instances"):
        _open(folder, folder / "boxes.json")


def test_paths_that_do_not_exist_are_named(folder):
    with pytest.raises(ValueError, match=r"none\.json: no such file of annotations"):
        _open(folder, folder / "none.json")
    with pytest.raises(ValueError, match="no such folder of images"):
        open_images(str(folder / "pictures"), annotations=_coco(folder, [], []))


def test_stated_sizes_are_compared_with_the_image(folder):
    images = [{"id": 1, "file_name": "a.jpg", "width": 160, "height": 80}]
    source = _open(folder, _coco(folder, images, [_box(1)]))
    assert source[0].boxes.tolist() == [[5, 5, 15, 15]] and source[0].notes
    images[0]["height"] = 160
    with pytest.raises(UnreadableImage, match="for an image of 160 x 160 pixels, the image has 80 x 40"):
        _open(folder, _coco(folder, images, [_box(1)]))[0]


def _voc(folder, name, *boxes, filename="", size="", hard=0):
    (folder / "voc").mkdir(exist_ok=True)
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>dog</name><difficult>{}</difficult><bndbox>{}</bndbox></object>".format(
            hard, "".join(f"<{side}>{at}</{side}>" for side, at in zip(sides, box))
        )
        for box in boxes
    )
    text = f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"
    (folder / "voc" / name).write_text(text)


def test_voc_files_count_from_one_and_have_stale_names_floats_and_marks(folder):
    _voc(folder, "a.xml", (1, 1, 10.5, 20), filename="IMG_1.jpg")
    _voc(folder, "b.XML", (4, 2, 10, 20), filename="b", hard=1)
    source = _open(folder, folder / "voc")
    assert source[0].boxes.tolist() == [[0, 0, 10.5, 20]] and source[1].boxes.tolist() == [[3, 1, 10, 20]]
    assert _open(folder, folder / "voc", keep_difficult=False)[1].boxes.shape == (0, 4)


def test_voc_files_that_count_from_zero_are_noticed(folder):
    _voc(folder, "a.xml", (0, 3, 10, 20))
    source = _open(folder, folder / "voc")
    assert source[0].boxes.tolist() == [[0, 3, 10, 20]] and "count pixels from 0" in source.notes[0]


def test_swapped_corners_of_voc_files_are_put_right_and_said(folder):
    _voc(folder, "a.xml", (60, 30, 11, 11))
    source = _open(folder, folder / "voc")
    assert source[0].boxes.tolist() == [[10, 10, 60, 30]] and source.options.box_format == "auto"
    assert "1 of 1 files (100.0%) have boxes with xmin > xmax or ymin > ymax, which were swapped" in source.notes[0]


def test_voc_files_that_contradict_or_are_broken_are_named(folder):
    _voc(folder, "a.xml", (1, 1, 10, 20), size="<size><width>50</width><height>50</height></size>")
    _voc(folder, "b.xml", (1, 1, 10, 20), size="<size><width>0</width><height>0</height></size>")
    (folder / "voc" / "c.xml").write_text("<annotation><object></object></annotation>")
    source = _open(folder, folder / "voc")
    assert "1 of 3 files (33.3%) are not Pascal VOC annotations" in source.notes[0] and "c.xml" in source.notes[0]
    assert len(source[1].boxes) == 1
    with pytest.raises(UnreadableImage, match="for an image of 50 x 50 pixels"):
        source[0]
    for name in ("a.xml", "b.xml"):
        (folder / "voc" / name).write_text("<svg/>")
    with pytest.raises(ValueError, match=r"got none that can be read: a\.xml"):
        _open(folder, folder / "voc")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

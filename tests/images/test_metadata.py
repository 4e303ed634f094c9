"""Tables that name the images of a folder, and folders with "::" in their names."""

import csv
import json
import pathlib

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.images import DataOptions, open_images, read_annotated


def _write_images(folder, names, *, first: int = 1):
    for number, name in enumerate(names, start=first):
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(path)
    return str(folder)


def _write_table(path, rows) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        plain = pathlib.Path(str(path).partition("::")[0]).parent / "plain.parquet"
        datasets.Dataset.from_list(rows).to_parquet(plain)
        plain.rename(path)


def _numbers(source) -> list[int]:
    if hasattr(source, "read"):
        return [source.read(index)[0].getpixel((0, 0))[0] for index in range(len(source))]
    stream = source.examples(seed=0)
    return sorted(Image.open(next(stream)[0]["path"]).getpixel((0, 0)) for _ in range(2))


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["set", "a::b"])
def test_tables_of_all_kinds_name_images_masks_and_labels(tmp_path, suffix, name, is_streaming):
    folder = _write_images(tmp_path / name, ["train/i/x.png", "train/i/y.png", "train/m/x.png", "train/i/z.png"])
    rows = [
        {"file_name": "i/y.png", "mask_file_name": "m/x.png", "label": 1},
        {"file_name": "i/x.png", "mask_file_name": "m/x.png", "label": 0},
    ]
    _write_table(tmp_path / name / "train" / f"metadata{suffix}", rows)
    source = open_images(folder, options=DataOptions(mask_column="mask"), is_streaming=is_streaming)
    assert _numbers(source) == ([1, 2] if is_streaming else [2, 1])
    assert "1 of 4 images (25.0%) are not named in metadata and left out: " in source.describe_labels()
    if not is_streaming:
        assert source.labels == [1, 0]
        assert (read_annotated(source.raw(0)).mask == 3).all()


def test_a_row_belongs_to_the_split_of_its_image_wherever_the_table_lies(tmp_path):
    folder = _write_images(tmp_path, ["train/a.png", "test/b.png", "train/c.png"])
    rows = [{"file_name": name, "label": number} for number, name in enumerate(["train/c.png", "test/b.png"])]
    _write_table(tmp_path / "metadata.jsonl", rows)
    assert (_numbers(open_images(folder)), open_images(folder).labels) == ([3], [0])
    assert open_images(folder, split="test").labels == [1]


def test_lists_and_groups_of_files_become_images(tmp_path):
    folder = _write_images(tmp_path, ["a.png", "b.png", "c.png"])
    row = {"file_name": "a.png", "near_file_names": ["b.png", "c.png"], "more": {"file_name": "b.png", "year": 3}}
    _write_table(tmp_path / "metadata.jsonl", [row])
    source = open_images(folder)
    assert _numbers(source) == [1] and "left out" not in source.describe_labels()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["file_name", "mask_file_name", "depth_file_name"])
@pytest.mark.parametrize(
    "name", ["../secret.png", "{outside}", "b/../../secret.png", "..\\secret.png", "C:/a.png", "file:///secret.png"]
)
def test_no_name_leads_out_of_the_folder(tmp_path, suffix, column, name):
    _write_images(tmp_path, ["secret.png", "set/a.png"])
    name = name.replace("{outside}", str(tmp_path / "secret.png"))
    _write_table(tmp_path / "set" / f"metadata{suffix}", [{"file_name": "a.png", column: name}])
    with pytest.raises(ValueError, match=r"metadata\.\w+ names the file .*: expected a path inside .*set'"):
        open_images(str(tmp_path / "set"))


@pytest.mark.parametrize(
    "row", [{"near_file_names": ["a.png", "../secret.png"]}, {"more": {"mask_file_name": "../secret.png"}}]
)
def test_names_in_lists_and_groups_do_not_lead_out_either(tmp_path, row):
    _write_images(tmp_path, ["secret.png", "set/a.png"])
    _write_table(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", **row}])
    with pytest.raises(ValueError, match=r"names the file '../secret.png'"):
        open_images(str(tmp_path / "set"))


def test_a_name_that_stays_inside_may_have_detours(tmp_path):
    folder = _write_images(tmp_path, ["a.png", "b/c.png"])
    _write_table(tmp_path / "metadata.jsonl", [{"file_name": "b/../a.png"}, {"file_name": "./b/c.png"}])
    assert _numbers(open_images(folder)) == [1, 2]


def test_a_table_that_is_damaged_is_named(tmp_path):
    folder = _write_images(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": ')
    with pytest.raises(ValueError, match=r"metadata\.jsonl' cannot be read: "):
        open_images(folder)


def test_tables_with_other_columns_are_named(tmp_path):
    folder = _write_images(tmp_path, ["train/a.png", "test/b.png"])
    _write_table(tmp_path / "test" / "metadata.jsonl", [{"file_name": "b.png", "label": 1}])
    _write_table(tmp_path / "train" / "metadata.jsonl", [{"file_name": "a.png"}])
    with pytest.raises(ValueError, match=r"has the columns 'image', 'label', and .*train.* 'image'"):
        open_images(folder)


def test_an_empty_cell_is_an_image_that_is_missing(tmp_path):
    folder = _write_images(tmp_path, ["a.png"])
    rows = [{"file_name": "a.png", "mask_file_name": "a.png"}, {"file_name": "a.png", "mask_file_name": None}]
    _write_table(tmp_path / "metadata.jsonl", rows)
    assert len(open_images(folder, options=DataOptions(mask_column="mask"))) == 2


def test_rows_without_an_image_or_with_that_of_another_row_are_counted(tmp_path):
    folder = _write_images(tmp_path, ["train/a.png", "test/b.png"])
    names = ["train/a.png", "test/b.png", "train/a.png", None]
    _write_table(tmp_path / "metadata.jsonl", [{"file_name": name, "label": 1} for name in names])
    assert open_images(folder).left_out == (
        "1 of 4 rows of metadata name an image that another row names",
        "1 of 4 rows of metadata name no image of a split and are left out",
    )


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("place", ["a::b", "a::b/c", "d/a::b"])
def test_tables_and_saved_datasets_lie_in_folders_of_any_name(tmp_path, place, is_streaming):
    pixels = [np.full((8, 8), number, dtype=np.uint8) for number in (1, 2, 3)]
    images = datasets.Dataset.from_dict({"image": list(map(Image.fromarray, pixels)), "label": [0, 1, 1]})
    images = images.cast_column("image", datasets.Image())
    folder = tmp_path / place
    images.to_parquet(tmp_path / "plain" / "train-000.parquet")
    images.select([1]).to_parquet(tmp_path / "plain" / "test.parquet")
    images.save_to_disk(tmp_path / "saved")
    folder.parent.mkdir(exist_ok=True)
    (tmp_path / "plain").rename(folder)
    source = open_images(str(tmp_path / "d" if place.startswith("d/") else folder), is_streaming=is_streaming)
    expected = [0, 1, 1]
    if is_streaming:
        stream = source.examples(seed=0)
        assert sorted(next(stream)[0]["label"] for _ in range(3)) == expected
    else:
        assert source.labels == expected
    assert len(open_images(str(folder), split="test")) == 1
    (tmp_path / "saved").rename(folder / "saved")
    assert open_images(str(folder / "saved"), is_streaming=is_streaming).class_names is None

"""Opening images by one string, decoding them late, and reading a stream that can be stopped anywhere."""

import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import struct
import tarfile
import unicodedata
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_vitreg.images import (
    DataOptions,
    ImageSource,
    ImageStream,
    UnreadableImage,
    check_channels,
    decode_image,
    derive_seed,
    open_images,
    read_annotated,
)
from modeling_vitreg.scenes import SceneSettings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _image(number: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), number, np.uint8))


def _encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _raw(content: bytes | None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path, "label": None, "name": "the image"}


def _write_folder(folder, names, *, first: int = 0) -> str:
    for number, name in enumerate(names, start=first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _image(number).save(folder / name)
    return str(folder)


def _write_shards(folder, *, num_shards: int = 3, images_per_shard: int = 4, prefix: str = "train") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{prefix}-{shard:03}.tar", "w") as archive:
            for number in range(shard * images_per_shard, (shard + 1) * images_per_shard):
                for suffix, content in (("png", _encode(_image(number))), ("cls", str(number % 5).encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return str(folder)


def _make_dataset(numbers) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"picture": [_image(number) for number in numbers], "kind": [number % 2 for number in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def _write_parquet(folder, *, num_shards: int = 3, images_per_shard: int = 4) -> str:
    for shard in range(num_shards):
        numbers = range(shard * images_per_shard, (shard + 1) * images_per_shard)
        _make_dataset(numbers).to_parquet(folder / f"train-{shard}-of-{num_shards}.parquet", batch_size=2)
    return str(folder)


def _number_of(image: Image.Image) -> int:
    """The images of these tests are of one grey, which is their number."""
    return int(np.asarray(image)[0, 0, 0])


def _numbers_of(source: ImageSource) -> list[int]:
    return [_number_of(source.read(index)[0]) for index in range(len(source))]


def _first_numbers(stream: ImageStream, count: int, **keywords) -> list[int]:
    examples = itertools.islice(stream.examples(**keywords), count)
    return [_number_of(decode_image(raw)) for raw, _ in examples]


# Decoding


def test_every_mode_becomes_rgb_with_the_same_colour():
    grey = Image.fromarray(np.full((4, 6), 100, np.uint8))
    red = Image.new("RGB", (6, 4), (200, 10, 20))
    palette = red.quantize(4)
    cases = {
        "grey": (_encode(grey), (100, 100, 100)),
        "grey with alpha": (_encode(grey.convert("LA")), (100, 100, 100)),
        "one bit": (_encode(grey.convert("1", dither=Image.Dither.NONE)), (0, 0, 0)),
        "grey of 16 bits": (_encode(Image.fromarray(np.full((4, 6), 25607, np.uint16))), (100, 100, 100)),
        "big-endian grey of 16 bits": (_encode(Image.fromarray(np.full((4, 6), 25607, ">u2")), "tiff"), (100,) * 3),
        "transparent": (_encode(Image.new("RGBA", (6, 4), (200, 10, 20, 0))), (200, 10, 20)),
        "palette": (_encode(palette), (200, 10, 20)),
        "transparent palette": (_encode(palette, transparency=bytes([7] * 4)), (200, 10, 20)),
        "four inks": (_encode(Image.new("CMYK", (6, 4), (55, 245, 235, 0)), "tiff"), (200, 10, 20)),
    }
    for name, (content, colour) in cases.items():
        image = decode_image(_raw(content))
        assert (image.mode, image.size) == ("RGB", (6, 4)), name
        assert image.getpixel((5, 3)) == colour, name


def test_an_image_is_turned_upright():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 0] = 255  # the left column
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright is a quarter turn clockwise
    image = decode_image(_raw(_encode(Image.fromarray(pixels), exif=exif)))
    assert image.size == (4, 6)
    assert np.asarray(image)[:, :, 0].tolist() == [[255] * 4] + [[0] * 4] * 5  # left became top


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_integers_of_any_depth_keep_their_content(depth, kind):
    ramp = np.linspace(0, 2**depth - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
    found = np.asarray(decode_image(_raw(_encode(Image.fromarray(ramp), kind))))[..., 0]
    assert (found == ramp >> (depth - 8)).all() and found.max() == 255


def test_floats_keep_their_content_or_are_refused_in_words():
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    for scale in (1, 255, 4095, 65535):
        found = np.asarray(decode_image(_raw(_encode(Image.fromarray(ramp * scale), "tiff"))))
        assert len(np.unique(found)) == 256, scale
    assert np.asarray(decode_image(_raw(_encode(Image.fromarray(ramp * 0), "tiff")))).max() == 0
    for pixels in (ramp * 7, ramp - 0.5, ramp * 1e6, np.where(ramp > 0.5, np.nan, ramp)):
        with pytest.raises(UnreadableImage, match=r"float pixels from .*: expected integers of 8 to 16"):
            decode_image(_raw(_encode(Image.fromarray(pixels.astype(np.float32)), "tiff")))
    for pixels in (ramp * 100_000, ramp * -9):
        with pytest.raises(UnreadableImage, match="integer pixels from"):
            decode_image(_raw(_encode(Image.fromarray(pixels.astype(np.int32)), "tiff")))


def _deep_colour(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel of an array (rows, columns, 3), which Pillow reads but cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colour_of_16_bits_is_read_and_refused_where_it_would_turn_dark():
    pixels = np.random.default_rng(0).integers(0, 2**16, (8, 9, 3))
    assert (np.asarray(decode_image(_raw(_deep_colour(pixels)))) == pixels >> 8).all()
    with pytest.raises(UnreadableImage, match="would turn dark: convert it to 8 bits per channel"):
        decode_image(_raw(_deep_colour(pixels >> 4)))


def test_an_image_is_opened_with_the_channels_of_the_model():
    image = Image.new("RGBA", (6, 4), (200, 10, 20, 50))
    for num_channels, pixel in ((1, 68), (3, (200, 10, 20)), (4, (200, 10, 20, 50))):
        assert decode_image(_raw(_encode(image)), num_channels=num_channels).getpixel((1, 1)) == pixel
    for num_channels in (0, 2, 5):
        with pytest.raises(
            ValueError, match=f"images of {num_channels} channels, but image files have 1 .* 3 .* or 4"
        ):
            check_channels(num_channels, reader="the model")


def test_a_name_with_control_characters_stays_on_one_line():
    assert str(UnreadableImage("a\n\x1b[31m.png", "empty")) == r"a\n\x1b[31m.png: empty"


def test_what_cannot_be_decoded_is_reported_with_its_name_and_a_reason(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    jpeg, png = _encode(noise, "jpeg"), _encode(noise)
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 255
    cases = {
        "empty": _raw(b""),
        "identify": _raw(b"no image"),
        "a web page, not an image": _raw(b"\n<html>404</html>"),
        "git lfs pull": _raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is empty": _raw(None, str(tmp_path / "zero.png")),
        "truncated": _raw(jpeg[: len(jpeg) // 2]),
        "OSError": _raw(png[: len(png) // 2]),
        "Error": _raw(bytes(damaged)),
        "No such file": _raw(None, str(tmp_path / "gone.png")),
        "no image in this row": _raw(None),
    }
    (tmp_path / "zero.png").write_bytes(b"")
    for reason, raw in cases.items():
        with pytest.raises(UnreadableImage, match=rf"the image: .*{reason}"):
            decode_image(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode_image(_raw(png))


def test_an_unreadable_image_travels_between_processes():
    copy = pickle.loads(pickle.dumps(UnreadableImage("a.png", "empty")))
    assert (copy.name, copy.reason, str(copy)) == ("a.png", "empty", "a.png: empty")


# Sources with an index


def test_a_folder_of_class_folders_has_labels(tmp_path):
    source = open_images(_write_folder(tmp_path / "animals", ["cat/a.png", "cat/b.png", "dog/a.png"]))
    assert source.class_names == ("cat", "dog")
    assert [source.read(index)[1] for index in range(3)] == [0, 0, 1]
    assert _numbers_of(source) == [0, 1, 2]
    assert source.name_of(2) == str(tmp_path / "animals" / "dog" / "a.png")


def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_images(_write_folder(tmp_path / "flat", ["a.png", "b.jpg"]))
    assert (len(source), source.class_names, source.read(0)[1]) == (2, None, None)


def test_folders_named_like_splits_are_splits(tmp_path):
    folder = _write_folder(tmp_path / "set", ["train/x/a.png", "train/y/a.png", "val/x/a.png", "val/y/a.png"])
    assert _numbers_of(open_images(folder)) == [0, 1]
    validation = open_images(folder, split="validation")
    assert _numbers_of(validation) == [2, 3]
    assert validation.class_names == ("x", "y")
    with pytest.raises(ValueError, match="no split 'test'; it has 'train', 'validation'"):
        open_images(folder, split="test")


def test_a_class_whose_name_holds_the_word_train_is_a_class(tmp_path):
    for name, other in (("bullet train", "car"), ("train", "car")):
        source = open_images(
            _write_folder(tmp_path / f"{name} [0]", [f"{name}/a.png", f"{other}/a.png", "ship [1]/a.png"])
        )
        assert source.class_names == tuple(sorted([name, other, "ship [1]"]))
        assert len(source) == 3


def test_splits_beside_classes_are_refused(tmp_path):
    folder = _write_folder(tmp_path / "set", ["train/a.png", "val/a.png", "extra/a.png"])
    with pytest.raises(ValueError, match="holds the splits 'train', 'val' and beside them 'extra'"):
        open_images(folder)


def test_names_of_splits_are_no_classes(tmp_path):
    folder = _write_folder(tmp_path / "set", ["Train/a.png", "Train/b.png", "dev/c.png", "test/d.png"])
    for split, numbers in (("train", [0, 1]), ("validation", [2]), ("test", [3])):
        source = open_images(folder, split=split)
        assert (_numbers_of(source), source.class_names, set(source.labels)) == (numbers, None, {None})
        assert source.describe_labels() == "labels: none; the images are not in class folders"
    stream = open_images(folder, is_streaming=True)
    assert sorted(_first_numbers(stream, 2, seed=0)) == [0, 1] and stream.class_names is None


@pytest.mark.parametrize("top", ["", "archive/", "archive/images/"])
@pytest.mark.parametrize("split", ["", "train/"])
def test_class_folders_may_be_nested_uneven_and_below_single_folders(tmp_path, top, split):
    names = ["cat/1.png", "cat/2.png", "dog/first/3.png", "dog/second/deep/4.png", "owl/images/5.png"]
    source = open_images(_write_folder(tmp_path / "a::b", [top + split + name for name in names]))
    assert source.class_names == ("cat", "dog", "owl")
    assert (source.labels, _numbers_of(source)) == ([0, 0, 1, 1, 2], [0, 1, 2, 3, 4])
    assert source.describe_labels() == "labels: 3 classes from folders: 'cat', 'dog', 'owl'"


def test_images_beside_class_folders_have_no_label_and_are_counted(tmp_path):
    source = open_images(_write_folder(tmp_path / "set", ["cat/a.png", "cat/b.png", "cover.png", "dog/c.png"]))
    assert source.labels == [0, 0, None, 1]
    assert "1 of 4 images have no label" in source.describe_labels()
    source = open_images(_write_folder(tmp_path / "flat", ["a.png", "b.png", "c.png", "x/d.png", "y/e.png"]))
    assert source.labels == [None] * 5 and "3 of 5 images are not in a class folder" in source.describe_labels()


def test_a_class_that_a_split_lacks_keeps_its_number(tmp_path):
    folder = _write_folder(tmp_path / "set", ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png"])
    source = open_images(folder, split="validation")
    assert source.labels == [2] and source.class_names == ("a", "b", "c")
    assert "3 classes, 1 of them in this split" in source.describe_labels()
    assert "note: the split 'validation' has no image of the classes 'a', 'b'" in source.describe_labels()


def test_class_folders_are_read_beside_foreign_metadata(tmp_path):
    folder = _write_folder(tmp_path / "set", ["cat/a.png", "dog/b.png"])
    for name, content in (("metadata.csv", "camera,year\nx,2\n"), ("metadata.jsonl", '{"camera": 1}\n')):
        (tmp_path / "set" / name).write_text(content)
        source = open_images(folder)
        assert source.labels == [0, 1]
        assert f"{name} has no column file_name, or is not UTF-8, and was not read" in source.describe_labels()


def test_links_in_a_circle_odd_names_and_empty_files_do_no_harm(tmp_path):
    folder = _write_folder(tmp_path / "set", ["cat/a\n#<b>.png", "dog/b.png"])
    (tmp_path / "set" / "dog" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "dog" / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "set" / "dog" / "empty.png").write_bytes(b"")
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path / "set" / "cat") + b"/\xff.png")).write_bytes(b"")
    os.mkfifo(tmp_path / "set" / "dog" / "pipe.png")  # to open it waits forever
    source = open_images(folder)
    assert source.labels == [0, 1, 1, 1]
    assert "links to a folder above it: it is left out" in source.describe_labels()
    assert "that is not UTF-8 and is left out" in source.describe_labels()
    assert "pipe.png is a pipe, socket or device and is left out" in source.describe_labels()
    assert source.describe_labels().count("\n") == 3
    for index in (2, 3):
        with pytest.raises(UnreadableImage, match=r"(broken|empty)\.png"):
            source.read(index)


def test_files_that_are_not_read_are_counted(tmp_path):
    folder = tmp_path / "set"
    _write_folder(folder, ["cat/a.png", "cat/b.png", "dog/c.png", "__background__/d.png", "__MACOSX/e.png"])
    for name in ("cat/1.heic", "dog/2.HEIC", "dog/download", "readme.md", "labels.txt", "labels.csv"):
        (folder / name).write_bytes(b"?")
    (folder / "owl").mkdir()
    source = open_images(str(folder))
    assert source.class_names == ("__background__", "cat", "dog") and len(source) == 4
    assert source.left_out == (
        f"the folder {folder / 'owl'} is empty",
        "4 files beside 4 images have no suffix of an image that can be read: 1 without suffix, 1 .csv, 2 .heic",
    )
    datasets.Dataset.from_dict({"feature": [1.0]}).to_parquet(folder / "features.parquet")
    source = open_images(str(folder))
    assert len(source) == 4 and "1 tables without images beside images are left out" in source.left_out[1]
    _write_shards(folder, num_shards=1, images_per_shard=2)
    assert "4 images beside shards are left out" in open_images(str(folder)).left_out[0]


def test_spellings_of_an_accent_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    names = [f"train/{composed}/a.png", "train/the/b.png", f"test/{apart}/c.png", f"test/{composed}/d.png"]
    source = open_images(_write_folder(tmp_path / "set", names), split="test")
    assert (source.class_names, source.labels) == ((composed, "the"), [0, 0])
    words = _labelled([composed, apart, "the", "the"], "string")
    assert ImageSource(words).labels == [0, 0, 1, 1]


def _labelled(values, kind: str) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})
    content = {"image": [_image(number) for number in range(len(values))], "label": values}
    return datasets.Dataset.from_dict(content, features=features)


def test_words_numbers_with_gaps_and_empty_cells_are_labels():
    cases = [
        ("string", ["owl", "cat", None, " ", "cat "], [1, 0, None, None, 0], ("cat", "owl"), "2 classes from"),
        ("int64", [20, 3, -1, None, 3], [1, 0, None, None, 0], None, "(numbers from 3 to 20 with gaps)"),
        ("int64", [1, 0, None, 2], [1, 0, None, 2], None, "numbers 0 to 2"),
        ("float64", [1.0, 0.0, float("nan"), None], [1, 0, None, None], None, "2 of 4 images have no label"),
        ("bool", [True, False, None], [1, 0, None], ("False", "True"), "'False', 'True'"),
        ("string", ["all", "are", "different"], [None] * 3, None, "labels: none; the column 'label' holds 3 texts"),
        ("float64", [0.5, 1.5], [None] * 2, None, "holds fractions"),
    ]
    for kind, values, labels, names, words in cases:
        source = ImageSource(_labelled(values, kind))
        assert (source.labels, source.class_names) == (labels, names), values
        assert [source.read(index)[1] for index in range(len(source))] == labels
        assert words in source.describe_labels()


def test_words_are_the_same_numbers_in_every_split(tmp_path):
    parts = {"train": ["owl", "cat", "cat"], "test": ["owl", "owl"]}
    splits = {name: _labelled(values, "string") for name, values in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    assert open_images(str(tmp_path / "set")).labels == [1, 0, 0]
    assert open_images(str(tmp_path / "set"), split="test").labels == [1, 1]
    options = DataOptions(label_column="label")
    with pytest.raises(ValueError, match="the labels of a stream are not known in advance"):
        open_images(str(tmp_path / "set"), is_streaming=True, options=options)


def test_parquet_files_and_saved_datasets_are_opened(tmp_path):
    (tmp_path / "parquet").mkdir()
    saved = _make_dataset(range(12))
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(tmp_path / "splits")
    for folder in (_write_parquet(tmp_path / "parquet"), str(tmp_path / "saved"), str(tmp_path / "splits")):
        source = open_images(folder)
        assert source.class_names == ("even", "odd")
        assert _numbers_of(source) == list(range(12))
        assert source.read(3)[1] == 1
        assert source.name_of(3) == "image 3"
        assert sorted(_first_numbers(open_images(folder, is_streaming=True), 12, seed=0)) == list(range(12))
    assert _numbers_of(open_images(str(tmp_path / "splits"), split="test")) == [3]


def test_scenes_are_a_source():
    settings = SceneSettings(image_size=16, max_objects=1)
    source = open_images("scenes", scenes=range(2, 5), scene_settings=settings)
    image, label = source.read(0)
    assert (len(source), image.size, len(source.class_names)) == (3, (16, 16), 24)
    assert label == open_images("scenes", scenes=range(1, 3), scene_settings=settings).read(1)[1]
    for keywords in ({"split": "test"}, {"is_streaming": True}, {"scenes": range(0, 9, 2)}):
        with pytest.raises(ValueError, match="For other images give another range"):
            open_images("scenes", **keywords)


def test_a_fingerprint_follows_the_data_and_not_the_place(tmp_path, monkeypatch):
    names = ["cat/a.png", "cat/b.png", "dog/a.png"]
    folder = _write_folder(tmp_path / "one", names)
    first = open_images(folder).dataset_hash
    assert open_images(shutil.copytree(folder, tmp_path / "copy" / "deep")).dataset_hash == first
    for place, name in ((folder, "."), (tmp_path, "one"), (f"{folder}/cat", "..")):
        monkeypatch.chdir(place)
        assert open_images(name).dataset_hash == first
    assert open_images(_write_folder(tmp_path / "renamed", [*names[:2], "dog/b.png"])).dataset_hash != first
    assert open_images(_write_folder(tmp_path / "more", [*names, "dog/b.png"])).dataset_hash != first
    Image.new("RGB", (9, 30)).save(tmp_path / "one" / "cat" / "a.png")
    assert open_images(folder).dataset_hash != first

    first = ImageSource(_make_dataset([1, 2, 3])).dataset_hash
    assert ImageSource(_make_dataset([1, 2, 3])).dataset_hash == first
    assert ImageSource(_make_dataset([1, 4, 3])).dataset_hash != first
    relabelled = _make_dataset([1, 2, 3]).cast_column("kind", datasets.ClassLabel(names=["even", "strange"]))
    assert ImageSource(relabelled).dataset_hash != first


def test_columns_are_found_by_type_or_asked_for():
    both = _make_dataset(range(3)).add_column("label", [7, 8, 9]).add_column("caption", ["a", "b", "c"])
    assert ImageSource(both).read(1)[1] == 1  # the usual name wins over the type
    assert ImageSource(both, options=DataOptions(label_column="kind")).read(1)[1] == 1
    two = both.add_column("mask", [{"path": "a.png", "bytes": None}] * 3, feature=datasets.Image())
    with pytest.raises(ValueError, match="'mask', 'picture'; choose one with --columns image=NAME"):
        ImageSource(two)
    assert len(ImageSource(two, options=DataOptions(image_column="mask"))) == 3
    with pytest.raises(ValueError, match="no column 'pixels'; the columns are 'caption', 'kind', 'label', 'picture'"):
        ImageSource(both, options=DataOptions(image_column="pixels"))
    with pytest.raises(ValueError, match="'picture' holds"):
        ImageSource(both, options=DataOptions(label_column="picture"))
    with pytest.raises(ValueError, match="expected a column of type Image, got 'caption'"):
        ImageSource(both.select_columns("caption"))


def _with_maps(*, num_images: int = 3) -> datasets.Dataset:
    """Images of 8 x 6 pixels; masks as in ADE20k, 0 for nobody knows; depths in millimetres, as an array."""
    random = np.random.default_rng(0)
    masks = random.integers(0, 4, (num_images, 6, 8), np.uint8)
    content = {
        "photo": [Image.new("RGB", (8, 6), (number, 0, 0)) for number in range(num_images)],
        "annotation": [Image.fromarray(mask) for mask in masks],
        "millimetres": random.integers(500, 9000, (num_images, 6, 8)).tolist(),
    }
    features = {
        "photo": datasets.Image(),
        "annotation": datasets.Image(),
        "millimetres": datasets.Array2D((6, 8), "int32"),
    }
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def test_maps_are_read_beside_the_only_image_that_is_no_map():
    dataset = _with_maps()
    options = DataOptions(mask_column="annotation", depth_column="millimetres", depth_scale=0.001)
    source = ImageSource(dataset, options=options)
    stream = ImageStream(dataset.to_iterable_dataset(), options=options)
    streamed = {raw["bytes"]: raw for raw, _ in itertools.islice(stream.examples(seed=0), 3)}
    for index, row in enumerate(dataset):
        raw = source.raw(index)
        for found in (read_annotated(raw).maps, read_annotated(streamed[raw["bytes"]]).maps):
            assert np.array_equal(found["mask"], np.asarray(row["annotation"]))
            assert np.allclose(found["depth"], np.asarray(row["millimetres"]) / 1000) and found["depth"].dtype == "f4"
    assert read_annotated(ImageSource(dataset, options=DataOptions(image_column="photo")).raw(0)).maps == {}
    plain = ImageSource(dataset, options=DataOptions(image_column="photo")).dataset_hash
    scaled = ImageSource(
        dataset, options=DataOptions(mask_column="annotation", depth_column="millimetres")
    ).dataset_hash
    assert len({plain, source.dataset_hash, scaled}) == 3
    with pytest.raises(ValueError, match=r"no column 'mask'; the columns are 'annotation'"):
        ImageSource(dataset, options=DataOptions(mask_column="mask"))


def test_classes_that_count_from_one_are_reduced_and_zero_is_hidden():
    dataset = _with_maps()
    raw = ImageSource(dataset, options=DataOptions(mask_column="annotation", reduce_labels=True)).raw(1)
    stored, (found,) = np.asarray(dataset[1]["annotation"]), read_annotated(raw).maps.values()
    assert np.array_equal(found[stored > 0], stored[stored > 0].astype(int) - 1)
    assert (found[stored == 0] == 255).all() and (stored == 0).any()


def test_masks_of_a_folder_are_named_in_its_metadata(tmp_path):
    _write_folder(tmp_path, ["train/images/a.png", "train/images/b.png"])
    _write_folder(tmp_path, ["train/masks/a.png", "train/masks/b.png"], first=7)
    for name in "ab":
        Image.open(tmp_path / f"train/masks/{name}.png").convert("L").save(tmp_path / f"train/masks/{name}.png")
    rows = [{"file_name": f"images/{name}.png", "mask_file_name": f"masks/{name}.png"} for name in "ab"]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_images(str(tmp_path), options=DataOptions(mask_column="mask"))
    found = [read_annotated(source.raw(index)).maps["mask"].max() for index in range(2)]
    assert len(source) == 2 and found == [7, 8]


def test_masks_of_shards_are_named_by_their_suffix(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            mask = _encode(Image.new("L", (8, 8), number))
            for suffix, content in (("png", _encode(_image(number))), ("mask.png", mask)):
                entry = tarfile.TarInfo(f"{number:03}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    stream = open_images(str(tmp_path / "a.tar"), options=DataOptions(mask_column="mask.png"))
    for raw, _ in itertools.islice(stream.examples(seed=0), 4):
        assert read_annotated(raw).maps["mask"].max() == np.asarray(decode_image(raw)).max()


def test_a_hidden_label_is_none():
    assert ImageSource(_make_dataset([4]).map(lambda row: {"kind": -1})).read(0)[1] is None


# Streams


def test_shards_are_named_in_many_ways(tmp_path):
    folder = _write_shards(tmp_path / "shards")
    first = _first_numbers(open_images(folder), 12, seed=0)
    assert sorted(first) == list(range(12))
    for source in (f"{folder}/*.tar", f"{folder}/train-{{000..002}}.tar", f"{folder}/train-{{000,001,002}}.tar"):
        assert _first_numbers(open_images(source), 12, seed=0) == first
    assert sorted(_first_numbers(open_images(f"{folder}/train-001.tar", split="any"), 4, seed=0)) == [4, 5, 6, 7]
    raw, _ = next(open_images(folder).examples(seed=0))
    assert raw["label"] == int(raw["name"][:4]) % 5


def _write_shard(path, files) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def test_shards_may_mix_suffixes_lack_classes_and_hold_other_files(tmp_path):
    png, jpeg = _encode(_image(7)), _encode(_image(7), "jpeg")
    files = [("README.txt", b"hello"), ("a/0.JPG", jpeg), ("a/0.cls", b"1"), ("a/0.txt", b"one"), ("a/1.png", png)]
    files += [("._a/2.cls", b"?"), ("a/2.jpeg", jpeg), ("a/2.cls", b""), ("a/3.cls", b"4"), ("a/4.png", png)]
    source = _write_shard(tmp_path / "shard.tar", [*files, ("a/4.cls", b"9\n")])
    stream = open_images(source, options=DataOptions(text_column="txt"))
    raws = sorted((raw for raw, _ in itertools.islice(stream.examples(seed=0), 4)), key=lambda raw: raw["name"])
    assert [raw["name"] for raw in raws] == ["a/0.jpg", "a/1.png", "a/2.jpeg", "a/4.png"]
    assert [raw["label"] for raw in raws] == [1, None, None, 9]
    assert [raw["text"] for raw in raws] == ["one", "", "", ""]
    assert {_number_of(decode_image(raw)) for raw in raws} == {7}
    assert "samples of" in stream.describe_labels() and "hold no image and are left out" in stream.describe_labels()


def test_shards_that_cannot_be_read_are_named(tmp_path):
    png = _encode(_image(7))
    whole = _write_shard(tmp_path / "whole.tar", [("0.png", png), ("0.cls", b"cat")])
    assert "'cls' is not a column of class numbers" in open_images(whole).describe_labels()
    mixed = _write_shard(tmp_path / "mixed.tar", [("0.png", png), ("0.cls", b"1"), ("1.png", png), ("1.cls", b"cat")])
    with pytest.raises(ValueError, match=r"mixed.tar: 1.cls holds 'cat', expected the number of a class"):
        list(itertools.islice(open_images(mixed).examples(seed=0), 2))
    with pytest.raises(ValueError, match=r"got files of the suffixes 'v1.png'. The suffix .* at the first dot"):
        open_images(_write_shard(tmp_path / "dots.tar", [("0.v1.png", png)]))
    with pytest.raises(ValueError, match=r"expected images in the shard .*, got files of the suffixes 'txt'"):
        open_images(_write_shard(tmp_path / "texts.tar", [("0.txt", b"one")]))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:700])
    (tmp_path / "page.tar").write_bytes(b"<html>" * 200)
    for name in ("cut", "page"):
        with pytest.raises(ValueError, match=f"the shard .*{name}.tar' is damaged"):
            open_images(str(tmp_path / f"{name}.tar"))


def test_shards_may_be_empty_compressed_and_of_other_suffixes_than_the_first(tmp_path, caplog):
    folder = tmp_path / "shards"
    folder.mkdir()
    _write_shard(folder / "0.tar", [])
    _write_shard(folder / "1.tar", [("0.jpg", _encode(_image(7), "jpeg")), ("0.cls", b"1")])
    rest = _write_shard(folder / "2.tar", [("1.png", _encode(_image(7))), ("1.cls", b"2"), ("2.cls", b"3")])
    (folder / "3.tar.gz").write_bytes(gzip.compress(pathlib.Path(rest).read_bytes()))
    both = {"0.jpg", "1.png"}
    for source, number, names in (
        ("", 3, both),
        ("?.tar", 2, both),
        ("{2,1}.tar", 2, both),
        ("3.tar.gz", 1, {"1.png"}),
    ):
        raws = [raw for raw, _ in itertools.islice(open_images(str(folder / source)).examples(seed=0), number)]
        assert {raw["name"] for raw in raws} == names and {_number_of(decode_image(raw)) for raw in raws} == {7}
    assert "2.tar: 1 samples hold no image and are left out" in caplog.text


@pytest.mark.parametrize("write", [_write_shards, _write_parquet])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_image_comes_once_in_a_pass_and_in_another_order_in_the_next(tmp_path, write, num_processes):
    (tmp_path / "data").mkdir()
    folder = write(tmp_path / "data", num_shards=4, images_per_shard=3)  # 4 shards: 2 processes share them, 3 do not
    count = 12 // num_processes
    shares = []
    for rank in range(num_processes):
        stream = open_images(folder, is_streaming=True, block_size=5)
        numbers = _first_numbers(stream, 2 * count, seed=3, rank=rank, num_processes=num_processes)
        shares.append((numbers[:count], numbers[count:]))
    passes = [list(itertools.chain(*parts)) for parts in zip(*shares)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12))
    assert passes[0] != passes[1] != sorted(passes[1])


@pytest.mark.parametrize("write", [_write_shards, _write_parquet])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_a_stream_goes_on_after_any_image(tmp_path, write, num_processes):
    (tmp_path / "data").mkdir()
    folder = write(tmp_path / "data", num_shards=4, images_per_shard=3)

    def open_again() -> ImageStream:
        return open_images(folder, is_streaming=True, block_size=4)

    owner = {"seed": 1, "rank": num_processes - 1, "num_processes": num_processes}
    examples = list(itertools.islice(open_again().examples(**owner), 30))
    expected = [_number_of(decode_image(raw)) for raw, _ in examples]
    stream = open_again()
    for taken, (_, state) in enumerate(examples[:25], start=1):
        state = json.loads(json.dumps(state))
        assert _first_numbers(stream, 5, **owner, state=state) == expected[taken : taken + 5], taken


def test_the_order_of_a_stream_follows_the_seed(tmp_path):
    folder = _write_shards(tmp_path / "shards")
    stream = open_images(folder)
    assert _first_numbers(stream, 12, seed=0) == _first_numbers(stream, 12, seed=0)
    assert _first_numbers(stream, 12, seed=0) != _first_numbers(stream, 12, seed=1)
    single = open_images(folder, block_size=1)  # only the order of the shards is left to chance
    orders = {tuple(_first_numbers(single, 12, seed=seed)[::4]) for seed in range(8)}
    assert len(orders) > 1 and all(sorted(order) == [0, 4, 8] for order in orders)


def test_a_stream_refuses_what_it_cannot_do(tmp_path):
    folder = _write_shards(tmp_path / "shards")
    stream = open_images(folder)
    _, state = next(stream.examples(seed=0))
    with pytest.raises(ValueError, match=r"expected the state of \{'seed': 0, 'rank': 0, 'num_processes': 2\}"):
        stream.examples(seed=0, num_processes=2, state=state)
    with pytest.raises(ValueError, match=r"rank in 0 \.\.\. 1, got 2"):
        stream.examples(seed=0, rank=2, num_processes=2)
    with pytest.raises(RuntimeError, match="process 12 of 13 found no image"):
        next(stream.examples(seed=0, rank=12, num_processes=13))
    with pytest.raises(ValueError, match="block_size to be a positive integer, got 0"):
        open_images(folder, block_size=0)


def test_the_fingerprint_of_a_stream_follows_its_files(tmp_path):
    first = open_images(_write_shards(tmp_path / "one")).dataset_hash
    assert open_images(_write_shards(tmp_path / "two")).dataset_hash == first
    assert open_images(_write_shards(tmp_path / "three", images_per_shard=40)).dataset_hash != first
    assert open_images(_write_shards(tmp_path / "four", num_shards=4)).dataset_hash != first


# Sources that are none


def test_a_source_that_does_not_exist_is_explained(tmp_path):
    _write_folder(tmp_path / "images", ["a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("")
    cases = {
        "image": r'expected "scenes" or "scenes:single" .*, a folder of images.*Did you mean .*images',
        "nothing_like_it": "which does not exist. The nearest folder is",
        "images/a.png": "got the file .*Give the folder that holds it",
        "imagess/*.tar": r"got shards of which 1 of 1 do not exist.*Did you mean .*images",
        "images/{0..2}.tar": "got shards of which 3 of 3 do not exist: .*0.tar.*1.tar.*2.tar",
        "empty": "got no files",
        "notes": r"got 1 \.md",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_images(str(tmp_path / source))
    with pytest.raises(ValueError, match="got ''"):
        open_images("")


def test_a_name_that_the_hub_does_not_answer_for_is_explained():
    with pytest.raises(RuntimeError, match="'nobody/nothing' is not a local path, and the Hub did not answer"):
        open_images("nobody/nothing")


def test_a_path_with_a_typo_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "model.pth").write_bytes(b"")
    for source in ("./no/such", "../no", "~/no/such", "photos2", "photos/train2", "no/such.pth", "a/b/c"):
        with pytest.raises(ValueError, match="which does not exist"):
            open_images(source)
    with pytest.raises(ValueError, match=r"got the file 'model\.pth'"):
        open_images("model.pth")
    monkeypatch.setattr("modeling_vitreg.images.hub.is_hub_known", lambda: False)
    with pytest.raises(RuntimeError, match="'no/such' is not a local path, and the Hub did not answer"):
        open_images("no/such")


def test_an_unknown_split_of_shards_is_explained(tmp_path):
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train'"):
        open_images(_write_shards(tmp_path / "shards"), split="test")


def test_seeds_differ_in_every_word():
    seeds = {derive_seed(*words) for words in itertools.product(range(4), repeat=3)}
    assert len(seeds) == 64
    assert all(0 < seed < 2**63 for seed in seeds)

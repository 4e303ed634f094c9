"""Where images and their truth come from, and their features on disk: once, whole, and with what could not be read."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.encoding import run_pass
from modeling_vitreg.evaluation import EncodingSettings, open_data
from modeling_vitreg.evaluation.cache import FeatureCache
from modeling_vitreg.evaluation.inputs import count_mask_classes, linear_inputs
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.features.model_hash import hash_weights
from modeling_vitreg.features.pixels import crop_map
from modeling_vitreg.images import DataOptions, ImageSource, UnreadableImage
from modeling_vitreg.images.labelled import FIRST_TEST_SCENE
from modeling_vitreg.scenes import SEMANTIC_NAMES, SceneSettings, render_scene


KINDS = ("pooled", "normed_patches", "raw_patches")
QUIET = {"has_progress_bar": False, "workers": 0, "patch_precision": "float32"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def encoder(tiny):
    return load_encoder(ViTWithRegistersModel(tiny(num_register_tokens=2, num_hidden_layers=5)), name="tiny")


def _dataset(num_images=7, **columns):
    """Images of 40 x 32 pixels with labels, masks and depths in millimetres."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (num_images, 32, 40, 3), np.uint8)
    masks = random.integers(0, 3, (num_images, 32, 40), np.uint8)
    depths = random.integers(500, 9000, (num_images, 32, 40)).astype(np.int32)
    content = {
        "photo": [Image.fromarray(image) for image in pixels],
        "label": [number % 2 for number in range(num_images)],
        "mask": [Image.fromarray(mask) for mask in masks],
        "depth": [Image.fromarray(depth) for depth in depths],
        **columns,
    }
    images = {name: datasets.Image() for name in ("photo", "mask", "depth")}
    return datasets.Dataset.from_dict(
        content, features=datasets.Features({**images, "label": datasets.ClassLabel(names=["cat", "dog"])})
    )


def _labelled(dataset):
    return ImageSource(dataset, options=DataOptions(mask_column="mask", depth_column="depth", depth_scale=0.001))


def _encode(encoder, images, folder, *, kinds=KINDS, **settings):
    settings = EncodingSettings(**{**QUIET, **settings})
    cache = FeatureCache(encoder, folder, kinds=kinds, settings=settings, num_images=len(images))
    run_pass(encoder, images, [cache], settings.for_pass())
    return cache.compute()


def test_scenes_have_exact_truth_and_test_images_that_lie_far_from_the_others():
    data = open_data("scenes", image_size=32, num_train=3, num_test=2)
    assert (len(data.train), len(data.test), data.mask_names) == (3, 2, SEMANTIC_NAMES)
    for part, start in ((data.train, 0), (data.test, FIRST_TEST_SCENE)):
        example, scene = part[1], render_scene(start + 1, settings=SceneSettings(image_size=32))
        assert example.label == scene.label
        for found, expected in ((example.image, scene.image), (example.mask, scene.semantic_mask)):
            assert np.array_equal(np.asarray(found), expected)
        assert np.array_equal(example.depth, scene.depth)
    colours = open_data("scenes", image_size=32, num_train=3, num_test=2, options=DataOptions(label_column="colours"))
    assert colours.train[1].label != data.train[1].label
    assert colours.train.dataset_hash != data.train.dataset_hash
    with pytest.raises(ValueError, match="their own splits, columns and annotations"):
        open_data("scenes", options=DataOptions(mask_column="mask"))


def _folder(path, parts, *, num_images=5):
    for part in parts:
        for name in ("cat", "dog"):
            (path / part / name).mkdir(parents=True)
            for number in range(num_images):
                Image.new("RGB", (40, 32), (number, 9, len(part))).save(path / part / name / f"{number}.png")
    return str(path)


def test_a_folder_of_class_folders_has_labels_and_holds_a_share_out(tmp_path):
    data = open_data(_folder(tmp_path / "images", [""]))
    assert (len(data.train), len(data.test)) == (7, 3) and data.train.class_names == ("cat", "dog")
    names = [{part[number].image.tobytes() for number in range(len(part))} for part in (data.train, data.test)]
    assert not data.train.options.maps and names[0] and names[1]
    again = open_data(_folder(tmp_path / "copy", [""]))
    assert (
        again.test.dataset_hash
        == data.test.dataset_hash
        != open_data(str(tmp_path / "copy"), seed=1).test.dataset_hash
    )


def test_a_test_split_is_found_and_images_are_drawn_by_the_seed(tmp_path):
    source = _folder(tmp_path / "images", ["train", "val"])
    data = open_data(source, num_train=4)
    assert (len(data.train), len(data.test)) == (4, 10)
    assert {data.train[number].label for number in range(4)} == {0, 1}  # not the first four, all cats
    with pytest.raises(ValueError, match="has no split 'dev'"):
        open_data(source, test_split="dev")


def test_maps_of_a_saved_dataset_are_read_by_the_names_of_their_columns(tmp_path):
    datasets.DatasetDict(train=_dataset(6), test=_dataset(4)).save_to_disk(str(tmp_path / "saved"))
    options = DataOptions(mask_column="mask", depth_column="depth", depth_scale=0.001)
    data = open_data(str(tmp_path / "saved"), options=options)
    example = data.test[2]
    assert (len(data.train), len(data.test)) == (6, 4)
    assert example.mask.shape == example.depth.shape == (32, 40) and 0.5 <= example.depth.min() <= 9
    with pytest.raises(ValueError, match=r"no column 'masks'; the columns are .*'mask'"):
        open_data(str(tmp_path / "saved"), options=DataOptions(mask_column="masks", image_column="photo"))
    with pytest.raises(ValueError, match=r"elsewhere', which does not exist"):
        open_data(str(tmp_path / "elsewhere"), options=DataOptions(mask_column="mask"))
    with pytest.raises(ValueError, match=r"several columns qualify: .* choose one with --columns image=NAME"):
        open_data(str(tmp_path / "saved"), options=DataOptions(depth_column="depth"))


def test_an_empty_folder_says_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images.*got no files"):
        open_data(str(tmp_path / "empty"))


def test_features_equal_those_of_one_pass_over_all_images(encoder, tmp_path):
    images = _labelled(_dataset())
    found = _encode(encoder, images, tmp_path, batch_size=2, shard_size=3)
    pixels = encoder.prepare([images[number].image for number in range(7)])
    layers = extract_features(encoder, pixels, layers=[-4, -3, -2, -1], is_normed=True)
    (raw,) = extract_features(encoder, pixels)
    expected = {
        ("pooled", "class_tokens"): torch.stack([layer.cls_token for layer in layers], dim=1),
        ("pooled", "mean_patches"): layers[-1].patch_tokens.mean(dim=1),
        ("normed_patches", "patches"): layers[-1].patch_grid,
        ("raw_patches", "patches"): raw.patch_grid,
        ("raw_patches", "class_tokens"): raw.cls_token,
    }
    for (kind, name), value in expected.items():
        torch.testing.assert_close(found[kind].load(name), value, rtol=1e-4, atol=1e-5)
        rows = torch.tensor([6, 0, 3, 3])
        torch.testing.assert_close(found[kind].take(name, rows), value[rows], rtol=1e-4, atol=1e-5)
    assert found["pooled"].load("labels").tolist() == [0, 1, 0, 1, 0, 1, 0]
    masks = [crop_map(images[number].mask, (32, 32)) for number in range(7)]
    assert np.array_equal(found["normed_patches"].load("masks"), masks)
    assert found["raw_patches"].load("depths").shape == (7, 32, 32) and len(found["pooled"]) == 7


def test_a_map_is_cut_where_the_image_is(encoder):
    for sides in ((32, 40), (64, 80), (50, 32)):
        values = np.arange(sides[0] * sides[1], dtype=np.int32).reshape(sides) // 9 % 200
        image = Image.fromarray(values.astype(np.uint8)).convert("RGB")
        shown = encoder.prepare([image])[0, 0] * encoder.image_std[0] + encoder.image_mean[0]
        fitted = crop_map(values, (32, 32))
        if sides[0] == 32:  # cut, not resized: the very pixels
            np.testing.assert_allclose(shown * 255, fitted, atol=0.01)
        assert fitted.shape == (32, 32) and np.corrcoef(shown.flatten(), fitted.flatten())[0, 1] > 0.5
    assert np.array_equal(crop_map(np.eye(32, dtype=np.float32), (32, 32)), np.eye(32))


def test_what_is_encoded_is_not_encoded_again_and_another_kind_adds_its_files_only(encoder, tmp_path, monkeypatch):
    images = _labelled(_dataset())
    _encode(encoder, images, tmp_path, shard_size=3, kinds=["pooled"])
    calls = []
    read = ImageSource.raw
    monkeypatch.setattr(ImageSource, "raw", lambda self, number: calls.append(number) or read(self, number))
    _encode(encoder, images, tmp_path, shard_size=3, kinds=["pooled"])
    assert not calls
    _encode(encoder, images, tmp_path, shard_size=3, kinds=["pooled", "raw_patches"])
    assert sorted(calls) == list(range(7))
    assert len(list(tmp_path.glob("*.pooled.safetensors"))) == 3 == len(list(tmp_path.glob("*.raw_patches.*")))


def test_an_interrupted_pass_goes_on_and_ends_with_the_same_features(encoder, tmp_path, monkeypatch):
    images, read = _labelled(_dataset()), ImageSource.raw

    def stop(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return read(self, number)

    monkeypatch.setattr(ImageSource, "raw", stop)
    with pytest.raises(RuntimeError, match="6 files of features are missing"):
        _encode(encoder, images, tmp_path / "a", shard_size=2, batch_size=2)
    assert len(list((tmp_path / "a").glob("*"))) == 2 * 3  # two whole shards of three kinds, and no part of one
    monkeypatch.setattr(ImageSource, "raw", read)
    resumed = _encode(encoder, images, tmp_path / "a", shard_size=2, batch_size=2)
    whole = _encode(encoder, images, tmp_path / "b", shard_size=2, batch_size=2)
    for kind in KINDS:
        for name in whole[kind].names:
            assert torch.equal(resumed[kind].load(name), whole[kind].load(name))


def test_unreadable_images_and_maps_are_counted_and_left_out(encoder, tmp_path, monkeypatch):
    images, read = _labelled(_dataset()), ImageSource.raw

    def spoil(self, number):
        if number in (1, 4, 5, 6):
            raise UnreadableImage(f"image {number}", "truncated")
        return read(self, number)

    monkeypatch.setattr(ImageSource, "raw", spoil)
    found = _encode(encoder, images, tmp_path, shard_size=4)["pooled"]  # nothing is left of the second shard
    assert found.counts.describe() == {
        "num_images": 3,
        "num_unreadable": 4,
        "num_nonfinite": 0,
        "unreadable": [f"image {number}: truncated" for number in (1, 4, 5, 6)],
        "nonfinite": [],
        "notes": [],
        "is_complete": True,
        "stopped_by": None,
    }
    assert found.load("labels").tolist() == [0, 0, 1] and found.load("numbers").tolist() == [0, 2, 3]


def test_a_broken_mask_makes_its_image_unreadable_and_stops_nothing(encoder, tmp_path):
    dataset = _dataset(3)
    rows = [{**dataset.cast_column("mask", datasets.Image(decode=False))[number]} for number in range(3)]
    rows[1]["mask"] = {"bytes": b"no picture", "path": None}
    images = _labelled(datasets.Dataset.from_list(rows, features=dataset.features))
    assert len(images.dataset_hash) == 16 and images.dataset_hash != _labelled(dataset).dataset_hash
    (line,) = _encode(encoder, images, tmp_path)["pooled"].counts.unreadable.values()
    assert line.startswith("image 1: mask: ")


def test_features_that_are_not_finite_are_counted_and_large_ones_do_not_overflow_in_silence(encoder, tmp_path):
    images = _labelled(_dataset())
    with torch.no_grad():
        encoder.layers[-1].mlp.fc2.bias.fill_(1e6)
    with pytest.raises(RuntimeError, match=r"above 65504.*encoding.patch_precision=float32"):
        _encode(encoder, images, tmp_path, kinds=["raw_patches"], patch_precision="float16")
    with torch.no_grad():
        encoder.layers[-1].mlp.fc2.bias.fill_(torch.nan)
    found = _encode(encoder, images, tmp_path / "nan", kinds=["raw_patches"])["raw_patches"]
    assert len(found.counts.nonfinite) == 7 and len(found) == 0


def test_the_fingerprint_of_a_model_changes_with_weights_and_settings_only(tiny, tmp_path):
    def print_of(seed, **settings):
        torch.manual_seed(seed)
        return hash_weights(load_encoder(ViTWithRegistersModel(tiny(**settings)), name=str(seed)))

    assert print_of(0) == print_of(0) != print_of(1)
    torch.manual_seed(0)
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path / "model")
    assert hash_weights(load_encoder(tmp_path / "model")) == print_of(0)
    assert print_of(0) != print_of(0, layer_norm_eps=1e-3)


def test_settings_out_of_range_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="batch_size of 1 or more, got 0"):
        EncodingSettings(batch_size=0)
    with pytest.raises(ValueError, match="one of float16, float32, got 'int8'"):
        EncodingSettings(patch_precision="int8")
    with pytest.raises(ValueError, match="does not fit patches of 8 pixels"):
        _encode(encoder, _labelled(_dataset(2)), tmp_path, image_size=30)
    with pytest.raises(ValueError, match="kinds out of pooled"):
        _encode(encoder, _labelled(_dataset(2)), tmp_path, kinds=["all"])


def test_inputs_of_the_linear_probe_are_those_of_dinov2(encoder, tmp_path):
    images = _labelled(_dataset())
    inputs, labels = linear_inputs(_encode(encoder, images, tmp_path)["pooled"], num_layers=(1, 4), device="cpu")
    pixels = encoder.prepare([images[number].image for number in range(7)])
    layers = extract_features(encoder, pixels, layers=[-4, -3, -2, -1], is_normed=True)
    mean, classes = layers[-1].patch_tokens.mean(dim=1), [layer.cls_token for layer in layers]
    expected = {
        "class token": classes[-1:],
        "class token, mean of the patches": [classes[-1], mean],
        "class tokens of 4 layers": classes,
        "class tokens of 4 layers, mean of the patches": [*classes, mean],
    }
    assert list(inputs) == list(expected) and labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for name, parts in expected.items():
        torch.testing.assert_close(inputs[name], torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)


def test_classes_of_masks_without_names_are_counted(encoder, tmp_path):
    features = _encode(encoder, _labelled(_dataset()), tmp_path)["normed_patches"]
    assert count_mask_classes([features, features], ignore_index=255) == 3
    with pytest.raises(ValueError, match="two classes or more, got 0 as the largest"):
        black = _labelled(_dataset(2, mask=[Image.new("L", (40, 32))] * 2))
        count_mask_classes([_encode(encoder, black, tmp_path / "black")["normed_patches"]], ignore_index=255)

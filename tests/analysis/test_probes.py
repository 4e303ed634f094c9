"""Probes equal scikit-learn's on the same split, and read what was written into tokens."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from modeling_vitreg.analysis.probes import (
    TokenSample,
    normalise,
    probe_class,
    probe_pixels,
    probe_position,
    split_images,
)
from modeling_vitreg.analysis.reservoir import NUM_LARGEST, NUM_RANDOM, TokenReservoir, draw_tokens, make_sample
from modeling_vitreg.features import TokenFeatures


GRID = (2, 3)


def _sample(num_images=40, width=16, seed=0) -> TokenSample:
    """Normal tokens hold the place and the pixels of their patch, outliers hold noise."""
    random = np.random.default_rng(seed)
    images, places = np.repeat(np.arange(num_images), 6), np.tile(np.arange(6), num_images)
    is_outlier = random.random(len(images)) < 0.25
    pixels = random.normal(size=(len(images), 4))
    tokens = np.concatenate([4 * np.eye(6)[places], pixels, random.normal(size=(len(images), width - 10))], axis=1)
    tokens[is_outlier] = random.normal(size=(is_outlier.sum(), width))
    return TokenSample(tokens.astype(np.float32), images, places, is_outlier, pixels)


def test_no_image_is_on_both_sides_and_both_have_some():
    images = np.repeat([5, 9, 11, 12], 3)
    is_test = split_images(images)
    assert not set(images[is_test]) & set(images[~is_test])
    assert is_test.sum() == 3
    assert split_images(np.array([1, 2])).sum() == 1
    with pytest.raises(ValueError, match="two images or more, got 1"):
        split_images(np.array([4, 4]))


def test_position_probe_equals_scikit_learn_and_finds_where_normal_patches_are():
    sample = _sample()
    report = probe_position(sample, grid=GRID)
    is_test = split_images(sample.images)
    rows = torch.nn.functional.layer_norm(torch.tensor(sample.tokens, dtype=torch.float64), (16,), eps=1e-6).numpy()
    scaler = StandardScaler().fit(rows[~is_test])
    probe = LogisticRegression(C=0.1, max_iter=200).fit(scaler.transform(rows[~is_test]), sample.places[~is_test])
    predicted = probe.predict(scaler.transform(rows[is_test]))
    for name, members in (("outlier", sample.is_outlier[is_test]), ("normal", ~sample.is_outlier[is_test])):
        guesses, truths = predicted[members], sample.places[is_test][members]
        distances = [np.hypot(g // 3 - t // 3, g % 3 - t % 3) for g, t in zip(guesses, truths)]
        assert report[name]["accuracy"] == np.mean(guesses == truths)
        assert report[name]["distance"] == pytest.approx(np.mean(distances))
        assert report[name]["num_test"] == members.sum()
    assert report["normal"]["accuracy"] == 1 and report["outlier"]["accuracy"] < 0.5
    assert report["chance"] == 1 / 6 and report["num_train"] == (~is_test).sum()


def test_pixel_probe_equals_scikit_learn_and_reads_normal_patches_better():
    sample = _sample()
    report = probe_pixels(sample)
    is_test = split_images(sample.images)
    rows = normalise(sample.tokens)
    scaler = StandardScaler().fit(rows[~is_test])
    ridge = Ridge(alpha=1.0).fit(scaler.transform(rows[~is_test]), sample.pixels[~is_test])
    errors = np.linalg.norm(ridge.predict(scaler.transform(rows[is_test])) - sample.pixels[is_test], axis=1)
    assert report["normal"]["error"] == pytest.approx(errors[~sample.is_outlier[is_test]].mean())
    assert report["normal"]["error"] < report["outlier"]["error"]
    blind = sample.pixels[~is_test].mean(axis=0) - sample.pixels[is_test]
    assert report["error_of_mean"] == pytest.approx(np.linalg.norm(blind, axis=1).mean())


def test_a_group_without_tokens_has_no_numbers():
    sample = _sample()
    clean = TokenSample(**{**vars(sample), "is_outlier": np.zeros(len(sample.images), bool)})
    assert probe_position(clean, grid=GRID)["outlier"] == {"num_test": 0, "accuracy": None, "distance": None}


def test_class_probe_equals_scikit_learn_and_skips_what_is_not_there():
    random = np.random.default_rng(0)
    labels, everyone = np.arange(60) % 3, np.arange(60)
    tokens = random.normal(size=(60, 8)) + 3 * np.eye(8)[labels]
    draws = {
        "knows": [(everyone, tokens), (everyone, tokens + 0.1)],
        "does not": [(everyone, random.normal(size=(60, 8)))],
        "one class": [(everyone[::3], tokens[::3])],
        "one image": [(everyone[:1], tokens[:1])],
    }
    report = probe_class(draws, labels)
    is_test = split_images(everyone)
    accuracies = []
    for _, rows in draws["knows"]:
        rows = normalise(rows)
        scaler = StandardScaler().fit(rows[~is_test])
        probe = LogisticRegression(C=0.1, max_iter=200).fit(scaler.transform(rows[~is_test]), labels[~is_test])
        accuracies.append(np.mean(probe.predict(scaler.transform(rows[is_test])) == labels[is_test]))
    assert report["knows"]["accuracy"] == pytest.approx(np.mean(accuracies)) and np.mean(accuracies) > 0.8
    assert report["knows"]["spread"] == pytest.approx(np.std(accuracies)) and report["knows"]["num_draws"] == 2
    assert report["does not"]["accuracy"] < 0.7
    assert "fewer than two classes" in report["one class"]["skipped"]
    assert "two images or more" in report["one image"]["skipped"]


def _tokens(num_images=3, num_patches=10, width=4) -> TokenFeatures:
    patches = torch.arange(num_images * num_patches, dtype=torch.float32).view(num_images, num_patches, 1)
    return TokenFeatures(
        patch_tokens=patches.expand(-1, -1, width) + 1,
        grid=(2, 5),
        cls_token=torch.zeros(num_images, width),
        distillation_token=None,
        register_tokens=torch.ones(num_images, 2, width),
        layer=1,
        feature="token",
        is_normed=False,
    )


def test_the_bank_keeps_random_and_largest_patches_with_their_pixels():
    tokens, bank = _tokens(), TokenReservoir(2, patch_shape=(2, 2))
    norms = tokens.patch_tokens.norm(dim=-1)
    pixels = torch.arange(40, dtype=torch.float32).view(1, 1, 4, 10).expand(3, 1, 4, 10)
    for part in (slice(0, 1), slice(1, 3)):
        fields = {name: getattr(tokens, name) for name in ("patch_tokens", "cls_token", "register_tokens")}
        batch = TokenFeatures(**{**vars(tokens), **{name: value[part] for name, value in fields.items()}})
        bank.add(
            batch, norms[part], numbers=torch.arange(3)[part], pixel_values=pixels[part], labels=[1, None, 2][part]
        )
    assert len(bank) == 2
    kept = bank.collect()
    assert kept["tokens"].shape == (2, NUM_RANDOM + NUM_LARGEST, 4)
    assert kept["labels"].tolist() == [1, -1] and kept["registers"].shape == (2, 2, 4)
    for image in range(2):
        assert set(kept["places"][image, NUM_RANDOM:]) == {6, 7, 8, 9}
        assert len(set(kept["places"][image, :NUM_RANDOM])) == NUM_RANDOM
        for place, token, patch in zip(kept["places"][image], kept["tokens"][image], kept["pixels"][image]):
            assert token[0] == image * 10 + place + 1
            corner = place // 5 * 20 + place % 5 * 2  # row and column of the first pixel
            assert patch.tolist() == [corner, corner + 1, corner + 10, corner + 11]


def test_a_sample_has_each_patch_once_and_draws_are_of_their_kind():
    tokens, bank = _tokens(), TokenReservoir(10, patch_shape=(2, 2))
    norms = tokens.patch_tokens.norm(dim=-1)
    bank.add(tokens, norms, numbers=torch.arange(3), pixel_values=torch.zeros(3, 1, 4, 10), labels=[0, 1, 0])
    kept = bank.collect()
    threshold = float(norms[1, 8])  # images 1 and 2 have outliers
    sample = make_sample(kept, threshold=threshold)
    pairs = list(zip(sample["images"], sample["places"]))
    assert len(set(pairs)) == len(pairs)
    is_outlier = [norms[image, place] >= threshold for image, place in pairs]
    assert sample["is_outlier"].tolist() == is_outlier
    draws = draw_tokens(kept, threshold=threshold, num_draws=2)
    assert set(draws) == {"class token", "normal patch", "outlier patch", "register"}
    assert len(draws["class token"]) == 1 and len(draws["outlier patch"]) == 2
    for images, rows in draws["outlier patch"]:
        assert images.tolist() == [1, 2] and (np.linalg.norm(rows, axis=1) >= threshold - 1e-4).all()
    for _, rows in draws["normal patch"]:
        assert (np.linalg.norm(rows, axis=1) < threshold).all()

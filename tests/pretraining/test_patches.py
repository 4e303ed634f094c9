"""Probe and similarities of patches during a run: against other libraries, a planted degradation, killed runs."""

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.monitoring.diagnosis import diagnose
from modeling_vitreg.pretraining.monitoring.patches import (
    BestPatches,
    choose_patches,
    classes_of_patches,
    consistency,
    probe_segmentation,
    similarities,
)
from modeling_vitreg.scenes import SEMANTIC_NAMES, SceneSettings, render_scene


def _planted(noise: float, *, seed: int = 0) -> dict:
    """Patches (20, 16, 12) that say their class, and less of it with noise."""
    generator = torch.Generator().manual_seed(7)
    classes = torch.randint(4, (20, 16), generator=generator)
    directions = torch.randn(4, 12, generator=generator)
    patches = directions[classes] + noise * torch.randn(20, 16, 12, generator=generator.manual_seed(seed))
    return {"patches": patches, "classes": classes, "num_classes": 5}


def test_the_probe_is_a_ridge_regression_of_another_library():
    data = _planted(1.5)
    own, truth = data["patches"].double().numpy(), data["classes"].numpy()
    scaler = StandardScaler().fit(own[::2].reshape(-1, 12))
    known, tested = (scaler.transform(part.reshape(-1, 12)) for part in (own[::2], own[1::2]))
    ridge = Ridge(alpha=1e-3 * len(known)).fit(known, np.eye(5)[truth[::2].ravel()])
    found = ridge.predict(tested).argmax(axis=1)
    expected = jaccard_score(truth[1::2].ravel(), found, average="macro")
    assert 0.3 < expected < 0.9
    assert probe_segmentation(**data) == pytest.approx(expected, abs=1e-12)
    assert probe_segmentation(**_planted(0.01)) == 1.0
    with pytest.raises(ValueError, match="expected 2 images or more"):
        probe_segmentation(data["patches"][:1], data["classes"][:1], num_classes=5)


def test_the_class_of_a_patch_is_that_of_most_of_its_pixels():
    masks = torch.randint(3, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    found = classes_of_patches(masks.to(torch.int16), (4, 3)).view(2, 2, 4)
    for image, row, column in np.ndindex(2, 2, 4):
        cell = masks[image, 4 * row : 4 * row + 4, 3 * column : 3 * column + 3]
        assert found[image, row, column] == cell.flatten().bincount().argmax()


def test_consistency_is_the_mean_correlation_of_the_cosines_of_pairs():
    first, second = _planted(1.0)["patches"], _planted(1.0, seed=1)["patches"]
    correlations = []
    for ours, theirs in zip(first.numpy(), second.numpy()):
        cosines = []
        for tokens in (ours, theirs):
            tokens = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
            cosines.append((tokens @ tokens.T)[np.triu_indices(16, 1)])
        correlations.append(np.corrcoef(*cosines)[0, 1])
    assert 0.1 < np.mean(correlations) < 0.9
    assert consistency(similarities(first), similarities(second)) == pytest.approx(np.mean(correlations), abs=1e-3)
    turned = first @ torch.linalg.qr(torch.randn(12, 12)).Q  # another basis, the same similarities
    assert consistency(similarities(first), similarities(3 * turned)) == pytest.approx(1, abs=1e-5)
    assert consistency(similarities(first), similarities(torch.ones_like(first))) == 0.0  # which has no variation
    assert len(choose_patches(2304)) == 64 and sorted(choose_patches(36).tolist()) == list(range(36))


def _look(best: BestPatches, noises: list[float], *, knn: list[float] | None = None) -> list[dict]:
    records = []
    for number, noise in enumerate(noises):
        record = {"step": 10 * number - 1, "ibot": 1.0} | ({"knn": knn[number]} if knn else {})
        records.append(record | best.compare(records, step=record["step"], **_planted(noise)))
    return records


def test_a_killed_run_goes_on_with_the_same_numbers_whatever_it_looked_at_last(tmp_path):
    noises = [2.0, 1.0, 1.5, 0.5, 1.2, 2.0]
    whole = _look(BestPatches(tmp_path / "whole", counts_start=True), noises)
    assert [record["patch_best_step"] for record in whole] == [-1, 9, 9, 29, 29, 29]
    assert [record["patch_consistency"] == pytest.approx(1) for record in whole] == [1, 1, 0, 1, 0, 0]
    for last in range(len(noises)):
        path = tmp_path / f"killed-{last}"
        _look(BestPatches(path, counts_start=True), noises)  # looked further than its last state
        records, best = whole[: last + 1], BestPatches(path, counts_start=True)
        for later in whole[last + 1 :]:
            noise = noises[whole.index(later)]
            words = {"step": later["step"], **_planted(noise)}
            found = {"step": later["step"], "ibot": 1.0, **best.compare(records, **words)}
            assert found == later
            records = [*records, found]
    (tmp_path / "killed-0").write_bytes(b"damaged")
    lost = BestPatches(tmp_path / "killed-0", counts_start=True).compare(whole, step=59, **_planted(2.0))
    assert (lost["patch_best_step"], lost["patch_consistency"]) == (59, pytest.approx(1))


def test_random_weights_are_never_the_best_step(tmp_path):
    records = _look(BestPatches(tmp_path / "best", counts_start=False), [0.5, 2.0, 1.0, 1.0])
    assert records[0].keys() == {"step", "ibot", "segmentation"}
    assert [record["patch_best_step"] for record in records[1:]] == [9, 19, 19]


def test_a_model_whose_patches_lose_their_content_is_named_while_knn_rises_and_a_healthy_one_is_not(tiny, tmp_path):
    scenes = [render_scene(index, settings=SceneSettings(image_size=32)) for index in range(24)]
    pixels = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).permute(0, 3, 1, 2) / 255
    masks = torch.stack([torch.from_numpy(scene.semantic_mask) for scene in scenes])
    config = tiny(initializer_range=0.2)
    words = {"classes": classes_of_patches(masks, config.patch_shape), "num_classes": len(SEMANTIC_NAMES)}
    alarms = {}
    for name, content in {
        "healthy": [1, 1.02, 1.05, 1.04, 1.05, 1.06],
        "lost": [1, 0.8, 0.4, 0.2, 0.05, 0.02],
    }.items():
        torch.manual_seed(0)
        model, records = ViTWithRegistersModel(config).eval(), []
        best, weight = BestPatches(tmp_path / name, counts_start=True), model.embeddings.patch_embeddings.weight
        start = weight.detach().clone()
        for number, share in enumerate(content):
            with torch.no_grad():
                weight.copy_(share * start)
                patches = model(pixels).patch_tokens
            found = best.compare(records, step=number - 1, patches=patches, **words)
            records.append({"step": number - 1, "ibot": 1.0, "knn": 0.2 + number / 50, **found})
        alarms[name] = [alarm for alarm in diagnose(records, num_prototypes=None) if "Dense" in alarm]
    assert not alarms["healthy"]
    assert len(alarms["lost"]) == 1
    assert re.match(
        r"Dense features fall since step (-1|\d) while k-NN rises: switch on gram.weight", alarms["lost"][0]
    )

"""Test-time registers: what was planted is found and moved, clean models are left alone, nothing is made worse."""

import json

import pytest
import torch
from planted_models import pictures, plain_model, planted_model
from transformers import AutoModel
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersForImageClassification
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.cards.model_folder import EXPECTED_OUTPUTS
from modeling_vitreg.cli import app
from modeling_vitreg.features import load_encoder
from modeling_vitreg.reports import RetrofitReport, read_report
from modeling_vitreg.retrofit import NothingToRepair, RetrofitError, RetrofitSettings, retrofit
from modeling_vitreg.retrofit.register_neurons import (
    add_test_time_register,
    find_outliers,
    group_units,
    measure_repair,
    rank_units,
    score_units,
)


FAMILIES = {
    "vit": {"num_register_tokens": 0},
    "dinov2 with registers": {"layer_scale_init_value": 1.0},
    "swiglu": {"hidden_act": "swiglu"},
    "dinov3": {"position_embedding_type": "rope", "has_key_bias": False},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu"},
}
IMAGES, _ = pictures(32)


@pytest.fixture(params=FAMILIES, ids=str)
def planted(request):
    return planted_model(layer=2, magnitude=60.0, **FAMILIES[request.param])


def _batches(model, size=8, **options):
    return list(load_encoder(model).prepare(IMAGES, **options).split(size))


def _word(model):
    return survey(load_encoder(model), IMAGES, settings=SurveySettings(has_progress_bar=False))[0].verdict["level"]


def test_the_planted_unit_is_found_and_moved(planted, tmp_path):
    planted.save_pretrained(tmp_path / "model")
    report = retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    assert report.register_neurons == {"2": [0]}
    assert report.outliers["highest_layer"] == 2 and report.outliers["share"] == pytest.approx(2 / 16)
    assert report.verdict["is_repaired"] and report.result["share"] == 0 and report.result["cosine"] > 0.999
    assert report.control["share"] == pytest.approx(2 / 16)  # a zero token alone repairs nothing
    assert read_report(tmp_path / "repaired" / "retrofit.json", kind=RetrofitReport) == report
    repaired = AutoModel.from_pretrained(tmp_path / "repaired")
    assert _word(planted) == "many" and _word(repaired) == "none"


def test_units_carry_over_to_another_image_size(planted):
    batches = _batches(planted)
    outliers = find_outliers(planted, batches)
    units = group_units(rank_units(score_units(planted, batches, outliers))[:1])
    repaired = add_test_time_register(planted, units)
    larger = _batches(planted, size=48)
    outliers = find_outliers(planted, larger)
    measured = measure_repair(planted, repaired, larger, outliers)
    assert measured["share_before"] > 0.05 and measured["share"] == 0


def test_scores_equal_the_published_loop(planted):
    batches = _batches(planted, size=5)  # the last batch is smaller
    outliers = find_outliers(planted, batches)
    expected = torch.zeros(outliers.highest_layer, planted.config.intermediate_size, dtype=torch.float64)
    for image in torch.cat(batches):
        states = planted(image[None], output_hidden_states=True).hidden_states
        where = states[outliers.layer][0].norm(dim=-1) >= outliers.threshold
        for number, layer in enumerate(planted.layers[: outliers.highest_layer]):
            attended = layer.attention(layer.norm1(states[number]), planted.embed(image[None])[1])
            activations = layer.mlp.activate(layer.norm2(states[number] + layer.layer_scale1(attended)))[0]
            expected[number] += activations[where].abs().mean(dim=0).double() / len(IMAGES)
    torch.testing.assert_close(score_units(planted, batches, outliers), expected, rtol=1e-6, atol=1e-9)


def test_a_clean_model_is_left_alone(tmp_path):
    plain_model().save_pretrained(tmp_path / "model")
    with pytest.raises(NothingToRepair, match="no layer has outliers"):
        retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    assert not (tmp_path / "repaired").exists()


def test_a_repair_that_harms_is_not_written(tmp_path, monkeypatch):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    worse = {"share_before": 0.1, "share": 0.0, "largest_norm_before": 9.0, "largest_norm": 1.0, "cosine": 0.9}
    monkeypatch.setattr("modeling_vitreg.retrofit.repair.measure_repair", lambda *_: dict(worse))
    with pytest.raises(RetrofitError, match=r"cosine of 0\.9000 .* below 0\.99.*Nothing was written; --force"):
        retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    assert not (tmp_path / "repaired").exists()
    report = retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES, settings=RetrofitSettings(force=True))
    assert not report.verdict["is_repaired"] and (tmp_path / "repaired" / "config.json").exists()


def test_a_head_keeps_its_weights_and_classes(tmp_path):
    planted = planted_model(layer=2, magnitude=60.0, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    classifier = ViTWithRegistersForImageClassification(planted.config).eval()
    classifier.vitreg.load_state_dict(planted.state_dict())
    classifier.save_pretrained(tmp_path / "model")
    retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    repaired = ViTWithRegistersForImageClassification.from_pretrained(tmp_path / "repaired").eval()
    pixels = _batches(planted)[0]
    torch.testing.assert_close(repaired(pixels).logits, classifier(pixels).logits, rtol=1e-4, atol=1e-4)
    assert repaired.config.id2label == {0: "a", 1: "b", 2: "c"} and repaired.config.num_test_time_registers == 1


def test_the_processor_of_the_original_stays(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    assert (tmp_path / "repaired" / path.name).read_text() == path.read_text()


def test_a_model_of_another_library_is_converted_first(tmp_path, monkeypatch):
    # The conversion has tests of its own; here it only has to be called, and its folder not to stay.
    seen = []

    def convert(source, output):
        seen.append(output)
        planted_model(layer=2, magnitude=60.0).save_pretrained(output)

    monkeypatch.setattr("modeling_vitreg.retrofit.repair.convert", convert)
    retrofit("owner/theirs", tmp_path / "repaired", images=IMAGES)
    assert len(seen) == 1 and not seen[0].exists() and (tmp_path / "repaired" / "model.safetensors").exists()


def test_a_second_retrofit_needs_force_and_adds(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    retrofit(tmp_path / "model", tmp_path / "once", images=IMAGES)
    with pytest.raises(RetrofitError, match="retrofitted already: 1 units of layers 2"):
        retrofit(tmp_path / "once", tmp_path / "twice", images=IMAGES)
    once = AutoModel.from_pretrained(tmp_path / "once").eval()
    twice = add_test_time_register(once, {3: [4]})
    assert twice.config.register_neurons == {"2": [0], "3": [4]} and twice.config.num_test_time_registers == 2
    assert twice.config.num_register_tokens == 4 and once.config.num_register_tokens == 3


@pytest.mark.parametrize(
    ("settings", "images", "message"),
    [
        ({}, IMAGES[:15], "expected 16 images or more, got 15"),
        ({"threshold": 1e6}, IMAGES, "no patch of layer 4 has a norm above 1e"),
        ({"layer": 9}, IMAGES, r"expected layer in 1 \.\.\. 4, got 9"),
        ({"threshold": -1.0}, IMAGES, "threshold above 0"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(settings, images, message, tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        retrofit(tmp_path / "model", tmp_path / "out", images=images, settings=RetrofitSettings(**settings))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RetrofitError, match="not empty"):
        retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES)


@pytest.mark.parametrize("name", ["num_registers", "num_units", "num_images", "image_size", "batch_size"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        RetrofitSettings(**{name: 0})


def test_the_verb_repairs_and_compares(tmp_path, monkeypatch):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / "images" / f"{number:02}.png")
    command = ["retrofit", "model", "repaired", "--images", "images", "--report", "page", "--set", "batch_size=16"]
    monkeypatch.chdir(tmp_path)
    done, again = CliRunner().invoke(app, command), CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "Repaired: with 1 unit moved, outliers fall from 12 % to 0 % of the patches of layer 4" in done.output
    assert "layer 2: units 0" in done.output and (tmp_path / "repaired" / EXPECTED_OUTPUTS).exists()
    words = [read_report(tmp_path / "page" / number / "artifacts.json").verdict["level"] for number in ("1", "2")]
    assert words == ["many", "none"] and (tmp_path / "page" / "index.html").exists()
    assert again.exit_code == 1 and "repaired exists and is not empty" in again.output

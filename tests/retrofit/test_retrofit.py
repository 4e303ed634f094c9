"""Test-time registers: what was planted is found and moved, clean models are left alone, nothing is made worse."""

import json

import pytest
import torch
from planted_models import SIDE, pictures, plain_model, planted_model
from safetensors.torch import load_file, save_file
from test_dual_encoder import TEXT_TOWERS, write_tokenizer
from transformers import AutoModel, AutoTokenizer, CLIPTextModel
from typer.testing import CliRunner

from modeling_vitreg import (
    MambaRConfig,
    MambaRModel,
    ViTWithRegistersDualEncoderConfig,
    ViTWithRegistersDualEncoderModel,
    ViTWithRegistersForImageClassification,
)
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.cards.model_folder import EXPECTED_OUTPUTS
from modeling_vitreg.cli import app
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, open_images
from modeling_vitreg.modeling_vitreg import ViTWithRegistersLayer
from modeling_vitreg.reports import RetrofitReport, read_report
from modeling_vitreg.retrofit import NothingToRepair, RetrofitError, RetrofitSettings, retrofit
from modeling_vitreg.retrofit.register_neurons import (
    Outliers,
    add_test_time_register,
    choose_num_units,
    find_outliers,
    group_units,
    measure_repair,
    observe,
    rank_units,
    score_units,
)
from modeling_vitreg.retrofit.repair import judge
from modeling_vitreg.scenes import SceneSettings


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
    measured = measure_repair(*(observe(model, larger, outliers) for model in (planted, repaired)), outliers)
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
    forced = retrofit(tmp_path / "model", tmp_path / "same", images=IMAGES, settings=RetrofitSettings(force=True))
    assert forced.verdict["sentence"].startswith("Written unchanged, because of --force: nothing to repair: no layer")
    same = AutoModel.from_pretrained(tmp_path / "same")
    assert same.config.num_test_time_registers == 0 and not same.config.register_neurons
    assert read_report(tmp_path / "same" / "retrofit.json", kind=RetrofitReport) == forced


def test_a_repair_that_harms_is_not_written(tmp_path, monkeypatch, drawn):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    worse = {"share_before": 0.1, "share": 0.0, "largest_norm_before": 9.0, "largest_norm": 1.0, "cosine": 0.9}
    worse |= {"interval_before": [0.05, 0.15], "interval": [0.0, 0.3], "num_images": 8}
    monkeypatch.setattr("modeling_vitreg.retrofit.repair.measure_repair", lambda *_: dict(worse))
    with pytest.raises(RetrofitError, match=r"cosine of 0\.9000 .* below 0\.99.*Nothing was written; --force"):
        retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES)
    assert not (tmp_path / "repaired").exists()
    with pytest.raises(RetrofitError, match=r"No model was written, .*index\.html shows why; --force"):
        retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES, report_folder=tmp_path / "page")
    assert not (tmp_path / "repaired").exists() and "Not repaired" in (tmp_path / "page" / "index.html").read_text()
    report = retrofit(tmp_path / "model", tmp_path / "repaired", images=IMAGES, settings=RetrofitSettings(force=True))
    assert not report.verdict["is_repaired"] and (tmp_path / "repaired" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "Repaired: with 2 units moved, outliers fall from 10 % to 1 % of the patches of layer 3, and the class "
         "token keeps a cosine of 0.9950 with the original."),
        ({"share": 0.03}, "Not repaired: with 2 units moved, outliers change from 10 % to 3 % of the patches of layer "
         "3; they must fall to a fifth or less."),
        ({"cosine": 0.98}, "Not repaired: outliers fall from 10 % to 1 % of the patches of layer 3, but the class "
         "token keeps a cosine of 0.9800 with the original, below 0.99."),
        ({"share_before": 0.0, "share": 0.0}, "The held-out images have no outliers in layer 3: use more images."),
    ],
)  # fmt: skip
def test_the_verdict_is_a_whole_sentence(changes, sentence):
    result = {"share_before": 0.1, "share": 0.01, "cosine": 0.995} | changes
    outliers = Outliers(layer=3, threshold=1.0, highest_layer=2, shares=(), masks=())
    assert judge(result, outliers, change="with 2 units moved") == {"is_repaired": not changes, "sentence": sentence}


def test_the_number_of_units_is_one_that_leaves_the_class_token(monkeypatch):
    def measure(_, number, __):
        return {"share_before": 0.1, "share": 0.1 / number, "largest_norm": 9.0 / number, "cosine": 1 - number / 1500}

    module = "modeling_vitreg.retrofit.register_neurons"
    monkeypatch.setattr(f"{module}.observe", lambda model, *_: sum(map(len, model.config.register_neurons.values())))
    monkeypatch.setattr(f"{module}.measure_repair", measure)
    ranking = [(1, unit) for unit in range(32)]
    number, tried = choose_num_units(plain_model(), ranking, [], None, original=None)
    assert [entry["num_units"] for entry in tried] == [1, 2, 5, 10, 20] and number == 10  # 20 units cost too much
    number, _ = choose_num_units(plain_model(), ranking, [], None, original=None, candidates=[1, 2])
    assert number == 2  # none is acceptable: the one that lowers norms most, which is refused then


def test_the_search_costs_at_most_three_passes_over_200_images(tmp_path, monkeypatch):
    planted = planted_model(layer=4, magnitude=60.0)  # the last layer is searched too
    planted.save_pretrained(tmp_path / "model")
    seen, forward = [], ViTWithRegistersLayer.forward
    monkeypatch.setattr(
        ViTWithRegistersLayer, "forward", lambda layer, x, *rest: seen.append(len(x)) or forward(layer, x, *rest)
    )
    monkeypatch.setattr("modeling_vitreg.retrofit.repair.time_ratio", lambda *_: 1.0)
    report = retrofit(tmp_path / "model", tmp_path / "repaired", images=pictures(200)[0])
    assert [entry["num_images"] for entry in (report.tried[0], report.result)] == [17, 50]
    assert len(report.tried) == 8 and report.outliers["highest_layer"] == 4
    passes = (150 + 150 + 50 + 8 * 17 + 50 + 50) * len(planted.layers)  # find, score, original, tried, result, control
    assert sum(seen) == passes <= 3 * 200 * len(planted.layers)


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
        ({"num_units": 10**6}, IMAGES, "expected num_units of 256 or less"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(settings, images, message, tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        retrofit(tmp_path / "model", tmp_path / "out", images=images, settings=RetrofitSettings(**settings))
    assert not (tmp_path / "out").exists()


def _damage(folder, name):
    weights = load_file(folder / "model.safetensors")
    if name == "missing":
        del weights["layers.2.mlp.fc1.weight"]
    else:
        weights["layers.2.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"), [("missing", "1 tensors are missing and would be random"), ("nan", "not finite in 1 ten")]
)
def test_a_damaged_model_is_never_repaired(damage, message, tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    _damage(tmp_path / "model", damage)
    with pytest.raises(ValueError, match=message):
        retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES)
    assert not (tmp_path / "out").exists()


def test_a_model_without_mlps_is_refused_in_words(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "image_size": SIDE, "patch_size": 8}
    MambaRModel(MambaRConfig(**sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(RetrofitError, match=r"expected a plain Vision Transformer.*'MambaRModel'"):
        retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES)


def test_a_report_that_the_model_would_replace_is_refused(tmp_path):
    for report in ("out", "out/report", "other/../out"):
        with pytest.raises(RetrofitError, match="would replace the report"):
            retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES, report_folder=tmp_path / report)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_was_not_written_is_not_announced(tmp_path, monkeypatch):
    plain_model().save_pretrained(tmp_path / "model")
    for number, image in enumerate(IMAGES[:16]):
        image.save(tmp_path / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    words = ["retrofit", "model", "out", "--images", ".", "--num-images", "16", "--force", "--report", "../page"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "wrote out\n" in done.output, done.output


def test_a_share_of_all_patches_is_a_plain_number():
    shares = {"share_before": 1.0, "share": 1.0, "cosine": 1.0}
    assert "from 100 % to 100 %" in judge(shares, Outliers(1, 1.0, 1, (), ()), change="with 1 unit moved")["sentence"]


def test_an_output_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RetrofitError, match="not empty"):
        retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES)


@pytest.mark.parametrize("name", ["num_registers", "num_units", "num_images", "image_size", "batch_size"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"expected {name} of {16 if name == 'num_images' else 1} or more, got 0"):
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
    report = read_report(tmp_path / "page" / "retrofit.json", kind=RetrofitReport)
    assert report == read_report(tmp_path / "repaired" / "retrofit.json", kind=RetrofitReport)
    assert [layer["share"] > 0 for layer in report.comparison["layers"]["before"]] == [False, True, True, True]
    assert not any(layer["share"] for layer in report.comparison["layers"]["after"])
    queries = [[entry["query"] for entry in report.comparison["attention"][side]] for side in ("before", "after")]
    assert queries == [["cls", "register 1", "register 2"], ["cls", "register 1", "register 2", "register 3"]]
    assert report.comparison["tasks"] == []  # a folder without classes
    reason = "segmentation: the images have no masks"
    assert reason in report.comparison["skipped"]["tasks"]
    assert again.exit_code == 1 and "repaired exists and is not empty" in again.output


def test_the_page_has_every_task_that_the_annotations_allow(tmp_path, drawn):
    torch.manual_seed(0)
    text = CLIPTextModel(TEXT_TOWERS["clip"])
    planted = planted_model(layer=2, magnitude=60.0)
    config = ViTWithRegistersDualEncoderConfig(planted.config, text.config, projection_dim=16)
    ViTWithRegistersDualEncoderModel(config, vision_model=planted, text_model=text).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    settings = SceneSettings(image_size=SIDE)
    options = DataOptions(label_column="label", **SCENE_COLUMNS)
    images = open_images("scenes", scenes=range(32), scene_settings=settings, options=options)
    report = retrofit(
        tmp_path / "model",
        tmp_path / "repaired",
        images=images,
        report_folder=tmp_path / "page",
        settings=RetrofitSettings(force=True),
    )
    found = {task["task"]: task for task in report.comparison["tasks"]}
    assert set(found) == {"knn", "segmentation", "discovery", "zero_shot"} and not report.comparison["skipped"]
    assert {task["n"] for task in found.values()} == {8} == {report.images["num_held_out"]}
    page = (tmp_path / "page" / "index.html").read_text()
    for row in ("segmentation: mean IoU", "discovery: CorLoc", "knn: top-1 accuracy", "zero-shot: top-1 accuracy"):
        assert row in page
    assert "time of a forward" in page and "cosine of the class token" in page and page.count("data:image/png") == 6
    names = {path.name for path in (tmp_path / "repaired").iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} <= names  # the tokenizer too
    AutoTokenizer.from_pretrained(tmp_path / "repaired")


def test_held_out_images_are_those_of_the_judgement(tmp_path, drawn):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    held_out = [image for number, image in enumerate(IMAGES) if number % 4 == 3]
    report = retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES, report_folder=tmp_path / "page")
    before = read_report(tmp_path / "page" / "1" / "artifacts.json")
    again = survey(
        load_encoder(planted_model(layer=2, magnitude=60.0)), held_out, settings=SurveySettings(has_progress_bar=False)
    )[0]
    assert before.verdict == again.verdict and before.images["num_images"] == 8
    (low, high), share = report.result["interval_before"], report.result["share_before"]
    assert (low, share, high) == (
        pytest.approx(before.verdict["low"]),
        before.verdict["share"],
        before.verdict["high"],
    )


def test_a_report_of_the_first_version_is_read(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    report = retrofit(tmp_path / "model", tmp_path / "out", images=IMAGES)
    content = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    del content["comparison"]
    (tmp_path / "old.json").write_text(json.dumps(content | {"version": 1}))
    assert read_report(tmp_path / "old.json", kind=RetrofitReport) == report

"""Cards: what the Hub reads of them, that no number comes from anywhere but a file, and that their programs run."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from planted_models import pictures, planted_model
from safetensors.torch import load_file, save_file
from test_dual_encoder import TEXT_TOWERS, write, write_tokenizer

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersDualEncoderConfig,
    ViTWithRegistersDualEncoderModel,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.cards import CardError, check_plan, make_plan, record_expected_outputs
from modeling_vitreg.cards.isolation import compare_outputs, read_outputs, run_here
from modeling_vitreg.pretraining.run.recipe import make_recipe
from modeling_vitreg.reports import ArtifactReport, ConversionReport, write_report
from modeling_vitreg.retrofit import METHODS, RetrofitSettings, finish_training, prepare_training, retrofit


RESULT = {
    "task": "knn",
    "dataset": "user/birds",
    "split": "test",
    "metric": "top1",
    "value": 0.71828,
    "interval": [0.7012, 0.7345],
    "interval_method": "Wilson, 95 %",
    "n": 2718,
    "seed": 5,
    "settings": {},
    "dataset_hash": "f00d",
    "weights_hash": "cafe",
}
VERIFIED = {
    "is_verified": True,
    "reference": "timm 1.0.31",
    "sizes": [[32, 32]],
    "num_images": 3,
    "errors": {"32x32": {"cls_token": {"absolute": 3.3e-6, "relative": 4.4e-7}}},
    "largest_relative_error": 4.4e-7,
    "tolerance": 1e-5,
    "notes": ["the reference takes images of one size"],
}


@pytest.fixture
def folder(tiny, tmp_path):
    ViTWithRegistersModel(tiny(initializer_range=0.2)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def conversion_report(
    folder, *, verification=VERIFIED, licence="apache-2.0", path="timm:vit_small_patch14_dinov2.lvd142m"
):
    """Write conversion.json; other tests use it too."""
    source = {"path": path, "layout": "dinov2", "sha256": "ab" * 32, "licence": licence, "assumed": {"head_dim": 64}}
    ledger = {"coverage": "all 20 source tensors accounted for"}
    report = ConversionReport(
        source=source, target={}, ledger=ledger, verification=verification, command="vitreg convert x y"
    )
    return write_report(report, folder / "conversion.json")


def evaluation_report(folder, *, name="evaluation.json", revision="d" * 40, num_registers=4, **changes):
    """Write what `vitreg evaluate` writes."""
    content = {
        "kind": "evaluation",
        "version": 1,
        "model": "model",
        "architecture": {"num_layers": 3, "num_heads": 2, "hidden_size": 32, "num_registers": num_registers},
        "data": {"f00d": {"name": "user/birds", "revision": revision}},
        "results": [RESULT | changes],
        "skipped": {},
        "stopped_by": None,
        "command": "vitreg evaluate model --tasks knn",
        "made_with": {"commit": "abc1234"},
    }
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def artifact_report(folder, **architecture):
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "num_register_tokens": 4}
    empty = {entry.name: {} for entry in dataclasses.fields(ArtifactReport)}
    facts = {
        "model": "model",
        "architecture": sizes | architecture,
        "images": {"source": "photographs", "num_images": 61, "size": [32, 32], "is_complete": True},
        "verdict": {"level": "few", "sentence": "Few artifacts: 0.31 % of the patches."},
        "layers": [],
        "command": "vitreg analyze model photographs",
    }
    return write_report(ArtifactReport(**{**empty, **facts}), folder / "artifacts.json")


def _metadata(card):
    return ModelCard(card, ignore_metadata_errors=False).data


def test_metadata_is_what_the_class_of_the_hub_reads_back(folder):
    conversion_report(folder)
    evaluation_report(folder)
    data = _metadata(make_plan(folder, "user/name").card)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert (data.license, data.base_model) == ("apache-2.0", "timm/vit_small_patch14_dinov2.lvd142m")
    assert {"vit", "registers", "dinov2", "custom_code"} <= set(data.tags)
    assert (data.datasets, data.metrics) == (["user/birds"], ["accuracy"])
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type) == ("image-classification", "user/birds")
    assert (result.dataset_revision, result.metric_name) == ("d" * 40, "knn top1")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.71828)
    circumstances = {"n": 2718, "interval": [0.7012, 0.7345], "interval_method": "Wilson, 95 %", "seed": 5}
    assert result.metric_args == circumstances


def test_results_on_the_hub_are_entries_that_its_client_parses(folder):
    parse = pytest.importorskip("huggingface_hub._eval_results").parse_eval_result_entries
    import yaml

    evaluation_report(folder)
    (entry,) = parse(yaml.safe_load(make_plan(folder, "user/name").files[".eval_results/vitreg.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("user/birds", "knn", 0.71828)
    assert "n = 2718" in entry.notes and entry.dataset_revision == "d" * 40
    evaluation_report(folder, dataset="user/birds:rare")
    plan = make_plan(folder, "user/name")
    assert parse(yaml.safe_load(plan.files[".eval_results/vitreg.yaml"]))[0].dataset_id == "user/birds"
    (result,) = _metadata(plan.card).eval_results
    assert (result.dataset_type, result.dataset_config) == ("user/birds", "rare")
    evaluation_report(folder, revision=None, dataset="scenes of 32 pixels")
    plan = make_plan(folder, "user/name")
    assert ".eval_results/vitreg.yaml" not in plan.files
    (result,) = _metadata(plan.card).eval_results
    assert (result.dataset_name, result.dataset_type) == ("scenes of 32 pixels", "scenes-of-32-pixels")


@pytest.mark.parametrize(
    "model, task",
    [
        (ViTWithRegistersForImageClassification, "image-classification"),
        (ViTWithRegistersForSemanticSegmentation, "image-segmentation"),
        (ViTWithRegistersForDepthEstimation, "depth-estimation"),
    ],
)
def test_the_task_is_that_of_the_architecture(tiny, tmp_path, model, task):
    model(tiny(num_labels=3)).save_pretrained(tmp_path / "model")
    card = make_plan(tmp_path / "model", "user/name").card
    assert _metadata(card).pipeline_tag == task and f'pipeline("{task}", model="user/name"' in card


def test_no_argument_carries_a_number_or_a_sentence():
    names = set(inspect.signature(make_plan).parameters)
    assert names == {"folder", "repo_id", "reports", "licence", "licence_name", "licence_link", "accepts_licence"}


def test_every_number_of_a_result_is_in_the_card_and_leaves_with_its_report(folder):
    report = evaluation_report(folder)
    card = make_plan(folder, "user/name").card
    assert "| knn | user/birds | top1 | 0.7183 | 0.7012 to 0.7345 | 2718 |" in card
    for word in ("vitreg evaluate model --tasks knn", "abc1234", "f00d", "seed 5", "d" * 40):
        assert word in card
    report.unlink()
    card = make_plan(folder, "user/name").card
    assert "**Not measured**" in card and "0.718" not in card and "2718" not in card
    assert _metadata(card).eval_results is None


def test_numbers_of_a_card_written_by_hand_do_not_get_in(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAccuracy: 99.9 %")
    plan = make_plan(folder, "user/name")
    assert "99.9" not in plan.card and _metadata(plan.card).license is None
    assert "skipped  'README.md': replaced by the card made" in plan.describe()


def test_every_number_of_a_bare_card_is_one_of_the_configuration(folder):
    body = make_plan(folder, "user/name").card.split("## Use")[0].split("---\n")[-1]
    config = json.loads((folder / "config.json").read_text())
    shapes = [tensor.numel() for tensor in load_file(folder / "model.safetensors").values()]
    known = {config["num_register_tokens"], config["num_hidden_layers"], config["hidden_size"], config["patch_size"]}
    known |= {config["num_attention_heads"]}
    found = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", body)}
    assert found - {float(number) for number in known} == {float(f"{sum(shapes) / 1000:.3g}")}


@pytest.mark.parametrize("change", [{"value": float("nan")}, {"value": "high"}, {"value": True}])
def test_a_result_that_is_no_number_is_refused(folder, change):
    evaluation_report(folder, **change)
    with pytest.raises(CardError, match="not a finite number"):
        make_plan(folder, "user/name")


def test_reports_that_do_not_exist_are_named(folder):
    with pytest.raises(CardError, match=r"--reports .*reports: no such file or folder: give the output folder"):
        make_plan(folder, "user/vit", reports=[folder / "reports"])


def test_a_result_without_its_circumstances_is_refused(folder):
    path = evaluation_report(folder)
    content = json.loads(path.read_text())
    del content["results"][0]["seed"], content["results"][0]["n"]
    path.write_text(json.dumps(content))
    with pytest.raises(CardError, match=r"lacks n, seed: measure it again"):
        make_plan(folder, "user/name")


def test_artifacts_are_told_with_their_figure(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    artifact_report(elsewhere)
    (elsewhere / "norms.png").write_bytes(b"png")
    plan = make_plan(folder, "user/name", reports=[elsewhere])
    assert "Few artifacts: 0.31 % of the patches." in plan.card and "61 images (photographs)" in plan.card
    assert "](reports/norms.png)" in plan.card and {"reports/norms.png", "reports/artifacts.json"} <= set(plan.files)
    assert "**Not measured**: this model has no artifact report" in make_plan(folder, "user/name").card
    renamed = (elsewhere / "artifacts.json").rename(elsewhere / "last week.json")
    assert "reports/artifacts.json" in make_plan(folder, "user/name", reports=[renamed]).files


def test_artifacts_of_another_model_are_refused(folder):
    artifact_report(folder, num_register_tokens=0)
    with pytest.raises(CardError, match=r"its num_register_tokens is 0, that of .* is 4"):
        make_plan(folder, "user/name")


def test_results_of_another_model_are_refused(folder):
    evaluation_report(folder, num_registers=0)
    with pytest.raises(CardError, match=r"is a report of another model, model: its num_register_tokens is 0"):
        make_plan(folder, "user/name")
    evaluation_report(folder)
    evaluation_report(folder, name="evaluation-later.json", task="linear", weights_hash="beef")
    with pytest.raises(CardError, match=r"are of 2 different models \(beef, cafe\)"):
        make_plan(folder, "user/name")
    evaluation_report(folder, name="evaluation-later.json", task="linear")
    card = make_plan(folder, "user/name").card
    assert "| linear | user/birds | top1 |" in card and "* linear, knn on `user/birds`" in card


def test_a_verification_is_told_with_its_errors(folder):
    conversion_report(folder)
    card = make_plan(folder, "user/name").card
    assert "compared with timm 1.0.31" in card and "**4.4e-07** (limit 1.0e-05)" in card
    assert "| 32x32 | cls_token | 3.3e-06 | 4.4e-07 |" in card
    assert "oquab2024dinov2" in card and "darcet2024registers" in card


def test_unverified_is_said(folder):
    conversion_report(folder, verification={"is_verified": False, "why": "it was skipped on request"})
    card = make_plan(folder, "user/name").card
    assert "**Not verified**" in card and "it was skipped on request" in card
    assert "was not compared with the model that it was converted from" in card


def test_a_repair_is_told_with_its_numbers_its_original_and_its_licence(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "original")
    conversion_report(tmp_path / "original", path="timm:vit_large")
    report = retrofit(tmp_path / "original", tmp_path / "repaired", images=pictures(32)[0], command="vitreg retrofit")
    plan = make_plan(tmp_path / "repaired", "user/repaired")
    assert report.verdict["sentence"] in plan.card and "`test-time`: 1 test-time register." in plan.card
    for name in ("share_before", "largest_norm_before", "largest_norm", "cosine", "time_ratio"):
        assert f"| {report.result[name]:.4g} " in plan.card, name
    assert "These numbers are of the model before its repair." in plan.card and "retrofit.json" in plan.files
    data = _metadata(plan.card)
    assert (data.base_model, data.base_model_relation, data.license) == ("timm/vit_large", "finetune", "apache-2.0")


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_repair_is_told_likewise(method, tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "original")
    conversion_report(tmp_path / "original", path="timm:vit_large")
    values = {"objective": METHODS[method], "num_steps": 2, "crops": {"num_global": 1, "num_local": 0}}
    words = {"images": pictures(32)[0], "settings": RetrofitSettings(num_registers=3, force=True)}
    prepare_training(tmp_path / "original", tmp_path / "run", method=method, recipe=make_recipe(values), **words)
    trained = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    torch.nn.init.zeros_(trained.layers[1].mlp.fc2.weight)  # of the unit that was planted
    trained.save_pretrained(tmp_path / "run" / "model")
    report = finish_training(tmp_path / "run", tmp_path / "repaired", **words)
    card = make_plan(tmp_path / "repaired", "user/repaired").card
    assert report.verdict["sentence"] in card and f"by the method `{method}`." in card
    for name in ("share_before", "largest_norm_before", "largest_norm", "cosine", "time_ratio"):
        assert f"| {report.result[name]:.4g} " in card, name
    data = _metadata(card)
    assert (data.base_model, data.base_model_relation, data.license) == ("timm/vit_large", "finetune", "apache-2.0")


def test_a_repair_of_a_model_on_the_disk_needs_a_licence(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "original")
    retrofit(tmp_path / "original", tmp_path / "repaired", images=pictures(32)[0])
    with pytest.raises(CardError, match="made from original, whose licence is unknown"):
        make_plan(tmp_path / "repaired", "user/repaired")
    assert "base_model" not in make_plan(tmp_path / "repaired", "user/repaired", licence="mit").card


def test_a_conditional_licence_needs_consent_by_its_name(folder):
    conversion_report(folder, licence="cc-by-nc-4.0")
    with pytest.raises(CardError, match=r"commercial use is not allowed.*--accept-license cc-by-nc-4.0"):
        make_plan(folder, "user/name")
    with pytest.raises(CardError, match="accept the licence by its name"):
        make_plan(folder, "user/name", accepts_licence="yes")
    card = make_plan(folder, "user/name", accepts_licence="cc-by-nc-4.0").card
    assert _metadata(card).license == "cc-by-nc-4.0" and "commercial use is not allowed" in card


def test_the_licence_of_dinov3_has_its_name_and_link(folder):
    conversion_report(folder, licence="dinov3-license")
    data = _metadata(make_plan(folder, "user/name", accepts_licence="dinov3-license").card)
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    assert data.license_link.startswith("https://ai.meta.com/")


def test_an_inherited_licence_cannot_be_changed_and_an_unknown_one_must_be_stated(folder):
    conversion_report(folder, licence="cc-by-nc-4.0")
    with pytest.raises(CardError, match="cannot be published under mit"):
        make_plan(folder, "user/name", licence="mit")
    conversion_report(folder, licence=None)
    with pytest.raises(CardError, match="The weights inherit it: look it up"):
        make_plan(folder, "user/name")
    assert _metadata(make_plan(folder, "user/name", licence="mit").card).license == "mit"


def test_a_licence_is_inherited_through_training(folder, tmp_path, tiny):
    conversion_report(folder, licence="dinov3-license")
    run = tmp_path / "run"
    ViTWithRegistersModel(tiny()).save_pretrained(run / "model")
    (run / "training.json").write_text(json.dumps({"init": str(folder), "steps": 3}))
    for place in (run, run / "model"):
        with pytest.raises(CardError, match="dinov3-license"):
            make_plan(place, "user/name")
    (run / "training.json").write_text(json.dumps({"init": "user/parent", "steps": 3}))
    data = _metadata(make_plan(run, "user/name", licence="mit").card)
    assert (data.base_model, data.base_model_relation) == ("user/parent", "finetune")


def test_facts_of_a_run_are_told_without_paths_on_the_disk_of_the_author(folder, tmp_path):
    facts = {
        "recipe": {"objective": "dinov2", "batch_size": 64},
        "data": {"name": "/home/alice/photographs", "split": "train"},
        "init": "/home/alice/secret/first",
        "steps": 350,
        "untrained_knn": 0.132,
        "knn": 0.326,
        "untrained_chance": 0.05,
        "chance": 0.05,
    }
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    (run / "training.json").write_text(json.dumps(facts))
    card = make_plan(run, "user/name", licence="mit").card
    rows = re.findall(r"^\| (.*) \|$", card.split("## Training")[1].split("<details>")[0], re.MULTILINE)
    assert rows[2:] == [
        "objective | self-distillation of class tokens and hidden patches, without labels (DINOv2)",
        "images | photographs, split train",
        "started from | first",
        "images seen, counting repetitions | 22400",
        "steps | 350",
        "k-NN accuracy before the first step | 0.132",
        "k-NN accuracy after the last step | 0.326",
        "chance | 0.05",
    ]
    assert "alice" not in card and "oquab2024dinov2" in card


def test_own_weights_without_a_licence_say_so(folder):
    card = make_plan(folder, "user/name").card
    assert "The author has stated no licence" in card and _metadata(card).license is None


def test_a_card_of_downloaded_files_is_the_same(folder, tmp_path):
    conversion_report(folder)
    evaluation_report(folder)
    artifact_report(folder)
    (folder / "norms.png").write_bytes(b"png")
    plan = make_plan(folder, "user/name")
    for path, file in plan.files.items():
        target = tmp_path / "downloaded" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    again = make_plan(tmp_path / "downloaded", "user/name")
    assert again.card == plan.card and set(again.files) == set(plan.files)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "configuration_vitreg.py"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CardError, match=f"{name} missing: save the model again"):
        make_plan(folder, "user/name")


def test_shards_travel_together_and_a_missing_one_is_named(tiny, tmp_path):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    plan = make_plan(tmp_path / "model", "user/name")
    assert len(shards) > 1 and {*shards, "model.safetensors.index.json"} <= set(plan.files)
    (tmp_path / "model" / shards[0]).unlink()
    with pytest.raises(CardError, match=f"missing: {shards[0]}"):
        make_plan(tmp_path / "model", "user/name")


def test_weights_that_are_cut_off_and_names_that_are_none_are_refused(folder):
    with pytest.raises(CardError, match="expected USER/NAME, got 'name'"):
        make_plan(folder, "name")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CardError, match="damaged or incomplete"):
        make_plan(folder, "user/name")
    (folder.parent / "empty").mkdir()
    with pytest.raises(CardError, match="found none of them"):
        make_plan(folder.parent / "empty", "user/name")


def test_weights_that_changed_since_the_outputs_were_recorded_are_refused(folder):
    record_expected_outputs(folder)
    content = json.loads((folder / "expected_outputs.json").read_text()) | {"kind": "fingerprint"}
    (folder / "fingerprint.json").write_text(json.dumps(content))  # its old name
    (folder / "expected_outputs.json").unlink()
    plan, said = make_plan(folder, "user/name"), []
    assert "expected_outputs.json" in check_plan(plan, say=said.append).files and "fingerprint.json" not in plan.files
    assert "with the recorded outputs (largest difference 0.0e+00)" in said[0]
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.weight"][3] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CardError, match=r"differs by .* weights, configuration or code were changed"):
        check_plan(plan, say=said.append)


def test_a_change_in_any_part_of_a_dual_encoder_is_seen(tiny, randomise, tmp_path):
    config = ViTWithRegistersDualEncoderConfig(tiny(), TEXT_TOWERS["clip"], projection_dim=16)
    folder = write(randomise(ViTWithRegistersDualEncoderModel(config)), tmp_path / "model")
    recorded = read_outputs(record_expected_outputs(folder))
    assert {"logits_per_image", "text_embeds", "image_embeds"} <= set(recorded["outputs"])
    assert compare_outputs(run_here(folder), recorded, title="model") == 0
    original = load_file(folder / "model.safetensors")
    for name in ("layers.0.mlp.fc1.weight", "embeddings.token_embedding.weight", "logit_scale"):
        (key,) = [key for key in original if key.endswith(name) and "text_model.encoder" not in key]
        save_file(original | {key: original[key] * 1.01}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CardError, match=r"differs by .* weights, configuration or code were changed"):
            compare_outputs(run_here(folder), recorded, title="model")


@pytest.mark.parametrize("name", ["dual_encoder_vitreg.py", "modeling_vitreg.py", "configuration_vitreg.py"])
def test_a_dual_encoder_without_a_file_of_its_code_is_refused(tiny, tmp_path, name):
    config = ViTWithRegistersDualEncoderConfig(tiny(), TEXT_TOWERS["clip"])
    folder = write(ViTWithRegistersDualEncoderModel(config), tmp_path / "model")
    assert _metadata(make_plan(folder, "user/name").card).pipeline_tag == "zero-shot-image-classification"
    (folder / name).unlink()
    with pytest.raises(CardError, match=f"{name} missing: save the model again"):
        make_plan(folder, "user/name")


def test_a_dual_encoder_without_a_tokenizer_is_refused(tiny, tmp_path):
    ViTWithRegistersDualEncoderModel(ViTWithRegistersDualEncoderConfig(tiny(), TEXT_TOWERS["clip"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(CardError, match=r"has no tokenizer .* so the model cannot read text: save the tokenizer"):
        make_plan(tmp_path, "user/name")


def test_a_folder_that_needs_the_package_is_refused(folder):
    code = folder / "modeling_vitreg.py"
    code.write_text(code.read_text() + "\nimport modeling_vitreg\n")
    with pytest.raises(CardError, match=r"model: cannot be loaded without this package: ModuleNotFoundError"):
        check_plan(make_plan(folder, "user/name"), say=lambda text: None)


def test_a_model_that_gives_nan_is_refused(tiny, tmp_path):
    model = ViTWithRegistersModel(tiny()).eval()
    with torch.no_grad():
        model.layernorm.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite in last_hidden_state"):
        record_expected_outputs(tmp_path, model)
    with pytest.raises(ValueError, match="leave it out"):
        record_expected_outputs(tmp_path, model.bfloat16())


def test_the_programs_of_every_card_run_as_they_are_printed(tmp_path, photograph):
    from conftest import TINY

    photograph.resize((64, 64)).save(tmp_path / "photograph.jpg")
    kinds = (
        ViTWithRegistersModel,
        ViTWithRegistersForImageClassification,
        ViTWithRegistersForSemanticSegmentation,
        ViTWithRegistersForDepthEstimation,
    )
    configs = [
        ViTWithRegistersConfig(**TINY, num_labels=3, num_register_tokens=4 * (n % 2)) for n in range(len(kinds))
    ]
    models = [kind(config) for kind, config in zip(kinds, configs)]
    models.append(ViTWithRegistersDualEncoderModel(ViTWithRegistersDualEncoderConfig(configs[1], TEXT_TOWERS["clip"])))
    with HubStandIn(tmp_path / "hub") as hub:
        programs = []
        for number, model in enumerate(models):
            model.save_pretrained(tmp_path / type(model).__name__)
            if model is models[-1]:
                write_tokenizer(tmp_path / type(model).__name__)
            plan = make_plan(tmp_path / type(model).__name__, f"user/model-{number}")
            contents = {
                path: file if isinstance(file, bytes) else file.read_bytes() for path, file in plan.files.items()
            }
            hub.add(f"user/model-{number}", contents, is_private=False)
            programs += re.findall(r"```python\n(.*?)```", plan.card, re.DOTALL)
        program = "import sys; sys.modules['modeling_vitreg'] = None\n" + "\n".join(programs)
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "home", token=None),
            capture_output=True,
            text=True,
        )
    assert len(programs) == 12
    assert run.returncode == 0, run.stderr
    assert "'label': 'a red cube'" in run.stdout and "'label': 'a blue sphere'" in run.stdout
    assert "torch.Size([1, 4, 4, 32])" in run.stdout and "registers torch.Size([1, 1, 4, 4, 4])" in run.stdout


def test_a_data_set_of_the_hub_is_known_by_its_revision_and_named_without_what_was_pinned():
    from modeling_vitreg.cards.facts import find_on_hub

    assert find_on_hub("user/birds:rare@v1", "d" * 40) == ("user/birds", "rare")
    assert find_on_hub("birds", "d" * 40) == ("birds", None)
    assert find_on_hub("user/birds", None) is None  # a folder of that name
    assert find_on_hub("scenes of 32 pixels", "d" * 40) is None


NASTY = "<script>x</script> | [a](javascript:b) `c` *d* # e\n# f ``` & &lt; $g$"


def test_text_of_others_is_text_of_the_card_and_nothing_else(folder, tmp_path):
    """Rendered as Markdown, names and commands of others make no tag, link, heading, cell or end of a code block."""
    from markdown_it import MarkdownIt

    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    evaluation_report(run / "model", dataset=NASTY, task="knn|x", revision=None)
    path = run / "model" / "evaluation.json"
    content = json.loads(path.read_text()) | {"command": f"vitreg evaluate '{NASTY}'\n```\n# out of the block"}
    path.write_text(json.dumps(content))
    training = {"recipe": {"objective": NASTY, "class_names": [NASTY]}, "data": {"name": NASTY}, "steps": 3}
    (run / "training.json").write_text(json.dumps(training))
    card = make_plan(run, "user/name", licence="mit").card
    assert _metadata(card).eval_results[0].dataset_name == NASTY
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("\n---\n", 1)[1])
    headings = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["name", "Use", "Evaluation", "Artifacts", "Training", "Limits", "Licence", "Citation"]
    inline = [child for token in tokens for child in token.children or ()]
    assert not [child for child in inline if child.type == "html_inline"]
    assert all(child.attrs["href"].startswith("reports/") or child.attrs["href"].endswith(".json")
               for child in inline if child.type == "link_open")  # fmt: skip
    blocks = [token.content for token in tokens if token.type == "html_block"]
    assert [block.split()[0] for block in blocks] == ["<details><summary>The", "</details>"]
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type == "td_open"]
    assert len(cells) == 6 + 2 * (len(rows) - 3)  # one result of six cells, and facts of two
    assert any("# out of the block" in token.content for token in tokens if token.type == "fence")


@pytest.mark.parametrize("wrong", [{"seed": {}}, {"interval": "high"}, {"dataset": 3}, {"metric": ["a"]}])
def test_facts_of_another_type_end_in_words(folder, wrong):
    evaluation_report(folder, **wrong)
    try:
        make_plan(folder, "user/name")
    except CardError as error:
        assert "evaluation.json" in str(error) or "make the report again" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": "ViT"}, "expected architectures to be a list of class names"),
        ({"architectures": [3]}, "expected architectures to be a list of class names"),
        ({"hidden_size": "wide"}, "expected hidden_size to be an integer"),
        ({"hidden_size": 33}, "is no valid configuration of this family"),
        ({"vision_config": 3, "text_config": {}}, "expected a model of this family"),
        ({"auto_map": 7}, "no auto_map to code in the folder"),
        ({"auto_map": {"AutoModel": "../../evil.Model"}}, "missing"),
    ],
)
def test_a_hostile_configuration_is_refused_in_words(folder, change, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CardError, match=re.escape(words)):
        make_plan(folder, "user/name")


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"a": "../other/model.safetensors"}}])
def test_a_weight_map_leads_nowhere_else(folder, index):
    (folder.parent / "other").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "other" / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CardError, match=r"expected weight_map|leads out of its folder"):
        make_plan(folder, "user/name")


def test_a_link_to_a_file_outside_is_not_uploaded(folder, tmp_path):
    (tmp_path / "token").write_text("hf_secret")
    (folder / "notes.txt").symlink_to(tmp_path / "token")
    plan = make_plan(folder, "user/name")
    assert "notes.txt" not in plan.files
    assert "'notes.txt': a link to a file outside of the folder" in plan.describe()


def test_the_code_of_a_folder_sees_neither_tokens_nor_the_home_of_the_user(folder, tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "aws", "WANDB_API_KEY": "w", "MY_PASSWORD": "p"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    code, seen = folder / "modeling_vitreg.py", tmp_path / "seen.json"
    spy = f"import json, os\njson.dump(dict(os.environ), open({str(seen)!r}, 'w'))\n"
    code.write_text(code.read_text() + spy)
    check_plan(make_plan(folder, "user/name"), say=lambda text: None)
    environment = json.loads(seen.read_text())
    assert not set(secrets) & set(environment) and not set(secrets.values()) & set(environment.values())
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HOME"] != os.environ["HOME"]


def test_a_licence_that_the_hub_does_not_list_needs_a_name_and_its_text(folder):
    with pytest.raises(CardError, match="the licence custom needs its text: save it as"):
        make_plan(folder, "user/name", licence="other")
    (folder / "LICENSE").write_text("All rights reserved.")
    plan = make_plan(folder, "user/name", licence="other", licence_name="house-rules")
    data = _metadata(plan.card)
    assert (data.license, data.license_name, data.license_link) == ("other", "house-rules", "LICENSE")
    assert "LICENSE" in plan.files
    link = "https://example.org/terms"
    data = _metadata(make_plan(folder, "user/name", licence="other", licence_link=link).card)
    assert (data.license_name, data.license_link) == ("custom", link)
    with pytest.raises(CardError, match="belong to the licence other"):
        make_plan(folder, "user/name", licence="mit", licence_name="house-rules")


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ("Apache 2.0", "apache-2.0"),
        ("Apache-2.0", "apache-2.0"),
        ("MIT License", "mit"),
        ("GPLv3", "gpl-3.0"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("cc-by-nc", "cc-by-nc-4.0"),
        ("my-own", "common ones are apache-2.0"),
    ],
)
def test_an_identifier_that_the_hub_does_not_know_is_refused_with_what_was_meant(folder, stated, meant):
    with pytest.raises(CardError, match=re.escape(meant)):
        make_plan(folder, "user/name", licence=stated)

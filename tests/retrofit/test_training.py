"""Retrofits that train: where they start, what they take from the model, and the model that they end with."""

import json
import pathlib
import shutil
import signal
import time

import pytest
import torch
import training_program
from planted_models import pictures, plain_model, planted_model
from transformers import AutoModel
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.cli import app
from modeling_vitreg.pretraining.build import make_config, make_objective
from modeling_vitreg.pretraining.run.recipe import make_recipe, read_recipe
from modeling_vitreg.reports import RetrofitReport, read_report
from modeling_vitreg.retrofit import (
    METHODS,
    NothingToRepair,
    RetrofitError,
    RetrofitSettings,
    finish_training,
    prepare_training,
)
from modeling_vitreg.retrofit.added_registers import add_registers, cluster_means, replace_tower


IMAGES, IS_WHITE = pictures(32)
RECIPES = pathlib.Path(__file__).parents[2] / "examples" / "recipes"
FAMILIES = {
    "vit": {"num_register_tokens": 0},
    "dinov2 with registers": {"layer_scale_init_value": 1.0},
    "dinov3": {"position_embedding_type": "rope", "has_key_bias": False, "hidden_act": "swiglu"},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu", "projection_size": 8},
}


def _recipe(method, **settings):
    settings = {"num_copies": 2, "lora_rank": 2} if method == "append" else settings
    values = {"objective": METHODS[method], "settings": settings, "num_steps": 2, "batch_size": 4}
    return make_recipe(values | {"crops": {"num_global": 1, "num_local": 0}})


@pytest.fixture
def prepare(tmp_path):
    def run(method="append", model=None, images=IMAGES, recipe=None, **settings):
        (model or planted_model(layer=2, magnitude=60.0)).save_pretrained(tmp_path / "model")
        chosen = RetrofitSettings(**{"num_registers": 3, **settings})
        words = {"method": method, "recipe": recipe or _recipe(method), "images": images, "settings": chosen}
        return prepare_training(tmp_path / "model", tmp_path / "run", **words)

    return run


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_appended_registers_leave_the_outputs_of_every_family(prepare, family, tmp_path):
    model = planted_model(layer=2, magnitude=60.0, **FAMILIES[family])
    recipe = prepare(model=model)
    started = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model").double()
    number = model.config.num_register_tokens + 3
    assert started.config.num_register_tokens == number and started.config.num_gated_registers == 3
    images, model = torch.randn(2, 3, 32, 48, dtype=torch.float64), model.double()
    for name in ("cls_token", "patch_tokens"):
        torch.testing.assert_close(started(images)[name], model(images)[name], rtol=0, atol=1e-6)
    # The recipe alone makes the same architecture again, as a run that continues does.
    config, own = make_config(recipe).to_dict(), started.config.to_dict()
    differing = {name for name in own if config.get(name) != own[name]}
    assert differing <= {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "projection_size",
        "transformers_version",
    }


def test_what_the_recipe_takes_from_the_model(prepare, tmp_path):
    recipe = prepare()
    settings = recipe.settings
    assert settings["layer"] == 4 and settings["first_layer"] == 1 and settings["threshold"] > 5
    assert recipe.crops.global_size == 32 and recipe.num_register_tokens == 5
    assert settings["teacher"] == str(tmp_path / "run" / "start" / "teacher")
    objective = make_objective(recipe, init=tmp_path / "run" / "start" / "model")
    losses = objective({"global_views": torch.randn(1, 4, 3, 32, 32)}, step=0)
    assert losses["gate"].item() == pytest.approx(1e-8)


def test_appended_registers_start_from_the_patches_that_become_outliers(prepare, tmp_path):
    prepare()
    started = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    new = started.embeddings.register_tokens.weight[2:]
    white = started.embeddings(torch.full((1, 3, 32, 32), 2.5))[0, -16:]
    assert torch.cosine_similarity(new[:, None], white, dim=-1).amax(dim=1).min() > 0.8
    assert torch.cdist(new, new).add(torch.eye(3)).min() > 0  # distinct


@pytest.mark.parametrize("method", ["distill", "refine"])
def test_other_methods_start_from_fresh_registers(prepare, method, tmp_path):
    prepare(method)
    started = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    assert (
        started.config.num_gated_registers == {"distill": 0, "refine": 3}[method]
        and started.config.num_register_tokens == 5
    )
    spread = started.embeddings.register_tokens.weight[2:].std().item()
    assert spread == pytest.approx({"distill": 32**-0.5, "refine": 0.02}[method], rel=0.3)


def test_a_ring_needs_no_registers(prepare, tmp_path):
    prepare("refine", recipe=_recipe("refine", registers="ring"))
    started = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    assert started.config.num_register_tokens == 2


def test_new_registers_stand_behind_those_of_their_kind(tiny):
    model = ViTWithRegistersModel(
        tiny(num_register_tokens=3, num_gated_registers=1, num_test_time_registers=1, register_neurons={1: [0]})
    )
    torch.nn.init.constant_(model.layers[0].attention.register_gates, 0.5)
    own, gated, last = model.embeddings.register_tokens.weight
    new = torch.arange(64.0).reshape(2, 32)
    plain, more = (add_registers(model, new, is_gated=is_gated) for is_gated in (False, True))
    assert torch.equal(plain.embeddings.register_tokens.weight, torch.stack([own, *new, gated, last]))
    assert torch.equal(more.embeddings.register_tokens.weight, torch.stack([own, gated, *new, last]))
    assert more.layers[0].attention.register_gates[0].tolist() == pytest.approx([0.5, 1e-8, 1e-8])


def test_means_of_clusters():
    points = torch.tensor([[0.0, 0.0], [0.2, 0.0], [9.0, 9.0], [9.0, 8.0]])
    means = cluster_means(points, 2)
    assert sorted(map(tuple, means.tolist())) == [pytest.approx((0.1, 0.0)), pytest.approx((9.0, 8.5))]
    assert torch.cdist(*[cluster_means(points[:1], 3)] * 2).add(torch.eye(3)).min() > 0  # fewer points than means


def test_a_head_comes_back_around_the_trained_tower(tiny):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3)).eval()
    tower = add_registers(model.vitreg, torch.randn(2, 32), is_gated=True)
    whole = replace_tower(model, tower)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(whole(images).logits, model(images).logits, rtol=0, atol=1e-5)
    assert whole.config.num_register_tokens == 6 and model.config.num_register_tokens == 4


def _finish(tmp_path, trained, **settings):
    """The end of a run that trained a model."""
    shutil.rmtree(tmp_path / "run" / "model", ignore_errors=True)
    trained.save_pretrained(tmp_path / "run" / "model")
    chosen = RetrofitSettings(**settings)
    return finish_training(tmp_path / "run", tmp_path / "out", images=IMAGES, settings=chosen, command="command")


def test_a_repair_is_written_and_one_that_fails_is_not(prepare, tmp_path):
    prepare()
    with pytest.raises(
        RetrofitError, match=r"with append and 3 registers, outliers change from 12 % to 12 %.*--force"
    ):
        _finish(tmp_path, ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model"))
    assert not (tmp_path / "out").exists()
    repaired = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    torch.nn.init.zeros_(repaired.layers[1].mlp.fc2.weight)  # of the unit that was planted
    report = _finish(tmp_path, repaired)
    assert report.verdict["is_repaired"] and "Repaired: with append and 3 registers" in report.verdict["sentence"]
    assert read_report(tmp_path / "out" / "retrofit.json", kind=RetrofitReport) == report
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_gated_registers == 3


def test_a_second_retrofit_needs_force(prepare, tmp_path):
    prepare()
    once = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RetrofitError, match="retrofitted already: 3 registers were appended"):
        prepare(model=once)
    assert not (tmp_path / "run").exists()
    prepare(model=once, force=True)
    twice = ViTWithRegistersModel.from_pretrained(tmp_path / "run" / "start" / "model")
    assert twice.config.num_gated_registers == 6


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"model": plain_model}, NothingToRepair, "no layer has outliers"),
        ({"images": IMAGES[:15]}, RetrofitError, "expected 16 images or more, got 15"),
        ({"model": lambda: planted_model(layer=2, magnitude=60.0, image_size=[32, 64])}, RetrofitError, "32 x 64"),
        ({"recipe": _recipe("distill")}, ValueError, "trains the objective 'append_registers', the recipe has 'dis"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(prepare, words, error, message, tmp_path):
    words = words | ({"model": words["model"]()} if "model" in words else {})
    with pytest.raises(error, match=message):
        prepare(**words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_method_is_not_continued(prepare):
    prepare("append")
    with pytest.raises(RetrofitError, match="holds a run of method 'append'"):
        prepare("refine")


# The program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / "images" / f"{number:02}.png")
    recipe = read_recipe(RECIPES / "retrofit-append-cpu.yaml").with_changes(
        {"num_steps": 6, "batch_size": 4, "settings.num_copies": 2, "settings.lora_rank": 2}
    )
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.as_dict()))
    return tmp_path


OPTIONS = ("--init", "model", "--data", "images", "--method", "append", "--num-eval-images", "8", "--force")


def test_a_killed_run_of_the_program_goes_on_with_the_same_bits(folder):
    training_program.run("retrofit.py", folder, *OPTIONS, output="whole")
    process = training_program.start("retrofit.py", folder, *OPTIONS, output="killed")
    while not (folder / "killed-training" / "state" / "LAST").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(training_program.losses_of(folder / "killed-training")) < 6 and not (folder / "killed").exists()
    training_program.run("retrofit.py", folder, *OPTIONS, output="killed")
    losses = [training_program.losses_of(folder / f"{name}-training") for name in ("killed", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = (ViTWithRegistersModel.from_pretrained(folder / name).state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_report(folder / "whole" / "retrofit.json", kind=RetrofitReport).method == "append"


def test_the_verb_runs_the_program_and_an_output_that_is_not_empty_is_kept(folder, monkeypatch):
    monkeypatch.chdir(folder)
    called = []
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: called.append(command) or type("R", (), {"returncode": 3})
    )
    verb = ["retrofit", "model", "out", "--images", "images", "--method", "append", "--set", "num_steps=2", "--force"]
    assert CliRunner().invoke(app, verb).exit_code == 3
    (command,) = called
    assert command[1].endswith("examples/retrofit.py") and {"--init=model", "--set=num_steps=2"} <= set(command)
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, verb)
    assert result.exit_code == 1 and "not empty" in result.output and len(called) == 1
    refused = CliRunner().invoke(app, ["retrofit", "model", "new", "--images", "images", "--recipe", "x"])
    assert refused.exit_code == 1 and "--recipe is for methods that train" in refused.output

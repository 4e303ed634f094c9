"""Runs that start from another library's model, which is converted into the folder of the run."""

import argparse
import json
import pathlib
import shutil
import sys

import official_layouts
import pytest
import torch
import training_program
import yaml
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.cards.facts import collect_facts


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
RECIPE = {
    "objective": "mae",
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14},
    "num_register_tokens": 4,
    "masks": {"kind": "random", "ratio": [0.75, 0.75], "share": 1},
    "crops": {"global_size": 28, "num_global": 1, "num_local": 0},
    "settings": {"decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2},
    "num_steps": 2,
    "batch_size": 4,
}
USUAL = ("--data", "scenes", "--num-scenes", "16", "--num-eval-images", "8")


def _save_dinov2(path):
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(path)


def _save_registers(path):
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES)).save_pretrained(path)


def _save_vit(path):
    ViTModel(ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False).save_pretrained(path)


def _save_clip(path):
    CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)).save_pretrained(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_starts_from_a_folder_of_transformers_and_its_card_names_it(folder):
    _save_dinov2(folder / "dinov2-small")
    screen = training_program.run("pretrain.py", folder, *USUAL, "--init", "dinov2-small", output="run")
    assert "dinov2-small was converted into run/init" in screen and "largest error of a token" in screen
    weights = load_file(folder / "run" / "init" / "model.safetensors")
    theirs = load_file(folder / "dinov2-small" / "model.safetensors")
    assert torch.equal(weights["embeddings.cls_token"], theirs["embeddings.cls_token"])
    assert ViTWithRegistersModel.from_pretrained(folder / "run" / "model").config.num_register_tokens == 4
    training = json.loads((folder / "run" / "training.json").read_text())
    assert pathlib.Path(training["init"]) == folder / "dinov2-small"
    parent = collect_facts(folder / "run").parent
    assert (parent.name, parent.relation) == ("dinov2-small", "finetune")


def test_a_run_goes_on_with_the_architecture_it_started_from_even_when_that_model_is_gone(folder):
    _save_dinov2(folder / "other")  # with layer scale, which the recipe does not have
    options = (*USUAL, "--init", "other", "--set", "num_steps=6")
    training_program.run("pretrain.py", folder, *options, output="whole")
    (folder / "other").rename(folder / "moved")
    shutil.rmtree(folder / "whole" / "init")
    shutil.copytree(folder / "whole", folder / "killed")
    last = folder / "killed" / "state"
    shutil.rmtree(last / (last / "LAST").read_text().strip())
    assert "continuing after step 3 of 6" in training_program.run("pretrain.py", folder, *options, output="killed")
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert "layers.0.layer_scale1.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _run(folder, init: str):
    """What `convert_init` of the training programs returns."""
    import arguments

    says = []
    run = argparse.Namespace(
        options=argparse.Namespace(init=init), folder=folder / "run", say=says.append, from_main=lambda make: make()
    )
    return arguments.convert_init(run), says


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(training_program.EXAMPLES)
    yield
    sys.modules.pop("arguments", None)


@pytest.mark.parametrize("save", [_save_registers, _save_vit, _save_clip], ids=["registers", "vit", "clip"])
def test_what_convert_can_read_is_converted(folder, programs, save):
    save(folder / "other")
    found, says = _run(folder, "other")
    assert found == str(folder / "run" / "init") and "init: other was converted" in says[0]
    assert ViTWithRegistersModel.from_pretrained(found).config.hidden_size == 32


def test_an_official_file_is_converted_and_what_an_older_attempt_left_is_replaced(folder, programs):
    state = official_layouts.fill(official_layouts.dinov2(384, 1, side=4))
    torch.save(state, folder / "dinov2_tiny.pth")
    (folder / "run" / "init").mkdir(parents=True)
    (folder / "run" / "init" / "config.json").write_text("{}")
    found, says = _run(folder, "dinov2_tiny.pth")
    assert "init: dinov2_tiny.pth was converted" in says[0]
    ours = ViTWithRegistersModel.from_pretrained(found).state_dict()
    assert torch.equal(ours["embeddings.cls_token"], state["cls_token"])


def test_a_model_of_timm_is_converted_under_both_of_its_names(folder, programs, monkeypatch):
    import arguments

    seen = []
    monkeypatch.setattr(arguments, "convert", lambda source, output: seen.append(source) or 1 / 0)
    for name in ("timm/vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"):
        with pytest.raises(ZeroDivisionError):
            _run(folder, name)
    assert seen == ["timm:vit_tiny_patch16_224"] * 2


def test_a_model_of_the_hub_is_downloaded_and_converted(folder, programs, monkeypatch):
    import arguments

    _save_dinov2(folder / "snapshot")
    monkeypatch.setattr(arguments, "is_of_this_family", lambda source: False)  # which asks the Hub
    monkeypatch.setattr(arguments, "snapshot_download", lambda name, allow_patterns: str(folder / "snapshot"))
    found, _ = _run(folder, "facebook/dinov2-small")
    report = json.loads((pathlib.Path(found) / "conversion.json").read_text())
    assert report["source"]["path"] == str(folder / "snapshot")


def test_an_own_model_is_left_where_it_is(folder, programs, tiny):
    ViTWithRegistersModel(tiny()).save_pretrained(folder / "own")
    assert _run(folder, "own") == ("own", [])
    (folder / "own").rename(folder / "model")
    assert _run(folder, str(folder)) == (str(folder), []) and not (folder / "run").exists()


def _save_swin(path):
    SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)).save_pretrained(path)


def _save_damaged(path):
    _save_dinov2(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("save", "init", "words"),
    [
        (_save_swin, "other", "model of type 'swin', which is not a plain Vision Transformer"),
        (_save_damaged, "other", "truncated or not safetensors.*by hand: vitreg convert other other-vitreg"),
        (lambda path: torch.save({"a": torch.zeros(3)}, path), "other", "vitreg convert other other-vitreg"),
        (lambda path: path.mkdir(), "other", "expected one of .* got 0 other checkpoints.*vitreg convert other"),
        (lambda path: None, "none/of/this", "no such file or folder"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_words(folder, programs, save, init, words):
    save(folder / "other")
    with pytest.raises(SystemExit, match=f"(?s)--init: .*{words}"):
        _run(folder, init)
    assert not (folder / "run").exists()

"""Folders of models that are damaged or hostile are refused by `load_encoder` in one error, at once."""

import json
import math
import time

import pytest
import torch
import transformers
from hostile_checkpoints import SIZES
from safetensors.torch import load_file, save_file

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification
from modeling_vitreg.features import load_encoder


@pytest.fixture
def folder(tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def without(*names):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


WEIGHTS = {
    "one tensor missing": (
        without("encoder.layer.0.norm1.weight"),
        r"1 tensors are missing and would be random: encoder.layer.0.norm1.weight: download",
    ),
    "most missing": (
        lambda weights: {"layernorm.weight": weights["layernorm.weight"]},
        r"expected num_hidden_layers|\d+ tensors are missing and would be random: .* more",
    ),
    "integers": (
        lambda weights: {name: (100 * tensor).long() for name, tensor in weights.items()},
        r"\d+ weights are not floating-point numbers \(.*: I64\)",
    ),
    "booleans": (
        lambda weights: {**weights, "layernorm.weight": weights["layernorm.weight"] > 0},
        r"1 weights are not floating-point numbers \(layernorm.weight: BOOL\)",
    ),
    "not finite": (
        lambda weights: {**weights, "layernorm.bias": weights["layernorm.bias"] / 0},
        r"values that are not finite in 1 tensors: layernorm.bias: the file is damaged, or its training diverged",
    ),
    "other shapes": (lambda weights: {name: t[:1].clone() for name, t in weights.items()}, "could not open"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_make_the_model_are_refused(name, folder):
    change, message = WEIGHTS[name]
    change_weights(folder, change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load_encoder(folder)


def test_what_no_feature_depends_on_may_be_missing(folder, tmp_path):
    change_weights(folder, without("embeddings.mask_token"))
    assert load_encoder(folder).family == "dinov2"
    config = transformers.ViTConfig(**SIZES, intermediate_size=48)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")  # has no pooler
    assert load_encoder(tmp_path / "vit").family == "vit"
    ours = ViTWithRegistersForImageClassification(ViTWithRegistersConfig(**SIZES, num_labels=3))
    ours.save_pretrained(tmp_path / "ours")
    assert load_encoder(tmp_path / "ours").num_register_tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**6}, r"config.json: expected num_hidden_layers to be an integer from 1 to 43"),
        ({"hidden_size": 10**12}, r"expected hidden_size to be an integer from 1 to 65,536, got 1000000000000"),
        ({"patch_size": "14"}, r"expected patch_size to be an integer from 1 to 4,096, got '14'"),
        ({"model_type": ["dinov2"]}, r"expected model_type to be a string"),
        ({"architectures": "Dinov2Model"}, r"expected architectures to be a list of class names"),
        ({"model_type": "no_such"}, r"could not open .* `no_such`"),
        ({"hidden_act": "no_such"}, r"could not open"),
    ],
)
def test_settings_out_of_proportion_are_refused_before_a_model_is_built(changes, message, folder):
    change_config(folder, **changes)
    start = time.perf_counter()
    with pytest.raises((ValueError, RuntimeError), match=message):
        load_encoder(folder)
    assert time.perf_counter() - start < 20


def test_code_of_a_folder_is_not_run_without_the_option_that_allows_it(folder):
    change_config(folder, model_type="no_such", auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"contains its own code: read it, then run it with --trust-remote-code"):
        load_encoder(folder)


@pytest.mark.parametrize(
    "mean", ["x", [math.nan] * 3, [math.inf, 0, 0], [], [True] * 3, [0.5] * 2, {"a": 1}, [0.5, "0.5", 0.5]]
)
def test_statistics_that_are_no_numbers_are_refused(mean, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [1, 1, 1]}))
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json has image_mean .* expected a finite number, or one"
    ):
        load_encoder(folder)


@pytest.mark.parametrize("text", ["[1]", "7", "{", "[" * 100_000, '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_object_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: (is not valid JSON|expected a JSON object)"):
        load_encoder(folder)


def test_a_map_of_weights_does_not_lead_out_of_the_folder(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the weight map leads out of its folder"):
        load_encoder(folder)


def test_an_index_beside_whole_weights_is_not_read(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert load_encoder(folder).family == "dinov2"


def test_a_file_of_weights_and_a_path_that_does_not_exist_are_answered_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("asked transformers"))
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"a.pth is a file of weights: convert it first, with: vitreg convert"):
        load_encoder(tmp_path / "a.pth")
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./no/such", "photos2", "/no/such", "outputs/typo", "~/model", "a/b/c", "owner/model.pth"):
        with pytest.raises(RuntimeError, match=r"could not open .*: no such folder, and not OWNER/NAME on the Hub"):
            load_encoder(name)

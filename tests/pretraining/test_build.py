"""What a run may start from, and what it says of everything else."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel

from modeling_vitreg import MambaRModel, ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.run.recipe import make_recipe


MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
RECIPE = {
    "objective": "mae",
    "model": MODEL,
    "masks": {"kind": "random", "ratio": [0.75, 0.75], "share": 1},
    "crops": {"global_size": 32, "num_global": 1, "num_local": 0},
    "settings": {"decoder_width": 32, "decoder_layers": 1, "decoder_heads": 2},
    "num_steps": 10,
    "batch_size": 4,
}


@pytest.fixture
def recipe():
    return make_recipe(RECIPE)


@pytest.fixture
def saved(tiny, tmp_path):
    ViTWithRegistersModel(tiny(num_register_tokens=4)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_run_starts_from_a_model_and_from_one_with_a_head(recipe, tiny, saved, tmp_path):
    ViTWithRegistersForImageClassification(tiny(num_register_tokens=4)).save_pretrained(tmp_path / "classifier")
    for folder in (saved, tmp_path / "classifier"):
        backbone = make_objective(recipe, init=folder).encoder
        assert backbone.config.num_hidden_layers == 3


def test_a_mamba_is_trained_with_labels_only_and_goes_on_from_a_smaller_size(tmp_path):
    model = {"model_type": "vitreg_mamba", "hidden_size": 32, "num_hidden_layers": 2, "patch_size": 8}
    fields = {**RECIPE, "objective": "classify", "settings": {"class_names": ["cat", "dog"]}, "model": model}
    fields.pop("masks")
    first = make_objective(make_recipe({**fields, "num_register_tokens": 3}))
    assert type(first.encoder) is MambaRModel and first.encoder.config.num_register_tokens == 3
    first.write(first.saved, tmp_path / "first")
    fields["crops"] = {**RECIPE["crops"], "global_size": 48}
    second = make_objective(make_recipe({**fields, "num_register_tokens": 3}), init=tmp_path / "first").encoder
    assert second.config.image_size == 48 and second.embeddings.position_embeddings.weight.shape == (1, 36, 32)
    assert torch.equal(second.layers[1].mixer.out_proj.weight, first.encoder.layers[1].mixer.out_proj.weight)
    with pytest.raises(ValueError, match="all of which the classifier reads, got 4"):
        make_objective(make_recipe({**fields, "num_register_tokens": 4}), init=tmp_path / "first")
    with pytest.raises(ValueError, match="objective mae trains models of type vitreg, got vitreg_mamba: choose"):
        make_objective(make_recipe({**RECIPE, "model": model, "num_register_tokens": 3}))
    with pytest.raises(
        ValueError, match="expected a model_type out of vitreg, vitreg_mamba, vitreg_hat, got 'resnet'"
    ):
        make_objective(make_recipe({**fields, "model": {"model_type": "resnet"}}))


def _save_dinov2(folder):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)


def _save_swin(folder):
    SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)).save_pretrained(folder)


def _save_file(path):
    torch.save({"cls_token": torch.zeros(1, 1, 4)}, path)


def _save_images(folder):
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / "a.png")


@pytest.mark.parametrize(
    ("save", "name", "words"),
    [
        (_save_dinov2, "other", "model of type dinov2: convert it first, with: vitreg convert"),
        (_save_swin, "other", "model of type 'swin', which is not a plain Vision Transformer"),
        (_save_file, "other.pth", "file of weights: convert it first, with: vitreg convert"),
        (_save_images, "other", "has no config.json"),
        (lambda path: None, "none/of/this", "no such file or folder"),
    ],
)
def test_a_model_of_another_library_is_refused_with_the_command_that_converts_it(
    recipe, tmp_path, monkeypatch, save, name, words
):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / name)
    with pytest.raises(ValueError, match=f"init: {name}.*{words}"):
        make_objective(recipe, init=name)


@pytest.mark.parametrize("reduction", [{"kind": "merge", "per_layer": 2}, {"kind": "learn"}])
def test_a_model_with_fewer_tokens_is_refused_by_an_objective_that_needs_all(reduction, recipe, tiny, tmp_path):
    ViTWithRegistersModel(tiny(token_reduction=reduction)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"needs all patches, and the model has token_reduction=.*train with classify"
    ):
        make_objective(recipe, init=tmp_path)


def test_missing_tensors_are_listed(recipe, saved):
    weights = load_file(saved / "model.safetensors")
    lost = [name for name in weights if name.startswith("layers.1.mlp")]
    save_file(
        {name: weights[name] for name in weights.keys() - set(lost)}, saved / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        ValueError, match=f"lacks {len(lost)} tensors, which would be random: {', '.join(sorted(lost))}"
    ):
        make_objective(recipe, init=saved)


def test_a_damaged_model_is_named(recipe, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"init: .*saved cannot be loaded"):
        make_objective(recipe, init=saved)


def test_sizes_that_contradict_the_configuration_are_named(recipe, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 16}))
    with pytest.raises(ValueError, match=r"init: .*saved cannot be loaded"):
        make_objective(recipe, init=saved)


def test_a_new_mask_token_is_not_missed(saved):
    simmim = make_recipe({**RECIPE, "objective": "simmim", "settings": {}})
    assert make_objective(simmim, init=saved).encoder.config.has_mask_token

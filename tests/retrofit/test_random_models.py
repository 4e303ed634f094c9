"""Retrofitted models of all families, drawn at random: the analysis runs, and sees the registers that were added."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import load_encoder
from modeling_vitreg.retrofit.register_neurons import add_test_time_register


FAMILIES = {
    "vit": {},
    "deit": {"has_distillation_token": True},
    "deit3": {"layer_scale_init_value": 0.1},
    "dino": {"patch_size": 4},
    "dinov2": {"layer_scale_init_value": 1.0},
    "dinov2 swiglu": {"layer_scale_init_value": 1.0, "hidden_act": "swiglu"},
    "dinov3": {"position_embedding_type": "rope", "has_key_bias": False, "layer_scale_init_value": 1.0},
    "mae": {"position_embedding_type": "sincos", "pooling": "mean"},
    "capi": {"position_embedding_type": "rope", "hidden_act": "swiglu"},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu"},
    "no class token": {"has_cls_token": False, "pooling": "mean"},
}
SETTINGS = SurveySettings(num_images=4, batch_size=3, num_ablation_images=2, has_progress_bar=False, is_strict=True)


def _retrofitted(seed: int) -> tuple[ViTWithRegistersModel, int]:
    """A random model with test-time registers, and how many registers it has in all."""
    draw = random.Random(seed)
    name = list(FAMILIES)[seed % len(FAMILIES)]
    heads, depth, own = draw.choice([1, 2, 3]), draw.randint(1, 4), draw.choice([0, 1, 4])
    sizes = {"hidden_size": 8 * heads, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": 8}
    sizes |= {"image_size": draw.choice([16, 32]), "num_register_tokens": own, "initializer_range": 0.3}
    torch.manual_seed(seed)
    model = ViTWithRegistersModel(ViTWithRegistersConfig(**sizes | FAMILIES[name])).eval()
    units = {
        layer: draw.sample(range(model.config.intermediate_size), draw.randint(1, 9))
        for layer in draw.sample(range(1, depth + 1), draw.randint(1, depth))
    }
    added = draw.choice([1, 2])
    return add_test_time_register(model, units, num_registers=added), own + added


def _check(seed: int) -> None:
    model, num_registers = _retrofitted(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 40, 56, 3)).astype(np.uint8)
    report, examples = survey(load_encoder(model), [Image.fromarray(image) for image in pixels], settings=SETTINGS)
    assert len(report.layers) == model.config.num_hidden_layers and report.images["num_nonfinite"] == 0
    assert report.architecture["num_register_tokens"] == num_registers == model.config.num_register_tokens
    registers = [query for query in report.attention["queries"] if query.startswith("register")]
    assert len(registers) == num_registers == len(report.attention["registers"]["similarity"])
    assert "skipped" not in report.ablation and set(registers) <= set(examples.attention)


@pytest.mark.parametrize("seed", range(len(FAMILIES)))
def test_a_retrofitted_random_model_is_analysed(seed):
    _check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(FAMILIES), 100 + len(FAMILIES)))
def test_a_hundred_more_are_analysed(seed):
    _check(seed)


@pytest.mark.parametrize("seed", [2, 6, 9])
def test_it_is_the_same_after_saving(seed, tmp_path):
    model, _ = _retrofitted(seed)
    model.save_pretrained(tmp_path)
    loaded, images = AutoModel.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 24, 32)
    assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)

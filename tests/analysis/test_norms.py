"""Norms of tokens layer by layer, and what counts as an outlier."""

import json

import pytest
import torch

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.analysis import TokenNorms, outlier_share, outlier_threshold, summarise_norms, token_norms


@pytest.fixture
def model(tiny, randomise):
    return randomise(ViTWithRegistersModel(tiny(num_register_tokens=2)))


def test_norms_are_those_of_every_layers_output_before_the_final_norm(model):
    images = torch.rand(2, 3, 32, 24)
    outputs = []
    hooks = [layer.register_forward_hook(lambda *arguments: outputs.append(arguments[2])) for layer in model.layers]
    norms = token_norms(model, images)
    for hook in hooks:
        hook.remove()
    expected = torch.stack(outputs).square().sum(dim=-1).sqrt()  # [L, B, N]: class token, 2 registers, 12 patches
    assert norms.patches.shape == (3, 2, 12)
    torch.testing.assert_close(norms.cls, expected[:, :, 0])
    torch.testing.assert_close(norms.registers, expected[:, :, 1:3])
    torch.testing.assert_close(norms.patches, expected[:, :, 3:])
    last = model(images, output_pre_norm=True).pre_norm.patch_tokens
    torch.testing.assert_close(norms.patches[-1], last.norm(dim=-1))


@pytest.mark.parametrize("has_distillation_token", [False, True])
@pytest.mark.parametrize("has_cls_token, num_register_tokens", [(True, 0), (False, 3), (False, 0)])
def test_kinds_of_tokens_that_a_model_lacks_are_none(tiny, has_cls_token, num_register_tokens, has_distillation_token):
    config = tiny(
        has_cls_token=has_cls_token,
        num_register_tokens=num_register_tokens,
        has_distillation_token=has_distillation_token and has_cls_token,
        pooling="cls" if has_cls_token else "mean",
    )
    norms = token_norms(ViTWithRegistersModel(config), torch.rand(1, 3, 32, 32))
    assert norms.patches.shape == (3, 1, 16)
    assert (norms.cls is not None) == has_cls_token
    assert (norms.registers is not None) == bool(num_register_tokens)


def test_every_module_returns_to_its_mode_and_no_gradient_is_recorded(tiny):
    model = ViTWithRegistersForImageClassification(tiny(hidden_dropout_prob=0.5, num_labels=3)).train()
    frozen = model.vitreg.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    images = torch.rand(1, 3, 32, 32)
    first, second = token_norms(model, images), token_norms(model, images)
    torch.testing.assert_close(first.patches, second.patches, rtol=0, atol=0)  # without dropout
    assert not first.patches.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.training and not frozen.training
    with pytest.raises(ValueError, match="does not fit patches"):
        token_norms(model, torch.rand(1, 3, 33, 32))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_norms_of_half_precision_are_float32_and_do_not_overflow(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny())).half()
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.fill_(300.0)
    norms = token_norms(model, torch.rand(1, 3, 32, 32))
    assert norms.patches.dtype == torch.float32
    assert norms.patches.isfinite().all() and norms.patches.max() > 1000


def test_planted_outliers_are_found_and_nothing_else():
    patches = torch.rand(4, 64) + 10
    planted = torch.zeros(4, 64, dtype=torch.bool)
    planted[0, 3] = planted[2, 60] = planted[3, :5] = True
    patches = torch.where(planted, patches * 20, patches)
    threshold = outlier_threshold(patches)
    assert ((patches > threshold) == planted).all()
    assert outlier_share(patches, threshold=threshold) == 7 / 256


def test_the_threshold_does_not_move_with_the_outliers_that_it_is_meant_to_find():
    normal = torch.linspace(9, 11, 100)
    spoiled = normal.clone()
    spoiled[60:] = 1e4
    assert outlier_threshold(normal) == pytest.approx(30, rel=1e-6)
    assert outlier_threshold(spoiled) == pytest.approx(30, rel=1e-6)
    assert outlier_share(spoiled, threshold=outlier_threshold(spoiled)) == 0.4
    assert outlier_share(normal, threshold=outlier_threshold(normal)) == 0  # a percentile would find some
    assert outlier_threshold(normal, multiple=5.0) == pytest.approx(50, rel=1e-6)


def test_a_norm_at_the_threshold_is_no_outlier():
    assert outlier_share(torch.tensor([1.0, 2, 3, 3.1]), threshold=3.0) == 0.25


def test_the_summary_has_the_numbers_of_each_layer_and_survives_json():
    patches = torch.arange(1.0, 102).repeat(2, 1, 1)  # 2 layers, one image, 101 patches of norms 1 to 101
    patches[1] += 99
    norms = TokenNorms(patches, registers=torch.tensor([[[5.0, 7.0]], [[6.0, 8.0]]]), cls=torch.tensor([[2.0], [3.0]]))
    summary = summarise_norms(norms)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["num_images"], summary["num_patches"], summary["multiple"]) == (1, 101, 3.0)
    first, second = summary["layers"]
    assert first == {
        "layer": 1,
        "median": 51.0,
        "q90": pytest.approx(91),
        "q99": pytest.approx(100),
        "max": 101.0,
        "max_over_median": pytest.approx(101 / 51),
        "outlier_share": 0.0,
        "cls": 2.0,
        "registers": [5.0, 7.0],
    }
    assert (second["layer"], second["median"], second["cls"], second["registers"]) == (2, 150.0, 3.0, [6.0, 8.0])


def test_the_share_in_the_summary_is_of_each_layers_own_median():
    patches = torch.ones(2, 2, 50)
    patches[0] *= 100  # would all be outliers by the median of both layers
    patches[1, 0, :5] = 4
    summary = summarise_norms(TokenNorms(patches))
    assert [layer["outlier_share"] for layer in summary["layers"]] == [0, 0.05]
    assert summary["layers"][0]["cls"] is None and summary["layers"][0]["registers"] == []


def test_the_summary_of_a_model_has_one_entry_a_layer(model):
    summary = summarise_norms(token_norms(model, torch.rand(2, 3, 32, 32)))
    assert [layer["layer"] for layer in summary["layers"]] == [1, 2, 3]
    assert all(len(layer["registers"]) == 2 for layer in summary["layers"])


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"multiple of the median above 1, got 0\.5"):
        outlier_threshold(torch.ones(3), multiple=0.5)
    with pytest.raises(ValueError, match=r"finite norms of at least one patch, got shape \(0,\)"):
        outlier_threshold(torch.ones(0))
    with pytest.raises(ValueError, match="median norm above 0"):
        outlier_threshold(torch.zeros(3))
    with pytest.raises(ValueError, match="threshold above 0, got -1"):
        outlier_share(torch.ones(3), threshold=-1)
    with pytest.raises(ValueError, match="at least one patch"):
        outlier_share(torch.ones(0), threshold=1.0)
    patches = torch.ones(3, 1, 4)
    patches[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer 2: .* with 1 that are not finite"):
        summarise_norms(TokenNorms(patches))

"""Schedules, groups of parameters and rates, against the numbers of DINOv2's default recipe."""

import math
import re

import pytest
import torch
import transformers

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.objectives.heads import PrototypeHead
from modeling_vitreg.pretraining.run.parameters import (
    is_decayed,
    learning_rate_multiplier,
    parameter_groups,
    set_rates,
)
from modeling_vitreg.pretraining.run.recipe import make_recipe
from modeling_vitreg.pretraining.run.schedules import cosine, linear, scale_learning_rate


NUM_STEPS, NUM_WARMUP, NUM_COLD = 125_000, 12_500, 37_500

# step: learning rate, weight decay, momentum, temperature of the teacher; 100 epochs of 1250 steps at batch 1024.
DINOV2 = {
    0: (0.0, 0.040000, 0.992000, 0.040000),
    1: (3.200256e-07, 0.040000, 0.992000, 0.040001),
    6250: (2.000160e-03, 0.042216, 0.992049, 0.045000),
    12499: (4.000000e-03, 0.048808, 0.992196, 0.049999),
    12500: (4.000000e-03, 0.048810, 0.992196, 0.050000),
    68750: (2.000500e-03, 0.248158, 0.996626, 0.070000),
    124999: (1.000001e-06, 0.400000, 1.000000, 0.070000),
    125000: (1.000000e-06, 0.400000, 1.000000, 0.070000),
}


@pytest.mark.parametrize("step", DINOV2)
def test_schedules_have_the_values_of_dinov2(step):
    learning_rate, weight_decay, momentum, temperature = DINOV2[step]
    found = cosine(step, base=4e-3, final=1e-6, num_steps=NUM_STEPS, num_warmup=NUM_WARMUP)
    assert found == pytest.approx(learning_rate, rel=5e-7, abs=1e-12)
    assert cosine(step, base=0.04, final=0.4, num_steps=NUM_STEPS) == pytest.approx(weight_decay, abs=6e-7)
    assert cosine(step, base=0.992, final=1.0, num_steps=NUM_STEPS) == pytest.approx(momentum, abs=6e-7)
    assert linear(step, start=0.04, final=0.07, num_steps=NUM_COLD) == pytest.approx(temperature, abs=6e-7)


def test_the_warm_up_reaches_the_base_at_its_last_step_and_is_a_straight_line():
    values = [cosine(step, base=1.0, final=0.0, num_steps=20, num_warmup=5, start=0.2) for step in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("num_warmup", [0, 1])
def test_a_warm_up_of_no_or_one_step_starts_at_the_base(num_warmup):
    assert cosine(0, base=0.5, final=0.0, num_steps=10, num_warmup=num_warmup) == 0.5


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    values = [cosine(step, base=1.0, final=0.1, num_steps=4, num_warmup=4) for step in range(6)]
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.1, 0.1])


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup_ratio", "decay_ratio"), [(0.1, 0.3), (0.0, 0.0), (0.5, 0.5), (0.26, 1 / 3)])
def test_warm_up_stable_decay_has_the_values_of_transformers(shape, warmup_ratio, decay_ratio):
    words = {"schedule": "wsd", "warmup_ratio": warmup_ratio, "decay_ratio": decay_ratio, "decay_shape": shape}
    words |= {"num_steps": 40, "learning_rate": 2.0, "learning_rate_rule": "none", "min_learning_rate": 0.25}
    recipe = make_recipe(words)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    counts = {"num_warmup_steps": int(warmup_ratio * 40), "num_decay_steps": int(decay_ratio * 40)}
    scheduler = transformers.get_wsd_schedule(
        optimizer, **counts, num_training_steps=40, decay_type=shape, min_lr_ratio=0.125
    )
    for step in range(43):
        assert recipe.rates(step)["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_before_its_decay_a_wsd_schedule_does_not_know_the_length_of_the_run():
    short, long = (
        make_recipe({"schedule": "wsd", "num_steps": number, "warmup_ratio": 4 / number, "decay_ratio": 0.2})
        for number in (40, 80)
    )
    rates = [[recipe.rates(step)["learning_rate"] for step in range(34)] for recipe in (short, long)]
    assert rates[0][:32] == rates[1][:32] and rates[0][33] < rates[1][33]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "step"}, "recipe: expected schedule to be one of cosine, wsd, got 'step'"),
        ({"decay_shape": "sqrt"}, "recipe: expected decay_shape to be one of linear, cosine, 1-sqrt, got 'sqrt'"),
        (
            {"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6},
            "recipe: warmup_ratio 0.5 and decay_ratio 0.6 are more than all steps",
        ),
    ],
)
def test_schedules_that_do_not_exist_or_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(values)


def test_a_line_of_no_or_one_step_is_at_its_end():
    assert [linear(step, start=0.1, final=0.3, num_steps=number) for number in (0, 1) for step in (0, 1)] == [0.3] * 4
    assert [linear(step, start=0.0, final=1.0, num_steps=3) for step in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(64, 1.0e-3), (512, 2.828e-3), (1024, 4.0e-3), (2048, 5.657e-3), (3072, 6.928e-3)]
)
def test_the_learning_rate_grows_with_the_root_of_the_batch(batch_size, expected):
    assert scale_learning_rate(4e-3, batch_size=batch_size, rule="sqrt1024") == pytest.approx(expected, abs=5e-7)


def test_other_rules_of_the_learning_rate():
    assert scale_learning_rate(2e-4, batch_size=3072, rule="sqrt1024") == pytest.approx(3.464e-4, abs=5e-8)
    assert scale_learning_rate(1.5e-4, batch_size=4096, rule="linear256") == pytest.approx(2.4e-3)
    assert scale_learning_rate(1.5e-4, batch_size=4096, rule="none") == 1.5e-4
    with pytest.raises(ValueError, match=r"sqrt1024, linear256, none.*'sqrt'"):
        scale_learning_rate(1.0, batch_size=1, rule="sqrt")


# Parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "name", "expected"),
    [
        (24, "embeddings.cls_token", 0.071790),
        (24, "embeddings.register_tokens.weight", 0.071790),
        (24, "embeddings.position_embeddings.weight", 0.071790),
        (24, "embeddings.mask_token", 0.071790),
        (24, "embeddings.patch_embeddings.weight", 0.071790 * 0.2),
        (24, "embeddings.patch_embeddings.bias", 0.071790 * 0.2),
        (24, "pre_layernorm.weight", 0.071790),
        (24, "layers.0.norm1.weight", 0.079766),
        (24, "layers.11.attention.qkv.weight", 0.254187),
        (24, "layers.23.mlp.fc2.bias", 0.9),
        (24, "layernorm.weight", 1.0),
        (12, "embeddings.register_tokens.weight", 0.254187),
        (12, "layers.0.mlp.fc1.weight", 0.282430),
        (12, "layers.11.mlp.fc1.weight", 0.9),
    ],
)
def test_the_learning_rate_falls_layer_by_layer_as_in_dinov2(num_layers, name, expected):
    found = learning_rate_multiplier(name, num_layers=num_layers, layer_decay=0.9, patch_multiplier=0.2)
    assert found == pytest.approx(expected, rel=1e-5)


def _groups(tiny, **changes):
    backbone = ViTWithRegistersModel(tiny(has_mask_token=True, layer_scale_init_value=0.1, has_pre_norm=True))
    head = PrototypeHead(32, num_prototypes=16, hidden_width=24, bottleneck_width=8)
    names = {parameter: f"backbone.{name}" for name, parameter in backbone.named_parameters()}
    names |= {parameter: f"head.{name}" for name, parameter in head.named_parameters()}
    values = {"layer_decay": 0.5, "patch_multiplier": 0.2, **changes}
    return parameter_groups(backbone, [head], **values), names


def _by_name(groups, names, key: str) -> dict:
    return {names[parameter]: group[key] for group in groups for parameter in group["params"]}


def test_every_parameter_is_in_one_group(tiny):
    groups, names = _groups(tiny)
    assert sorted(names[parameter] for group in groups for parameter in group["params"]) == sorted(names.values())
    kinds = [tuple(value for key, value in group.items() if key != "params") for group in groups]
    assert len(set(kinds)) == len(kinds)


def test_weight_decay_spares_biases_norms_and_layer_scale_and_tokens_if_asked(tiny):
    groups, names = _groups(tiny)
    decays = _by_name(groups, names, "weight_decay_multiplier")
    spared = {name for name, multiplier in decays.items() if multiplier == 0}
    assert set(decays.values()) == {0.0, 1.0}
    expected = {name for name, p in zip(names.values(), names) if p.ndim == 1}  # biases, norms and scales are vectors
    assert spared == expected
    assert "backbone.layers.0.layer_scale1.weight" in spared
    assert "backbone.pre_layernorm.weight" in spared
    assert "head.last_layer.magnitude" not in spared

    groups, names = _groups(tiny, decays_tokens=False)
    decays = _by_name(groups, names, "weight_decay_multiplier")
    tokens = {"cls_token", "mask_token", "register_tokens.weight", "position_embeddings.weight"}
    assert {name for name in decays if decays[name] == 0} - spared == {
        f"backbone.embeddings.{name}" for name in tokens
    }


def test_tokens_that_do_not_decay_are_those_that_the_model_names(tiny):
    model = ViTWithRegistersModel(tiny(has_mask_token=True, has_distillation_token=True))
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert {name for name in matrices if not is_decayed(name, decays_tokens=False)} == model.no_weight_decay()


def test_registers_learn_with_the_embeddings_and_heads_at_the_full_rate(tiny):
    groups, names = _groups(tiny)
    rates = _by_name(groups, names, "lr_multiplier")
    embedded = 0.5**4  # three layers and the final norm above
    assert rates["backbone.embeddings.register_tokens.weight"] == embedded
    assert rates["backbone.embeddings.patch_embeddings.weight"] == pytest.approx(0.2 * embedded)
    assert [rates[f"backbone.layers.{layer}.norm1.weight"] for layer in range(3)] == [0.125, 0.25, 0.5]
    assert rates["backbone.layernorm.weight"] == 1
    assert {rate for name, rate in rates.items() if name.startswith("head.")} == {1.0}


def test_only_the_prototypes_are_a_last_layer(tiny):
    groups, names = _groups(tiny)
    is_last = _by_name(groups, names, "is_last_layer")
    assert {name for name in is_last if is_last[name]} == {"head.last_layer.magnitude", "head.last_layer.direction"}


def test_parameters_without_gradient_are_in_no_group(tiny):
    model = ViTWithRegistersModel(tiny())
    model.embeddings.requires_grad_(False)
    found = {parameter for group in parameter_groups(model) for parameter in group["params"]}
    assert found == {parameter for parameter in model.parameters() if parameter.requires_grad}


def test_rates_reach_the_groups_and_freeze_the_last_layer(tiny):
    groups, names = _groups(tiny)
    optimizer = torch.optim.AdamW(groups)
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.3, is_last_layer_frozen=True)
    rates, decays = (_by_name(optimizer.param_groups, names, key) for key in ("lr", "weight_decay"))
    assert rates["head.last_layer.direction"] == rates["head.last_layer.magnitude"] == 0
    assert rates["head.mlp.0.weight"] == 0.1
    assert rates["backbone.layers.2.norm1.weight"] == pytest.approx(0.05)
    assert decays["backbone.layers.2.norm1.weight"] == 0
    assert decays["backbone.layers.2.mlp.fc1.weight"] == 0.3
    set_rates(optimizer, learning_rate=0.2, weight_decay=0.3)
    assert _by_name(optimizer.param_groups, names, "lr")["head.last_layer.direction"] == 0.2
    assert all(math.isfinite(group["lr"]) for group in optimizer.param_groups)

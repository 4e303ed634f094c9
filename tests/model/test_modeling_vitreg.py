"""The model: tokens by name, registers, positions, masks, initial values, and what it says to bad input."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForMaskedImageModeling,
    ViTWithRegistersModel,
)
from modeling_vitreg.modeling_vitreg import AUTO_MODELS
from modeling_vitreg.positions_vitreg import rotary_tables


POSITIONS = ("learned", "sincos", "rope", "none")


@st.composite
def architectures(draw):
    """Any number of registers with every kind of position, prefix and pooling."""
    pooling = draw(st.sampled_from(["cls", "mean", "cls_mean", "cls_distillation"]))
    has_cls_token = pooling != "mean" or draw(st.booleans())
    position = draw(st.sampled_from(POSITIONS))
    return ViTWithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_register_tokens=draw(st.integers(0, 16)),
        has_cls_token=has_cls_token,
        has_distillation_token=pooling == "cls_distillation" or (has_cls_token and draw(st.booleans())),
        position_embedding_type=position,
        has_prefix_positions=has_cls_token and position == "learned" and draw(st.booleans()),
        pooling=pooling,
        has_pooled_norm=pooling == "mean" and draw(st.booleans()),
        initializer_range=0.3,
    )


@given(architectures())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_registers_never_appear_in_the_patch_grid(config):
    model = ViTWithRegistersModel(config).eval()
    output = model(torch.randn(2, 3, 12, 20), output_pre_norm=True)
    sequence, prefix = output.last_hidden_state, config.num_prefix_tokens
    assert sequence.shape == (2, prefix + 15, 16)
    assert output.patch_grid.shape == (2, 3, 5, 16)
    assert torch.equal(output.patch_grid.flatten(1, 2), sequence[:, prefix:])
    assert torch.equal(output.patch_tokens, sequence[:, prefix:])
    assert output.register_tokens.shape == (2, config.num_register_tokens, 16)
    named = [
        *([] if output.cls_token is None else [output.cls_token[:, None]]),
        *([] if output.distillation_token is None else [output.distillation_token[:, None]]),
        output.register_tokens,
        output.patch_tokens,
    ]
    assert torch.equal(torch.cat(named, dim=1), sequence)
    assert (output.cls_token is None) == (not config.has_cls_token)
    assert (output.distillation_token is None) == (not config.has_distillation_token)
    assert torch.equal(model.norm_tokens(output.pre_norm.patch_grid), output.patch_grid)


@given(architectures(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_permuting_registers_permutes_only_register_outputs(config, random):
    model = ViTWithRegistersModel(config).eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    order = list(range(config.num_register_tokens))
    random.shuffle(order)
    if order:
        weight = model.embeddings.register_tokens.weight
        weight.data = weight.data[order]
    after = model(images)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(after.register_tokens, before.register_tokens[:, order], **close)
    torch.testing.assert_close(after.patch_tokens, before.patch_tokens, **close)
    torch.testing.assert_close(after.pooler_output, before.pooler_output, **close)


def test_without_registers_the_parameter_does_not_exist(tiny):
    keys = ViTWithRegistersModel(tiny(num_register_tokens=0)).state_dict().keys()
    assert set(ViTWithRegistersModel(tiny()).state_dict()) - set(keys) == {"embeddings.register_tokens.weight"}


def test_registers_start_distinct_and_train_apart(tiny):
    # transformers' Dinov2WithRegisters starts them at zero; equal inputs get equal gradients and stay equal for ever.
    model = ViTWithRegistersForImageClassification(tiny(num_labels=4))
    registers = model.vitreg.embeddings.register_tokens.weight
    start = registers.detach().clone()
    assert torch.pdist(start).min() > 0.05
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    for _ in range(30):
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (registers - start).detach()
    assert moved.norm(dim=1).min() > 0.1
    assert torch.pdist(moved).min() > 0.1


def test_a_loss_on_the_class_token_reaches_every_register(tiny):
    model = ViTWithRegistersModel(tiny())
    model(torch.randn(2, 3, 32, 32)).cls_token.square().sum().backward()
    gradients = model.embeddings.register_tokens.weight.grad
    assert (gradients.norm(dim=1) > 0).all()
    assert torch.pdist(gradients).min() > 0


@pytest.mark.parametrize("cls", AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_registers_are_exempt_from_weight_decay_wherever_class_token_and_positions_are(tiny, cls):
    model = cls(tiny())
    prefix = "" if cls is ViTWithRegistersModel else "vitreg."
    expected = {"cls_token", "register_tokens.weight", "position_embeddings.weight"}
    if cls.__name__.endswith("MaskedImageModeling"):
        expected.add("mask_token")
    assert model.no_weight_decay() == {f"{prefix}embeddings.{name}" for name in expected}


@pytest.mark.parametrize(("before", "after"), [(4, 6), (4, 2), (0, 3), (3, 0), (2, 2)])
def test_resizing_registers_keeps_the_first_and_starts_new_ones_distinct(tiny, before, after, tmp_path):
    model = ViTWithRegistersForImageClassification(tiny(num_register_tokens=before))
    old = model.vitreg.embeddings.register_tokens
    kept = old.weight[:after].detach().clone() if old is not None else torch.empty(0, 32)
    model.resize_register_tokens(after)
    output = model.vitreg(torch.randn(1, 3, 32, 32))
    assert output.register_tokens.shape == (1, after, 32)
    assert output.patch_grid.shape == (1, 4, 4, 32)
    if after:
        new = model.vitreg.embeddings.register_tokens.weight
        assert torch.equal(new[: len(kept)], kept)
        assert torch.pdist(new).min() > 0.05
        assert new.requires_grad
    model.save_pretrained(tmp_path)
    assert ViTWithRegistersModel.from_pretrained(tmp_path).config.num_register_tokens == after


def test_resizing_registers_keeps_precision_and_frozen_state(tiny):
    model = ViTWithRegistersModel(tiny()).to(torch.bfloat16).requires_grad_(False)
    model.resize_register_tokens(5)
    registers = model.embeddings.register_tokens.weight
    assert registers.dtype == torch.bfloat16
    assert not registers.requires_grad
    with pytest.raises(ValueError, match=r"num_register_tokens to be 0 or a positive integer, got -1"):
        model.resize_register_tokens(-1)


def test_hidden_states_are_the_residual_stream(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(layer_scale_init_value=0.1)))
    output = model(torch.randn(2, 3, 32, 32), output_hidden_states=True, output_pre_norm=True)
    assert len(output.hidden_states) == 4
    for layer, before, after in zip(model.layers, output.hidden_states, output.hidden_states[1:]):
        assert torch.equal(layer(before), after)
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert torch.equal(output.pre_norm.hidden_state, output.hidden_states[-1])
    named = model.split_tokens(output.hidden_states[1], (4, 4))
    assert torch.equal(named.register_tokens, output.hidden_states[1][:, 1:5])


def test_the_first_layers_may_be_run_alone(tiny):
    model, images = ViTWithRegistersModel(tiny()).eval(), torch.randn(1, 3, 32, 32)
    every = model(images, output_hidden_states=True, output_attentions=True)
    for number in range(4):
        some = model(images, num_layers=number, output_hidden_states=True, output_attentions=True)
        assert torch.equal(some.last_hidden_state, model.layernorm(every.hidden_states[number]))
        for kind in ("hidden_states", "attentions"):
            assert all(map(torch.equal, some[kind], every[kind]))
        assert (len(some.hidden_states), len(some.attentions)) == (number + 1, number)
    with pytest.raises(ValueError, match="expected num_layers from 0 to 3, got 4"):
        model(images, num_layers=4)
    with pytest.raises(ValueError, match=r"expected hidden states from -2 to 1, got \[2\]"):
        model(images, num_layers=1, output_hidden_states=2)


def test_hidden_states_may_be_chosen_by_number(tiny):
    model = ViTWithRegistersModel(tiny()).eval()
    images = torch.randn(1, 3, 32, 32)
    every = model(images, output_hidden_states=True).hidden_states
    some = model(images, output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in some] == [True, False, False, True]
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[3], every[3])
    with pytest.raises(ValueError, match=r"expected hidden states from -4 to 3, got \[4\]"):
        model(images, output_hidden_states=4)


def test_a_tuple_has_the_values_of_the_output(tiny):
    model = ViTWithRegistersModel(tiny()).eval()
    images = torch.randn(1, 3, 32, 32)
    output = model(images)
    assert all(torch.equal(a, b) for a, b in zip(model(images, return_dict=False), output.to_tuple()))
    model.config.return_dict = False
    assert isinstance(model(images), tuple)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "cls_distillation"])
def test_pooling_reads_what_its_name_says(tiny, randomise, pooling):
    model = randomise(ViTWithRegistersModel(tiny(pooling=pooling, has_distillation_token=True)))
    output = model(torch.randn(2, 3, 32, 32))
    patches = output.last_hidden_state[:, 6:].mean(1)
    cls, distillation = output.last_hidden_state[:, 0], output.last_hidden_state[:, 1]
    expected = {
        "cls": cls,
        "mean": patches,
        "cls_mean": torch.cat([cls, patches], dim=-1),
        "cls_distillation": (cls + distillation) / 2,
    }
    assert torch.equal(output.pooler_output, expected[pooling])
    assert output.pooler_output.shape[1] == model.config.pooled_size


def test_a_pooled_norm_takes_the_place_of_the_norm_of_tokens(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(has_cls_token=False, pooling="mean", has_pooled_norm=True)))
    output = model(torch.randn(2, 3, 32, 32), output_pre_norm=True)
    assert torch.equal(output.last_hidden_state, output.pre_norm.hidden_state)
    assert torch.equal(output.pooler_output, model.layernorm(output.patch_tokens.mean(1)))


@pytest.mark.parametrize("shape", [(2, 16), (2, 4, 4)])
def test_masked_patches_are_replaced_before_positions_are_added(tiny, randomise, shape):
    model = randomise(ViTWithRegistersModel(tiny(has_mask_token=True)))
    mask = torch.rand(shape) < 0.5
    images = torch.randn(2, 3, 32, 32)
    embedded = model.embeddings(images, mask)
    positions = model.embeddings.position_embeddings.weight[:, 1:]
    plain = model.embeddings.patch_embeddings(images).flatten(2).transpose(1, 2)
    expected = torch.where(mask.flatten(1)[..., None], model.embeddings.mask_token, plain) + positions
    torch.testing.assert_close(embedded[:, 5:], expected)
    other = torch.where(mask.view(2, 4, 4)[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3), 9.0, images)
    assert torch.equal(model(images, mask).last_hidden_state, model(other, mask).last_hidden_state)


def test_the_batch_is_not_mixed(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(pooling="cls_mean")))
    images = torch.randn(4, 3, 32, 24)
    together = model(images).pooler_output
    alone = torch.cat([model(image[None]).pooler_output for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# Positions ---------------------------------------------------------------------------------------------------------


def test_a_resized_position_table_gets_gradients(tiny):
    model = ViTWithRegistersModel(tiny())
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 40))
    model(torch.randn(1, 3, 48, 40)).patch_tokens.square().sum().backward()
    assert (model.embeddings.position_embeddings.weight.grad[:, 1:].abs().sum(-1) > 0).all()


def test_inference_mode_leaves_nothing_behind_that_breaks_training(tiny):
    for position in POSITIONS:
        model = ViTWithRegistersModel(tiny(position_embedding_type=position))
        with torch.inference_mode():
            model(torch.randn(1, 3, 48, 40))
        with torch.no_grad():
            model(torch.randn(1, 3, 48, 40))
        model(torch.randn(1, 3, 48, 40)).pooler_output.sum().backward()


def test_positions_are_resized_in_float32_under_autocast(tiny):
    model = ViTWithRegistersModel(tiny()).eval()
    positions = model.embeddings.position_embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = positions((6, 5))[1]
    assert torch.equal(reduced, positions((6, 5))[1])


def test_rotary_positions_are_augmented_only_while_training(tiny, randomise):
    config = tiny(position_embedding_type="rope", rope_shift=0.5, rope_jitter=2.0, rope_rescale=2.0)
    model = randomise(ViTWithRegistersModel(config))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images).patch_tokens, model(images).patch_tokens)
    model.train()
    assert not torch.allclose(model(images).patch_tokens, model(images).patch_tokens, atol=1e-3)


def test_rotary_positions_of_capi_put_registers_around_the_border_by_a_plain_loop(tiny):
    config = tiny(position_embedding_type="rope", rope_style="capi", num_register_tokens=8, has_cls_token=True)
    cos, sin = rotary_tables(config, (3, 4), training=True, device="cpu")
    border = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
    places = [*border, *((row / 2, column / 3) for row in range(3) for column in range(4))]
    turns = [7 * 10000 ** -(pair / 3) for pair in range(4)]  # heads have 16 channels
    for token, (row, column) in enumerate(places, start=1):
        angles = torch.tensor([2 * math.pi * turn * way for way in (row, column) for turn in turns * 2])
        torch.testing.assert_close(cos[token], angles.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(sin[token], angles.sin(), rtol=0, atol=1e-4)
    assert torch.equal(cos[0], torch.ones(16)) and not sin[0].any()


def test_a_norm_may_be_without_mean_and_bias(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(norm_type="rmsnorm", layer_norm_eps=1e-5)))
    assert not [name for name, _ in model.named_parameters() if "norm" in name and name.endswith("bias")]
    tokens = model(torch.randn(1, 3, 32, 32), output_pre_norm=True)
    before = tokens.pre_norm.patch_tokens
    expected = before / (before.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * model.layernorm.weight
    torch.testing.assert_close(tokens.patch_tokens, expected)


def test_a_projection_makes_image_embeddings_of_the_pooled_vector(tiny, randomise, tmp_path):
    model = randomise(ViTWithRegistersModel(tiny(projection_size=5)))
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    torch.testing.assert_close(output.image_embeds, output.pooler_output @ model.projection.weight.T)
    assert ViTWithRegistersModel(tiny())(images).image_embeds is None
    model.save_pretrained(tmp_path)
    head, info = ViTWithRegistersForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not [name for name in head.state_dict() if "projection" in name]


# Setters -----------------------------------------------------------------------------------------------------------


def _loads_again(model, tmp_path, images):
    """Save, load, and compare tokens and configuration."""
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    base, other = model.base_model, again.base_model
    assert torch.equal(base(images).last_hidden_state, other(images).last_hidden_state)
    skipped = ("architectures", "auto_map", "dtype", "torch_dtype", "_name_or_path")
    before, after = ({k: v for k, v in each.config.to_dict().items() if k not in skipped} for each in (model, again))
    assert before == after


@pytest.mark.parametrize("cls", AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_what_the_setters_leave_behind_is_saved_and_loaded(tiny, tmp_path, cls):
    model = cls(tiny(masked_target="features"))
    model.resize_register_tokens(6)
    model.resize_position_embeddings((48, 40))
    model.set_input_embeddings(nn.Conv2d(5, 32, kernel_size=8, stride=8, bias=False))
    assert (model.config.num_channels, model.config.has_patch_bias) == (5, False)
    _loads_again(model, tmp_path, torch.randn(1, 5, 48, 40))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 5


def test_other_channels_do_not_keep_the_statistics_of_the_model_that_was_loaded(tiny, tmp_path):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path / "first")
    model = ViTWithRegistersModel.from_pretrained(tmp_path / "first")
    model.set_input_embeddings(nn.Conv2d(3, 32, kernel_size=8, stride=8))
    assert len(model.image_processor_settings()["image_mean"]) == 3
    model.set_input_embeddings(nn.Conv2d(1, 32, kernel_size=8, stride=8))
    _loads_again(model, tmp_path / "second", torch.randn(1, 1, 32, 32))
    assert json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())["image_std"] == [0.5]


CAPI = {"position_embedding_type": "rope", "rope_style": "capi", "has_cls_token": False, "pooling": "mean"}


@pytest.mark.parametrize("count", [6, 2.0, True, -4, None, "8", torch.tensor(8)], ids=str)
def test_a_number_of_registers_that_the_configuration_refuses_changes_nothing(tiny, count):
    model = ViTWithRegistersModel(tiny(**CAPI))
    before = model.embeddings.register_tokens
    with pytest.raises(ValueError, match="num_register_tokens"):
        model.resize_register_tokens(count)
    assert model.config.num_register_tokens == 4 and model.embeddings.register_tokens is before
    model.resize_register_tokens(8)
    assert model(torch.randn(1, 3, 32, 32)).register_tokens.shape[1] == 8


@pytest.mark.parametrize("size", [33, 32.0, True, (32,), "32", None, 0, (32, -8)], ids=str)
def test_an_image_size_that_the_configuration_refuses_changes_nothing(tiny, size):
    for position in POSITIONS:
        model = ViTWithRegistersModel(tiny(position_embedding_type=position))
        with pytest.raises(ValueError, match="image_size"):
            model.resize_position_embeddings(size)
        assert model.config.image_size == 32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(3, 16, 8, 8), "got Conv2d with out_channels=16"),
        (nn.Conv2d(3, 32, 4, 4), r"got Conv2d with kernel_size=\(4, 4\), stride=\(4, 4\)"),
        (nn.Conv2d(3, 32, 8, 4), r"got Conv2d with stride=\(4, 4\)"),
        (nn.Conv2d(3, 32, 8, 8, padding=1), r"got Conv2d with padding=\(1, 1\)"),
        (nn.Conv2d(4, 32, 8, 8, groups=2), "got Conv2d with groups=2"),
        (nn.Linear(192, 32), "got Linear"),
        (None, "got NoneType"),
    ],
    ids=str,
)
def test_a_patch_embedding_that_the_configuration_cannot_describe_is_refused(tiny, layer, message):
    model = ViTWithRegistersModel(tiny())
    before = model.get_input_embeddings()
    with pytest.raises(ValueError, match=rf"expected an nn.Conv2d with out_channels=32, kernel_size=.* {message}"):
        model.set_input_embeddings(layer)
    assert model.get_input_embeddings() is before and model.config.num_channels == 3


def test_a_model_that_predicts_pixels_keeps_its_channels(tiny):
    model = ViTWithRegistersForMaskedImageModeling(tiny())
    with pytest.raises(ValueError, match="predicts pixels of 3 channels: for 4 make a new model"):
        model.set_input_embeddings(nn.Conv2d(4, 32, 8, 8))
    model.set_input_embeddings(nn.Conv2d(3, 32, 8, 8))


# The image processor file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_mean": "x"},
        {"image_mean": [0.5, float("nan"), 0.5]},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": []},
        {"image_mean": [[0.5], 0.5, 0.5]},
        {"image_std": [0.2, 0.0, 0.2]},
        {"image_std": [0.2, None, 0.2]},
        {"image_std": float("inf")},
        {"rescale_factor": "1/255"},
        {"rescale_factor": -1},
    ],
    ids=str,
)
def test_numbers_of_an_image_processor_that_are_none_are_refused_by_name(tiny, tmp_path, wrong):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path)
    path, (name,) = tmp_path / "preprocessor_config.json", wrong
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | wrong))
    model = ViTWithRegistersModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"preprocessor_config.json has {name} .*, expected a finite number"):
        model.image_processor_settings()
    model.save_pretrained(tmp_path / "again")  # a trained model is not lost for it
    assert json.loads((tmp_path / "again" / path.name).read_text()) == right


@pytest.mark.parametrize("text", ["[1, 2]", "{", "3", ""])
def test_an_image_processor_that_is_no_object_is_refused(tiny, tmp_path, text):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json (is no valid JSON|holds a (list|int))"):
        ViTWithRegistersModel.from_pretrained(tmp_path).image_processor_settings()


def test_one_mean_for_all_channels_becomes_one_for_each(tiny, tmp_path):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", "image_mean": 0.5, "image_std": [0.25]})
    )
    settings = ViTWithRegistersModel.from_pretrained(tmp_path).image_processor_settings()
    assert (settings["image_mean"], settings["image_std"]) == ([0.5] * 3, [0.25] * 3)


# Initial values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_initialisation_leaves_no_value_of_an_empty_model(tiny, cls):
    for position in POSITIONS:
        config = tiny(position_embedding_type=position, layer_scale_init_value=1e-5, has_mask_token=True)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        for name, tensor in model.state_dict().items():
            assert not torch.isnan(tensor).any(), name
            assert (tensor >= 0).all() or tensor.is_floating_point(), name


def test_initial_values_follow_the_configuration(tiny):
    config = tiny(hidden_size=128, num_attention_heads=2, layer_scale_init_value=1e-5, initializer_range=0.02)
    state = ViTWithRegistersModel(config, use_mask_token=True).state_dict()
    assert state["layers.0.layer_scale1.weight"].unique().tolist() == pytest.approx([1e-5])
    assert (state["embeddings.mask_token"] == 0).all()
    for name in ("layers.0.attention.qkv.weight", "layers.1.mlp.fc1.weight", "embeddings.patch_embeddings.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("embeddings.register_tokens.weight", "embeddings.position_embeddings.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert (state["layers.0.attention.qkv.bias"] == 0).all()


def test_an_absent_key_bias_stays_zero_under_training(tiny):
    model = ViTWithRegistersModel(tiny(position_embedding_type="rope", has_key_bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32)).patch_tokens.sum().backward()
        optimizer.step()
    query, key, value = model.layers[0].attention.qkv.bias.chunk(3)
    assert (key == 0).all()
    assert (query != 0).any()
    assert (value != 0).any()
    bare = ViTWithRegistersModel(tiny(has_query_bias=False, has_key_bias=False, has_value_bias=False))
    assert bare.layers[0].attention.qkv.bias is None


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean(tiny):
    model = ViTWithRegistersModel(tiny(drop_path_rate=0.5, drop_path_schedule="constant"))
    drop_path = model.layers[0].drop_path.train()
    state, branch = torch.zeros(10_000, 1, 1), torch.ones(10_000, 1, 1)
    dropped = drop_path.add(state, lambda _: branch, drop_path.choose(state))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop_path.eval().choose(state) is None


def test_stochastic_depth_on_a_subset_runs_the_branch_on_it_alone_and_keeps_the_mean(tiny):
    settings = {"drop_path_rate": 0.4, "drop_path_schedule": "constant", "drop_path_mode": "batch_subset"}
    model = ViTWithRegistersModel(tiny(**settings)).train()
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(len(inputs[0])))
    model(torch.randn(10, 3, 32, 32))
    assert seen == [6]
    drop_path, state = model.layers[0].drop_path, torch.zeros(10, 1, 1)
    added = drop_path.add(state, torch.ones_like, drop_path.choose(state))
    assert (added != 0).sum() == 6
    assert added.mean().item() == pytest.approx(1.0)
    # Of one image something is kept; attention maps are of all images.
    assert len(drop_path.choose(torch.zeros(1, 1, 1))[0]) == 1
    assert model(torch.randn(3, 3, 32, 32), output_attentions=True).attentions[0].shape[0] == 3


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "batch_subset"])
@pytest.mark.parametrize("is_training", [False, True])
def test_a_layer_that_finishes_some_tokens_finishes_them_as_it_would_all(tiny, randomise, mode, is_training):
    model = randomise(ViTWithRegistersModel(tiny(drop_path_rate=0.5, layer_scale_init_value=0.5)))
    layer = model.layers[-1].train(is_training)
    group = torch.randn(6, 21, model.config.hidden_size)
    read = torch.tensor([0, 21, 25, 60, 125, 3])
    torch.manual_seed(3)
    expected = layer(group).flatten(0, 1)[read]
    layer.drop_path.mode = mode  # all images take part, so both modes draw factors
    torch.manual_seed(3)
    found = layer(group.flatten(0, 1), (None,), (group.shape[:2],), read)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert is_training == (not torch.allclose(expected, layer.eval()(group).flatten(0, 1)[read]))


def test_images_that_do_not_fit_are_refused_with_the_sizes_that_do(tiny):
    model = ViTWithRegistersModel(tiny())
    with pytest.raises(ValueError, match=r"height of 36 pixels does not fit patches of 8 pixels: .* 32 and 40"):
        model(torch.randn(1, 3, 36, 32))
    with pytest.raises(ValueError, match=r"width of 4 pixels does not fit patches of 8 pixels: .* 8 and 16"):
        model(torch.randn(1, 3, 32, 4))
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, height, width\), got .* \(1, 1, 32, 32\)"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"got a tensor of shape \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match=r"expected `pixel_values`, .* got None"):
        model()


def test_a_mask_that_does_not_fit_is_refused(tiny):
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"this model has no mask token"):
        ViTWithRegistersModel(tiny())(images, torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool_masked_pos has shape \(2, 9\), expected \(2, 16\)"):
        ViTWithRegistersModel(tiny(has_mask_token=True))(images, torch.ones(2, 9, dtype=torch.bool))


def test_an_unknown_attention_back_end_is_refused(tiny):
    with pytest.raises(ValueError, match='Specified `attn_implementation="quick"` is not supported'):
        ViTWithRegistersModel._from_config(tiny(), attn_implementation="quick")


def test_modules_can_be_copied_and_moved(tiny):
    model = ViTWithRegistersModel(tiny()).eval()
    images = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        assert torch.equal(copy.deepcopy(model)(images).last_hidden_state, expected)
        torch.testing.assert_close(model.double()(images).last_hidden_state.float(), expected, rtol=0, atol=1e-5)
    assert isinstance(model.get_input_embeddings(), nn.Conv2d)

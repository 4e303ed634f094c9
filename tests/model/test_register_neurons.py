"""Register neurons: the activation of chosen units moves to the test-time registers, for each image and unit."""

import pytest
import torch

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersMLP


NEURONS = {1: [3], 3: [0, 7, 5]}
FAMILIES = {
    "vit": {},
    "dinov2": {"layer_scale_init_value": 1.0, "interpolate_antialias": False, "interpolate_offset": 0.1},
    "swiglu": {"hidden_act": "swiglu"},
    "rope": {"position_embedding_type": "rope", "num_register_tokens": 1},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu"},
    "deit": {"has_distillation_token": True, "pooling": "cls_distillation"},
    "no class token": {"has_cls_token": False, "pooling": "mean"},
}


@pytest.fixture(params=FAMILIES, ids=str)
def model(request, tiny, randomise):
    config = tiny(num_test_time_registers=1, register_neurons=NEURONS, **FAMILIES[request.param])
    return randomise(ViTWithRegistersModel(config))


def _slow_activate(mlp, tokens, registers):
    """The published rule as a loop over images and units."""
    hidden = ViTWithRegistersMLP.activate(mlp, tokens).detach().clone()
    for image in hidden:
        for unit in mlp.initial_units:
            column = image[:, unit].tolist()
            largest = max(column, key=abs)
            image[:, unit] = 0
            image[registers, unit] = largest
    return hidden


def test_the_mlp_follows_the_published_rule(model):
    registers = model.config.token_slices["registers"].stop - 1
    tokens = torch.randn(2, model.config.num_prefix_tokens + 12, model.config.hidden_size)
    for number, layer in enumerate(model.layers, start=1):
        if number in NEURONS:
            expected = _slow_activate(layer.mlp, tokens, registers)
            torch.testing.assert_close(layer.mlp.activate(tokens), expected, rtol=0, atol=0)
            assert (expected[:, registers, NEURONS[number]] < 0).any() or "silu" not in str(layer.mlp.activation)
        else:
            assert type(layer.mlp) is ViTWithRegistersMLP


def test_a_batch_equals_its_images_one_by_one_at_another_size(model):
    images = torch.randn(3, 3, 32, 48)
    together = model(images).last_hidden_state
    for number, image in enumerate(images):
        torch.testing.assert_close(model(image[None]).last_hidden_state[0], together[number], rtol=1e-5, atol=1e-5)


def test_the_place_of_a_token_without_position_does_not_matter(tiny, randomise):
    # The official code appends the token at the end; here it stands among the registers.
    model = randomise(ViTWithRegistersModel(tiny(num_test_time_registers=1, register_neurons=NEURONS)))
    place = model.config.token_slices["registers"].stop - 1
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    state, _, _ = model.embed(images)
    order = [*range(place), *range(place + 1, state.shape[1]), place]
    moved = state[:, order]
    for layer in model.layers:
        if layer.mlp.__class__ is not ViTWithRegistersMLP:
            layer.mlp.registers = (state.shape[1] - 1, state.shape[1])
        moved = layer(moved)
    torch.testing.assert_close(model.norm_tokens(moved)[:, :-1], expected[:, order[:-1]], rtol=1e-5, atol=1e-5)


def test_a_saved_model_computes_the_same(model, tmp_path):
    images = torch.randn(2, 3, 40, 32)
    model.save_pretrained(tmp_path)
    loaded = ViTWithRegistersModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).last_hidden_state, model(images).last_hidden_state, rtol=0, atol=0)
    assert loaded.config.register_neurons == {"1": [3], "3": [0, 7, 5]}


def test_it_compiles_and_exports(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(num_test_time_registers=1, register_neurons=NEURONS)))
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).last_hidden_state, expected)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images).last_hidden_state, expected)


def test_the_gradient_reaches_every_parameter(tiny, randomise):
    config = tiny(num_test_time_registers=1, register_neurons=NEURONS, num_labels=3)
    model = randomise(ViTWithRegistersForImageClassification(config)).train()
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_test_time_registers": 5}, r"in 0 \.\.\. num_register_tokens \(4\), got 5"),
        ({"num_test_time_registers": -1}, "in 0"),
        ({"num_test_time_registers": True}, "in 0"),
        ({"register_neurons": {1: [0]}}, "set num_test_time_registers=1"),
        ({"num_test_time_registers": 1, "register_neurons": {0: [0]}}, r"layers in 1 \.\.\. 3, got '0'"),
        ({"num_test_time_registers": 1, "register_neurons": {4: [0]}}, "layers in"),
        ({"num_test_time_registers": 1, "register_neurons": {1: [128]}}, r"distinct units in 0 \.\.\. 127"),
        ({"num_test_time_registers": 1, "register_neurons": {1: [2, 2]}}, "distinct units"),
        ({"num_test_time_registers": 1, "register_neurons": {1: []}}, "distinct units"),
        (
            {"num_test_time_registers": 1, "position_embedding_type": "rope", "rope_style": "capi"},
            "gives every register a position",
        ),
    ],
)
def test_contradictions_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_registers_of_a_retrofitted_model_are_not_resized(tiny):
    model = ViTWithRegistersModel(tiny(num_test_time_registers=1, register_neurons=NEURONS))
    weight = model.embeddings.register_tokens.weight.clone()
    with pytest.raises(ValueError, match=r"1 of the 4 registers are test-time registers.*keep 4 registers"):
        model.resize_register_tokens(8)
    model.resize_register_tokens(4)  # as training does with the number of its recipe
    assert torch.equal(model.embeddings.register_tokens.weight, weight)


def test_a_plain_model_has_neither(tiny):
    config = tiny()
    assert config.num_test_time_registers == 0 and config.register_neurons == {}
    assert ViTWithRegistersConfig.from_dict(config.to_dict()).register_neurons == {}

"""Gated registers: a key that counts as often as its gate says, and not at all while the gate is closed."""

import pytest
import torch

from modeling_vitreg import ViTWithRegistersBackbone, ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import CLOSED_GATE
from modeling_vitreg.pretraining.run.parameters import is_decayed
from modeling_vitreg.pretraining.views.packing import encode_views


GATED = {"num_register_tokens": 4, "num_gated_registers": 3}
FAMILIES = {
    "vit": {},
    "dinov2": {"layer_scale_init_value": 1.0, "interpolate_antialias": False, "interpolate_offset": 0.1},
    "rope": {"position_embedding_type": "rope", "has_key_bias": False},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu"},
    "deit": {"has_distillation_token": True, "pooling": "cls_distillation"},
    "no class token": {"has_cls_token": False, "pooling": "mean"},
    "test-time register": {"num_test_time_registers": 1, "register_neurons": {2: [3]}},
}


@pytest.fixture
def model(tiny, randomise):
    return randomise(ViTWithRegistersModel(tiny(**GATED)))


@pytest.fixture(params=FAMILIES, ids=str)
def pair(request, tiny, randomise):
    """A model, and the same with three gated registers of which all gates are closed."""
    family = FAMILIES[request.param]
    plain = randomise(ViTWithRegistersModel(tiny(**{"num_register_tokens": 1, **family})))
    gated = ViTWithRegistersModel(tiny(**{**family, **GATED}))
    weights = plain.state_dict()
    old, slices = weights.pop("embeddings.register_tokens.weight"), gated.config.token_slices["registers"]
    own = 1 - gated.config.num_test_time_registers
    left = gated.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith(("register_gates", "register_tokens.weight")) for name in left.missing_keys)
    with torch.no_grad():
        registers = gated.embeddings.register_tokens.weight
        registers.normal_()
        registers[:own], registers[own + 3 :] = old[:own], old[own:]
    assert slices.stop - slices.start == len(registers) == 4
    return plain, gated.eval()


def _slow_attention(attention, packed, gates):
    """One head and one image after the other: key j counts w_j times."""
    width = packed.shape[-1] // 3
    outputs = torch.zeros(*packed.shape[:2], width)
    probabilities = []
    for image, tokens in enumerate(packed):
        probabilities.append([])
        for head, channels in enumerate(torch.arange(width).chunk(attention.num_heads)):
            query, key, value = (tokens[:, channels + part * width] for part in range(3))
            weights = gates[head] * (query @ key.T / len(channels) ** 0.5).exp()
            weights = weights / weights.sum(dim=-1, keepdim=True)
            outputs[image][:, channels] = weights @ value
            probabilities[-1].append(weights)
    return outputs, torch.stack([torch.stack(heads) for heads in probabilities])


@torch.no_grad()
@pytest.mark.parametrize("back_end", ["eager", "sdpa", "flex_attention"])
def test_every_back_end_counts_a_key_as_often_as_its_gate_says(model, back_end):
    model.set_attn_implementation(back_end)
    attention = model.layers[1].attention
    num_tokens = model.config.num_prefix_tokens + 12
    gates = torch.ones(2, num_tokens)
    gates[:, 2:5] = attention.register_gates.abs()
    packed = torch.randn(2, num_tokens, 96)
    expected, probabilities = _slow_attention(attention, packed, gates)
    torch.testing.assert_close(attention.attend(packed)[0], expected, rtol=1e-5, atol=1e-6)
    output, shown = attention.attend(packed, output_attentions=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shown, probabilities, rtol=1e-5, atol=1e-6)


def test_maps_are_those_of_the_gated_attention(model):
    images = torch.randn(2, 3, 32, 48)
    expected = model(images, output_attentions=True).attentions[-1][:, :, 0, 5:]
    torch.testing.assert_close(model.attention_maps(images).cls[:, 0].flatten(2), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_closed_gates_leave_every_output_unchanged(pair, dtype):
    plain, gated = (model.to(dtype) for model in pair)
    first, then = plain.config.num_prefix_tokens, gated.config.num_prefix_tokens
    for size in ((32, 32), (48, 24)):
        images = torch.randn(2, 3, *size, dtype=dtype)
        before, after = plain(images, output_hidden_states=True), gated(images, output_hidden_states=True)
        # In float32 the order of the sums differs, and the difference grows with the values.
        scale = 1.0 if dtype == torch.float64 else before.last_hidden_state.abs().max().item()
        for name in ("pooler_output", "patch_tokens"):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6 * scale)
        for old, new in zip(before.hidden_states, after.hidden_states):
            torch.testing.assert_close(new[:, then:], old[:, first:], rtol=1e-5, atol=1e-6 * scale)


def test_open_gates_are_ordinary_registers(model, tiny):
    for layer in model.layers:
        torch.nn.init.constant_(layer.attention.register_gates, -1.0)
    ordinary = ViTWithRegistersModel(tiny()).eval()
    ordinary.load_state_dict({k: v for k, v in model.state_dict().items() if "register_gates" not in k})
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images)[0], ordinary(images)[0], rtol=1e-5, atol=1e-5)


def test_a_closed_gate_has_a_gradient_that_opens_it(tiny):
    model = ViTWithRegistersForImageClassification(tiny(**GATED, num_labels=3, initializer_range=0.2)).train()
    gates = [layer.attention.register_gates for layer in model.vitreg.layers]
    assert all((gate == CLOSED_GATE).all() for gate in gates)
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(gate.grad.isfinite().all() and (gate.grad.abs() > 1e-6).all() for gate in gates)
    assert not is_decayed("layers.0.attention.register_gates", decays_tokens=True)
    assert "vitreg.layers.0.attention.register_gates" in model.no_weight_decay()


def test_it_is_saved_compiled_and_exported(model, tmp_path):
    images = torch.randn(2, 3, 40, 32)
    expected = model(images).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded, report = ViTWithRegistersModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and loaded.config.num_gated_registers == 3
    torch.testing.assert_close(loaded(images).last_hidden_state, expected, rtol=0, atol=0)
    maps = ViTWithRegistersBackbone.from_pretrained(tmp_path)(images).feature_maps[0]
    torch.testing.assert_close(maps.flatten(2).mT, expected[:, 5:], rtol=0, atol=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).last_hidden_state, expected)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images).last_hidden_state, expected)


def test_views_of_several_sizes_in_one_sequence_are_those_one_by_one(model):
    groups = [(torch.randn(2, 3, 32, 32), None), (torch.randn(3, 3, 16, 24), None)]
    wanted = [torch.tensor([0, 5, 31]), None]
    for is_packed in (False, True):
        (cls, patches), (small_cls, _) = encode_views(model, groups, patches=wanted, is_packed=is_packed)
        output, small = model(groups[0][0]), model(groups[1][0])
        torch.testing.assert_close(cls, output.cls_token, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patches, output.patch_tokens.flatten(0, 1)[wanted[0]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(small_cls, small.cls_token, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gated_registers": 5}, r"num_gated_registers in 0 \.\.\. 4, .*, got 5"),
        ({"num_gated_registers": 4, "num_test_time_registers": 1}, r"in 0 \.\.\. 3"),
        ({"num_gated_registers": True}, "got True"),
        (
            {"num_gated_registers": 4, "position_embedding_type": "rope", "rope_style": "capi"},
            "gives every register a position",
        ),
    ],
)
def test_contradictions_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_gated_registers_are_not_resized(model):
    with pytest.raises(ValueError, match=r"3 of the 4 registers are gated registers.*keep 4 registers"):
        model.resize_register_tokens(8)
    model.resize_register_tokens(4)

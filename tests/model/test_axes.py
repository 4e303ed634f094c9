"""Axes beyond ViT and DINOv2: every path of attention agrees, gates are timm's, and models are saved and exported."""

import warnings

import pytest
import timm.layers
import torch
from reference_models import randomise, relative_error

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersAttention
from modeling_vitreg.pretraining.views.packing import encode_views


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
AXES = {
    "gate of heads": {"attention_gate": "head"},
    "gate of elements": {"attention_gate": "element", "has_attention_norm": True},
    "fewer keys, normed": {"num_key_value_heads": [4, 2], "has_query_key_norm": True, "norm_type": "rmsnorm"},
    "norm in a gated MLP": {"has_mlp_norm": True, "hidden_act": "swiglu"},
    "axial": {"position_embedding_type": "learned_rope", "rope_style": "axial", "rope_reference_grid": [3, 5]},
    "mixed": {"position_embedding_type": "rope", "rope_style": "mixed", "rope_columns_first": True},
    "bias in layers": {"relative_position_bias": "layer", "position_embedding_type": "none"},
    "shared bias": {"relative_position_bias": "shared"},
    "attention pooling": {"pooling": "attention", "pooling_num_heads": 2, "has_cls_token": False},
    "refined patches": {"pooling": "prr", "num_register_tokens": 2},
    "class tokens, no final norm": {"num_cls_tokens": 3, "pooling": "cls_concat", "has_final_norm": False},
    "mean class token, cut positions": {
        "num_cls_tokens": 2,
        "pooling": "cls_average",
        "interpolate_mode": "bilinear_crop",
        "interpolate_antialias": False,
    },
    "norm of patches": {"has_patch_norm": True, "interpolate_mode": "bilinear"},
}
# What other files test, for the comparison of back ends of attention.
OTHERS = {
    "plain": {},
    "DINOv3": {"position_embedding_type": "rope", "layer_scale_init_value": 0.5, "hidden_act": "swiglu"},
    "CAPI": {"position_embedding_type": "rope", "rope_style": "capi", "has_key_bias": False},
    "distilled": {"position_embedding_type": "sincos", "has_distillation_token": True, "pooling": "cls_distillation"},
    "gated registers, fewer keys": {"num_gated_registers": 2, "num_key_value_heads": 2},
    "test-time registers": {"num_test_time_registers": 1, "register_neurons": {"1": [0, 3]}},
    "merged patches": {"token_reduction": {"kind": "merge", "per_layer": 3}},
    "learned tokens": {"token_reduction": {"kind": "learn", "num_tokens": 3}},
}
BACK_ENDS = ("eager", "sdpa", "flex_attention")


def build(name: str, **fields) -> ViTWithRegistersModel:
    torch.manual_seed(0)
    return randomise(ViTWithRegistersModel(ViTWithRegistersConfig(**SIZES, **(AXES | OTHERS)[name], **fields)))


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", AXES)
def test_every_path_of_attention_gives_the_same_tokens(name):
    model, pixels = build(name), images(24, 40)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(pixels, output_hidden_states=True)
        traced = model(pixels, output_attentions=True)
        model.set_attn_implementation("eager")
        eager = model(pixels)
        assert relative_error(eager.last_hidden_state, expected.last_hidden_state) < 1e-5
        assert relative_error(traced.pooler_output, expected.pooler_output) < 1e-5
        maps = model.attention_maps(pixels, layers=(1, 2), queries="registers")
        start = model.config.num_prefix_tokens
        rows = model.config.token_slices["registers"]
        for number, probabilities in enumerate(traced.attentions):
            shown = probabilities[:, :, rows, start:].unflatten(-1, (3, 5)).transpose(1, 2)
            assert relative_error(maps.registers[:, number], shown) < 1e-5


def agree(model: ViTWithRegistersModel, pixels: torch.Tensor, implementation: str, run=None) -> None:
    """Compare all tokens of all layers with those of eager attention, or see that a bias of the scores is refused."""
    model.set_attn_implementation("eager")
    expected = model(pixels, output_hidden_states=True)
    model.set_attn_implementation(implementation)
    has_bias = model.config.relative_position_bias or (model.config.reduction or {}).get("kind") == "merge"
    if implementation == "flex_attention" and has_bias:
        with pytest.raises(ValueError, match="needs attention 'eager' or 'sdpa', got 'flex_attention'"):
            model(pixels)
        return
    found = (model if run is None else run)(pixels, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        assert relative_error(found[name], expected[name]) < 1e-5
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", AXES | OTHERS)
def test_flex_attention_gives_the_tokens_of_eager_attention(name):
    # Without its compiler, which takes ten seconds for each shape.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        agree(build(name), images(24, 40), "flex_attention")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACK_ENDS)
@pytest.mark.parametrize("name", AXES | OTHERS)
def test_compiled_models_give_the_tokens_of_eager_attention(name, implementation):
    torch._dynamo.reset()
    model = build(name)
    with torch.no_grad():
        agree(model, images(24, 40), implementation)
        agree(model, images(24, 40), implementation, torch.compile(model, fullgraph=True))


@pytest.mark.parametrize("name", [name for name in AXES if "has_cls_token" not in AXES[name]])
def test_packed_views_give_the_tokens_of_each_group_alone(name):
    model, groups = build(name), [(images(32, 32), None), (images(16, 24), None)]
    with torch.no_grad():
        packed = encode_views(model, groups, patches=[torch.arange(4), None], is_packed=True)
        for (cls_tokens, _), (pixels, _) in zip(packed, groups):
            torch.testing.assert_close(cls_tokens, model(pixels).cls_token, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", AXES)
def test_the_model_is_saved_resized_and_exported(name, tmp_path):
    model, pixels = build(name), images(24, 40)
    model.save_pretrained(tmp_path)
    again = ViTWithRegistersModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixels)
        assert torch.equal(again(pixels).last_hidden_state, expected.last_hidden_state)
        again.resize_position_embeddings((24, 40))
        assert relative_error(again(pixels).last_hidden_state, expected.last_hidden_state) < 1e-5
        sides = {2: 8 * torch.export.Dim("rows", min=2, max=16), 3: 8 * torch.export.Dim("columns", min=2, max=16)}
        program = torch.export.export(model, (images(32, 48),), dynamic_shapes={"pixel_values": sides})
        found = program.module()(pixels).last_hidden_state
        assert relative_error(found, expected.last_hidden_state) < 1e-5


@pytest.mark.parametrize("name", AXES)
def test_all_parameters_of_a_new_model_get_values_and_gradients(name):
    torch.manual_seed(0)
    model = ViTWithRegistersModel(ViTWithRegistersConfig(**SIZES, **AXES[name])).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    output = model(images(32, 32))
    (output.last_hidden_state.square().sum() + output.pooler_output.square().sum()).backward()
    lacking = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not lacking


def test_the_gate_of_elements_is_that_of_timm():
    config = ViTWithRegistersConfig(**SIZES, attention_gate="element", has_attention_norm=True)
    options = {"qkv_bias": True, "scale_norm": True, "norm_layer": torch.nn.LayerNorm, "gated": True}
    try:
        theirs = randomise(timm.layers.Attention(32, num_heads=4, **options))
    except TypeError:
        pytest.skip("this version of timm has no gated attention")
    theirs.norm.eps = config.layer_norm_eps
    config._attn_implementation = "sdpa"
    ours = ViTWithRegistersAttention(config).eval()
    names = {"gate.weight": "gate.linear.weight", "gate.bias": "gate.linear.bias"}
    ours.load_state_dict({names.get(name, name): tensor for name, tensor in theirs.state_dict().items()})
    tokens = torch.randn(2, 11, 32)
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens)) < 1e-6


@pytest.mark.parametrize("kind", ["head", "element"])
def test_an_open_gate_changes_nothing(kind):
    gated, pixels = build("gate of heads" if kind == "head" else "gate of elements"), images(32, 32)
    plain_fields = {name: value for name, value in gated.config.to_dict().items() if name != "attention_gate"}
    plain = ViTWithRegistersModel(ViTWithRegistersConfig.from_dict(plain_fields)).eval()
    assert not plain.load_state_dict(gated.state_dict(), strict=False).missing_keys  # it changes no other name
    with torch.no_grad():
        for layer in gated.layers:
            layer.attention.gate.linear.weight.zero_()
            layer.attention.gate.linear.bias.fill_(20.0)
        assert relative_error(gated(pixels).last_hidden_state, plain(pixels).last_hidden_state) < 1e-6


def test_a_gate_of_a_head_is_one_number_for_its_channels():
    attention = build("gate of heads").layers[0].attention
    attended, normed = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        gated = attention.gate(attended, normed)
        numbers = torch.sigmoid(normed @ attention.gate.linear.weight.T + attention.gate.linear.bias)
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            torch.testing.assert_close(gated[..., part], attended[..., part] * numbers[..., head : head + 1])


def test_a_relative_bias_is_looked_up_by_the_offset_of_two_patches():
    model = build("bias in layers")
    bias, (rows, columns), prefix = model.layers[0].attention.position_bias, (4, 4), model.config.num_prefix_tokens
    with torch.no_grad():
        values = bias((rows, columns))[0]  # [H, N, N]
        for query in range(rows * columns):
            for key in range(rows * columns):
                down, right = query // columns - key // columns, query % columns - key % columns
                number = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
                assert torch.equal(values[:, prefix + query, prefix + key], bias.weight[number])
        assert torch.equal(values[:, 0, prefix], bias.weight[-3])
        assert torch.equal(values[:, prefix, 0], bias.weight[-2])
        assert torch.equal(values[:, 1, 0], bias.weight[-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads"),
        ({"num_key_value_heads": [4]}, "a list of num_hidden_layers"),
        ({"attention_gate": "row"}, "attention_gate to be one of None, head, element"),
        ({"pooling_num_heads": 2}, "fields of attention pooling need pooling='attention'"),
        ({"pooling": "attention", "pooling_num_heads": 5}, "pooling_num_heads to divide hidden_size"),
        ({"pooled_cls_tokens": [0]}, "pooled_cls_tokens need pooling='cls_concat'"),
        ({"pooling": "cls_concat", "num_cls_tokens": 2, "pooled_cls_tokens": [2]}, "pooled_cls_tokens in 0"),
        ({"num_cls_tokens": 2, "has_distillation_token": True}, "num_cls_tokens=2 needs has_cls_token=True"),
        ({"rope_style": "axial"}, "rope_style='axial' needs position_embedding_type='rope'"),
        ({"position_embedding_type": "rope", "rope_grid_offset": 1.0}, "need rope_style='axial'"),
        ({"position_embedding_type": "rope", "rope_columns_first": True}, "rope_columns_first=True needs rope_style"),
        ({"has_final_norm": False, "has_pooled_norm": True, "pooling": "mean"}, "but has_final_norm=False"),
        ({"has_mlp_layer_scale": False}, "has_mlp_layer_scale=False needs a layer_scale_init_value"),
        ({"interpolate_mode": "nearest"}, "interpolate_mode to be one of bicubic, bilinear, bilinear_crop"),
        (
            {"has_mlp_norm": True, "num_test_time_registers": 1, "register_neurons": {"1": [0]}},
            "register_neurons move activations that has_mlp_norm=True would norm",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("(", r"\(")):
        ViTWithRegistersConfig(**SIZES, **fields)


@pytest.mark.parametrize("name", AXES)
def test_quantisers_that_replace_linear_layers_reach_all_of_them(name):
    model, pixels = build(name), images(32, 32)
    count = sum(type(module) is torch.nn.Linear for module in model.modules())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        kinds = [type(module) for module in quantised.modules()]
        assert torch.nn.Linear not in kinds and kinds.count(torch.ao.nn.quantized.dynamic.Linear) == count
        error = relative_error(quantised(pixels).last_hidden_state, model(pixels).last_hidden_state)
        assert 0 < error < 0.2

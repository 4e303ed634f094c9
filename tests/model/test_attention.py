"""Attention: the same result under every back end, true maps under all of them, and maps of chosen layers only."""

import pytest
import torch

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersAttention


BACK_ENDS = ("eager", "sdpa", "flex_attention")


def _probabilities(model, images):
    """The slow program: scores of every pair of tokens, one head after the other."""
    states = model(images, output_hidden_states=True).hidden_states
    for layer, state in zip(model.layers, states):
        width = state.shape[-1]
        qkv = torch.nn.functional.linear(layer.norm1(state), layer.attention.qkv.weight, layer.attention.qkv.bias)
        heads = []
        for head in torch.arange(width).chunk(layer.attention.num_heads):
            query, key = qkv[..., head], qkv[..., head + width]
            heads.append((query @ key.mT / len(head) ** 0.5).softmax(-1))
        yield torch.stack(heads, dim=1)


@pytest.fixture(params=BACK_ENDS)
def model(request, tiny, randomise):
    torch.manual_seed(0)
    model = randomise(ViTWithRegistersModel._from_config(tiny(), attn_implementation=request.param))
    assert model.config._attn_implementation == request.param
    return model


def test_every_back_end_gives_the_eager_result(model):
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        output = model(images).last_hidden_state
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(output, model(images).last_hidden_state, rtol=0, atol=1e-5)


def test_attentions_are_true_under_every_back_end(model):
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        expected = list(_probabilities(model, images))
        output = model(images, output_attentions=True)
        plain = model(images)
    assert len(output.attentions) == 3
    for attention, slow in zip(output.attentions, expected):
        torch.testing.assert_close(attention, slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_maps_are_attentions_folded_onto_the_grid(tiny, randomise, position):
    config = tiny(position_embedding_type=position, has_distillation_token=True)
    model = randomise(ViTWithRegistersModel(config))
    images = torch.randn(2, 3, 24, 40)
    attentions = model(images, output_attentions=True).attentions
    maps = model.attention_maps(images, layers=(3, 1), queries=("cls", "distillation", "registers"))
    assert maps.cls.shape == (2, 2, 2, 3, 5)  # images, layers, heads, rows, columns
    assert maps.registers.shape == (2, 2, 4, 2, 3, 5)
    for position, layer in enumerate((3, 1)):
        folded = attentions[layer - 1][..., 6:].unflatten(-1, (3, 5))
        torch.testing.assert_close(maps.cls[:, position], folded[:, :, 0])
        torch.testing.assert_close(maps.distillation[:, position], folded[:, :, 1])
        torch.testing.assert_close(maps.registers[:, position], folded[:, :, 2:6].transpose(1, 2))
    last = model.attention_maps(images, layers=(-1, -3), queries=("cls", "distillation", "registers"))
    assert all(torch.equal(last[name], maps[name]) for name in maps)
    averaged = model.attention_maps(images, average_heads=True)
    torch.testing.assert_close(averaged.cls[:, 0], maps.cls[:, 0].mean(1))
    torch.testing.assert_close(averaged.registers[:, 0], maps.registers[:, 0].mean(2))
    assert averaged.distillation is None


def test_maps_compute_only_the_queries_and_layers_asked_for(tiny, monkeypatch):
    model = ViTWithRegistersForImageClassification(tiny()).eval()
    shapes, layers = [], []
    original = ViTWithRegistersAttention.prefix_attention
    monkeypatch.setattr(
        ViTWithRegistersAttention,
        "prefix_attention",
        lambda *args: shapes.append(original(*args).shape) or original(*args),
    )
    for number, layer in enumerate(model.vitreg.layers):
        layer.register_forward_hook(lambda *_, number=number: layers.append(number))
    model.attention_maps(torch.randn(2, 3, 32, 32), layers=2)
    assert shapes == [(2, 2, 5, 21)]  # prefix x tokens, never tokens x tokens
    assert layers == [0]  # of layer 2 only queries and keys are needed, layer 3 never runs


def test_maps_leave_out_kinds_that_the_model_lacks(tiny):
    model = ViTWithRegistersModel(tiny(has_cls_token=False, pooling="mean"))
    maps = model.attention_maps(torch.randn(1, 3, 32, 32))
    assert maps.cls is None
    assert maps.registers.shape == (1, 1, 4, 2, 4, 4)
    maps = ViTWithRegistersModel(tiny(num_register_tokens=0)).attention_maps(torch.randn(1, 3, 32, 32))
    assert maps.registers.shape == (1, 1, 0, 2, 4, 4)


def test_maps_of_unknown_layers_or_queries_are_refused(tiny):
    model = ViTWithRegistersModel(tiny())
    images = torch.randn(1, 3, 32, 32)
    for layer in (0, 4, -4):
        with pytest.raises(
            ValueError, match=rf"expected layers from 1 to 3, or from -3 to -1 .* got \[{layer}\]; 0 is"
        ):
            model.attention_maps(images, layers=layer)
    with pytest.raises(ValueError, match=r"expected queries out of cls, distillation, registers, got .*patches"):
        model.attention_maps(images, queries=("patches",))


def test_attention_dropout_leaves_the_returned_probabilities_whole(tiny):
    model = ViTWithRegistersModel(tiny(attention_probs_dropout_prob=0.5)).train()
    for attention in model(torch.randn(1, 3, 32, 32), output_attentions=True).attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))

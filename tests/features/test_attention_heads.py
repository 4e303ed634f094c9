"""Attention, values and output weights of the heads: together they are what the layer adds, in any family."""

import pytest
import torch
from reference_models import randomise
from test_updates import MODELS, SIZES

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.features import load_encoder
from modeling_vitreg.features.families import find_part
from modeling_vitreg.features.heads import read_heads


def _ours(**changes):
    return ViTWithRegistersModel(ViTWithRegistersConfig(**SIZES, num_register_tokens=2, **changes))


FAMILIES = {
    **MODELS,
    "shared": lambda: _ours(num_key_value_heads=2),
    "gated": lambda: _ours(attention_gate="head"),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_heads_add_up_to_what_the_layer_adds(name):
    torch.manual_seed(0)
    encoder, pixels, added = load_encoder(randomise(FAMILIES[name]())), torch.randn(2, 3, 32, 32), {}
    found = read_heads(encoder, pixels, lambda heads: heads)
    assert list(found) == [1, 2]
    for number, block in enumerate(encoder.layers, start=1):
        projection, scale = find_part(block, "projection"), find_part(block, "scale") or torch.nn.Identity()
        hook = projection.register_forward_hook(lambda _, inputs, output: added.update(output=output, sum=inputs[0]))
        norm = find_part(block, "attention").register_forward_pre_hook(
            lambda _, inputs, words: added.update(normed=inputs[0] if inputs else words["hidden_states"]),
            with_kwargs=True,
        )
        encoder.tower(pixels)
        hook.remove(), norm.remove()
        heads = found[number]
        if name != "gated":
            added["sum"] = scale(added["output"] - projection.bias)
            update = torch.einsum("bhij,bhjd,hcd->bic", heads.attention, heads.values, heads.weights)
        else:  # the gate stands between
            gated = find_part(block, "attention").gate((heads.attention @ heads.values).transpose(1, 2).flatten(2),
                                                       heads.normed)  # fmt: skip
            update = gated
        torch.testing.assert_close(update, added["sum"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.normed, added["normed"])
        assert heads.is_average
        if number == 2:
            torch.testing.assert_close(heads.attention[:, :, : encoder.num_prefix_tokens],
                                       encoder.prefix_attention(pixels, layers=[2])[0])  # fmt: skip


def test_attention_that_does_more_than_average_is_refused():
    model = MODELS["ours"]().eval()
    model.layers[1].attention.proj.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with pytest.raises(ValueError, match="one of layer 2 that does more"):
        read_heads(load_encoder(model), torch.randn(1, 3, 32, 32), lambda heads: heads)
    assert not any(module._forward_hooks for module in model.modules())

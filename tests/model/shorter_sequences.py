"""What holds for every model with fewer tokens inside its layers, of four layers, for tests of each kind."""

import pytest
import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.features import class_token_updates, extract_features, load_encoder
from modeling_vitreg.features.heads import read_heads
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModelOutput


def assert_features_and_back_ends_agree(
    model: ViTWithRegistersModel, images: Tensor, *, shown: ViTWithRegistersModelOutput, runs: Tensor | float = 1.0
) -> None:
    """Features are those of whole sequences, and eager attention gives the same tokens.

    Args:
        shown: output with attentions.
        runs: (B, P, 1), whether the last layer computes a patch.
    """
    expected, prefix, encoder = model(images), model.config.num_prefix_tokens, load_encoder(model)
    (tokens,) = extract_features(encoder, images, layers=3)
    states = model(images, output_hidden_states=True).hidden_states
    assert torch.equal(tokens.patch_tokens, states[3][:, prefix:])
    (values,) = extract_features(encoder, images, layers=4, feature="value")
    layer = model.layers[3]
    own = layer.attention.qkv(layer.norm1(states[3])).split(layer.attention.sizes, dim=-1)[2][:, prefix:]
    torch.testing.assert_close(values.patch_tokens, own * runs, rtol=1e-5, atol=1e-5)
    updates = class_token_updates(encoder, images, layer=4)
    assert updates["patches"].abs().max() > 0
    with pytest.raises(ValueError, match="among all tokens, got a model with token_reduction"):
        read_heads(encoder, images, lambda heads: None)
    recorded = encoder.prefix_attention(images, layers=[4])[0]
    torch.testing.assert_close(recorded, shown.attentions[3][:, :, :prefix])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(images).last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="token_reduction needs attention 'eager' or 'sdpa', got 'flex_attention'"):
        model(images)


def assert_compiled_and_exported_agree(
    model: ViTWithRegistersModel, images: Tensor
) -> tuple[ViTWithRegistersModelOutput, ViTWithRegistersModelOutput]:
    """The same tokens as one graph and exported; returns the outputs of the model and of the graph."""
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled.last_hidden_state, expected.last_hidden_state)
    exported = torch.export.export(model, (images,), strict=False).module()(images)
    torch.testing.assert_close(exported.last_hidden_state, expected.last_hidden_state)
    return expected, compiled

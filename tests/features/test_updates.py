"""What a layer adds to the class token, by kind of token: equal to a slow program, and to the model's own sum."""

import pytest
import timm
import torch
from planted_models import plain_model
from reference_models import randomise
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.features import class_token_updates, load_encoder, register_share


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}


def _timm():
    return timm.create_model(
        "vit_small_patch14_reg4_dinov2", embed_dim=32, depth=2, num_heads=4, img_size=32, patch_size=8, num_classes=0
    )


MODELS = {
    "ours": lambda: ViTWithRegistersModel(
        ViTWithRegistersConfig(**SIZES, num_register_tokens=3, layer_scale_init_value=0.5, initializer_range=0.2)
    ),
    "dinov2": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=2)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "timm": _timm,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_updates_add_up_to_what_the_layer_adds(name):
    torch.manual_seed(0)
    encoder = load_encoder(randomise(MODELS[name]()))
    pixels = torch.randn(2, 3, 32, 32)
    updates = class_token_updates(encoder, pixels, layer=1)
    layer = encoder.layers[0]
    inner = layer.attention if hasattr(layer, "attention") else getattr(layer, "self_attn", None) or layer.attn
    added = {}
    scale = getattr(layer, "layer_scale1", None) or getattr(layer, "ls1", None) or torch.nn.Identity()
    hook = inner.register_forward_hook(
        lambda _, __, output: added.update(own=output[0] if isinstance(output, tuple) else output)
    )
    encoder.tower(pixels)
    hook.remove()
    bias = next(
        module.bias
        for path, module in inner.named_modules()
        if path.split(".")[-1] in ("proj", "dense", "o_proj", "out_proj")
    )
    with torch.no_grad():
        expected = scale(added["own"])[:, 0] - scale(bias)
    torch.testing.assert_close(sum(updates.values()), expected, rtol=1e-4, atol=1e-6)
    assert all(part.shape == (2, 32) for part in updates.values())
    assert (updates["registers"].abs().sum() > 0) == (encoder.num_register_tokens > 0)


def test_the_share_equals_the_slow_program():
    torch.manual_seed(0)
    model = MODELS["ours"]().eval()
    encoder, pixels = load_encoder(model), torch.randn(2, 3, 32, 32)
    (attention,) = encoder.prefix_attention(pixels, layers=[2])
    layer = model.layers[1]
    state = model(pixels, output_hidden_states=[1]).hidden_states[1]
    value = layer.attention.v_proj(layer.norm1(state)) if hasattr(layer.attention, "v_proj") else None
    if value is None:
        value = layer.attention.qkv(layer.norm1(state)).chunk(3, dim=-1)[2]
    for image in range(2):
        parts = torch.zeros(3, 32)
        for token in range(state.shape[1]):
            kind = 0 if token == 0 else 1 if token <= 3 else 2
            for head in range(4):
                columns = slice(8 * head, 8 * head + 8)
                moved = layer.attention.proj.weight[:, columns] @ value[image, token, columns]
                parts[kind] += attention[image, head, 0, token] * moved.detach()
        lengths = layer.layer_scale1(parts).norm(dim=1)
        expected = lengths[1] / lengths.sum()
        torch.testing.assert_close(register_share(encoder, pixels)[image], expected.detach(), rtol=1e-4, atol=1e-6)


def test_without_registers_or_class_token_there_is_no_share():
    pixels = torch.randn(1, 3, 32, 32)
    assert register_share(load_encoder(plain_model(num_register_tokens=0)), pixels) is None
    assert class_token_updates(load_encoder(plain_model(has_cls_token=False, pooling="mean")), pixels) is None


def test_attention_that_does_more_than_average_has_no_parts(monkeypatch):
    model = MODELS["ours"]().eval()
    model.layers[-1].attention.proj.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))  # a gate
    assert class_token_updates(load_encoder(model), torch.randn(1, 3, 32, 32)) is None

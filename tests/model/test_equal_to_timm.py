"""With the weights of a model of timm, every token of every layer is that model's, and so are pool and logits.

The models are timm's by name, made small by arguments, and take images of any size.
"""

from dataclasses import dataclass, field

import pytest
import timm
import torch
from reference_models import (
    SIZES,
    assert_small,
    concatenate,
    layer_errors,
    randomise,
    relative_error,
    rename,
    token_errors,
)

from modeling_vitreg import ViTWithRegistersForImageClassification


NAMES = {
    r"^": "vitreg.",
    r"vitreg\.head_dist": "distillation_classifier",
    r"vitreg\.head": "classifier",
    r"patch_embed\.proj": "embeddings.patch_embeddings",
    r"cls_token": "embeddings.cls_token",
    r"dist_token": "embeddings.distillation_token",
    r"reg_token": "embeddings.register_tokens.weight",
    r"pos_embed": "embeddings.position_embeddings.weight",
    r"norm_pre": "pre_layernorm",
    r"\.(fc_)?norm\.": ".layernorm.",
    r"blocks": "layers",
    r"attn": "attention",
    r"ls(\d)\.gamma|gamma_(\d)": r"layer_scale\1\2.weight",
    r"([qkv])_bias": r"\1.bias",
}


def weights_from_timm(theirs: dict) -> dict:
    """Weights of any plain ViT of timm with its heads. Eva has no bias on the keys, which is zero in ours."""
    weights = rename(theirs, NAMES)
    for name in [name for name in weights if name.endswith(".q.bias")]:
        weights[name.replace(".q.", ".k.")] = torch.zeros_like(weights[name])
    weights = concatenate(weights, ("q", "k", "v"), "qkv")
    weights = concatenate(weights, ("fc1_g", "fc1_x"), "fc1")
    registers = "vitreg.embeddings.register_tokens.weight"
    if registers in weights:
        weights[registers] = weights[registers][0]  # [1, R, D] -> [R, D]
    return weights


@dataclass(frozen=True)
class Family:
    """A model of timm, and what makes ours equal to it.

    Args:
        name: of the model in timm.
        fields: the fields of our configuration that are not its defaults.
        places: where its sequence has each kind of tokens.
        arguments: of the model beside its sizes.
    """

    name: str
    fields: dict
    places: dict
    arguments: dict = field(default_factory=dict)


CLS = {"cls_token": 0, "patch_tokens": slice(1, None)}
CLS_DISTILLATION = {"cls_token": 0, "distillation_token": 1, "patch_tokens": slice(2, None)}
CLS_REGISTERS = {"cls_token": 0, "register_tokens": slice(1, 5), "patch_tokens": slice(5, None)}
REGISTERS = {"register_tokens": slice(0, 4), "patch_tokens": slice(4, None)}

VIT = {"num_register_tokens": 0}
SCALED = {"num_register_tokens": 0, "layer_scale_init_value": 1.0, "has_prefix_positions": False}
REGISTERED = {**SCALED, "num_register_tokens": 4}
CLIP = {"num_register_tokens": 0, "layer_norm_eps": 1e-5, "has_patch_bias": False, "has_pre_norm": True}
DINOV3 = {
    "num_register_tokens": 4,
    "layer_scale_init_value": 1.0,
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "rope",
    "pooling": "mean",
}
DINOV3_NO_BIAS = {**DINOV3, "has_query_bias": False, "has_key_bias": False, "has_value_bias": False}

FAMILIES = {
    "vit": Family("vit_base_patch16_224", VIT, CLS),
    "vit with oblong images and patches": Family(
        "vit_base_patch16_224", {**VIT, "image_size": (48, 32), "patch_size": (8, 4)}, CLS
    ),
    "vit without class token": Family(
        "vit_base_patch16_224",
        {**VIT, "has_cls_token": False, "pooling": "mean", "has_pooled_norm": True},
        {"patch_tokens": slice(0, None)},
        {"class_token": False, "global_pool": "avg"},
    ),
    "deit distilled": Family(
        "deit_tiny_distilled_patch16_224",
        {**VIT, "has_distillation_token": True, "pooling": "cls_distillation"},
        CLS_DISTILLATION,
    ),
    "deit3": Family("deit3_small_patch16_224", SCALED, CLS),
    "dinov2": Family("vit_small_patch14_dinov2", {**SCALED, "has_prefix_positions": True}, CLS),
    "dinov2 with registers": Family("vit_small_patch14_reg4_dinov2", REGISTERED, CLS_REGISTERS),
    "dinov2 with registers and swiglu": Family(
        "vit_giant_patch14_reg4_dinov2",
        {**REGISTERED, "hidden_act": "swiglu", "intermediate_size": 85},
        CLS_REGISTERS,
    ),
    "registers without class token": Family(
        "vit_medium_patch16_reg4_gap_256",
        {**REGISTERED, "has_cls_token": False, "pooling": "mean", "has_pooled_norm": True},
        REGISTERS,
    ),
    "refined patches": Family(
        "vit_base_patch14_reg4_dinov2", {**REGISTERED, "pooling": "prr"}, CLS_REGISTERS, {"global_pool": "prr"}
    ),
    "refined patches without class token": Family(
        "vit_medium_patch16_reg4_gap_256",
        {**REGISTERED, "has_cls_token": False, "pooling": "prr"},
        REGISTERS,
        {"global_pool": "prr", "fc_norm": False},
    ),
    "clip": Family("vit_base_patch16_clip_224", CLIP, CLS),
    "clip with quick gelu": Family("vit_base_patch16_clip_quickgelu_224", {**CLIP, "hidden_act": "quick_gelu"}, CLS),
    "dinov3": Family("vit_small_patch16_dinov3", DINOV3_NO_BIAS, CLS_REGISTERS),
    "dinov3 pooled by class token": Family(
        "vit_small_patch16_dinov3", {**DINOV3_NO_BIAS, "pooling": "cls"}, CLS_REGISTERS, {"global_pool": "token"}
    ),
    "dinov3 with bias": Family("vit_small_patch16_dinov3_qkvb", {**DINOV3, "has_key_bias": False}, CLS_REGISTERS),
    "dinov3 with gated mlp": Family(
        "vit_small_plus_patch16_dinov3",
        {**DINOV3_NO_BIAS, "hidden_act": "swiglu", "intermediate_size": 128},
        CLS_REGISTERS,
    ),
    "dinov3 with gated mlp and bias": Family(
        "vit_small_plus_patch16_dinov3_qkvb",
        {**DINOV3, "has_key_bias": False, "hidden_act": "swiglu", "intermediate_size": 128},
        CLS_REGISTERS,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_every_layer_and_the_logits_are_those_of_timm(name, tiny, record_property):
    family = FAMILIES[name]
    if family.arguments.get("global_pool") == "prr" and not hasattr(timm.layers, "AttentionPoolPrr"):
        pytest.skip(f"timm {timm.__version__} has no pooling prr")
    config = tiny(**family.fields, num_labels=5)
    theirs = randomise(make_small(family, config))
    states = record_inputs([*theirs.blocks, theirs.norm])
    ours = ViTWithRegistersForImageClassification(config).eval()
    ours.load_state_dict(weights_from_timm(theirs.state_dict()), strict=True)
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        states.clear()
        expected = theirs.forward_features(images)
        output = ours.vitreg(images, output_hidden_states=True)
        found = token_errors(output, expected, family.places)
        found |= layer_errors(output.hidden_states, states, family.places)
        found["pooled"] = relative_error(output.pooler_output, theirs.forward_head(expected, pre_logits=True))
        found["logits"] = relative_error(ours(images).logits, theirs(images))
        errors |= {(size, what): error for what, error in found.items()}
    assert_small(errors, record_property)


def make_small(family: Family, config) -> torch.nn.Module:
    """The model of timm in the sizes of our configuration."""
    arguments = {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_labels,
        "dynamic_img_size": True,
    }
    return timm.create_model(family.name, **(arguments | family.arguments))


def record_inputs(modules: list) -> list:
    """A list to which each of these modules, when it runs, adds the tokens that it gets."""
    inputs = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, positional: inputs.append(positional[0]))
    return inputs

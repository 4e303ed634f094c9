"""With the weights of a model of transformers, every token of every layer is that model's, at any size of image.

The weights are read from the saved file, whose names are the same in every version of the library.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from reference_models import (
    SIZES,
    assert_small,
    concatenate,
    layer_errors,
    randomise,
    relative_error,
    rename,
    states_like,
    token_errors,
)
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ViTConfig,
    ViTMAEConfig,
)

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel


# ViT, DeiT, MAE, DINOv2
NAMES = {
    r"^(vit|deit|dinov2|dinov2_with_registers)\.": "vitreg.",
    r"cls_classifier": "classifier",
    r"patch_embeddings\.projection": "patch_embeddings",
    r"(position_embeddings|register_tokens)": r"\1.weight",
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.": "attention.",
    r"attention\.output\.dense": "attention.proj",
    r"intermediate\.dense|mlp\.weights_in": "mlp.fc1",
    r"output\.dense|mlp\.weights_out": "mlp.fc2",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"lambda1": "weight",
}
DINOV3_NAMES = {
    r"register_tokens": "register_tokens.weight",
    r"^layer\.": "layers.",
    r"^norm\.": "layernorm.",
    r"o_proj": "proj",
    r"down_proj": "fc2",
    r"lambda1": "weight",
}
CLIP_NAMES = {
    r"^vision_model\.": "",
    r"class_embedding": "cls_token",
    r"patch_embedding": "patch_embeddings",
    r"position_embedding\.": "position_embeddings.",
    r"pre_layrnorm": "pre_layernorm",
    r"encoder\.layers": "layers",
    r"self_attn": "attention",
    r"out_proj": "proj",
    r"layer_norm": "norm",
    r"post_layernorm": "layernorm",
}


def weights_from_transformers(saved: dict) -> dict:
    """Weights of ViT, DeiT and DINOv2, with any heads."""
    weights = concatenate(rename(saved, NAMES), ("query", "key", "value"), "qkv")
    return with_our_shapes(weights)


def weights_from_mae(saved: dict) -> dict:
    """Weights of the encoder of MAE; the position of its class token is zero, and ours has none."""
    weights = weights_from_transformers(saved)
    positions = weights["embeddings.position_embeddings.weight"]
    assert not positions[:, 0].any()
    return {**weights, "embeddings.position_embeddings.weight": positions[:, 1:]}


def weights_from_dinov3(saved: dict) -> dict:
    """Weights of DINOv3: keys have no bias, which is zero in ours."""
    weights = rename(saved, DINOV3_NAMES)
    weights |= {
        name.replace("weight", "bias"): torch.zeros_like(weight[0])
        for name, weight in weights.items()
        if name.endswith("k_proj.weight")
    }
    weights = concatenate(weights, ("q_proj", "k_proj", "v_proj"), "qkv")
    if "layers.0.mlp.gate_proj.weight" in weights:
        return with_our_shapes(concatenate(weights, ("gate_proj", "up_proj"), "fc1"))
    return with_our_shapes(rename(weights, {"up_proj": "fc1"}))


def weights_from_clip(saved: dict) -> dict:
    """Weights of CLIP's image tower."""
    weights = concatenate(rename(saved, CLIP_NAMES), ("q_proj", "k_proj", "v_proj"), "qkv")
    return with_our_shapes(weights)


def with_our_shapes(weights: dict) -> dict:
    """Tokens are (1, 1, D), registers (R, D), positions (1, slots + P, D)."""
    for name, weight in weights.items():
        width = weight.shape[-1]
        if name.endswith(("cls_token", "mask_token")):
            weights[name] = weight.reshape(1, 1, width)
        elif "register_tokens" in name:
            weights[name] = weight.reshape(-1, width)
        elif "position_embeddings" in name:
            weights[name] = weight.reshape(1, -1, width)
    return weights


@dataclass(frozen=True)
class Family:
    """A model of transformers, and what makes ours equal to it.

    Args:
        build: makes the model from the sizes that all configurations name alike.
        fields: the fields of our configuration that are not its defaults.
        places: where its sequence has each kind of tokens.
        weights: makes our weights of those in its file.
        options: of its forward.
        is_normed: whether its last hidden state lies behind the final norm.
    """

    build: Callable
    fields: dict
    places: dict
    weights: Callable = weights_from_transformers
    options: dict = field(default_factory=dict)
    is_normed: bool = True


CLS = {"cls_token": 0, "patch_tokens": slice(1, None)}
CLS_DISTILLATION = {"cls_token": 0, "distillation_token": 1, "patch_tokens": slice(2, None)}
CLS_REGISTERS = {"cls_token": 0, "register_tokens": slice(1, 5), "patch_tokens": slice(5, None)}

VIT = {"num_register_tokens": 0, "intermediate_size": 80, "layer_norm_eps": 1e-12, "interpolate_antialias": False}
DEIT = {**VIT, "has_distillation_token": True}
DINOV2 = {
    "num_register_tokens": 0,
    "layer_scale_init_value": 1.0,
    "interpolate_antialias": False,
    "has_mask_token": True,
}
DINOV2_REGISTERS = {**DINOV2, "num_register_tokens": 4, "interpolate_antialias": True}
DINOV3 = {
    "num_register_tokens": 4,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-5,
    "layer_scale_init_value": 1.0,
    "position_embedding_type": "rope",
    "has_key_bias": False,
    "has_mask_token": True,
}
CLIP = {
    "num_register_tokens": 0,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "interpolate_antialias": False,
    "has_patch_bias": False,
    "has_pre_norm": True,
}

RESIZE = {"interpolate_pos_encoding": True}

FAMILIES = {
    "vit": Family(
        lambda sizes: transformers.ViTModel(
            ViTConfig(**sizes, intermediate_size=80), add_pooling_layer=False, use_mask_token=True
        ),
        {**VIT, "has_mask_token": True},
        CLS,
        options=RESIZE,
    ),
    "vit without bias of queries, keys and values": Family(
        lambda sizes: transformers.ViTModel(
            ViTConfig(**sizes, intermediate_size=80, qkv_bias=False), add_pooling_layer=False
        ),
        {**VIT, "has_query_bias": False, "has_key_bias": False, "has_value_bias": False},
        CLS,
        options=RESIZE,
    ),
    "deit": Family(
        lambda sizes: transformers.DeiTModel(
            DeiTConfig(**sizes, intermediate_size=80), add_pooling_layer=False, use_mask_token=True
        ),
        {**DEIT, "has_mask_token": True},
        CLS_DISTILLATION,
        options=RESIZE,
    ),
    "dinov2": Family(lambda sizes: transformers.Dinov2Model(Dinov2Config(**sizes)), DINOV2, CLS),
    "dinov2 with swiglu": Family(
        lambda sizes: transformers.Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)),
        {**DINOV2, "hidden_act": "swiglu"},
        CLS,
    ),
    "dinov2 with registers": Family(
        lambda sizes: transformers.Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)),
        DINOV2_REGISTERS,
        CLS_REGISTERS,
    ),
    "dinov2 with registers and swiglu": Family(
        lambda sizes: transformers.Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, use_swiglu_ffn=True)),
        {**DINOV2_REGISTERS, "hidden_act": "swiglu"},
        CLS_REGISTERS,
    ),
    "dinov3": Family(
        lambda sizes: transformers.DINOv3ViTModel(
            DINOv3ViTConfig(**sizes, intermediate_size=80, num_register_tokens=4)
        ),
        DINOV3,
        CLS_REGISTERS,
        weights_from_dinov3,
    ),
    "dinov3 with gated mlp": Family(
        lambda sizes: transformers.DINOv3ViTModel(
            DINOv3ViTConfig(
                **sizes, intermediate_size=80, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"
            )
        ),
        {**DINOV3, "hidden_act": "swiglu"},
        CLS_REGISTERS,
        weights_from_dinov3,
    ),
    "clip": Family(
        lambda sizes: transformers.CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=80)),
        CLIP,
        CLS,
        weights_from_clip,
        options=RESIZE,
        is_normed=False,
    ),
}

# Classifiers: how to build one, and the fields of ours.
HEADS = {
    "vit": (lambda sizes: transformers.ViTForImageClassification(ViTConfig(**sizes, intermediate_size=80)), VIT),
    "deit": (lambda sizes: transformers.DeiTForImageClassification(DeiTConfig(**sizes, intermediate_size=80)), DEIT),
    "dinov2": (
        lambda sizes: transformers.Dinov2ForImageClassification(Dinov2Config(**sizes)),
        {**DINOV2, "pooling": "cls_mean"},
    ),
    "dinov2 with registers": (
        lambda sizes: transformers.Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**sizes)),
        {**DINOV2_REGISTERS, "pooling": "cls_mean"},
    ),
}


@pytest.fixture
def make_pair(tiny, tmp_path):
    """Make a model of transformers with random weights, and ours with the same."""

    def make(build, weights, fields, ours=ViTWithRegistersModel):
        config = tiny(**fields)
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        theirs = randomise(build({name: getattr(config, name) for name in shared}))
        theirs.save_pretrained(tmp_path)
        ours = ours(config).eval()
        ours.load_state_dict(weights(load_file(tmp_path / "model.safetensors")), strict=True)
        return ours, theirs

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_every_layer_is_that_of_transformers(name, make_pair, record_property):
    family = FAMILIES[name]
    ours, theirs = make_pair(family.build, family.weights, family.fields)
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        output = ours(images, output_hidden_states=True, output_pre_norm=True)
        expected = theirs(images, output_hidden_states=True, **family.options)
        tokens = output if family.is_normed else output.pre_norm
        found = token_errors(tokens, expected.last_hidden_state, family.places)
        found |= layer_errors(
            states_like(output, expected, is_normed=family.is_normed), expected.hidden_states, family.places
        )
        if expected.get("pooler_output") is not None:
            found["pooler_output"] = relative_error(output.pooler_output, expected.pooler_output)
        errors |= {(size, what): error for what, error in found.items()}
    assert_small(errors, record_property)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "has_mask_token" in family.fields])
def test_masked_patches_are_replaced_as_in_transformers(name, make_pair, record_property):
    family = FAMILIES[name]
    ours, theirs = make_pair(family.build, family.weights, family.fields)
    images, mask = torch.randn(2, 3, 24, 40), torch.rand(2, 15) < 0.5
    output = ours(images, bool_masked_pos=mask)
    expected = theirs(images, bool_masked_pos=mask, **family.options)
    assert_small(token_errors(output, expected.last_hidden_state, family.places), record_property)


@torch.no_grad()
def test_rotary_positions_of_training_are_those_of_transformers_for_the_same_seed(make_pair, record_property):
    ours, theirs = make_pair(
        lambda sizes: transformers.DINOv3ViTModel(
            DINOv3ViTConfig(
                **sizes,
                intermediate_size=80,
                num_register_tokens=4,
                pos_embed_shift=0.3,
                pos_embed_jitter=1.5,
                pos_embed_rescale=2.0,
            )
        ),
        weights_from_dinov3,
        {**DINOV3, "rope_shift": 0.3, "rope_jitter": 1.5, "rope_rescale": 2.0},
    )
    images = torch.randn(2, 3, 24, 40)
    torch.manual_seed(1)
    output = ours.train()(images)
    torch.manual_seed(1)
    expected = theirs.train()(images)
    assert_small(token_errors(output, expected.last_hidden_state, CLS_REGISTERS), record_property)


@torch.no_grad()
def test_every_token_of_every_layer_is_that_of_the_encoder_of_mae(make_pair, record_property):
    ours, theirs = make_pair(
        build_mae,
        weights_from_mae,
        {**VIT, "position_embedding_type": "sincos"},
    )
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        output = ours(images, output_hidden_states=True)
        expected = theirs(images, output_hidden_states=True, **RESIZE)
        found = token_errors(output, unshuffle(expected.last_hidden_state, expected.ids_restore), CLS)
        states = tuple(unshuffle(state, expected.ids_restore) for state in expected.hidden_states)
        found |= layer_errors(states_like(output, expected), states, CLS)
        errors |= {(size, what): error for what, error in found.items()}
    assert_small(errors, record_property)


def test_the_fixed_positions_of_a_new_model_are_those_of_mae(tiny, make_pair):
    fields = {**VIT, "position_embedding_type": "sincos"}
    ours, _ = make_pair(build_mae, weights_from_mae, fields)
    new = ViTWithRegistersModel(tiny(**fields))
    assert torch.equal(new.embeddings.position_embeddings.weight, ours.embeddings.position_embeddings.weight)


def build_mae(sizes: dict) -> torch.nn.Module:
    """MAE's encoder of all patches, with its fixed positions; transformers 5 leaves those of a new model at zero."""
    mae = transformers.ViTMAEModel(ViTMAEConfig(**sizes, intermediate_size=80, mask_ratio=0.0))
    mae.embeddings.patch_embeddings.projection._is_hf_initialized = False
    mae.embeddings.initialize_weights()
    return mae


def unshuffle(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Patches behind a class token to where they lie in the image."""
    patches = tokens[:, 1:].gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], dim=1)


def weights_of_classifier(saved: dict) -> dict:
    """Weights of a whole classifier, which has no use for a mask token."""
    weights = weights_from_transformers(saved)
    weights.pop("vitreg.embeddings.mask_token", None)
    return weights


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_transformers(name, make_pair, record_property):
    build, fields = HEADS[name]
    ours, theirs = make_pair(
        lambda sizes: build({**sizes, "num_labels": 5}),
        weights_of_classifier,
        {**fields, "num_labels": 5},
        ViTWithRegistersForImageClassification,
    )
    options = RESIZE if name in ("vit", "deit") else {}
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        errors[size] = relative_error(ours(images).logits, theirs(images, **options).logits)
    assert_small(errors, record_property)


@torch.no_grad()
def test_both_logits_of_a_distilled_model_are_those_of_transformers(make_pair, record_property):
    ours, theirs = make_pair(
        lambda sizes: transformers.DeiTForImageClassificationWithTeacher(
            DeiTConfig(**sizes, intermediate_size=80, num_labels=5)
        ),
        weights_of_classifier,
        {**DEIT, "pooling": "cls_distillation", "num_labels": 5},
        ViTWithRegistersForImageClassification,
    )
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        output, expected = ours(images), theirs(images, **RESIZE)
        for logits in ("logits", "cls_logits", "distillation_logits"):
            errors[size, logits] = relative_error(output[logits], expected[logits])
    assert_small(errors, record_property)


@torch.no_grad()
def test_the_projection_of_clip_is_a_classifier_without_bias(make_pair, record_property):
    ours, theirs = make_pair(
        lambda sizes: transformers.CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, intermediate_size=80, projection_dim=5)
        ),
        weights_from_clip_with_projection,
        {**CLIP, "num_labels": 5},
        ViTWithRegistersForImageClassification,
    )
    errors = {}
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        errors[size] = relative_error(ours(images).logits, theirs(images, **RESIZE).image_embeds)
    assert_small(errors, record_property)


def weights_from_clip_with_projection(saved: dict) -> dict:
    """Weights of CLIP's image tower as the base of a classifier, and those of its projection."""
    projection = saved.pop("visual_projection.weight")
    weights = {f"vitreg.{name}": weight for name, weight in weights_from_clip(saved).items()}
    return {**weights, "classifier.weight": projection, "classifier.bias": torch.zeros(len(projection))}

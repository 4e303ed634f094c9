"""transformers: ViT, DeiT, MAE, MSN, I-JEPA, Dinov2, DINOv3, CLIP and its kin, and their classifiers.

The tables use the names that every version writes to files. The names that version 5 has in memory, and those of CLIP
with and without `vision_model.`, are mapped to them first. `config.json` has what the shapes do not show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

import torch

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Drop, Join, Rename, Rule, add_axes, add_axis, drop_axes, drop_axis
from .layout import BILINEAR, CLIP, IMAGENET, INCEPTION, CheckpointInfo, Layout, prepare_crop, prepare_square
from .mae import FIXED, is_sincos
from .settings import labels_of, side_of


EMBEDDINGS: list[Rule] = [
    Rename("embeddings.cls_token", "embeddings.cls_token"),
    Rename("embeddings.distillation_token", "embeddings.distillation_token"),
    Rename("embeddings.register_tokens", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("embeddings.patch_embeddings.projection.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("layernorm.{leaf}", "layernorm.{leaf}"),
    Drop("pooler.dense.{leaf}", why="a layer after the class token, which this family does not have"),
]
POSITIONS: list[Rule] = [Rename("embeddings.position_embeddings", "embeddings.position_embeddings.weight")]
LAYER = "encoder.layer.{i}"
ATTENTION: list[Rule] = [
    Join(
        tuple(f"{LAYER}.attention.attention.{part}.{{leaf}}" for part in ("query", "key", "value")),
        "layers.{i}.attention.qkv.{leaf}",
    ),
    Rename(f"{LAYER}.attention.output.dense.{{leaf}}", "layers.{i}.attention.proj.{leaf}"),
]
VIT_LAYER: list[Rule] = [
    Rename(f"{LAYER}.layernorm_before.{{leaf}}", "layers.{i}.norm1.{leaf}"),
    Rename(f"{LAYER}.layernorm_after.{{leaf}}", "layers.{i}.norm2.{leaf}"),
    Rename(f"{LAYER}.intermediate.dense.{{leaf}}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename(f"{LAYER}.output.dense.{{leaf}}", "layers.{i}.mlp.fc2.{leaf}"),
]
DINO_LAYER: list[Rule] = [
    Rename(f"{LAYER}.norm1.{{leaf}}", "layers.{i}.norm1.{leaf}"),
    Rename(f"{LAYER}.norm2.{{leaf}}", "layers.{i}.norm2.{leaf}"),
    Rename(f"{LAYER}.layer_scale1.lambda1", "layers.{i}.layer_scale1.weight"),
    Rename(f"{LAYER}.layer_scale2.lambda1", "layers.{i}.layer_scale2.weight"),
]
_MLP = ("fc1", "fc2")
PLAIN_MLP: list[Rule] = [
    Rename(f"{LAYER}.mlp.{part}.{{leaf}}", f"layers.{{i}}.mlp.{part}.{{leaf}}") for part in ("fc1", "fc2")
]
GATED_MLP: list[Rule] = [
    Rename(f"{LAYER}.mlp.weights_in.{{leaf}}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename(f"{LAYER}.mlp.weights_out.{{leaf}}", "layers.{i}.mlp.fc2.{leaf}"),
]
# What version 5 has in memory for the two above.
SPLIT_MLP: list[Rule] = [
    Join((f"{LAYER}.mlp.gate_proj.{{leaf}}", f"{LAYER}.mlp.up_proj.{{leaf}}"), "layers.{i}.mlp.fc1.{leaf}"),
    Rename(f"{LAYER}.mlp.down_proj.{{leaf}}", "layers.{i}.mlp.fc2.{leaf}"),
]
MASK = Rename("embeddings.mask_token", "embeddings.mask_token")
FLAT_MASK = Rename("embeddings.mask_token", "embeddings.mask_token", add_axis, drop_axis)
CLASSIFIER: list[Rule] = [Rename("classifier.{leaf}", "classifier.{leaf}")]
TWO_CLASSIFIERS: list[Rule] = [
    Rename("cls_classifier.{leaf}", "classifier.{leaf}"),
    Rename("distillation_classifier.{leaf}", "distillation_classifier.{leaf}"),
]
DINOV3: list[Rule] = [
    Rename("embeddings.cls_token", "embeddings.cls_token"),
    MASK,
    Rename("embeddings.register_tokens", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("embeddings.patch_embeddings.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("layer.{i}.norm1.{leaf}", "layers.{i}.norm1.{leaf}"),
    Rename("layer.{i}.norm2.{leaf}", "layers.{i}.norm2.{leaf}"),
    Rename("layer.{i}.attention.o_proj.{leaf}", "layers.{i}.attention.proj.{leaf}"),
    Rename("layer.{i}.layer_scale1.lambda1", "layers.{i}.layer_scale1.weight"),
    Rename("layer.{i}.layer_scale2.lambda1", "layers.{i}.layer_scale2.weight"),
    Rename("layer.{i}.mlp.down_proj.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
    Rename("norm.{leaf}", "layernorm.{leaf}"),
]
CLIP_LAYER = "encoder.layers.{i}"
CLIP_RULES: list[Rule] = [
    Rename("embeddings.class_embedding", "embeddings.cls_token", add_axes, drop_axes),
    Rename("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.weight"),
    Rename("embeddings.position_embedding.weight", "embeddings.position_embeddings.weight", add_axis, drop_axis),
    Drop("embeddings.position_ids", why="the numbers of the positions"),
    Rename("pre_layrnorm.{leaf}", "pre_layernorm.{leaf}"),
    Join(tuple(f"{CLIP_LAYER}.self_attn.{part}_proj.{{leaf}}" for part in "qkv"), "layers.{i}.attention.qkv.{leaf}"),
    Rename(f"{CLIP_LAYER}.self_attn.out_proj.{{leaf}}", "layers.{i}.attention.proj.{leaf}"),
    Rename(f"{CLIP_LAYER}.layer_norm1.{{leaf}}", "layers.{i}.norm1.{leaf}"),
    Rename(f"{CLIP_LAYER}.layer_norm2.{{leaf}}", "layers.{i}.norm2.{leaf}"),
    Rename(f"{CLIP_LAYER}.mlp.{{rest}}", "layers.{i}.mlp.{rest}"),
    Rename("post_layernorm.{leaf}", "layernorm.{leaf}"),
    Rename("visual_projection.weight", "projection.weight"),
    Drop("outside.{rest}", why="not part of the image tower"),
]
# Models whose image tower is CLIP's, and these towers alone.
CLIP_WHOLE = ("clip", "metaclip_2", "altclip", "chinese_clip")
CLIP_TOWERS = tuple(f"{name}_vision_model" for name in CLIP_WHOLE)
# Names that version 5 has in memory, and those that it writes.
_ALIASES = [
    (re.compile(r"^layers\.(\d+)\."), r"encoder.layer.\1."),
    (re.compile(r"(encoder\.layer\.\d+\.attention)\.([qkv])_proj\."), r"\1.attention.\2."),
    (re.compile(r"(encoder\.layer\.\d+\.attention)\.o_proj\."), r"\1.output.dense."),
]
_PARTS = {"q": "query", "k": "key", "v": "value"}


def _strip(name: str, *, base: str) -> str:
    return name.removeprefix(f"{base}.")


def _canonical(base: str) -> Callable[[Iterable[str]], dict[str, str]]:
    """Names of version 5 in memory, or with the prefix of a base model, as names in files."""

    def shorten(name: str) -> str:
        short = _strip(name, base=base)
        for pattern, written in _ALIASES:
            short = pattern.sub(written, short)
        short = re.sub(r"(attention\.attention)\.([qkv])\.", lambda match: f"{match[1]}.{_PARTS[match[2]]}.", short)
        is_vit = base in ("vit", "deit", "ijepa")
        if is_vit and ".mlp." in short:
            short = short.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        return short

    return lambda names: {name: shorten(name) for name in names}


def _canonical_dinov3(names: Iterable[str]) -> dict[str, str]:
    return {name: _strip(_strip(name, base="dinov3_vit"), base="model").removeprefix("model.") for name in names}


def _canonical_clip(names: Iterable[str]) -> dict[str, str]:
    has_prefix = any(name.startswith("vision_model.") for name in names)
    known = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")

    def shorten(name: str) -> str:
        if has_prefix and name.startswith("vision_model."):  # AltCLIP beside its text tower writes `layer`
            return name.removeprefix("vision_model.").replace("encoder.layer.", "encoder.layers.")
        is_own = name == "visual_projection.weight" or (not has_prefix and name.startswith(known))
        return name if is_own else f"outside.{name}"

    return {name: shorten(name) for name in names}


def read_settings(settings: dict) -> dict:
    """Fields that the settings of all classes have under the same names."""
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    return {
        "hidden_size": width,
        "num_hidden_layers": settings["num_hidden_layers"],
        "num_attention_heads": heads,
        "hidden_act": _act(settings),
        "image_size": _plain(settings.get("image_size", 224)),
        "patch_size": _plain(settings.get("patch_size", 16)),
        "num_channels": settings.get("num_channels", 3),
        "num_register_tokens": 0,
        "layer_norm_eps": settings.get("layer_norm_eps", 1e-6),
        "hidden_dropout_prob": settings.get("hidden_dropout_prob", 0.0),
        "initializer_range": settings.get("initializer_range", 0.02),
    }


def _plain(size):
    return size if isinstance(size, int) else tuple(size) if size[0] != size[1] else size[0]


def _act(settings: dict) -> str:
    act = settings.get("hidden_act", "gelu")
    if act not in ("gelu", "quick_gelu", "gelu_pytorch_tanh"):
        raise ConversionError(f"transformers' {settings['model_type']} with hidden_act={act!r} cannot be represented")
    return act


def _configure_vit(info: CheckpointInfo) -> dict:
    settings = info.settings
    has_bias = settings.get("qkv_bias", True)
    return {
        **read_settings(settings),
        "intermediate_size": settings.get("intermediate_size", 3072),
        "attention_probs_dropout_prob": settings.get("attention_probs_dropout_prob", 0.0),
        "interpolate_antialias": False,
        "has_mask_token": info.has("embeddings.mask_token"),
        **dict.fromkeys(("has_query_bias", "has_key_bias", "has_value_bias"), has_bias),
        **labels_of(info, "classifier"),
    }


def _configure_deit(info: CheckpointInfo) -> dict:
    fields = {**_configure_vit(info), "has_distillation_token": True}
    two = labels_of(info, "cls_classifier")
    return {**fields, **two, "pooling": "cls_distillation"} if two else fields


def _configure_ijepa(info: CheckpointInfo) -> dict:
    return {**_configure_vit(info), "has_cls_token": False, "pooling": "mean"}


def _configure_mae(info: CheckpointInfo) -> dict:
    is_fixed = is_sincos(info, "embeddings.position_embeddings")
    return {**_configure_vit(info), "position_embedding_type": "sincos" if is_fixed else "learned"}


def _configure_dinov2(info: CheckpointInfo) -> dict:
    settings = info.settings
    is_gated, ratio = settings.get("use_swiglu_ffn", False), settings.get("mlp_ratio", 4)
    width = settings["hidden_size"]
    hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 if is_gated else int(width * ratio)
    has_registers = "num_register_tokens" in settings
    labels = labels_of(info, "classifier")
    return {
        **read_settings(settings),
        "hidden_act": "swiglu" if is_gated else _act(settings),
        "intermediate_size": hidden,
        "num_register_tokens": settings.get("num_register_tokens", 0),
        "layer_scale_init_value": settings.get("layerscale_value", 1.0),
        "attention_probs_dropout_prob": settings.get("attention_probs_dropout_prob", 0.0),
        "drop_path_rate": settings.get("drop_path_rate", 0.0),
        "interpolate_antialias": has_registers,
        "has_mask_token": info.has("embeddings.mask_token") and not labels,
        **dict.fromkeys(("has_query_bias", "has_key_bias", "has_value_bias"), settings.get("qkv_bias", True)),
        **labels,
        **({"pooling": "cls_mean"} if labels else {}),
    }


def _configure_dinov3(info: CheckpointInfo) -> dict:
    settings = info.settings
    missing = [name for name in ("proj_bias", "mlp_bias") if not settings.get(name, True)]
    if missing:
        raise ConversionError(f"transformers' dinov3_vit with {missing[0]}=False cannot be represented")
    is_gated = settings.get("use_gated_mlp", False)
    if is_gated and settings.get("hidden_act") != "silu":
        raise ConversionError(f"dinov3_vit with a gate of {settings.get('hidden_act')!r} cannot be represented")
    rope = settings.get("rope_parameters") or {}
    return {
        **read_settings({**settings, "hidden_act": "gelu" if is_gated else settings.get("hidden_act", "gelu")}),
        "hidden_act": "swiglu" if is_gated else _act(settings),
        "intermediate_size": settings["intermediate_size"],
        "num_register_tokens": settings.get("num_register_tokens", 0),
        "layer_scale_init_value": settings.get("layerscale_value", 1.0),
        "drop_path_rate": settings.get("drop_path_rate", 0.0),
        "position_embedding_type": "rope",
        "rope_theta": rope.get("rope_theta", settings.get("rope_theta", 100.0)),
        "rope_shift": settings.get("pos_embed_shift"),
        "rope_jitter": settings.get("pos_embed_jitter"),
        "rope_rescale": settings.get("pos_embed_rescale"),
        "layer_norm_eps": settings.get("layer_norm_eps", 1e-5),
        "has_query_bias": settings.get("query_bias", True),
        "has_key_bias": settings.get("key_bias", False),
        "has_value_bias": settings.get("value_bias", True),
        "has_mask_token": info.has("embeddings.mask_token"),
    }


def _configure_clip(info: CheckpointInfo) -> dict:
    settings = info.settings
    vision = settings.get("vision_config") if settings["model_type"] in CLIP_WHOLE else settings
    vision = {"model_type": "clip_vision_model", **_CLIP_DEFAULTS, **(vision or {})}
    has_projection = info.has("visual_projection.weight")
    return {
        **read_settings(vision),
        "intermediate_size": vision["intermediate_size"],
        "attention_probs_dropout_prob": vision.get("attention_dropout", 0.0),
        "has_pre_norm": True,
        "has_patch_bias": False,
        "interpolate_antialias": False,
        "projection_size": info.size("visual_projection.weight", 0) if has_projection else None,
    }


_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def _vit_rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    return [*EMBEDDINGS, *POSITIONS, *ATTENTION, *VIT_LAYER, MASK, *CLASSIFIER]


def _deit_rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    return [*EMBEDDINGS, *POSITIONS, *ATTENTION, *VIT_LAYER, MASK, *_classifiers(config)]


def _classifiers(config: ViTWithRegistersConfig | None) -> list[Rule]:
    if config is None:
        return [*CLASSIFIER, *TWO_CLASSIFIERS]
    return TWO_CLASSIFIERS if config.pooling == "cls_distillation" else CLASSIFIER


def _mae_rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    is_fixed = config is not None and config.position_embedding_type == "sincos"
    fixed = [
        Rename(
            f"embeddings.{rule.source.replace('pos_embed', 'position_embeddings')}",
            rule.target,
            rule.to_target,
            rule.to_source,
        )
        for rule in FIXED
    ]
    decoder = Drop("decoder.{rest}", why="the decoder of pretraining")
    return [*EMBEDDINGS, *(fixed if is_fixed else POSITIONS), *ATTENTION, *VIT_LAYER, *CLASSIFIER, decoder]


def _dinov2_rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    is_gated = config is not None and config.hidden_act == "swiglu"
    gated = [*GATED_MLP, *SPLIT_MLP]
    mlp = [*PLAIN_MLP, *gated] if config is None else gated if is_gated else PLAIN_MLP
    has_mask = config is None or config.has_mask_token
    mask = FLAT_MASK if has_mask else Drop("embeddings.mask_token", why="a classifier does not use it")
    return [*EMBEDDINGS, *POSITIONS, *ATTENTION, *DINO_LAYER, *mlp, mask, *CLASSIFIER]


def _dinov3_rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    parts = tuple(f"layer.{{i}}.attention.{part}_proj.{{leaf}}" for part in "qkv")
    lacking = ()
    if config is None or not config.has_key_bias:
        biases = (config is None or config.has_query_bias, False, config is None or config.has_value_bias)
        lacking = tuple(part for part, is_there in zip(parts, biases) if not is_there)
    weights = tuple(part.replace("{leaf}", "weight") for part in parts)
    biases = tuple(part.replace("{leaf}", "bias") for part in parts)
    rules = [
        *DINOV3,
        Join(weights, "layers.{i}.attention.qkv.weight"),
        Join(biases, "layers.{i}.attention.qkv.bias", tuple(part.replace("{leaf}", "bias") for part in lacking)),
    ]
    gated = Join(("layer.{i}.mlp.gate_proj.{leaf}", "layer.{i}.mlp.up_proj.{leaf}"), "layers.{i}.mlp.fc1.{leaf}")
    plain = Rename("layer.{i}.mlp.up_proj.{leaf}", "layers.{i}.mlp.fc1.{leaf}")
    return [*rules, gated if config is None or config.hidden_act == "swiglu" else plain]


def _prepare(
    info: CheckpointInfo, config: ViTWithRegistersConfig, *, statistics: dict, squash: bool, **options
) -> dict:
    """For folders without the settings of an image processor: those of the class that the family uses."""
    side = side_of(config)
    make = prepare_square if squash else prepare_crop
    return make(side, **options, **statistics)


def _layout(name: str, base: str, configure, rules, *, statistics: dict, squash: bool = False, **options) -> Layout:
    canonical = {"dinov3_vit": _canonical_dinov3, "clip": _canonical_clip}.get(base, _canonical(base))
    return Layout(
        name=name,
        title=f"transformers' {base}",
        licence=None,
        rules=rules,
        configure=configure,
        prepare=lambda info, config: _prepare(info, config, statistics=statistics, squash=squash, **options),
        canonical=canonical,
    )


_SQUARE = {"statistics": INCEPTION, "squash": True, "resample": BILINEAR}
_CROP = {"statistics": IMAGENET}
# By `model_type`.
LAYOUTS = {
    "vit": _layout("transformers-vit", "vit", _configure_vit, _vit_rules, **_SQUARE),
    "deit": _layout("transformers-deit", "deit", _configure_deit, _deit_rules, **_CROP),
    "ijepa": _layout("transformers-ijepa", "ijepa", _configure_ijepa, _vit_rules, **_SQUARE),
    "vit_mae": _layout("transformers-mae", "vit", _configure_mae, _mae_rules, **_CROP),
    "dinov2": _layout("transformers-dinov2", "dinov2", _configure_dinov2, _dinov2_rules, **_CROP),
    "dinov2_with_registers": _layout(
        "transformers-dinov2-registers", "dinov2_with_registers", _configure_dinov2, _dinov2_rules, **_CROP
    ),
    "dinov3_vit": _layout(
        "transformers-dinov3", "dinov3_vit", _configure_dinov3, _dinov3_rules, statistics=IMAGENET, squash=True
    ),
    "clip_vision_model": _layout(
        "transformers-clip", "clip", _configure_clip, lambda config: list(CLIP_RULES), statistics=CLIP
    ),
}
LAYOUTS |= dict.fromkeys((*CLIP_WHOLE, *CLIP_TOWERS), LAYOUTS["clip_vision_model"])
LAYOUTS["vit_msn"] = LAYOUTS["vit"]
# It writes a tensor of registers where there are none.
LAYOUTS["dinov3_vit"] = dataclasses.replace(
    LAYOUTS["dinov3_vit"],
    extras=lambda config: (
        {} if config.num_register_tokens else {"embeddings.register_tokens": torch.zeros(1, 0, config.hidden_size)}
    ),
)

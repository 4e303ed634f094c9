"""transformers: AIMv2, with RMSNorm, SwiGLU, a norm of the patches and an attention pooling without query layer."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Drop, Fill, Join, Rename, Rule, add_axis, drop_axis
from .layout import CLIP, CheckpointInfo, Layout, prepare_crop
from .settings import complete, side_of
from .siglip import canonical
from .transformers import read_settings


LAYER = "encoder.layers.{i}"
_POOLING = "attention_pooling"
RULES: list[Rule] = [
    Rename("embeddings.patch_embed.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("embeddings.rms_norm.weight", "embeddings.patch_norm.weight"),
    Rename("embeddings.position_embedding.weight", "embeddings.position_embeddings.weight", add_axis, drop_axis),
    Join(tuple(f"{LAYER}.attention.{part}_proj.weight" for part in "qkv"), "layers.{i}.attention.qkv.weight"),
    Rename(f"{LAYER}.attention.out_proj.weight", "layers.{i}.attention.proj.weight"),
    Rename(f"{LAYER}.rms_norm1.weight", "layers.{i}.norm1.weight"),
    Rename(f"{LAYER}.rms_norm2.weight", "layers.{i}.norm2.weight"),
    Join((f"{LAYER}.ffn.gate_proj.weight", f"{LAYER}.ffn.up_proj.weight"), "layers.{i}.mlp.fc1.weight"),
    Rename(f"{LAYER}.ffn.down_proj.weight", "layers.{i}.mlp.fc2.weight"),
    Rename("rms_norm.weight", "layernorm.weight"),
    *(
        Fill(f"layers.{{i}}.{part}.bias", 0.0, why="this layout has no bias")
        for part in ("attention.proj", "mlp.fc1", "mlp.fc2")
    ),
    Rename("head.cls_token", f"{_POOLING}.probe"),
    Join(("head.k_proj.weight", "head.v_proj.weight"), f"{_POOLING}.key_value.weight"),
    Rename("head.output_proj.{leaf}", f"{_POOLING}.proj.{{leaf}}"),
    Drop("outside.{rest}", why="not part of the image tower"),
]


def _configure(info: CheckpointInfo) -> dict:
    settings = complete(info)
    if settings["is_native"]:
        raise ConversionError(
            "AIMv2 of native size computes its positions anew for each size: it cannot be represented"
        )
    odd = [name for name in ("qkv_bias", "mlp_bias") if settings[name]]
    if odd or settings["hidden_act"] != "silu":
        what = f"{odd[0]}=True" if odd else f"hidden_act={settings['hidden_act']!r}"
        raise ConversionError(f"transformers' {settings['model_type']} with {what} cannot be represented")
    pooling = {"pooling": "mean"}
    if info.has("head.cls_token"):
        pooling = {"pooling": "attention", "pooling_intermediate_size": 0}
        pooling |= {"has_pooling_query": False, "has_pooling_bias": False}
    return {
        **read_settings({**settings, "hidden_act": "gelu"}),
        "hidden_act": "swiglu",
        "intermediate_size": settings["intermediate_size"],
        "norm_type": "rmsnorm",
        "layer_norm_eps": settings["rms_norm_eps"],
        "has_patch_norm": True,
        "has_cls_token": False,
        "has_query_bias": False,
        "has_key_bias": False,
        "has_value_bias": False,
        **pooling,
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    return {
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "qkv_bias": False,
        "mlp_bias": False,
        "use_head": config.pooling == "attention",
    }


LAYOUT = Layout(
    name="transformers-aimv2",
    title="transformers' AIMv2",
    licence=None,
    rules=lambda config: list(RULES),
    configure=_configure,
    prepare=lambda info, config: prepare_crop(side_of(config), resize=side_of(config), **CLIP),
    canonical=lambda names: canonical(names, more=("rms_norm.",)),
    model_types=("aimv2_vision_model", "aimv2"),
    write_settings=_write_settings,
)

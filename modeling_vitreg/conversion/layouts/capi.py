"""facebookresearch/capi: `capi_vitl14_*.pth`, the encoder under `backbone.`; the predictor is dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg.positions_vitreg import capi_frequencies

from ..rules import Drop, Fill, Join, Rename, Rule, add_axis, drop_axis
from .layout import IMAGENET, CheckpointInfo, Layout, each, heads_of, prepare_crop


BLOCK = "encoder.blocks.{i}"
RULES: list[Rule] = [
    Rename("registers", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("patch_embed.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename(f"{BLOCK}.residual1.norm.weight", "layers.{i}.norm1.weight"),
    Join(tuple(f"{BLOCK}.residual1.fn.{part}_proj.weight" for part in "qkv"), "layers.{i}.attention.qkv.weight"),
    Rename(f"{BLOCK}.residual1.fn.proj.weight", "layers.{i}.attention.proj.weight"),
    Rename(f"{BLOCK}.residual2.norm.weight", "layers.{i}.norm2.weight"),
    Rename(f"{BLOCK}.residual2.fn.fc1.weight", "layers.{i}.mlp.fc1.weight"),
    Rename(f"{BLOCK}.residual2.fn.fc2.weight", "layers.{i}.mlp.fc2.weight"),
    Fill("layers.{i}.attention.proj.bias", 0.0, why="this layout has no bias"),
    Fill("layers.{i}.mlp.fc1.bias", 0.0, why="this layout has no bias"),
    Fill("layers.{i}.mlp.fc2.bias", 0.0, why="this layout has no bias"),
    Fill("layernorm.weight", 1.0, why="the final norm of this layout has no factors"),
    Drop("mask_token", why="belongs to the predictor"),
    Drop("decoder.{rest}", why="the predictor of pretraining"),
    Drop("outside.{rest}", why="not part of the backbone"),
]


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    def frequencies(name: str) -> Tensor:
        rows, empty = capi_frequencies(config).tile(2), torch.zeros(2 * len(capi_frequencies(config)))
        return torch.stack([torch.cat([rows, empty]), torch.cat([empty, rows])])

    return [*RULES, Drop(f"{BLOCK}.residual1.fn.rope.freqs", why="computed from the width", value=frequencies)]


def _canonical(name: str) -> str:
    if name.startswith("backbone."):
        return name.removeprefix("backbone.")
    return (
        name
        if name.startswith(("encoder.", "decoder.", "registers", "mask_token", "patch_embed"))
        else f"outside.{name}"
    )


def _configure(info: CheckpointInfo) -> dict:
    width, freqs = info.size("patch_embed.weight", 0), "encoder.blocks.*.residual1.fn.rope.freqs"
    patch = info.size("patch_embed.weight", -1)
    is_turned = info.has(freqs)
    return {
        "hidden_size": width,
        "num_hidden_layers": info.depth("encoder.blocks.*."),
        "num_attention_heads": width // info.size(freqs, 1) if is_turned else heads_of(info, width),
        "intermediate_size": info.size("encoder.blocks.*.residual2.fn.fc2.weight", 1),
        "patch_size": patch,
        "image_size": 224 // patch * patch,
        "num_channels": info.size("patch_embed.weight", 1),
        "num_register_tokens": info.size("registers", 1),
        "has_cls_token": False,
        "pooling": "mean",
        "norm_type": "rmsnorm",
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "rope",
        "rope_style": "capi",
        "has_query_bias": False,
        "has_key_bias": False,
        "has_value_bias": False,
    }


LAYOUT = Layout(
    name="capi",
    title="facebookresearch/capi",
    licence="apache-2.0",
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_crop(config.image_size, **IMAGENET),
    canonical=each(_canonical),
)

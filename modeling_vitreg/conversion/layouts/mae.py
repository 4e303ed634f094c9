"""facebookresearch/mae: the encoder of pretraining (`mae_pretrain_vit_*.pth`) and fine-tuned classifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg.positions_vitreg import sincos_position_table

from ..rules import Drop, Rename, Rule
from .blocks import HEAD, LAYERS, MLP, POSITIONS, STEM, read_sizes
from .layout import IMAGENET, CheckpointInfo, Layout, prepare_crop


DECODER: list[Rule] = [
    Drop("mask_token", why="belongs to the decoder"),
    Drop("decoder_{rest}", why="the decoder of pretraining"),
]


def _drop_slot(table: Tensor) -> Tensor:
    """(1, 1 + P, D) -> (1, P, D), without the zeros of the class token."""
    return table[:, 1:]


def _add_slot(table: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


FIXED: list[Rule] = [Rename("pos_embed", "embeddings.position_embeddings.weight", _drop_slot, _add_slot)]


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    positions = FIXED if config is not None and config.position_embedding_type == "sincos" else POSITIONS
    return [*STEM, *positions, *LAYERS, *MLP, *HEAD, *DECODER, Rename("fc_norm.{leaf}", "layernorm.{leaf}")]


def _configure(info: CheckpointInfo) -> dict:
    fields = {
        **read_sizes(info),
        "intermediate_size": info.size("blocks.*.mlp.fc2.weight", 1),
        "interpolate_antialias": False,
    }
    if is_sincos(info, "pos_embed"):
        fields["position_embedding_type"] = "sincos"
    if info.has("head.weight"):
        fields["num_labels"] = info.size("head.weight", 0)
    if info.has("fc_norm.weight"):
        fields |= {"pooling": "mean", "has_pooled_norm": True}
    return fields


def is_sincos(info: CheckpointInfo, name: str) -> bool:
    """Whether a position table with a slot for the class token is the fixed one of MAE."""
    _, num_positions, width = info.shapes[name]
    side = round((num_positions - 1) ** 0.5)
    if side * side != num_positions - 1 or width % 4:
        return False
    table = sincos_position_table((side, side), width).flatten(0, 1)
    found = info.read(name)[0].float()
    return not found[0].any() and torch.allclose(found[1:], table, atol=1e-5)


def _is_hinted(info: CheckpointInfo) -> bool:
    return info.has("decoder_*") or "mae" in info.file_name.lower() or is_sincos(info, "pos_embed")


LAYOUT = Layout(
    name="mae",
    title="facebookresearch/mae",
    licence="cc-by-nc-4.0",
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_crop(config.image_size, **IMAGENET),
    is_hinted=_is_hinted,
)

"""The names of timm for the parts of a Vision Transformer, which most projects use."""

from __future__ import annotations

from ..rules import Rename, Rule
from .layout import CheckpointInfo, heads_of, image_size_of


STEM: list[Rule] = [
    Rename("cls_token", "embeddings.cls_token"),
    Rename("patch_embed.proj.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("norm.{leaf}", "layernorm.{leaf}"),
]
POSITIONS: list[Rule] = [Rename("pos_embed", "embeddings.position_embeddings.weight")]
LAYERS: list[Rule] = [
    Rename("blocks.{i}.norm1.{leaf}", "layers.{i}.norm1.{leaf}"),
    Rename("blocks.{i}.attn.qkv.{leaf}", "layers.{i}.attention.qkv.{leaf}"),
    Rename("blocks.{i}.attn.proj.{leaf}", "layers.{i}.attention.proj.{leaf}"),
    Rename("blocks.{i}.norm2.{leaf}", "layers.{i}.norm2.{leaf}"),
]
MLP: list[Rule] = [
    Rename("blocks.{i}.mlp.fc1.{leaf}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.mlp.fc2.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
]
SCALES: list[Rule] = [
    Rename("blocks.{i}.ls1.gamma", "layers.{i}.layer_scale1.weight"),
    Rename("blocks.{i}.ls2.gamma", "layers.{i}.layer_scale2.weight"),
]
GAMMAS: list[Rule] = [
    Rename("blocks.{i}.gamma_1", "layers.{i}.layer_scale1.weight"),
    Rename("blocks.{i}.gamma_2", "layers.{i}.layer_scale2.weight"),
]
HEAD: list[Rule] = [Rename("head.{leaf}", "classifier.{leaf}")]


def read_sizes(info: CheckpointInfo, *, num_prefix_positions: int | None = 1) -> dict:
    """Sizes that the shapes show: width, depth, heads, MLP, patch, channels, and the size of the image.

    Args:
        info: facts about the checkpoint.
        num_prefix_positions: positions before the patches in the table; None if there is no table.
    """
    width = info.size("patch_embed.proj.weight", 0)
    patch = info.size("patch_embed.proj.weight", -2), info.size("patch_embed.proj.weight", -1)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": info.depth("blocks.*."),
        "num_attention_heads": heads_of(info, width),
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "num_channels": info.size("patch_embed.proj.weight", 1),
        "num_register_tokens": 0,
    }
    if num_prefix_positions is not None and "image_size" not in info.config_overrides:
        num_patches = info.size("pos_embed", -2) - num_prefix_positions
        sizes["image_size"] = image_size_of(info, num_patches, patch)
    return sizes

"""yun-liu/HAT-Net: `HAT-Net_*.pth`. It has norms that no image passes; they keep their initial values in training."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_vitreg import HATNetConfig, HATNetForImageClassification, HATNetModel

from ..rules import Drop, Rename, Rule
from .layout import IMAGENET, CheckpointInfo, Layout, prepare_crop


_IN_A_BLOCK = {
    "attn.norm": "attention.norm",
    "attn.qkv": "attention.qkv",
    "attn.grid_norm": "attention.local_norm",
    "attn.ds_norm": "attention.pool_norm",
    "attn.q": "attention.query",
    "attn.kv": "attention.key_value",
    "attn.proj": "attention.proj",
    "conv.conv1.0": "convolutions.norm1",
    "conv.conv1.1": "convolutions.expand",
    "conv.conv2.0": "convolutions.depthwise",
    "conv.conv3.0": "convolutions.reduce",
    "conv.conv3.1": "convolutions.norm2",
}
_AROUND = {
    "patch_embed.0": "embeddings.patch_embeddings",
    "patch_embed.1": "embeddings.norm",
    "patch_embed.3": "embeddings.projection",
    **{f"ds{stage + 2}.conv": f"downsamplings.{stage}.projection" for stage in range(3)},
    **{f"ds{stage + 2}.norm": f"downsamplings.{stage}.norm" for stage in range(3)},
    "classifier.1": "classifier",
}
_WINDOWS, _POOLS = (8, 7, 7, 1), (8, 4, 2, 1)  # of all published models


def _blocks(config: HATNetConfig) -> list[tuple[int, int]]:
    """Stage and number in it of each block."""
    return [(stage, number) for stage, depth in enumerate(config.depths) for number in range(depth)]


def _rules(config: HATNetConfig | None) -> list[Rule]:
    places = {f"blocks.{stage}.{{i}}": "layers.{i}" for stage in range(4)}
    if config is not None:
        places = {f"blocks.{stage}.{i}": f"layers.{layer}" for layer, (stage, i) in enumerate(_blocks(config))}
    names = _AROUND | {
        f"{block}.{there}": f"{layer}.{here}" for block, layer in places.items() for there, here in _IN_A_BLOCK.items()
    }
    rules: list[Rule] = [Rename(f"{there}.{{leaf}}", f"{here}.{{leaf}}") for there, here in names.items()]
    return rules + [Drop(f"{block}.attn.proj_norm.{{leaf}}", why="its code never calls this norm") for block in places]


def _configure(info: CheckpointInfo) -> dict:
    stages, has_windows = range(4), [info.has(f"blocks.{stage}.0.attn.grid_norm.weight") for stage in range(4)]
    widths = [info.size(f"blocks.{stage}.*.attn.proj.weight", 0) for stage in stages]
    hidden = [info.size(f"blocks.{stage}.*.conv.conv2.0.weight", 0) for stage in stages]
    given = info.config_overrides
    fields = {
        "hidden_sizes": widths,
        "depths": [info.depth(f"blocks.{stage}.*.") for stage in stages],
        "head_size": given.get("head_size", widths[0]),  # published models have one head in the first stage
        "kernel_sizes": [info.size(f"blocks.{stage}.*.conv.conv2.0.weight", -1) for stage in stages],
        "expansions": [size // width for size, width in zip(hidden, widths)],
        "window_sizes": [size if has else 1 for size, has in zip(given.get("window_sizes", _WINDOWS), has_windows)],
        "pool_sizes": list(given.get("pool_sizes", _POOLS)),
        "stem_size": info.size("patch_embed.0.weight", 0),
        "num_channels": info.size("patch_embed.0.weight", 1),
    }
    has_classifier = info.has("classifier.1.weight")
    return fields | ({"num_labels": info.size("classifier.1.weight", 0)} if has_classifier else {})


def _extras(config: HATNetConfig) -> dict[str, Tensor]:
    norms = {f"blocks.{stage}.{i}.attn.proj_norm": config.hidden_sizes[stage] for stage, i in _blocks(config)}
    weights = {f"{name}.weight": torch.ones(size) for name, size in norms.items()}
    return weights | {f"{name}.bias": torch.zeros(size) for name, size in norms.items()}


LAYOUT = Layout(
    name="hat-net",
    title="yun-liu/HAT-Net",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_crop(config.image_size, **IMAGENET),
    extras=_extras,
    config_class=HATNetConfig,
    models=(HATNetModel, HATNetForImageClassification),
)

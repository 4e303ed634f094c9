"""facebookresearch/dinov3: `dinov3_vit*_pretrain_{lvd1689m,sat493m}-*.pth`, whose licence is their own."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Drop, Join, Rename, Rule, add_axis, drop_axis
from .blocks import LAYERS, MLP, SCALES, STEM, read_sizes
from .layout import BICUBIC, IMAGENET, CheckpointInfo, Layout, each, prepare_square


def _clear_keys(bias: Tensor) -> Tensor:
    """The bias (3 D,) of queries, keys and values, without that of keys, which the original masks."""
    queries, keys, values = bias.chunk(3)
    return torch.cat([queries, torch.zeros_like(keys), values])


MASKED_BIAS = Rename("blocks.{i}.attn.qkv.bias", "layers.{i}.attention.qkv.bias", _clear_keys)
TOKENS: list[Rule] = [
    Rename("storage_tokens", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("mask_token", "embeddings.mask_token", add_axis, drop_axis),
]
GATED: list[Rule] = [
    Join(("blocks.{i}.mlp.w1.{leaf}", "blocks.{i}.mlp.w2.{leaf}"), "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.mlp.w3.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
]
SATELLITE = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    layers = LAYERS
    if config is not None and not config.has_key_bias:
        layers = [rule for rule in LAYERS if rule.source != "blocks.{i}.attn.qkv.{leaf}"]
        layers += [Rename("blocks.{i}.attn.qkv.weight", "layers.{i}.attention.qkv.weight"), MASKED_BIAS]
    rules: list[Rule] = [*STEM, *layers, *SCALES, *TOKENS]
    rules += [*MLP, *GATED] if config is None else GATED if config.hidden_act == "swiglu" else MLP

    def periods(name: str) -> Tensor:
        quarter = config.hidden_size // config.num_attention_heads // 4
        return config.rope_theta ** (torch.arange(quarter, dtype=torch.float32) / quarter)

    def bias_mask(name: str) -> Tensor:
        return torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(config.hidden_size)

    return [
        *rules,
        Drop("rope_embed.periods", why="computed from rope_theta", value=periods),
        Drop("blocks.{i}.attn.qkv.bias_mask", why="a mask that removes the bias of keys", value=bias_mask),
        Drop("local_cls_norm.{leaf}", why="norm of local crops, used in training only"),
    ]


def _configure(info: CheckpointInfo) -> dict:
    width = info.size("patch_embed.proj.weight", 0)
    is_gated, has_bias = info.has("blocks.*.mlp.w3.weight"), info.has("blocks.*.attn.qkv.bias")
    fields = {"num_attention_heads": info.config_overrides.get("num_attention_heads", width // 64)}
    if info.has("rope_embed.periods"):
        periods = info.read("rope_embed.periods").float()
        fields["num_attention_heads"] = width // (4 * len(periods))
        fields["rope_theta"] = round(float(periods[-1]) ** (len(periods) / max(len(periods) - 1, 1)), 2)
    info.config_overrides.setdefault("num_attention_heads", fields["num_attention_heads"])
    return {
        **read_sizes(info, num_prefix_positions=None),
        **fields,
        "intermediate_size": info.size(f"blocks.*.mlp.{'w3' if is_gated else 'fc2'}.weight", 1),
        "hidden_act": "swiglu" if is_gated else "gelu",
        "num_register_tokens": info.size("storage_tokens", 1) if info.has("storage_tokens") else 0,
        "position_embedding_type": "rope",
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 1e-5,
        "has_query_bias": has_bias,
        "has_key_bias": has_bias and not info.has("blocks.*.attn.qkv.bias_mask"),
        "has_value_bias": has_bias,
        "has_mask_token": True,
    }


def _prepare(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    statistics = SATELLITE if "sat493m" in info.file_name.lower() else IMAGENET
    return prepare_square(config.image_size, resample=BICUBIC, **statistics)


LAYOUT = Layout(
    name="dinov3",
    title="facebookresearch/dinov3",
    licence="dinov3-license",
    rules=_rules,
    configure=_configure,
    prepare=_prepare,
    canonical=each(lambda name: name.removeprefix("backbone.")),
    is_hinted=lambda info: info.has("storage_tokens") or info.has("rope_embed.periods"),
)

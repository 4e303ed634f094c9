"""timm: `VisionTransformer`, `Eva` and `Beit` of any plain kind; from a file, a folder or a model."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Drop, Fill, Join, Rename, Rule, add_axis, drop_axis
from .blocks import GAMMAS, HEAD, LAYERS, MLP, POSITIONS, SCALES, STEM, read_sizes
from .layout import (
    BICUBIC,
    BILINEAR,
    CLIP,
    IMAGENET,
    INCEPTION,
    CheckpointInfo,
    Layout,
    each,
    prepare_crop,
    prepare_square,
)
from .sapiens2 import join_heads
from .timm_modules import read_module


EXTRAS: list[Rule] = [
    Rename("reg_token", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("dist_token", "embeddings.distillation_token"),
    Rename("head_dist.{leaf}", "distillation_classifier.{leaf}"),
    Rename("norm_pre.{leaf}", "pre_layernorm.{leaf}"),
]
POOLED: list[Rule] = [Rename("fc_norm.{leaf}", "layernorm.{leaf}")]
SPLIT_BIAS: list[Rule] = [
    Join(
        ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.k_bias", "blocks.{i}.attn.v_bias"),
        "layers.{i}.attention.qkv.bias",
        may_lack=("blocks.{i}.attn.k_bias",),
    )
]
EVA_GATED: list[Rule] = [
    Join(("blocks.{i}.mlp.fc1_g.{leaf}", "blocks.{i}.mlp.fc1_x.{leaf}"), "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.mlp.fc2.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
]
_RESAMPLE = {"bicubic": BICUBIC, "bilinear": BILINEAR}


QUERY_KEY_VALUE: list[Rule] = [
    Rename("blocks.{i}.attn.qkv.weight", "layers.{i}.attention.qkv.weight"),
    Rename("blocks.{i}.attn.qkv.bias", "layers.{i}.attention.qkv.bias"),
]
APART = tuple(f"blocks.{{i}}.attn.{part}_proj.{{leaf}}" for part in "qkv")
PARTS: list[Rule] = [
    Rename("patch_embed.norm.{leaf}", "embeddings.patch_norm.{leaf}"),
    Rename("blocks.{i}.attn.q_norm.{leaf}", "layers.{i}.attention.query_norm.{leaf}"),
    Rename("blocks.{i}.attn.k_norm.{leaf}", "layers.{i}.attention.key_norm.{leaf}"),
    Rename("blocks.{i}.attn.norm.{leaf}", "layers.{i}.attention.norm.{leaf}"),
    Rename("blocks.{i}.attn.gate.{leaf}", "layers.{i}.attention.gate.linear.{leaf}"),
    Rename("blocks.{i}.mlp.norm.{leaf}", "layers.{i}.mlp.norm.{leaf}"),
    Rename("blocks.{i}.attn.relative_position_bias_table", "layers.{i}.attention.position_bias.weight"),
    Rename("rel_pos_bias.relative_position_bias_table", "position_bias.weight"),
    Drop("rel_pos_bias.relative_position_index", why="the numbers of the offsets"),
    Rename("rope.freqs", "rotary_frequencies.weight"),
    Rename("attn_pool.latent", "attention_pooling.probe"),
    Rename("attn_pool.q.{leaf}", "attention_pooling.query.{leaf}"),
    Rename("attn_pool.kv.{leaf}", "attention_pooling.key_value.{leaf}"),
    Rename("attn_pool.proj.{leaf}", "attention_pooling.proj.{leaf}"),
    Rename("attn_pool.norm.{leaf}", "attention_pooling.norm.{leaf}"),
    Rename("attn_pool.mlp.fc1.{leaf}", "attention_pooling.fc1.{leaf}"),
    Rename("attn_pool.mlp.fc2.{leaf}", "attention_pooling.fc2.{leaf}"),
]
NO_BIAS: list[Rule] = [
    Fill(f"layers.{{i}}.{part}.bias", 0.0, why="this model has no bias")
    for part in ("attention.proj", "mlp.fc1", "mlp.fc2")
]


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    stem = [rule for rule in STEM if config is None or not config.has_pooled_norm or rule.source != "norm.{leaf}"]
    layers = [rule for rule in LAYERS if rule.source != "blocks.{i}.attn.qkv.{leaf}"]
    if config is None:
        mlp, scales = [*MLP, *EVA_GATED[:1]], [*SCALES, *GAMMAS]
        every = [*QUERY_KEY_VALUE, *SPLIT_BIAS, *join_heads(None, APART, leaf="weight"), *POOLED]
        return [*stem, *POSITIONS, *layers, *mlp, *scales, *EXTRAS, *every, *PARTS, *HEAD]
    is_eva = is_of_eva(config)
    # Of several sources of one tensor the first is written, and all are read.
    joins = [*join_heads(config, APART, leaf="weight"), *join_heads(config, APART, leaf="bias")]
    fused = [QUERY_KEY_VALUE[0], *SPLIT_BIAS, QUERY_KEY_VALUE[1], *joins]
    if has_heads_apart(config):
        fused = [*joins, *QUERY_KEY_VALUE, *SPLIT_BIAS]
    elif not is_eva or (config.rope_style != "dinov3" and config.has_key_bias):
        fused = [*QUERY_KEY_VALUE, *SPLIT_BIAS, *joins]
    mlp = [*EVA_GATED, MLP[0]] if has_gate_apart(config) else [*MLP, EVA_GATED[0]]
    if config.has_patch_norm:  # AIMv2
        mlp = [*NO_BIAS, *mlp]
        layers = [NO_BIAS[0], *layers]
    scales = [*GAMMAS, *SCALES] if is_eva else [*SCALES, *GAMMAS]
    pooled = POOLED if config.has_pooled_norm else []
    return [*stem, *POSITIONS, *layers, *fused, *mlp, *scales, *EXTRAS, *pooled, *PARTS, *HEAD]


def is_of_eva(config: ViTWithRegistersConfig) -> bool:
    """Whether the architecture is one of timm's `Eva` or `Beit`, not of its `VisionTransformer`."""
    lacks_key_bias = config.has_query_bias and not config.has_key_bias
    return config.has_rope or lacks_key_bias or config.relative_position_bias is not None


def has_heads_apart(config: ViTWithRegistersConfig) -> bool:
    """Whether timm has queries, keys and values of this architecture in layers of their own (Sapiens2, EVA-02)."""
    has_few = set(config.key_value_heads) != {config.num_attention_heads}
    return has_few or (config.has_rope and (config.has_query_key_norm or config.has_mlp_norm))


def has_gate_apart(config: ViTWithRegistersConfig) -> bool:
    """Whether timm has gate and value of SwiGLU in layers of their own (DINOv3, EVA-02, AIMv2)."""
    is_dinov3 = config.position_embedding_type == "rope" and not config.has_query_key_norm
    is_dinov3 &= config.rope_style == "dinov3"
    return config.hidden_act == "swiglu" and (is_dinov3 or config.has_mlp_norm or config.has_patch_norm)


def _configure(info: CheckpointInfo) -> dict:
    is_eva = not info.has("pos_embed")
    if info.module is None and not is_eva and info.has("blocks.*.attn.q_bias"):
        raise ConversionError(
            f"{info.file_name}: a file does not show what positions this model of timm rotates by: give its name "
            "(timm:NAME), or a folder with its config.json"
        )
    fields = read_module(info.module) if info.module is not None else {}
    if info.module is None:
        fields = _configure_eva(info) if is_eva else _configure_vit(info)
        if not info.has("cls_token") or is_eva or info.has("fc_norm.weight"):
            fields["pooling"] = "mean"
        fields |= {
            "has_pooled_norm": info.has("fc_norm.weight"),
            "has_query_key_norm": info.has("*.attn.q_norm.weight"),
        }
        fields |= {"has_final_norm": info.has("norm.weight") or info.has("fc_norm.weight")}
        if info.has("attn_pool.latent"):
            fields |= {"pooling": "attention", "pooling_intermediate_size": info.size("attn_pool.mlp.fc2.weight", 1)}
    has_scale = info.has("blocks.*.gamma_1") or info.has("blocks.*.ls1.gamma")
    fields |= {
        "layer_scale_init_value": 1e-5 if has_scale else None,
        "intermediate_size": info.size("blocks.*.mlp.fc2.weight", 1),
        "num_register_tokens": info.size("reg_token", 1) if info.has("reg_token") else 0,
        "has_cls_token": info.has("cls_token"),
        "has_distillation_token": info.has("dist_token"),
        "has_patch_bias": info.has("patch_embed.proj.bias"),
    }
    if info.has("head.weight"):
        fields["num_labels"] = info.size("head.weight", 0)
    if info.has("head_dist.weight"):
        fields["pooling"] = "cls_distillation"
    return fields


def _configure_vit(info: CheckpointInfo) -> dict:
    num_special = info.has("cls_token") + info.has("dist_token")
    num_positions, side = info.size("pos_embed", -2), None
    for slots in (num_special, 0):
        side = round((num_positions - slots) ** 0.5)
        if side * side == num_positions - slots:
            break
    is_gated = info.size("blocks.*.mlp.fc1.weight", 0) == 2 * info.size("blocks.*.mlp.fc2.weight", 1)
    has_bias = info.has("blocks.*.attn.qkv.bias")
    fields = read_sizes(info, num_prefix_positions=slots)
    fields |= {
        "hidden_act": "swiglu" if is_gated else "quick_gelu" if "quickgelu" in info.file_name.lower() else "gelu",
        "has_prefix_positions": bool(slots),
        "has_query_bias": has_bias,
        "has_key_bias": has_bias,
        "has_value_bias": has_bias,
    }
    if info.has("norm_pre.weight"):
        fields |= {"has_pre_norm": True, "layer_norm_eps": 1e-5}
    if info.has("blocks.*.ls1.gamma"):
        fields["layer_scale_init_value"] = 1e-5
    return fields


def _configure_eva(info: CheckpointInfo) -> dict:
    has_bias = info.has("blocks.*.attn.q_bias")
    return {
        **read_sizes(info, num_prefix_positions=None),
        "image_size": 256,
        "hidden_act": "swiglu" if info.has("blocks.*.mlp.fc1_g.weight") else "gelu",
        "position_embedding_type": "rope",
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 1e-5 if info.has("blocks.*.gamma_1") else None,
        "has_query_bias": has_bias,
        "has_key_bias": info.has("blocks.*.attn.k_bias"),
        "has_value_bias": has_bias,
    }


def _prepare(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    data = dict(getattr(info.module, "pretrained_cfg", None) or {})
    data |= (info.settings or {}).get("pretrained_cfg", {})
    if "mean" in data:
        statistics = {"image_mean": list(data["mean"]), "image_std": list(data["std"])}
    elif config.has_pre_norm:
        statistics = CLIP
    else:
        is_plain = config.layer_scale_init_value is None and not config.has_distillation_token
        statistics = INCEPTION if is_plain or not config.has_cls_token else IMAGENET
    side = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
    resample = _RESAMPLE.get(data.get("interpolation", "bicubic"), BICUBIC)
    if data.get("crop_mode", "center") == "squash":
        return prepare_square(side, resample=resample, **statistics)
    share = data.get("crop_pct", 0.9)
    return prepare_crop(side, resize=int(side / share), resample=resample, **statistics)


LAYOUT = Layout(
    name="timm",
    title="timm",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=_prepare,
    canonical=each(lambda name: name.removeprefix("visual.trunk.")),
    is_hinted=lambda info: info.module is not None or "timm" in info.file_name.lower(),
)

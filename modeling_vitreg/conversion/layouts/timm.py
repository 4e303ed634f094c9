"""timm: `VisionTransformer` of any plain kind, and `Eva` in its form of DINOv3; from a file, a folder or a model."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Join, Rename, Rule, add_axis, drop_axis
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


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    if config is None:
        return [*STEM, *POSITIONS, *LAYERS, *MLP, *SCALES, *GAMMAS, *EXTRAS, *POOLED, *SPLIT_BIAS, *EVA_GATED, *HEAD]
    is_eva = config.position_embedding_type == "rope"
    stem = [rule for rule in STEM if rule.source != "norm.{leaf}"] + POOLED if config.has_pooled_norm else STEM
    layers = [rule for rule in LAYERS if not is_eva or rule.source != "blocks.{i}.attn.qkv.{leaf}"]
    if is_eva:
        layers += [Rename("blocks.{i}.attn.qkv.weight", "layers.{i}.attention.qkv.weight"), *SPLIT_BIAS]
    mlp = EVA_GATED if is_eva and config.hidden_act == "swiglu" else MLP
    return [*stem, *POSITIONS, *layers, *mlp, *(GAMMAS if is_eva else SCALES), *EXTRAS, *HEAD]


def _configure(info: CheckpointInfo) -> dict:
    is_eva = not info.has("pos_embed")
    if info.module is not None:
        info.config_overrides.setdefault("num_attention_heads", info.module.blocks[0].attn.num_heads)
    fields = _configure_eva(info) if is_eva else _configure_vit(info)
    fields |= {
        "intermediate_size": info.size("blocks.*.mlp.fc2.weight", 1),
        "num_register_tokens": info.size("reg_token", 1) if info.has("reg_token") else 0,
        "has_cls_token": info.has("cls_token"),
        "has_patch_bias": info.has("patch_embed.proj.bias"),
    }
    if not fields["has_cls_token"] or is_eva or info.has("fc_norm.weight"):
        fields["pooling"] = "mean"
    fields["has_pooled_norm"] = info.has("fc_norm.weight")
    if info.has("head.weight"):
        fields["num_labels"] = info.size("head.weight", 0)
    if info.module is not None:
        fields |= _read_module(info.module)
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
        "has_distillation_token": info.has("dist_token"),
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


def _read_module(module) -> dict:
    """Settings of a model of timm that its tensors do not show.

    Raises:
        ConversionError: this family cannot represent the architecture.
    """
    name, block = type(module).__name__, module.blocks[0]
    act, rope = type(block.mlp.act).__name__, type(getattr(module, "rope", None)).__name__
    pooling = {"token": "cls", "": "cls", "avg": "mean"}.get(module.global_pool)
    acts = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "swiglu"}
    has_norm = type(getattr(block.attn, "q_norm", None)).__name__ not in ("NoneType", "Identity")
    refusals = {
        f"global_pool={module.global_pool!r}": pooling is None,
        f"the activation {act}": act not in acts,
        f"rotary positions of class {rope}": rope not in ("NoneType", "RotaryEmbeddingDinoV3"),
        "pool_include_prefix=True": getattr(module, "pool_include_prefix", False),
        "a norm of queries and keys": has_norm,
    }
    refused = [what for what, is_so in refusals.items() if is_so]
    if refused:
        raise ConversionError(f"timm's {name} with {' and '.join(refused)} cannot be represented")
    has_final_norm = type(module.norm).__name__ != "Identity"
    norm = module.norm if has_final_norm else module.fc_norm
    patch, image = module.patch_embed.patch_size, module.patch_embed.img_size or (256, 256)
    is_gated = act == "SiLU" or hasattr(block.mlp, "fc1_g")
    return {
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": norm.eps,
        "hidden_act": "swiglu" if is_gated else acts[act],
        "pooling": pooling if module.cls_token is not None or pooling == "mean" else "mean",
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "image_size": image[0] if image[0] == image[1] else tuple(image),
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

__all__ = ["LAYOUT"]

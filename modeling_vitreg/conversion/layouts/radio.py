"""transformers: RADIO (C-RADIO v3 and v4), with several class tokens, registers, and no final norm.

Its positions are resized to a square and cut. The model norms the images itself; here the image processor does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Drop, Rename, Rule, Split, add_axis, drop_axis
from .blocks import LAYERS, MLP
from .layout import CLIP, CheckpointInfo, Layout, each, prepare_square
from .settings import complete
from .transformers import read_settings


_TOKENS = ("embeddings.cls_token", "embeddings.register_tokens.weight")
RULES: list[Rule] = [
    *LAYERS,
    *MLP,
    Rename("patch_generator.pos_embed", "embeddings.position_embeddings.weight"),
    Rename("blocks.{i}.layer_scale1.lambda1", "layers.{i}.layer_scale1.weight"),
    Rename("blocks.{i}.layer_scale2.lambda1", "layers.{i}.layer_scale2.weight"),
    Drop("patch_generator.video_embedder.weight", why="patches of videos"),
]


def _extras(config: ViTWithRegistersConfig) -> dict[str, Tensor]:
    """Mean and deviation of the images, and the class tokens that are pooled."""
    mean, std = (torch.tensor(CLIP[f"image_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    chosen = config.pooled_cls_tokens if config.pooled_cls_tokens is not None else range(config.num_cls_tokens)
    numbers = torch.tensor(list(chosen))
    return {"input_conditioner.norm_mean": mean, "input_conditioner.norm_std": std, "summary_idxs": numbers}


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    rows, columns = (16, 16) if config is None else config.patch_shape
    counts = (1, 1) if config is None else (config.num_cls_tokens, config.num_register_tokens)
    reasons = dict.fromkeys(("input_conditioner.norm_mean", "input_conditioner.norm_std"), "in the image processor")

    def value(name: str) -> Tensor:
        return _extras(config)[name].float()

    def to_patches(weight: Tensor) -> Tensor:
        return weight.unflatten(1, (-1, rows, columns))

    def to_rows(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    tokens: Rule = Rename("patch_generator.cls_token.token", _TOKENS[0], add_axis, drop_axis)
    if counts[1]:
        tokens = Split(
            "patch_generator.cls_token.token",
            _TOKENS,
            shares=counts,
            to_target=(add_axis, torch.Tensor.contiguous),
            to_source=(drop_axis, torch.Tensor.contiguous),
        )
    return [
        *RULES,
        tokens,
        Rename("patch_generator.embedder.weight", "embeddings.patch_embeddings.weight", to_patches, to_rows),
        *(Drop(name, why=why, value=value) for name, why in {**reasons, "summary_idxs": "in config.json"}.items()),
    ]


def _canonical(name: str) -> str:
    return name.removeprefix("radio_model.").removeprefix("model.")


def _in_file(name: str) -> str:
    return f"radio_model.{'' if name.startswith(('input_conditioner.', 'summary_idxs')) else 'model.'}{name}"


def _configure(info: CheckpointInfo) -> dict:
    settings = complete(info)
    if settings["use_swiglu_ffn"]:
        raise ConversionError(
            "transformers' radio with use_swiglu_ffn=True cannot be represented: its names are unknown"
        )
    if settings["max_img_size"] % settings["patch_size"]:
        raise ConversionError(f"max_img_size {settings['max_img_size']} is no multiple of the patch")
    has_bias = settings["qkv_bias"]
    return {
        **read_settings({**settings, "image_size": settings["max_img_size"]}),
        "intermediate_size": int(settings["hidden_size"] * settings["mlp_ratio"]),
        "num_cls_tokens": settings["num_cls_tokens"],
        "num_register_tokens": settings["num_registers"],
        "pooling": "cls_concat",
        "pooled_cls_tokens": settings["summary_idxs"],
        "has_prefix_positions": False,
        "interpolate_mode": "bilinear_crop",
        "interpolate_antialias": False,
        "has_patch_bias": False,
        "has_final_norm": False,
        "layer_scale_init_value": 1.0 if info.has("blocks.*.layer_scale1.lambda1") else None,
        **dict.fromkeys(("has_query_bias", "has_key_bias", "has_value_bias"), has_bias),
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    ratio = config.intermediate_size / config.hidden_size
    return {
        "mlp_ratio": ratio,
        "max_img_size": config.image_size,
        "image_size": 224,
        "num_cls_tokens": config.num_cls_tokens,
        "num_registers": config.num_register_tokens,
        "summary_idxs": _extras(config)["summary_idxs"].tolist(),
        "norm_mean": CLIP["image_mean"],
        "norm_std": CLIP["image_std"],
    }


LAYOUT = Layout(
    name="transformers-radio",
    title="transformers' RADIO",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_square((info.settings or {}).get("image_size", 224), **CLIP),
    canonical=each(_canonical),
    model_types=("radio",),
    write_settings=_write_settings,
    in_file=_in_file,
    extras=_extras,
)

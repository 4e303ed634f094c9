"""transformers: TIPSv2, DINOv2 with one register and bilinear positions, alone or beside its text tower."""

from __future__ import annotations

from collections.abc import Iterable

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Drop, Rename, Rule
from .blocks import LAYERS, POSITIONS, SCALES, STEM
from .dinov2 import GATED, TOKENS
from .layout import CheckpointInfo, Layout, prepare_square
from .settings import complete, side_of
from .transformers import read_settings


MLP: list[Rule] = [
    Rename("blocks.{i}.mlp.c_fc.{leaf}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.mlp.c_proj.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
]
OUTSIDE = Drop("outside.{rest}", why="not part of the image tower")


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    mlp = [*MLP, *GATED] if config is None else GATED if config.hidden_act == "swiglu" else MLP
    return [*STEM, *POSITIONS, *LAYERS, *SCALES, *TOKENS, *mlp, OUTSIDE]


def _canonical(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    is_whole = any(name.startswith("text_encoder.") for name in names)

    def shorten(name: str) -> str:
        is_own = name.startswith("vision_encoder.") or not is_whole
        return name.removeprefix("vision_encoder.") if is_own else f"outside.{name}"

    return {name: shorten(name) for name in names}


def _configure(info: CheckpointInfo) -> dict:
    settings = complete(info)
    is_gated, width = settings["use_swiglu_ffn"], settings["hidden_size"]
    hidden = info.size(f"blocks.*.mlp.{'w3' if is_gated else 'c_proj'}.weight", 1)
    return {
        **read_settings(settings),
        "hidden_act": "swiglu" if is_gated else settings["hidden_act"],
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_register_tokens": settings["num_register_tokens"],
        "layer_scale_init_value": settings["layerscale_value"],
        "attention_probs_dropout_prob": settings["attention_probs_dropout_prob"],
        "drop_path_rate": settings["drop_path_rate"],
        "interpolate_mode": "bilinear",
        "has_mask_token": info.has("mask_token"),
        **dict.fromkeys(("has_query_bias", "has_key_bias", "has_value_bias"), settings["qkv_bias"]),
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    is_gated = config.hidden_act == "swiglu"
    ratio = config.intermediate_size / config.hidden_size
    return {
        "mlp_ratio": 1.5 * ratio if is_gated else ratio,
        "use_swiglu_ffn": is_gated,
        "hidden_act": "gelu" if is_gated else config.hidden_act,
        "layerscale_value": config.layer_scale_init_value,
        "num_register_tokens": config.num_register_tokens,
    }


LAYOUT = Layout(
    name="transformers-tipsv2",
    title="transformers' TIPSv2",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_square(
        side_of(config), resample=2, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
    ),
    canonical=_canonical,
    model_types=("tipsv2_vision_model", "tipsv2"),
    write_settings=_write_settings,
)

"""transformers: Pixio, a masked autoencoder with several class tokens, which have positions."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Rule
from .layout import IMAGENET, CheckpointInfo, Layout, each, prepare_square
from .settings import complete, side_of
from .transformers import ATTENTION, DINO_LAYER, EMBEDDINGS, POSITIONS, VIT_LAYER, read_settings


RULES: list[Rule] = [*EMBEDDINGS, *POSITIONS, *ATTENTION, *DINO_LAYER[:2], *VIT_LAYER[2:]]


def _configure(info: CheckpointInfo) -> dict:
    settings = complete(info)
    return {
        **read_settings(settings),
        "intermediate_size": int(settings["hidden_size"] * settings["mlp_ratio"]),
        "attention_probs_dropout_prob": settings["attention_probs_dropout_prob"],
        "drop_path_rate": settings["drop_path_rate"],
        "num_cls_tokens": settings["n_cls_tokens"],
        "pooling": "cls_average",
        "interpolate_antialias": False,
        **dict.fromkeys(("has_query_bias", "has_key_bias", "has_value_bias"), settings["qkv_bias"]),
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    return {"mlp_ratio": config.intermediate_size // config.hidden_size, "n_cls_tokens": config.num_cls_tokens}


LAYOUT = Layout(
    name="transformers-pixio",
    title="transformers' Pixio",
    licence=None,
    rules=lambda config: list(RULES),
    configure=_configure,
    prepare=lambda info, config: prepare_square(side_of(config), **IMAGENET),
    canonical=each(lambda name: name.removeprefix("pixio.")),
    model_types=("pixio",),
    write_settings=_write_settings,
)

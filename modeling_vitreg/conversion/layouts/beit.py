"""transformers: BEiT and data2vec-vision, with relative position biases and no bias on the keys."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Drop, Join, Rename, Rule
from .layout import INCEPTION, CheckpointInfo, Layout, each, prepare_square
from .settings import complete, labels_of, side_of
from .transformers import ATTENTION, CLASSIFIER, EMBEDDINGS, MASK, POSITIONS, VIT_LAYER, read_settings


_BARE = ("data2vec-vision", "Data2VecVisionModel")  # the one that may have no norm at all
LAYER = "encoder.layer.{i}"
_PARTS = tuple(f"{LAYER}.attention.attention.{part}" for part in ("query", "key", "value"))
_TABLE = "relative_position_bias.relative_position_bias_table"
RULES: list[Rule] = [
    *(rule for rule in EMBEDDINGS if rule.source not in ("layernorm.{leaf}", "pooler.dense.{leaf}")),
    *POSITIONS,
    MASK,
    Join(tuple(f"{part}.weight" for part in _PARTS), "layers.{i}.attention.qkv.weight"),
    Join(tuple(f"{part}.bias" for part in _PARTS), "layers.{i}.attention.qkv.bias", may_lack=(f"{_PARTS[1]}.bias",)),
    ATTENTION[1],
    *VIT_LAYER,
    Rename(f"{LAYER}.lambda_1", "layers.{i}.layer_scale1.weight"),
    Rename(f"{LAYER}.lambda_2", "layers.{i}.layer_scale2.weight"),
    Rename(f"{LAYER}.attention.attention.{_TABLE}", "layers.{i}.attention.position_bias.weight"),
    Rename(f"encoder.{_TABLE}", "position_bias.weight"),
    Drop(
        f"{LAYER}.attention.attention.relative_position_bias.relative_position_index", why="the numbers of the offsets"
    ),
    Drop("encoder.relative_position_bias.relative_position_index", why="the numbers of the offsets"),
    *CLASSIFIER,
]


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    norms = [Rename("layernorm.{leaf}", "layernorm.{leaf}"), Rename("pooler.layernorm.{leaf}", "layernorm.{leaf}")]
    return [*RULES, *(norms if config is None else [norms[config.has_pooled_norm]])]


def _canonical(name: str) -> str:
    return name.removeprefix("beit.").removeprefix("data2vec_vision.")


def _configure(info: CheckpointInfo) -> dict:
    settings, is_mean = complete(info), info.has("pooler.layernorm.weight")
    has_table, scale = info.has("embeddings.position_embeddings"), settings["layer_scale_init_value"]
    is_shared, is_own = (settings[f"use_{kind}relative_position_bias"] for kind in ("shared_", ""))
    return {
        **read_settings(settings),
        **labels_of(info),
        "intermediate_size": settings["intermediate_size"],
        "attention_probs_dropout_prob": settings["attention_probs_dropout_prob"],
        "drop_path_rate": settings["drop_path_rate"],
        "position_embedding_type": "learned" if has_table else "none",
        "interpolate_antialias": False,
        "relative_position_bias": "layer" if is_own else "shared" if is_shared else None,
        "has_key_bias": False,
        "layer_scale_init_value": scale if scale > 0 else None,
        "has_final_norm": is_mean or info.has("layernorm.weight"),  # data2vec without its pooler has none
        "pooling": "mean" if is_mean else "cls",
        "has_pooled_norm": is_mean,
        "has_mask_token": info.has("embeddings.mask_token"),
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    return {
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "use_absolute_position_embeddings": config.has_position_table,
        "use_relative_position_bias": config.relative_position_bias == "layer",
        "use_shared_relative_position_bias": config.relative_position_bias == "shared",
        "layer_scale_init_value": config.layer_scale_init_value or 0.0,
        "use_mean_pooling": config.has_pooled_norm or not config.has_final_norm,
        "use_mask_token": config.has_mask_token,
        **({} if config.has_final_norm else {"model_type": _BARE[0], "architectures": [_BARE[1]]}),
    }


LAYOUT = Layout(
    name="transformers-beit",
    title="transformers' BEiT",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_square(side_of(config), **INCEPTION),
    canonical=each(_canonical),
    model_types=("beit", "data2vec-vision"),
    write_settings=_write_settings,
)

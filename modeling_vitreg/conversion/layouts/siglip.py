"""transformers: SigLIP, and SigLIP 2 of a fixed size: image tower with attention pooling, alone or beside text.

A classifier reads the mean of the patches and does not use the pooling.
"""

from __future__ import annotations

from collections.abc import Iterable

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Drop, Join, Rename, Rule, Split, add_axis, drop_axis
from .layout import INCEPTION, CheckpointInfo, Layout, prepare_square
from .settings import complete, labels_of, side_of
from .transformers import read_settings


LAYER = "encoder.layers.{i}"
RULES: list[Rule] = [
    Rename("embeddings.patch_embedding.bias", "embeddings.patch_embeddings.bias"),
    Rename("embeddings.position_embedding.weight", "embeddings.position_embeddings.weight", add_axis, drop_axis),
    Drop("embeddings.position_ids", why="the numbers of the positions"),
    Join(tuple(f"{LAYER}.self_attn.{part}_proj.{{leaf}}" for part in "qkv"), "layers.{i}.attention.qkv.{leaf}"),
    Rename(f"{LAYER}.self_attn.out_proj.{{leaf}}", "layers.{i}.attention.proj.{leaf}"),
    Rename(f"{LAYER}.layer_norm1.{{leaf}}", "layers.{i}.norm1.{leaf}"),
    Rename(f"{LAYER}.layer_norm2.{{leaf}}", "layers.{i}.norm2.{leaf}"),
    Rename(f"{LAYER}.mlp.{{rest}}", "layers.{i}.mlp.{rest}"),
    Rename("post_layernorm.{leaf}", "layernorm.{leaf}"),
    Rename("classifier.{leaf}", "classifier.{leaf}"),
    Drop("outside.{rest}", why="not part of the image tower"),
]
_POOLING = "attention_pooling"
HEAD: list[Rule] = [
    Rename("head.probe", f"{_POOLING}.probe"),
    Split(
        "head.attention.in_proj_{leaf}",
        (f"{_POOLING}.query.{{leaf}}", f"{_POOLING}.key_value.{{leaf}}"),
        shares=(1, 2),
    ),
    Rename("head.attention.out_proj.{leaf}", f"{_POOLING}.proj.{{leaf}}"),
    Rename("head.layernorm.{leaf}", f"{_POOLING}.norm.{{leaf}}"),
    Rename("head.mlp.fc1.{leaf}", f"{_POOLING}.fc1.{{leaf}}"),
    Rename("head.mlp.fc2.{leaf}", f"{_POOLING}.fc2.{{leaf}}"),
]
UNUSED: list[Rule] = [Drop("head.{rest}", why="this model averages the patches")]
WEIGHT: list[Rule] = [Rename("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.weight")]


def canonical(names: Iterable[str], *, more: tuple[str, ...] = ()) -> dict[str, str]:
    """Names of the image tower without its prefix, and all others marked as outside."""
    names = list(names)
    has_prefix = any(name.startswith("vision_model.") for name in names)
    known = ("embeddings.", "encoder.", "post_layernorm.", "head.", "classifier.", *more)

    def shorten(name: str) -> str:
        if has_prefix and not name.startswith(("vision_model.", "classifier.")):
            return f"outside.{name}"
        short = name.removeprefix("vision_model.")
        return short if short.startswith(known) else f"outside.{name}"

    return {name: shorten(name) for name in names}


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    return [*RULES, *WEIGHT, *(HEAD if config is None or config.pooling == "attention" else UNUSED)]


def _configure(info: CheckpointInfo) -> dict:
    settings, labels = complete(info), labels_of(info)
    return {
        **read_settings(settings),
        **labels,
        "intermediate_size": settings["intermediate_size"],
        "attention_probs_dropout_prob": settings["attention_dropout"],
        "has_cls_token": False,
        "interpolate_antialias": False,
        "pooling": "attention" if info.has("head.probe") and not labels else "mean",
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    return {"attention_dropout": config.attention_probs_dropout_prob, "vision_use_head": config.pooling == "attention"}


LAYOUT = Layout(
    name="transformers-siglip",
    title="transformers' SigLIP",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_square(side_of(config), **INCEPTION),
    canonical=canonical,
    model_types=("siglip_vision_model", "siglip"),
    write_settings=_write_settings,
)

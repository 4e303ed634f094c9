"""transformers: Sapiens2, DINOv3 with RMSNorm, norms of queries and keys, and fewer heads of keys and values."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Join, Rename, Rule, add_axis, drop_axis
from .layout import IMAGENET, CheckpointInfo, Layout, each, prepare_square
from .settings import complete, side_of
from .transformers import read_settings


RULES: list[Rule] = [
    Rename("cls_token", "embeddings.cls_token"),
    Rename("embeddings.mask_token", "embeddings.mask_token"),
    Rename("storage_tokens", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("patch_embed.projection.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("blocks.{i}.ln1.weight", "layers.{i}.norm1.weight"),
    Rename("blocks.{i}.ln2.weight", "layers.{i}.norm2.weight"),
    Rename("blocks.{i}.attn.q_norm.weight", "layers.{i}.attention.query_norm.weight"),
    Rename("blocks.{i}.attn.k_norm.weight", "layers.{i}.attention.key_norm.weight"),
    Rename("blocks.{i}.attn.proj.{leaf}", "layers.{i}.attention.proj.{leaf}"),
    Rename("blocks.{i}.attn.gamma.weight", "layers.{i}.layer_scale1.weight"),
    Rename("blocks.{i}.ffn.w12.{leaf}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.ffn.w3.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
    Rename("ln1.weight", "layernorm.weight"),
]


def join_heads(config: ViTWithRegistersConfig | None, parts: tuple[str, ...], *, leaf: str) -> list[Rule]:
    """Queries, keys and values of each layer, whose numbers of heads differ.

    Args:
        config: our configuration, or None for any.
        parts: names of the three, with `{i}` and `{leaf}`.
        leaf: "weight" or "bias".
    """
    target = "layers.{i}.attention.qkv.{leaf}"
    if config is None:
        return [Join(parts, target)]
    has = (config.has_query_bias, config.has_key_bias, config.has_value_bias)
    rules = []
    for number, heads in enumerate(config.key_value_heads):
        names = tuple(part.replace("{i}", str(number)).replace("{leaf}", leaf) for part in parts)
        lacking = tuple(name for name, is_there in zip(names, has) if leaf == "bias" and not is_there)
        shares = (config.num_attention_heads, heads, heads)
        whole = target.replace("{i}", str(number)).replace("{leaf}", leaf)
        rules.append(Join(names, whole, may_lack=lacking, shares=shares))
    return rules


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    parts = tuple(f"blocks.{{i}}.attn.w{part}.{{leaf}}" for part in "qkv")
    joins = join_heads(config, parts, leaf="weight")
    return [*RULES, *joins, *(join_heads(config, parts, leaf="bias") if config is not None else [])]


def _configure(info: CheckpointInfo) -> dict:
    settings = complete(info)
    odd = [name for name in ("proj_bias", "mlp_bias", "use_gated_mlp", "use_qk_norm") if not settings[name]]
    if odd or settings["hidden_act"] != "silu":
        what = f"{odd[0]}=False" if odd else f"hidden_act={settings['hidden_act']!r}"
        raise ConversionError(f"transformers' sapiens2 with {what} cannot be represented")
    heads = settings["num_key_value_heads_per_layer"]
    return {
        **read_settings({**settings, "hidden_act": "gelu"}),
        "hidden_act": "swiglu",
        "intermediate_size": settings["intermediate_size"],
        "attention_probs_dropout_prob": settings["attention_dropout"],
        "drop_path_rate": settings["drop_path_rate"],
        "num_key_value_heads": None if set(heads) == {settings["num_attention_heads"]} else heads,
        "has_query_key_norm": True,
        "norm_type": "rmsnorm",
        "layer_norm_eps": settings["rms_norm_eps"],
        "num_register_tokens": settings["num_register_tokens"],
        "position_embedding_type": "rope",
        "rope_theta": settings["rope_theta"],
        "rope_shift": settings["pos_embed_shift"],
        "rope_jitter": settings["pos_embed_jitter"],
        "rope_rescale": settings["pos_embed_rescale"],
        "layer_scale_init_value": settings["layerscale_value"],
        "has_mlp_layer_scale": False,
        "has_query_bias": settings["query_bias"],
        "has_key_bias": settings["key_bias"],
        "has_value_bias": settings["value_bias"],
        "has_mask_token": info.has("embeddings.mask_token"),
    }


def _write_settings(config: ViTWithRegistersConfig) -> dict:
    return {
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "num_key_value_heads_per_layer": config.key_value_heads,
        "num_register_tokens": config.num_register_tokens,
        "rope_theta": config.rope_theta,
        "pos_embed_shift": config.rope_shift,
        "pos_embed_jitter": config.rope_jitter,
        "pos_embed_rescale": config.rope_rescale,
        "layerscale_value": config.layer_scale_init_value,
        "query_bias": config.has_query_bias,
        "key_bias": config.has_key_bias,
        "value_bias": config.has_value_bias,
        "use_mask_token": config.has_mask_token,
        "drop_path_rate": config.drop_path_rate,
        "attention_dropout": config.attention_probs_dropout_prob,
    }


LAYOUT = Layout(
    name="transformers-sapiens2",
    title="transformers' Sapiens2",
    licence=None,
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_square(side_of(config), **IMAGENET),
    canonical=each(lambda name: name),
    model_types=("sapiens2",),
    write_settings=_write_settings,
)

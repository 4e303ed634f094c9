"""Models of timm in memory: what their modules say of the architecture, which their tensors do not show."""

from __future__ import annotations

from torch import nn

from ..rules import ConversionError


_ACTS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "swiglu"}
_ROPES = {"NoneType": "dinov3", "RotaryEmbeddingDinoV3": "dinov3", "RotaryEmbeddingCat": "axial"}
_ROPES["RotaryEmbeddingMixed"] = "mixed"
_NORMS = {"LayerNorm": "layernorm", "LayerNormFp32": "layernorm", "RmsNorm": "rmsnorm"}
_FILES, _STAGES = ("vision_transformer", "eva", "beit"), ("stages", "layers", "network", "layer1")
_BLOCKS, _ATTENTIONS = ("Block", "EvaBlock"), ("Attention", "AttentionRope", "EvaAttention")


def read_module(module: nn.Module) -> dict:
    """Fields of our configuration for a model of timm.

    Raises:
        ConversionError: this family cannot represent the architecture; the message names the parts.
    """
    name, part = type(module).__name__, _other_part(module)
    if part is not None:
        raise ConversionError(f"timm's {name} with {part} cannot be represented")
    block = module.blocks[0]
    attention, rope = block.attn, getattr(module, "rope", None)
    refusals = {
        f"attention of class {_name(attention)}": _name(attention) not in _ATTENTIONS,
        f"global_pool={module.global_pool!r}": module.global_pool not in ("token", "", "avg", "map", "prr"),
        f"the activation {_name(block.mlp.act)}": _name(block.mlp.act) not in _ACTS,
        f"rotary positions of class {_name(rope)}": _name(rope) not in _ROPES,
        f"norms of class {_name(block.norm1)}": _name(block.norm1) not in _NORMS,
        "pool_include_prefix=True": getattr(module, "pool_include_prefix", False) and module.global_pool != "prr",
        "heads of another width": attention.qkv is not None and attention.proj.in_features != module.embed_dim,
        "norms of tokens and of the pooled vector": _is_there(module.norm) and _is_there(module.fc_norm),
    }
    refused = [what for what, is_so in refusals.items() if is_so]
    if refused:
        raise ConversionError(f"timm's {name} with {' and '.join(refused)} cannot be represented")
    patch, image = module.patch_embed.patch_size, module.patch_embed.img_size or (256, 256)
    return {
        "hidden_size": module.embed_dim,
        "num_hidden_layers": len(module.blocks),
        "num_channels": module.patch_embed.proj.in_channels,
        "patch_size": _plain(patch),
        "image_size": _plain(image),
        "has_patch_norm": _is_there(getattr(module.patch_embed, "norm", None)),
        "has_pre_norm": _is_there(getattr(module, "norm_pre", None)),
        "has_final_norm": _is_there(module.norm) or _is_there(module.fc_norm),
        "has_pooled_norm": _is_there(module.fc_norm),
        **_read_layers(module, block),
        **_read_positions(module, [side // one for side, one in zip(image, patch)]),
        **_read_pooling(module),
    }


def _other_part(module: nn.Module) -> str | None:
    """The part for which a model is none of timm's `VisionTransformer`, `Eva` and `Beit`, None if it is one."""
    lists = (nn.Sequential, nn.ModuleList)
    if not isinstance(blocks := getattr(module, "blocks", None), lists):
        stages = next((name for name in _STAGES if isinstance(getattr(module, name, None), lists)), None)
        return f"several grids ({stages})" if stages else "no list of blocks"
    file = type(blocks[0]).__module__.removeprefix("timm.models.")
    if _name(blocks[0]) not in _BLOCKS or (file not in _FILES and file != type(blocks[0]).__module__):
        return f"blocks of class {_name(blocks[0])}" + (f" in {file}" if _name(blocks[0]) in _BLOCKS else "")
    patches = next((getattr(module, name) for name in ("patch_embed", "embeds") if hasattr(module, name)), None)
    return None if _name(patches) == "PatchEmbed" else f"patches of class {_name(patches)}"


def _read_layers(module: nn.Module, block: nn.Module) -> dict:
    attention = block.attn
    heads = [getattr(layer.attn, "num_kv_heads", attention.num_heads) for layer in module.blocks]
    state = {name for name, _ in block.named_parameters()}
    scales = [{"ls1.gamma", "gamma_1"} & state, {"ls2.gamma", "gamma_2"} & state]
    has_bias = [
        bool({"attn.qkv.bias", f"attn.{part}_bias", f"attn.{part}_proj.bias"} & state) for part in ("q", "k", "v")
    ]
    act, is_gated = _name(block.mlp.act), hasattr(block.mlp, "fc1_g") or _name(block.mlp.act) == "SiLU"
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": None if set(heads) == {attention.num_heads} else heads,
        "has_query_key_norm": _is_there(getattr(attention, "q_norm", None)),
        "attention_gate": "element" if getattr(attention, "gate", None) is not None else None,
        "has_attention_norm": _is_there(getattr(attention, "norm", None)),
        "has_mlp_norm": _is_there(getattr(block.mlp, "norm", None)),
        "hidden_act": "swiglu" if is_gated else _ACTS[act],
        "norm_type": _NORMS[_name(block.norm1)],
        "layer_norm_eps": block.norm1.eps,
        "layer_scale_init_value": 1e-5 if scales[0] else None,
        "has_mlp_layer_scale": bool(scales[1]) or not scales[0],
        **dict(zip(("has_query_bias", "has_key_bias", "has_value_bias"), has_bias)),
    }


def _read_positions(module: nn.Module, grid: list[int]) -> dict:
    rope, table = getattr(module, "rope", None), module.pos_embed
    fields: dict = {"position_embedding_type": "rope" if table is None else "learned"}
    if table is None and rope is None:
        fields["position_embedding_type"] = "none"
    if table is not None:
        slots = table.shape[1] - grid[0] * grid[1]
        special = sum(getattr(module, name, None) is not None for name in ("cls_token", "dist_token"))
        if slots not in (0, special):
            raise ConversionError(f"timm's {type(module).__name__} with positions of registers cannot be represented")
        fields |= {"has_prefix_positions": bool(slots)}
        fields["position_embedding_type"] = "learned" if rope is None else "learned_rope"
    if rope is not None:
        style = _ROPES[_name(rope)]
        fields |= {"rope_style": style, "rope_theta": float(rope.temperature)}
        if style != "dinov3":
            fields["rope_columns_first"] = rope.grid_indexing == "xy"
        if style == "axial":
            reference = rope.ref_feat_shape
            fields |= {"rope_grid_offset": float(rope.grid_offset)}
            fields |= {"rope_reference_grid": None if reference is None else list(reference)}
        is_half = getattr(module.blocks[0].attn, "rotate_half", False)
        if is_half != (style == "dinov3") or getattr(rope, "in_pixels", False) or getattr(rope, "linear_bands", False):
            raise ConversionError(f"timm's {_name(rope)} with other pairs of channels or bands cannot be represented")
    if getattr(module.blocks[0].attn, "relative_position_bias_table", None) is not None:
        fields["relative_position_bias"] = "layer"
    if getattr(module, "rel_pos_bias", None) is not None:
        fields["relative_position_bias"] = "shared"
    return fields


def _read_pooling(module: nn.Module) -> dict:
    if module.global_pool == "prr":
        return {"pooling": "prr"}
    if module.global_pool != "map":
        has_cls = getattr(module, "cls_token", None) is not None
        return {"pooling": "cls" if module.global_pool != "avg" and has_cls else "mean"}
    pool = module.attn_pool
    is_odd = pool.latent_len != 1 or pool.pos_embed is not None or _is_there(pool.q_norm) or pool.mlp is None
    if is_odd or not isinstance(pool.q, nn.Linear):
        raise ConversionError("timm's attention pooling with other parts than SigLIP's cannot be represented")
    return {
        "pooling": "attention",
        "pooling_num_heads": pool.num_heads,
        "pooling_intermediate_size": pool.mlp.fc2.in_features,
    }


def _is_there(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _name(module: object) -> str:
    return type(module).__name__


def _plain(sides: tuple) -> int | tuple:
    return sides[0] if sides[0] == sides[1] else tuple(sides)

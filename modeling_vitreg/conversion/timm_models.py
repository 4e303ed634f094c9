"""Models of timm: built by name, from a folder that other people wrote, and from a configuration of ours."""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib

import torch
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg.names import list_first

from .layouts.timm import has_gate_apart, has_heads_apart, is_of_eva
from .rules import ConversionError, stage
from .sources import Source
from .verify import Reference, title_of


_NOT_IN_TIMM = ("dino_head.", "ibot_head.", "head.mlp", "head.last_layer", "decoder_", "local_cls_norm")
_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")


def create(name: str) -> nn.Module:
    """A model of timm with its pretrained weights, by the name that the user typed.

    Raises:
        ConversionError: timm is not installed, or does not know the name.
    """
    name = name.removeprefix("timm:")
    remedy = "list names with timm.list_models('vit*', pretrained=True)"
    with stage(f"timm could not create {name!r}", remedy=remedy):
        return _import_timm().create_model(name, pretrained=True)


def build(name: str, **arguments) -> nn.Module:
    """A model of timm with random weights."""
    return _import_timm().create_model(name, pretrained=False, **arguments)


def build_folder(source: Source) -> nn.Module:
    """The model of a folder of timm, with the weights of the folder.

    `config.json` is not trusted: names that timm does not list, and arguments that are not those of the
    architecture (such as `checkpoint_path`, which some versions of timm unpickle), are refused. Sizes are compared
    with the tensors before the model takes any memory.

    Raises:
        ConversionError: the folder asks for something else, or its tensors do not fit.
    """
    timm, settings, file = _import_timm(), source.settings, source.path / "config.json"
    name, arguments = settings["architecture"], settings.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ConversionError(f"{file}: expected model_args to be an object, got {arguments!r:.60}: correct the file")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"{name[:12]}*")[:3]) if name.isidentifier() else ""
        raise ConversionError(
            f"{file}: expected the name of a model that timm lists, got {name!r:.80}"
            + (f"; did you mean {near}?" if near else ": correct the name, or convert the file of the weights")
        )
    if "num_classes" in settings:
        arguments = {"num_classes": settings["num_classes"], **arguments}
    with stage(f"{file}: timm cannot build {name}", remedy="correct model_args, or convert the file of the weights"):
        _check_arguments(arguments, source, file)
        with _ShapesOnly(), torch.device("meta"):
            empty = build(name, **arguments)
        if type(empty).__name__ not in _CLASSES:
            raise ConversionError(f"{file}: timm's {name} is no plain Vision Transformer: it cannot be represented")
        shapes = {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}
        if shapes != source.shapes:
            odd = sorted(key for key in {*shapes, *source.shapes} if shapes.get(key) != source.shapes.get(key))
            raise ConversionError(
                f"{source.path}: {len(odd)} tensors do not fit {name}: {list_first(odd)}: config.json belongs to "
                "another model, or the file is incomplete"
            )
        module = build(name, **arguments)
        module.load_state_dict({key: source.read(key) for key in source.shapes}, strict=True)
    return module


def timm_reference(layout: str, source: Source, config: ViTWithRegistersConfig) -> Reference:
    """timm's model of these sizes, its weights through timm's own filter of checkpoints."""
    # timm adds the slot of the class token to the token where there are registers.
    is_folded = layout == "dinov2" and config.num_register_tokens > 0
    has_slots = config.has_prefix_positions or config.position_embedding_type == "sincos"
    num_classes = source.shapes["head.weight"][0] if "head.weight" in source.shapes else 0
    name, arguments = timm_arguments(config, has_prefix_positions=has_slots and not is_folded)
    module = build(name, num_classes=num_classes, **arguments)
    state = {name: source.read(name) for name in source.shapes if not name.startswith(_NOT_IN_TIMM)}
    if layout == "mae":
        state.pop("mask_token", None)
    filters = importlib.import_module(type(module).__module__)
    is_third = layout == "deit" and config.layer_scale_init_value is not None
    state = filters.checkpoint_filter_fn(state, module, **({"adapt_layer_scale": True} if is_third else {}))
    module.load_state_dict(state, strict=True)
    return Reference(title_of("timm"), functools.partial(run_timm, module), module, timm_positions(config))


def timm_positions(config: ViTWithRegistersConfig) -> dict:
    """Fields under which positions are resized as timm does it, where that is not what the configuration says."""
    if not config.has_position_table:
        return {}
    rule = {"interpolate_antialias": True, "interpolate_offset": 0.0, "interpolate_mode": "bicubic"}
    return {name: value for name, value in rule.items() if getattr(config, name) != value}


def timm_arguments(config: ViTWithRegistersConfig, *, has_prefix_positions: bool) -> tuple[str, dict]:
    """The name of a model of timm, and the arguments that give it our architecture.

    Args:
        config: configuration of the model of this family.
        has_prefix_positions: whether its table has slots for class and distillation token.
    """
    is_gated = config.hidden_act == "swiglu"
    is_eva = is_of_eva(config)
    is_packed = is_gated and not is_eva and not has_gate_apart(config)
    hidden = config.intermediate_size * (2 if is_packed else 1)
    pools = {"mean": "avg", "cls_mean": "avg", "attention": "map"}
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (hidden + 0.5) / config.hidden_size,  # timm takes the whole part of the product
        "qkv_bias": config.has_query_bias,
        "init_values": config.layer_scale_init_value,
        "class_token": config.has_cls_token,
        "global_pool": pools.get(config.pooling, "token"),
        "dynamic_img_size": True,
    }
    if config.relative_position_bias is not None:
        return "beit_base_patch16_224", _beit_arguments(arguments, config)
    if is_eva:
        return _eva_name(config), arguments | _eva_arguments(config)
    acts = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "swiglu": "silu"}
    arguments |= {
        "no_embed_class": not has_prefix_positions,
        "reg_tokens": config.num_register_tokens,
        "fc_norm": config.has_pooled_norm,
        "act_layer": acts[config.hidden_act],
    }
    options = {
        "final_norm": (config.has_final_norm, True),
        "qk_norm": (config.has_query_key_norm, False),
        "scale_attn_norm": (config.has_attention_norm, False),
        "scale_mlp_norm": (config.has_mlp_norm, False),
    }
    arguments |= {name: value for name, (value, usual) in options.items() if value != usual}
    if config.has_distillation_token:
        del arguments["class_token"], arguments["no_embed_class"], arguments["reg_tokens"]
        return "deit_tiny_distilled_patch16_224", arguments
    if config.pooling == "prr" and hasattr(_import_timm().layers, "AttentionPoolPrr"):
        arguments["global_pool"] = "prr"
    if config.has_pre_norm:
        return "vit_base_patch16_clip_224", arguments
    if config.has_patch_norm:
        return "aimv2_large_patch14_224", arguments
    return ("vit_giant_patch14_reg4_dinov2" if is_gated else "vit_base_patch16_224"), arguments


def _beit_arguments(arguments: dict, config: ViTWithRegistersConfig) -> dict:
    unknown = ("class_token", "dynamic_img_size")
    return {name: value for name, value in arguments.items() if name not in unknown} | {
        "use_abs_pos_emb": config.has_position_table,
        "use_rel_pos_bias": config.relative_position_bias == "layer",
        "use_shared_rel_pos_bias": config.relative_position_bias == "shared",
    }


def _eva_name(config: ViTWithRegistersConfig) -> str:
    """A model with the norm of a configuration, for no argument in a file sets a norm."""
    if config.norm_type == "rmsnorm" and config.rope_style != "capi":
        return "vit_base_patch16_sapiens2"
    if config.rope_style in ("dinov3", "capi") and config.has_rope:
        return "vit_small_patch16_dinov3"
    # timm ignores arguments that are None, so the model has to have none of the parts.
    return "vit_pe_core_tiny_patch16_384" if config.layer_norm_eps == 1e-5 else "eva_giant_patch14_224"


def _eva_arguments(config: ViTWithRegistersConfig) -> dict:
    is_gated, is_apart = config.hidden_act == "swiglu", has_heads_apart(config)
    # Not aligned: the hidden width is what it is.
    gate = {"swiglu_mlp": True, "swiglu_align_to": int(has_gate_apart(config))} if is_gated else {}
    arguments = {"num_reg_tokens": config.num_register_tokens, "use_fc_norm": config.has_pooled_norm, **gate}
    arguments |= {"rope_temperature": config.rope_theta}
    is_dinov3 = config.rope_style == "dinov3" and config.norm_type == "layernorm" and not config.has_position_table
    if config.rope_style == "capi" or (is_dinov3 and not is_apart):  # timm has no CAPI, as the comparison finds
        return arguments
    is_plain = config.has_key_bias and (is_apart or config.rope_style != "dinov3")
    heads = config.key_value_heads
    # Parts that older versions of timm lack.
    new = {
        "qk_norm": config.has_query_key_norm,
        "num_kv_heads": None if set(heads) == {config.num_attention_heads} else heads,
        "attn_only_layer_scale": not config.has_mlp_layer_scale,
    }
    arguments |= {name: value for name, value in new.items() if value}
    return arguments | {
        "use_abs_pos_emb": config.has_position_table,
        "use_rot_pos_emb": config.has_rope,
        "no_embed_class": not config.has_prefix_positions,
        "rope_type": {"axial": "cat"}.get(config.rope_style, config.rope_style),
        "rope_rotate_half": config.rope_style == "dinov3",
        "rope_grid_offset": config.rope_grid_offset,
        "rope_grid_indexing": "xy" if config.rope_columns_first else "ij",
        "ref_feat_shape": config.rope_reference_grid,
        "attn_type": "rope" if is_plain and not config.has_mlp_norm else "eva",
        "qkv_fused": not is_apart,
        "scale_mlp": config.has_mlp_norm,
        "scale_attn_inner": config.has_attention_norm,
        "use_pre_transformer_norm": config.has_pre_norm,
        "use_post_transformer_norm": config.has_final_norm and not config.has_pooled_norm,
        "attn_pool_num_heads": config.pooling_num_heads,
        "attn_pool_mlp_ratio": (
            None
            if config.pooling_intermediate_size is None
            else (config.pooling_intermediate_size + 0.5) / config.hidden_size
        ),
    }


def run_timm(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Tokens and logits of a model of timm."""
    tokens = module.forward_features(images)
    counts = {
        "cls_token": int(getattr(module, "cls_token", None) is not None),
        "distillation_token": int(getattr(module, "dist_token", None) is not None),
        "register_tokens": _num_rows(getattr(module, "reg_token", None)),
    }
    named, start = {}, 0
    for kind, count in counts.items():
        if count:
            part = tokens[:, start : start + count]
            named[kind] = part if kind == "register_tokens" else part[:, 0]
        start += count
    named["patch_tokens"] = tokens[:, start:]
    if getattr(module, "attn_pool", None) is not None:
        named["pooler_output"] = module.forward_head(tokens, pre_logits=True)
    if getattr(module, "num_classes", 0):
        named["logits"] = module(images)
    return named


def _num_rows(tokens: Tensor | None) -> int:
    return 0 if tokens is None else tokens.shape[1]


def sizes_of(module: nn.Module) -> list[tuple[int, int]] | None:
    """Arguments that let a model of timm take several image sizes."""
    if getattr(module, "dynamic_img_size", False) or module.patch_embed.img_size is None:
        return None
    module.dynamic_img_size = module.patch_embed.strict_img_size = False
    return [tuple(module.patch_embed.img_size)]


def _check_arguments(arguments: dict, source: Source, file: pathlib.Path) -> None:
    """Arguments have to be those of a constructor, which reads no files, and of a size that the tensors can have."""
    kinds = {"vision_transformer": "VisionTransformer", "eva": "Eva", "beit": "Beit"}
    modules = {name: importlib.import_module(f"timm.models.{name}") for name in kinds}
    known = {
        key for name in kinds for key in inspect.signature(getattr(modules[name], kinds[name]).__init__).parameters
    }
    for key, value in arguments.items():
        most = len(source.shapes) if key == "depth" else 2**17
        values = value if isinstance(value, list) else [value]
        is_plain = all(isinstance(one, (int, float, str, type(None))) for one in values)
        if key not in known - {"self", "device", "dtype", "weight_init"} or not is_plain:
            raise ConversionError(
                f"{file}: model_args has {key}={value!r:.60}, which is no size of a model: remove it"
            )
        if any(isinstance(one, (int, float)) and not -1 <= one <= most for one in values):
            raise ConversionError(f"{file}: model_args has {key}={value!r:.60}, expected a number up to {most:,}")


class _ShapesOnly(torch.overrides.TorchFunctionMode):
    """Lets timm build a model on the device "meta": it reads the rates of stochastic depth from a tensor."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        return function(*arguments, **(keywords | {"device": "cpu"} if function is torch.linspace else keywords))


def _import_timm():
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConversionError("timm is needed for this conversion, and is not installed: pip install timm") from error

"""Originals to compare with, built by the libraries that are installed: transformers, timm and open_clip.

Each takes the tensors of the source through code of its own, so that no table of ours has a part in it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import types

import torch
import transformers
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig

from .sources import Source
from .verify import Reference


_NOT_IN_TIMM = ("dino_head.", "ibot_head.", "head.mlp", "head.last_layer", "decoder_", "local_cls_norm")


def find_reference(layout: str, source: Source, config: ViTWithRegistersConfig, module=None) -> Reference | str:
    """The reference for a source, or in words why there is none.

    Args:
        layout: its name.
        source: its tensors, under the names of the layout.
        config: of ours.
        module: the model itself, where the source was given as one.
    """
    if layout.startswith("transformers"):
        return transformers_reference(source, config)
    if layout == "timm" and module is not None:
        return Reference(title_of("timm"), functools.partial(run_timm, module), module, sizes=_sizes_of(module))
    wanted = {"clip": "open_clip"}.get(layout, "timm")
    if layout == "capi":
        return "no library has this family: give its repository with --code CLONE"
    if not _is_installed(wanted):
        package = {"open_clip": "open_clip_torch"}.get(wanted, wanted)
        return f"{wanted} is not installed: pip install {package}, or give the official repository with --code CLONE"
    return open_clip_reference(source, config) if layout == "clip" else timm_reference(layout, source, config)


# timm -------------------------------------------------------------------------------------------------------------


def timm_reference(layout: str, source: Source, config: ViTWithRegistersConfig) -> Reference:
    """timm's model of these sizes, its weights through timm's own filter of checkpoints."""
    # timm adds the slot of the class token to the token where there are registers.
    is_folded = layout == "dinov2" and config.num_register_tokens > 0
    has_slots = config.has_prefix_positions or config.position_embedding_type == "sincos"
    num_classes = source.shapes["head.weight"][0] if "head.weight" in source.shapes else 0
    module = make_timm(config, num_classes=num_classes, has_prefix_positions=has_slots and not is_folded)
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
    if config.position_embedding_type not in ("learned", "sincos"):
        return {}
    rule = {"interpolate_antialias": True, "interpolate_offset": 0.0}
    return {name: value for name, value in rule.items() if getattr(config, name) != value}


def make_timm(config: ViTWithRegistersConfig, *, num_classes: int, has_prefix_positions: bool) -> nn.Module:
    """A model of timm of the same architecture, with random weights; see `timm_arguments`."""
    name, arguments = timm_arguments(config, has_prefix_positions=has_prefix_positions)
    return importlib.import_module("timm").create_model(name, num_classes=num_classes, **arguments)


def timm_arguments(config: ViTWithRegistersConfig, *, has_prefix_positions: bool) -> tuple[str, dict]:
    """The name of a model of timm, and the arguments that make it of our architecture.

    Args:
        config: of ours.
        has_prefix_positions: whether its table has slots for class and distillation token.
    """
    is_gated, is_eva = config.hidden_act == "swiglu", config.position_embedding_type == "rope"
    hidden = config.intermediate_size * (2 if is_gated and not is_eva else 1)
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
        "global_pool": "avg" if config.pooling in ("mean", "cls_mean") else "token",
        "dynamic_img_size": True,
    }
    if is_eva:
        # Not aligned: the hidden width is what it is.
        gate = {"swiglu_mlp": True, "swiglu_align_to": 1} if is_gated else {}
        arguments |= {"num_reg_tokens": config.num_register_tokens, "use_fc_norm": config.has_pooled_norm, **gate}
        return "vit_small_patch16_dinov3", arguments | {"rope_temperature": config.rope_theta}
    acts = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "swiglu": "silu"}
    arguments |= {
        "no_embed_class": not has_prefix_positions,
        "reg_tokens": config.num_register_tokens,
        "fc_norm": config.has_pooled_norm,
        "act_layer": acts[config.hidden_act],
    }
    if config.has_distillation_token:
        del arguments["class_token"], arguments["no_embed_class"], arguments["reg_tokens"]
        return "deit_tiny_distilled_patch16_224", arguments
    if config.has_pre_norm:
        return "vit_base_patch16_clip_224", arguments
    return ("vit_giant_patch14_reg4_dinov2" if is_gated else "vit_base_patch16_224"), arguments


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
    if getattr(module, "num_classes", 0):
        named["logits"] = module(images)
    return named


def _num_rows(tokens: Tensor | None) -> int:
    return 0 if tokens is None else tokens.shape[1]


def _sizes_of(module: nn.Module) -> list[tuple[int, int]] | None:
    """A model of timm takes other sizes if it was told so before."""
    if getattr(module, "dynamic_img_size", False) or module.patch_embed.img_size is None:
        return None
    module.dynamic_img_size = module.patch_embed.strict_img_size = False
    return [tuple(module.patch_embed.img_size)]


# transformers -----------------------------------------------------------------------------------------------------


def transformers_reference(source: Source, config: ViTWithRegistersConfig) -> Reference:
    """The class of transformers that wrote the folder."""
    kind = getattr(transformers, source.settings["architectures"][0])
    options = {"mask_ratio": 0.0} if source.settings["model_type"] == "vit_mae" else {}
    module = kind.from_pretrained(source.path, **options)
    rule = {
        "interpolate_antialias": source.settings["model_type"] == "dinov2_with_registers",
        "interpolate_offset": 0.0,
    }
    is_table = config.position_embedding_type in ("learned", "sincos")
    positions = {name: value for name, value in rule.items() if is_table and getattr(config, name) != value}
    run = functools.partial(run_transformers, module, config)
    return Reference(title_of("transformers"), run, module, positions)


def run_transformers(module: nn.Module, config: ViTWithRegistersConfig, images: Tensor) -> dict[str, Tensor]:
    """Normed tokens, logits and projections of a model of transformers."""
    model_type = module.config.model_type
    if model_type in ("clip", "clip_vision_model"):
        return _run_clip(module, images)
    # A base model may own a part that is called as the base model of others is.
    has_head = "For" in type(module).__name__
    base = getattr(module, module.base_model_prefix) if has_head else module
    output = _call(base, images)
    tokens = output.last_hidden_state
    if model_type == "vit_mae":
        patches = tokens[:, 1:].gather(1, output.ids_restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    slices = config.token_slices
    named = {
        "cls_token": tokens[:, slices["cls"]].flatten(1),
        "distillation_token": tokens[:, slices["distillation"]].flatten(1),
        "register_tokens": tokens[:, slices["registers"]],
        "patch_tokens": tokens[:, slices["patches"]],
    }
    if has_head:
        output = _call(module, images)
        kinds = ("logits", "cls_logits", "distillation_logits")
        named |= {kind: output[kind] for kind in kinds if output.get(kind) is not None and model_type != "vit_mae"}
    return named


def _run_clip(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    vision = getattr(module, "vision_model", module)
    tokens = _call(vision, images).last_hidden_state
    tokens = vision.post_layernorm(tokens)
    named = {"cls_token": tokens[:, 0], "patch_tokens": tokens[:, 1:]}
    if hasattr(module, "visual_projection"):
        named["image_embeds"] = module.visual_projection(named["cls_token"])
    return named


def _call(module: nn.Module, images: Tensor):
    takes = inspect.signature(module.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    try:
        return module(images, **options)
    except TypeError:
        return module(images)


# open_clip --------------------------------------------------------------------------------------------------------


def open_clip_reference(source: Source, config: ViTWithRegistersConfig) -> Reference:
    """OpenCLIP's image tower; for each size of images one whose table OpenCLIP has resized."""
    state = {name: source.read(name).float() for name in source.shapes if not name.startswith("outside.")}
    make = functools.cache(functools.partial(_make_tower, config, state))
    native = make(tuple(side * patch for side, patch in zip(config.grid_shape, config.patch_shape)))
    positions = {} if config.interpolate_antialias else {"interpolate_antialias": True}
    run = functools.partial(_run_open_clip, make)
    return Reference(title_of("open_clip", "open_clip_torch"), run, native, positions)


def _make_tower(config: ViTWithRegistersConfig, state: dict[str, Tensor], size: tuple[int, int]) -> nn.Module:
    towers = importlib.import_module("open_clip.transformer")
    resize = importlib.import_module("open_clip.model").resize_pos_embed
    acts = {"quick_gelu": towers.QuickGELU, "gelu": nn.GELU}
    tower = towers.VisionTransformer(
        image_size=size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
        ls_init_value=config.layer_scale_init_value,
        output_dim=config.projection_size or config.hidden_size,
        act_layer=acts[config.hidden_act],
        output_tokens=True,
    )
    if config.projection_size is None:
        tower.proj = None
    fitted = {f"visual.{name}": tensor for name, tensor in state.items()}
    resize(fitted, types.SimpleNamespace(visual=tower))
    tower.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in fitted.items()}, strict=True)
    return tower.eval()


def _run_open_clip(make, images: Tensor) -> dict[str, Tensor]:
    tower, held = make(tuple(images.shape[2:])), {}
    handle = tower.ln_post.register_forward_hook(lambda _, inputs, output: held.update(tokens=output))
    try:
        pooled, _ = tower(images)
    finally:
        handle.remove()
    named = {"cls_token": held["tokens"][:, 0], "patch_tokens": held["tokens"][:, 1:]}
    return named | ({"image_embeds": pooled} if tower.proj is not None else {})


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def title_of(package: str, distribution: str | None = None) -> str:
    """A library and its version."""
    return f"{package} {importlib.metadata.version(distribution or package)}"


__all__ = [
    "find_reference",
    "make_timm",
    "run_timm",
    "run_transformers",
    "timm_arguments",
    "timm_positions",
    "timm_reference",
    "title_of",
]

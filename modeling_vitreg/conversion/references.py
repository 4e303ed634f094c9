"""Originals to compare with: transformers, timm and open_clip if they are installed, or a clone of a repository.

Each one loads the tensors of the source with its own code, without the tables of this package. A clone is code, and
it runs: only one that the caller names is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import Tensor, nn

from modeling_vitreg import HATNetConfig, ViTWithRegistersConfig
from modeling_vitreg.names import list_first
from modeling_vitreg.reports import versions

from .layouts.transformers import CLIP_TOWERS, CLIP_WHOLE
from .layouts.transformers_files import transformers_class
from .rules import ConversionError
from .sources import Source
from .timm_models import run_timm, sizes_of, timm_reference
from .verify import Reference, title_of


# Settings that would load other files, run code, or change the precision.
_NOT_OF_ARCHITECTURE = ("architectures", "auto_map", "quantization_config", "_name_or_path", "dtype", "torch_dtype")

_OF_ONE_SIZE = ("aimv2",)  # model types that take images of the size of their table only


def find_reference(layout: str, source: Source, config: ViTWithRegistersConfig, module=None) -> Reference | str:
    """The original for a source, or the reason why there is none.

    Args:
        layout: name of the layout.
        source: the tensors, under the names of the layout; for transformers under those of the file.
        config: configuration of the model of this family.
        module: the model itself, if the source was given as one.
    """
    if layout.startswith("transformers"):
        return transformers_reference(source, config)
    if layout == "timm" and module is not None:
        return Reference(title_of("timm"), functools.partial(run_timm, module), module, sizes=sizes_of(module))
    if layout == "mamba-reg":
        return "its project runs on a GPU only: the tests compare the layers of the model with other libraries"
    wanted = {"clip": "open_clip"}.get(layout, "timm")
    if layout in ("capi", "hat-net"):
        return "no library has this family: give its repository with --code CLONE"
    if not _is_installed(wanted):
        package = {"open_clip": "open_clip_torch"}.get(wanted, wanted)
        return f"{wanted} is not installed: pip install {package}, or give the official repository with --code CLONE"
    return open_clip_reference(source, config) if layout == "clip" else timm_reference(layout, source, config)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# transformers -----------------------------------------------------------------------------------------------------


def transformers_reference(source: Source, config: ViTWithRegistersConfig) -> Reference:
    """The class of transformers that the folder names, with the tensors of the source and no other file."""
    settings = {name: value for name, value in source.settings.items() if name not in _NOT_OF_ARCHITECTURE}
    kind = getattr(transformers, transformers_class(source.settings, source.shapes))
    theirs = kind.config_class.from_dict(settings)
    if settings["model_type"] == "vit_mae":
        theirs.mask_ratio = 0.0
    unread = ("mask_token", "pooler", *(("layer_scale",) if settings["model_type"] == "radio" else ()))
    state = {name: source.read(name) for name in source.shapes}
    module, report = kind.from_pretrained(
        None, config=theirs, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    empty = [name for name, tensor in module.state_dict().items() if not tensor.numel()]  # as no registers of DINOv3
    if missing := [name for name in report["missing_keys"] if not any(part in name for part in (*unread, *empty))]:
        raise ConversionError(
            f"{source.path}: {len(missing)} tensors are missing: {list_first(sorted(missing))}; another version of "
            f"transformers may use other names (installed: {versions('transformers')['transformers']})"
        )
    is_smooth = settings["model_type"] in ("dinov2_with_registers", "tipsv2", "tipsv2_vision_model")
    rule = {"interpolate_antialias": is_smooth, "interpolate_offset": 0.0}
    rule = rule if config.has_position_table else {}
    positions = {name: value for name, value in rule.items() if getattr(config, name) != value}
    run = functools.partial(run_transformers, module, config)
    native = [tuple(side * patch for side, patch in zip(config.grid_shape, config.patch_shape))]
    sizes = native if settings["model_type"].startswith(_OF_ONE_SIZE) else None
    return Reference(title_of("transformers"), run, module, positions, sizes=sizes)


def run_transformers(module: nn.Module, config: ViTWithRegistersConfig, images: Tensor) -> dict[str, Tensor]:
    """Normed tokens, logits and projections of a model of transformers."""
    model_type = module.config.model_type
    if model_type in (*CLIP_WHOLE, *CLIP_TOWERS):
        return _run_clip(module, images)
    # A base model may own a part that is called as the base model of others is.
    has_head, base = "For" in type(module).__name__, getattr(module, "vision_model", None)
    if base is None:
        base = getattr(module, module.base_model_prefix) if has_head else module
    if model_type == "radio":  # it norms the images itself
        images = images * module.input_conditioner.norm_std + module.input_conditioner.norm_mean
    output = _call(base, images)
    tokens = output.last_hidden_state
    if model_type == "vit_mae":
        patches = tokens[:, 1:].gather(1, output.ids_restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    slices = config.token_slices
    named = {
        "cls_token": tokens[:, slices["cls"]][:, :1].flatten(1),
        "distillation_token": tokens[:, slices["distillation"]].flatten(1),
        "register_tokens": tokens[:, slices["registers"]],
        "patch_tokens": tokens[:, slices["patches"]],
    }
    if config.num_cls_tokens > 1:
        named["cls_tokens"] = tokens[:, slices["cls"]]
    if config.pooling in ("attention", "cls_average", "cls_concat"):
        named["pooler_output"] = output.summary if model_type == "radio" else output.pooler_output
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


# Clones of repositories -------------------------------------------------------------------------------------------


def repository_reference(
    layout: str, code: str | os.PathLike, source: Source, config: ViTWithRegistersConfig
) -> Reference:
    """The class of a repository with the weights of the source.

    Args:
        layout: its name.
        code: a clone of the repository.
        source: the tensors, under the names of the layout.
        config: our configuration, for the sizes.

    Raises:
        ConversionError: the family has no such repository, or the clone lacks a file or a package.
    """
    makers = {"dinov2": _dinov2, "dino": _dino, "dinov3": _dinov3, "deit": _deit, "capi": _capi, "hat-net": _hat_net}
    if layout not in makers:
        raise ConversionError(f"--code runs {', '.join(makers)}; {layout} is compared with an installed library")
    try:
        with _on_path(pathlib.Path(code)):
            module, run, ignored, sizes = makers[layout](config)
    except (ImportError, AttributeError) as error:
        raise ConversionError(
            f"{code}: expected a clone of the repository of {layout} with its requirements installed, got {error}"
        ) from error
    state = {name: source.read(name) for name in source.shapes if not name.startswith(ignored)}
    module.load_state_dict(state, strict=True)
    return Reference(f"{pathlib.Path(code).resolve().name} (its repository)", run, module, sizes=sizes)


Made = tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]], tuple[str, ...], list | None]


def _dinov2(config: ViTWithRegistersConfig) -> Made:
    os.environ["XFORMERS_DISABLED"] = "1"  # its attention runs on a GPU only
    vits = importlib.import_module("dinov2.models.vision_transformer")
    is_gated = config.hidden_act == "swiglu"
    module = vits.DinoVisionTransformer(
        **_sizes(config),
        init_values=1.0,
        ffn_layer="swiglufused" if is_gated else "mlp",
        mlp_ratio=4 if is_gated else config.intermediate_size / config.hidden_size,
        block_chunks=0,
        num_register_tokens=config.num_register_tokens,
        interpolate_antialias=config.interpolate_antialias,
        interpolate_offset=config.interpolate_offset,
    )

    def run(images: Tensor) -> dict[str, Tensor]:
        tokens = module.forward_features(images)
        names = {"cls_token": "clstoken", "register_tokens": "regtokens", "patch_tokens": "patchtokens"}
        return {kind: tokens[f"x_norm_{name}"] for kind, name in names.items()}

    return module, run, ("dino_head.", "ibot_head."), None


def _dino(config: ViTWithRegistersConfig) -> Made:
    vits = importlib.import_module("vision_transformer")
    sizes = _sizes(config)
    module = vits.VisionTransformer(
        **{**sizes, "img_size": [sizes["img_size"]]},
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )
    return module, _of_all_tokens(lambda images: module.get_intermediate_layers(images, 1)[0]), ("head.",), None


def _dinov3(config: ViTWithRegistersConfig) -> Made:
    vits = importlib.import_module("dinov3.models.vision_transformer")
    is_gated, ratio = config.hidden_act == "swiglu", config.intermediate_size / config.hidden_size
    module = vits.DinoVisionTransformer(
        **_sizes(config),
        ffn_ratio=ratio * 1.5 if is_gated else ratio,
        ffn_layer="swiglu" if is_gated else "mlp",
        qkv_bias=config.has_query_bias,
        mask_k_bias=config.has_query_bias and not config.has_key_bias,
        layerscale_init=1.0,
        norm_layer="layernormbf16",
        n_storage_tokens=config.num_register_tokens,
        pos_embed_rope_base=config.rope_theta,
        pos_embed_rope_dtype="fp32",
    )

    def run(images: Tensor) -> dict[str, Tensor]:
        tokens = module.forward_features(images)
        names = {"cls_token": "x_norm_clstoken", "register_tokens": "x_storage_tokens"}
        return {kind: tokens[name] for kind, name in {**names, "patch_tokens": "x_norm_patchtokens"}.items()}

    return module, run, ("local_cls_norm.",), None


def _deit(config: ViTWithRegistersConfig) -> Made:
    sizes = {**_sizes(config), "num_classes": config.num_labels}
    options = {"qkv_bias": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)}
    options["mlp_ratio"] = config.intermediate_size / config.hidden_size
    if config.layer_scale_init_value is not None:
        vits = importlib.import_module("models_v2")
        module = vits.vit_models(**sizes, **options, init_scale=1e-4, block_layers=vits.Layer_scale_init_Block)
    elif config.has_distillation_token:
        module = importlib.import_module("models").DistilledVisionTransformer(**sizes, **options)
    else:
        module = importlib.import_module("timm.models.vision_transformer").VisionTransformer(**sizes, **options)
    native = [(config.image_size, config.image_size)]
    return module, lambda images: {"logits": module(images)}, (), native


def _capi(config: ViTWithRegistersConfig) -> Made:
    model = importlib.import_module("model")
    attention = {"block_kwargs": {"attn_kwargs": {"num_heads": config.num_attention_heads}}}
    module = model.EncoderDecoder(
        patch_size=config.patch_size,
        n_registers=config.num_register_tokens,
        transformers_kwargs={"embed_dim": config.hidden_size, "drop_path_rate": 0.0, **attention},
        encoder_kwargs={"depth": config.num_hidden_layers},
        decoder_kwargs={"depth": 1},
    )
    module.decoder = nn.Identity()
    del module.mask_token

    def run(images: Tensor) -> dict[str, Tensor]:
        last = len(module.encoder.blocks)
        tokens, _ = module.forward_features(images, None, None, enc_layer=last, dec_layer=None)
        num_registers = config.num_register_tokens
        return {"register_tokens": tokens[:, :num_registers], "patch_tokens": tokens[:, num_registers:]}

    return module, run, ("decoder.", "outside.", "mask_token"), None


def _hat_net(config: HATNetConfig) -> Made:
    theirs = {"dims": "hidden_sizes", "head_dim": "head_size", "grid_sizes": "window_sizes", "ds_ratios": "pool_sizes"}
    theirs |= {name: name for name in ("depths", "expansions", "kernel_sizes")} | {"num_classes": "num_labels"}
    arguments = {name: getattr(config, field) for name, field in theirs.items()}
    module = importlib.import_module("HAT_Net").HAT_Net(**arguments)

    def run(images: Tensor) -> dict[str, Tensor]:
        held = []
        with module.blocks[-1][-1].register_forward_hook(lambda _, __, maps: held.append(maps)):
            logits = module(images)
        return {"patch_tokens": held[0].flatten(2).transpose(1, 2), "logits": logits}

    strides = [4, 8, 16, 32]
    side = math.lcm(
        *(s * size for sizes in (config.window_sizes, config.pool_sizes) for s, size in zip(strides, sizes))
    )
    return module, run, (), [(side, side), (side, 2 * side)]


def _sizes(config: ViTWithRegistersConfig) -> dict:
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }


def _of_all_tokens(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], dict[str, Tensor]]:
    def run(images: Tensor) -> dict[str, Tensor]:
        tokens = encode(images)
        return {"cls_token": tokens[:, 0], "patch_tokens": tokens[:, 1:]}

    return run


@contextlib.contextmanager
def _on_path(folder: pathlib.Path) -> Iterator[None]:
    """Import from a clone, and forget its modules afterwards: their names are those of many."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and pathlib.Path(file).is_relative_to(folder.resolve()):
                del sys.modules[name]

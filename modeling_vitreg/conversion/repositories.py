"""Originals to compare with, run from a clone of their own repository that the caller names.

A clone is code, and it runs: nothing here looks for one by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig

from .rules import ConversionError
from .sources import Source
from .verify import Reference


def repository_reference(
    layout: str, code: str | os.PathLike, source: Source, config: ViTWithRegistersConfig
) -> Reference:
    """The class of a facebookresearch repository with the weights of the source.

    Args:
        layout: its name.
        code: a clone of the repository.
        source: the tensors, under the names of the layout.
        config: of ours, for the sizes.

    Raises:
        ConversionError: the family has no such repository, or the clone lacks a file or a package.
    """
    makers = {"dinov2": _dinov2, "dino": _dino, "dinov3": _dinov3, "deit": _deit, "capi": _capi}
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


__all__ = ["repository_reference"]

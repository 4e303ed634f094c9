"""Recognition of each family of models, its parts, and the arguments that it needs for images of any size.

A family is known by the name of the class that holds embeddings, layers and final norm; names of the parts differ
between families and versions, and the first one that exists counts. Other models are read by `parts.examine`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modeling_vitreg.modes import changed_attributes


# Class of the module that holds embeddings, layers and final norm -> family.
FAMILIES = {
    "MambaRModel": "mamba_r",
    "ViTWithRegistersModel": "vitreg",
    "ViTModel": "vit",
    "DeiTModel": "deit",
    "Dinov2Model": "dinov2",
    "Dinov2Backbone": "dinov2",
    "Dinov2WithRegistersModel": "dinov2_with_registers",
    "Dinov2WithRegistersBackbone": "dinov2_with_registers",
    "DINOv3ViTModel": "dinov3_vit",
    "DINOv3ViTBackbone": "dinov3_vit",
    "CLIPVisionModel": "clip",
    "CLIPVisionTransformer": "clip",
    "SiglipVisionModel": "siglip",
    "SiglipVisionTransformer": "siglip",
    "ViTMAEModel": "vit_mae",
    "IJepaModel": "ijepa",
    "VisionTransformer": "timm",
    "Eva": "timm",
    "DinoVisionTransformer": "dinov2_hub",
}
WITHOUT_ATTENTION = ("mamba_r",)
EXPECTED = (
    "a model of this package; ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT, CLIP, SigLIP, ViTMAE or I-JEPA of "
    "transformers; VisionTransformer or Eva of timm; DINOv2 of torch.hub; or another model with a list of blocks"
)

# Where each part lies, over families and versions; the first one that exists counts.
_PARTS = {
    "patches": (
        "embeddings.patch_embeddings.projection",
        "embeddings.patch_embeddings",
        "embeddings.patch_embedding",
        "patch_embed.proj",
        "embeddings.patch_projection",
        "embeds.proj",
    ),
    "layers": (
        *("encoder.layer", "encoder.layers", "model.layer", "layer", "layers", "blocks"),
        *("stages", "encoder.stages", "model.stages", "transformer.resblocks"),
    ),
    "norm": ("layernorm", "post_layernorm", "norm", "rms_norm", "ln_post"),
    "cls": ("embeddings.cls_token", "embeddings.class_embedding", "cls_token", "class_embedding", "embeds.cls_token"),
    "distillation": ("embeddings.distillation_token", "dist_token"),
    "registers": ("embeddings.register_tokens", "register_tokens", "reg_token", "embeds.reg_token"),
    "attention": ("attention.attention", "attention", "self_attn", "attn"),
    "projection": (
        "attention.output.dense",
        "attention.o_proj",
        "attention.out_proj",
        "attention.proj",
        "self_attn.out_proj",
        "self_attn.o_proj",
        "attn.proj",
    ),
    "scale": ("layer_scale1", "ls1"),
    "mlp": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "mlp.w3", "output.dense"),
}


def find_part(module: nn.Module, part: str) -> object:
    """A part of a tower or of a layer; None where there is none.

    Args:
        module: a tower or a layer.
        part: of a tower "patches", "layers", "norm", "cls", "distillation" or "registers"; of a layer "attention",
            "projection" (its last linear layer), "scale" (of what it adds) or "mlp" (its second linear layer).
    """
    for path in _PARTS[part]:
        if (found := follow(module, path)) is not None:
            return found
    return None


def find_tower(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Family and the module of a model that holds embeddings, layers and final norm; None for other models."""
    for module in model.modules():
        for kind in type(module).__mro__:
            is_whole = all(find_part(module, part) is not None for part in ("layers", "norm"))
            if kind.__name__ in FAMILIES and is_whole and isinstance(find_part(module, "patches"), nn.Conv2d):
                return FAMILIES[kind.__name__], module
    return None


def find_layers(tower: nn.Module) -> list[nn.Module]:
    """All layers in order."""
    layers = find_part(tower, "layers")
    if getattr(tower, "chunked_blocks", False):  # official DINOv2 with empty places, so that numbers stay
        layers = [layer for chunk in layers for layer in chunk if not isinstance(layer, nn.Identity)]
    return list(layers)


def count_heads(tower: nn.Module, attention: nn.Module | None) -> int | None:
    """H; None where neither the attention nor the configuration tells."""
    for name in ("num_heads", "num_attention_heads"):
        for owner in (attention, getattr(tower, "config", None)):
            if attention is not None and isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    return None


def find_image_size(tower: nn.Module, patch_shape: tuple) -> tuple[int, int]:
    """Pixels (rows, columns) that the model was trained at, cut to whole patches; 224 where nothing tells."""
    places = ("config.image_size", "patch_embed.img_size", "img_size", "image_size", "patch_embed.image_size")
    size = next((size for place in places if isinstance(size := follow(tower, place), (int, tuple, list))), None)
    size = size or (getattr(tower, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(max(side // patch, 1) * patch for side, patch in zip(sides, patch_shape))


def keywords_of(tower: nn.Module, family: str, pixel_values: Tensor, patch_shape: tuple) -> dict:
    """Keyword arguments of the model besides the images."""
    takes = inspect.signature(tower.forward).parameters
    keywords = {"interpolate_pos_encoding": True} if family != "vitreg" and "interpolate_pos_encoding" in takes else {}
    if family == "vit_mae":  # it sorts the patches by this noise, even where it masks none
        num_patches = math.prod(side // patch for side, patch in zip(pixel_values.shape[2:], patch_shape))
        order = torch.arange(num_patches, device=pixel_values.device, dtype=torch.float32)
        keywords["noise"] = order.expand(len(pixel_values), -1)
    return keywords


@contextlib.contextmanager
def any_image_size(tower: nn.Module, family: str, pixel_values: Tensor) -> Iterator[None]:
    """Make timm interpolate positions, and MAE keep all patches."""
    if family == "vit_mae":
        with changed_attributes([(tower.config, "mask_ratio", 0.0)]):
            yield
        return
    is_fixed = family == "timm" and not getattr(tower, "dynamic_img_size", True)  # others interpolate unasked
    if not is_fixed or tuple(tower.patch_embed.img_size) == tuple(pixel_values.shape[2:]):
        yield
        return
    embed = tower.patch_embed
    changes = [(tower, "dynamic_img_size", True), (embed, "strict_img_size", False)]
    changes += [(embed, "flatten", False), (embed, "output_fmt", type(embed.output_fmt)("NHWC"))]
    resize_rotary = getattr(getattr(tower, "rope", None), "update_feat_shape", None) or (lambda grid: None)
    try:
        resize_rotary([side // patch for side, patch in zip(pixel_values.shape[2:], embed.patch_size)])
        with changed_attributes(changes):
            yield
    finally:
        resize_rotary(list(embed.grid_size))


def follow(module: object, path: str) -> object:
    """The object at a dotted path below a module, None if there is none."""
    for name in path.split("."):
        is_last = name.startswith("-") and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
        module = module[int(name)] if is_last else getattr(module, name, None)
    return module

"""Image towers of OpenCLIP and of OpenAI's CLIP, alone or beside their text tower; the projection is kept."""

from __future__ import annotations

from collections.abc import Iterable

from ..rules import Drop, Rename, Rule, add_axes, add_axis, drop_axes, drop_axis, transpose
from .layout import CLIP, CheckpointInfo, Layout, heads_of, image_size_of, prepare_crop


BLOCK = "transformer.resblocks.{i}"
# OpenAI's, as their addresses have them.
HASHES = {
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
RULES: list[Rule] = [
    Rename("class_embedding", "embeddings.cls_token", add_axes, drop_axes),
    Rename("positional_embedding", "embeddings.position_embeddings.weight", add_axis, drop_axis),
    Rename("conv1.weight", "embeddings.patch_embeddings.weight"),
    Rename("ln_pre.{leaf}", "pre_layernorm.{leaf}"),
    Rename(f"{BLOCK}.ln_1.{{leaf}}", "layers.{i}.norm1.{leaf}"),
    Rename(f"{BLOCK}.attn.in_proj_{{leaf}}", "layers.{i}.attention.qkv.{leaf}"),
    Rename(f"{BLOCK}.attn.out_proj.{{leaf}}", "layers.{i}.attention.proj.{leaf}"),
    Rename(f"{BLOCK}.ls_1.gamma", "layers.{i}.layer_scale1.weight"),
    Rename(f"{BLOCK}.ln_2.{{leaf}}", "layers.{i}.norm2.{leaf}"),
    Rename(f"{BLOCK}.mlp.c_fc.{{leaf}}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename(f"{BLOCK}.mlp.c_proj.{{leaf}}", "layers.{i}.mlp.fc2.{leaf}"),
    Rename(f"{BLOCK}.ls_2.gamma", "layers.{i}.layer_scale2.weight"),
    Rename("ln_post.{leaf}", "layernorm.{leaf}"),
    Rename("proj", "projection.weight", transpose, transpose),
    Drop("outside.{rest}", why="not part of the image tower"),
]


def _canonical(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if not any(name.startswith("visual.") for name in names):
        return {name: name for name in names}
    # Beside an image tower the names at the top, which are the same, belong to the text tower.
    return {name: name.removeprefix("visual.") if name.startswith("visual.") else f"outside.{name}" for name in names}


def _configure(info: CheckpointInfo) -> dict:
    width, patch = info.size("conv1.weight", 0), info.size("conv1.weight", -1)
    settings = (info.settings or {}).get("model_cfg", {})
    vision = settings.get("vision_cfg", {})
    is_quick = settings.get("quick_gelu", is_openai(info) or "quickgelu" in info.file_name.lower())
    heads = width // vision["head_width"] if "head_width" in vision else heads_of(info, width)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": info.depth("transformer.resblocks.*."),
        "num_attention_heads": heads,
        "intermediate_size": info.size("transformer.resblocks.*.mlp.c_proj.weight", 1),
        "hidden_act": "quick_gelu" if is_quick else "gelu",
        "patch_size": patch,
        "image_size": image_size_of(info, info.size("positional_embedding", 0) - 1, (patch, patch)),
        "num_channels": info.size("conv1.weight", 1),
        "num_register_tokens": 0,
        "has_pre_norm": True,
        "has_patch_bias": False,
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": 1e-5 if info.has("transformer.resblocks.*.ls_1.gamma") else None,
        # OpenCLIP resizes a table with antialiasing when it loads one; OpenAI's code does not resize.
        "interpolate_antialias": not is_openai(info),
    }
    if info.has("proj"):
        fields["projection_size"] = info.size("proj", 1)
    return fields


def is_openai(info: CheckpointInfo) -> bool:
    """Whether OpenAI made the file: its archives hold the resolution as a tensor."""
    return info.has("outside.input_resolution") or "openai" in info.file_name.lower()


LAYOUT = Layout(
    name="clip",
    title="OpenCLIP or OpenAI's CLIP",
    licence=None,
    rules=lambda config: list(RULES),
    configure=_configure,
    prepare=lambda info, config: prepare_crop(config.image_size, resize=config.image_size, **CLIP),
    canonical=_canonical,
    hashes=HASHES,
)

"""facebookresearch/dinov2: backbones with and without registers, training checkpoints, and linear heads.

Backbones: `dinov2_vit{s,b,l,g}14_pretrain.pth`, `..._reg4_pretrain.pth`. Training: `teacher_checkpoint.pth`, with the
backbone under `teacher` beside the heads, in chunks where it was sharded so. Heads, each a file of its own:
`..._linear_head.pth` and `..._linear4_head.pth` (classes), `..._{nyu,kitti}_linear{,4}_head.pth` (depth),
`..._{ade20k,voc2012}_{linear,ms}_head.pth` (segments).
"""

from __future__ import annotations

import re

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import ConversionError, Drop, Rename, Rule, add_axis, drop_axis
from .blocks import LAYERS, MLP, POSITIONS, SCALES, STEM, read_sizes
from .layout import IMAGENET, CheckpointInfo, Layout, each, prepare_crop


GATED: list[Rule] = [
    Rename("blocks.{i}.mlp.w12.{leaf}", "layers.{i}.mlp.fc1.{leaf}"),
    Rename("blocks.{i}.mlp.w3.{leaf}", "layers.{i}.mlp.fc2.{leaf}"),
]
TOKENS: list[Rule] = [
    Rename("register_tokens", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("mask_token", "embeddings.mask_token", add_axis, drop_axis),
]
HEADS: list[Rule] = [
    Drop("dino_head.{rest}", why="projection head of training"),
    Drop("ibot_head.{rest}", why="projection head of training"),
]
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
# Stages, from 1 on, that the depth heads with four layers read, by depth of the backbone.
_DEPTH_STAGES = {12: [3, 6, 9, 12], 24: [5, 12, 18, 24], 40: [10, 20, 30, 40]}


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    rules = [*STEM, *POSITIONS, *LAYERS, *SCALES, *TOKENS, *HEADS]
    if config is None:
        return [*rules, *MLP, *GATED]
    return rules + (GATED if config.hidden_act == "swiglu" else MLP)


def _canonical(name: str) -> str:
    return _CHUNK.sub(r"blocks.\1.", name.removeprefix("backbone."))


def _configure(info: CheckpointInfo) -> dict:
    num_registers = info.size("register_tokens", 1) if info.has("register_tokens") else 0
    is_gated = info.has("blocks.*.mlp.w12.weight")
    # The hub builds backbones with registers with antialiasing; training, and all others, with the offset.
    is_smooth = num_registers > 0 and info.checkpoint_key is None
    return {
        **read_sizes(info),
        "intermediate_size": info.size(f"blocks.*.mlp.{'w3' if is_gated else 'fc2'}.weight", 1),
        "hidden_act": "swiglu" if is_gated else "gelu",
        "num_register_tokens": num_registers,
        "layer_scale_init_value": 1e-5,
        "interpolate_antialias": is_smooth,
        "interpolate_offset": 0.0 if is_smooth else 0.1,
        "has_mask_token": True,
    }


def _prepare(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    side = max(224 // config.patch_shape[0], 1) * config.patch_shape[0]
    return prepare_crop(side, **IMAGENET)


LAYOUT = Layout(
    name="dinov2",
    title="facebookresearch/dinov2",
    licence="apache-2.0",
    rules=_rules,
    configure=_configure,
    prepare=_prepare,
    canonical=each(_canonical),
    is_hinted=lambda info: "dinov2" in info.file_name.lower() or info.has("register_tokens"),
)


def configure_head(shapes: dict[str, tuple], config: ViTWithRegistersConfig, *, title: str) -> tuple[str, dict, list]:
    """Fields and rules that a head from a separate file adds to a backbone.

    Args:
        shapes: shapes of the tensors of the head.
        config: configuration of the backbone.
        title: name of the file, for messages.

    Returns:
        Word for the class of the model ("classification", "segmentation", "depth"), fields of the configuration, and
        rules for the tensors.

    Raises:
        ConversionError: it is no head of this backbone.
    """
    width = config.hidden_size
    if "decode_head.conv_seg.weight" in shapes:
        num_labels, size = shapes["decode_head.conv_seg.weight"][:2]
        depth, count = config.num_hidden_layers, size // width
        fields = {"num_labels": num_labels, "out_indices": list(range(depth - count + 1, depth + 1))}
        rules = [
            Rename("decode_head.conv_seg.{leaf}", "segmentation_classifier.{leaf}"),
            Rename("decode_head.bn.{rest}", "segmentation_norm.{rest}"),
        ]
        return "segmentation", fields, rules
    if "decode_head.conv_depth.weight" in shapes:
        num_bins, size = shapes["decode_head.conv_depth.weight"][:2]
        count = size // (2 * width)
        if count not in (1, 4) or (count == 4 and config.num_hidden_layers not in _DEPTH_STAGES):
            raise ConversionError(f"{title}: a depth head of {size} channels does not fit a width of {width}")
        stages = [config.num_hidden_layers] if count == 1 else _DEPTH_STAGES[config.num_hidden_layers]
        # The hub builds the head with 80 metres, for the indoor weights too.
        fields = {"num_depth_bins": num_bins, "out_indices": stages, "min_depth": 1e-3, "max_depth": 80.0}
        return "depth", fields, [Rename("decode_head.conv_depth.{leaf}", "depth_classifier.{leaf}")]
    if set(shapes) == {"weight", "bias"} and shapes["weight"][1] % width == 0:
        num_labels, size = shapes["weight"]
        fields = {"num_labels": num_labels, "pooling": "cls_mean", "num_classifier_layers": size // width - 1}
        return "classification", fields, [Rename("{leaf}", "classifier.{leaf}")]
    raise ConversionError(
        f"{title}: is no linear head of a backbone of width {width}: expected weight (classes, 2 or 5 x {width}) and "
        f"bias, decode_head.conv_seg or decode_head.conv_depth; got {', '.join(list(shapes)[:5])}"
    )

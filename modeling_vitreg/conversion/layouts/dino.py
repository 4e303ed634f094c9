"""facebookresearch/dino: `dino_{deitsmall,vitbase}{16,8}_pretrain.pth`, and checkpoints with teacher and student."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Drop, Rule
from .blocks import LAYERS, MLP, POSITIONS, STEM, read_sizes
from .layout import IMAGENET, CheckpointInfo, Layout, each, prepare_crop


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    heads = [Drop(f"{part}.{{rest}}", why="projection head of training") for part in ("head.mlp", "head.last_layer")]
    return [*STEM, *POSITIONS, *LAYERS, *MLP, *heads]


def _configure(info: CheckpointInfo) -> dict:
    return {
        **read_sizes(info),
        "intermediate_size": info.size("blocks.*.mlp.fc2.weight", 1),
        "interpolate_antialias": False,
        "interpolate_offset": 0.1,
    }


LAYOUT = Layout(
    name="dino",
    title="facebookresearch/dino",
    licence="apache-2.0",
    rules=_rules,
    configure=_configure,
    prepare=lambda info, config: prepare_crop(config.image_size, **IMAGENET),
    canonical=each(lambda name: name.removeprefix("backbone.")),
    is_hinted=lambda info: (
        info.checkpoint_key in ("teacher", "student")
        or ("dino" in info.file_name.lower() and "dinov" not in info.file_name.lower())
    ),
)

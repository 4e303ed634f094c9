"""facebookresearch/deit: DeiT, its distilled form, and DeiT-III; tensors lie under `model`."""

from __future__ import annotations

from modeling_vitreg import ViTWithRegistersConfig

from ..rules import Rename, Rule
from .blocks import GAMMAS, HEAD, LAYERS, MLP, POSITIONS, STEM, read_sizes
from .layout import IMAGENET, CheckpointInfo, Layout, prepare_crop


DISTILLED: list[Rule] = [
    Rename("dist_token", "embeddings.distillation_token"),
    Rename("head_dist.{leaf}", "distillation_classifier.{leaf}"),
]


def _rules(config: ViTWithRegistersConfig | None) -> list[Rule]:
    rules = [*STEM, *POSITIONS, *LAYERS, *MLP, *HEAD]
    if config is None or config.layer_scale_init_value is not None:
        rules += GAMMAS
    if config is None or config.has_distillation_token:
        rules += DISTILLED
    return rules


def _configure(info: CheckpointInfo) -> dict:
    is_third, is_distilled = info.has("blocks.*.gamma_1"), info.has("dist_token")
    fields = {
        **read_sizes(info, num_prefix_positions=0 if is_third else 1 + is_distilled),
        "intermediate_size": info.size("blocks.*.mlp.fc2.weight", 1),
        "has_distillation_token": is_distilled,
        "interpolate_antialias": False,
    }
    if is_third:
        fields |= {"has_prefix_positions": False, "layer_scale_init_value": 1e-4, "drop_path_schedule": "constant"}
    if info.has("head.weight"):
        fields["num_labels"] = info.size("head.weight", 0)
        fields["pooling"] = "cls_distillation" if is_distilled else "cls"
    return fields


def _prepare(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    # DeiT cuts 224 pixels out of 256, DeiT-III takes the whole image.
    side, is_third = config.image_size, config.layer_scale_init_value is not None
    return prepare_crop(side, resize=side if is_third else None, **IMAGENET)


LAYOUT = Layout(
    name="deit",
    title="facebookresearch/deit",
    licence="apache-2.0",
    rules=_rules,
    configure=_configure,
    prepare=_prepare,
    is_hinted=lambda info: info.checkpoint_key == "model" or info.file_name.lower().startswith("deit"),
)

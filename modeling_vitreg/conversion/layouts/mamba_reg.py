"""wangf3014/Mamba-Reg: `mambar_*_patch16_224.pth`; tensors lie under `model`. It calls registers class tokens."""

from __future__ import annotations

from modeling_vitreg import MambaRConfig, MambaRForImageClassification, MambaRModel, ViTWithRegistersConfig

from ..rules import Rename, Rule, add_axis, drop_axis
from .layout import IMAGENET, CheckpointInfo, Layout, image_size_of, prepare_crop


_MIXER = "layers.{i}.mixer"
RULES: list[Rule] = [
    Rename("cls_token", "embeddings.register_tokens.weight", drop_axis, add_axis),
    Rename("pos_embed_cls", "embeddings.register_tokens.positions", drop_axis, add_axis),
    Rename("pos_embed", "embeddings.position_embeddings.weight"),
    Rename("patch_embed.proj.{leaf}", "embeddings.patch_embeddings.{leaf}"),
    Rename("layers.{i}.norm.weight", "layers.{i}.norm.weight"),
    Rename(f"{_MIXER}.in_proj.weight", f"{_MIXER}.in_proj.weight"),
    Rename(f"{_MIXER}.out_proj.weight", f"{_MIXER}.out_proj.weight"),
    *(
        rule
        for suffix, direction in (("", "forward"), ("_b", "backward"))
        for rule in (
            Rename(f"{_MIXER}.conv1d{suffix}.{{leaf}}", f"{_MIXER}.{direction}_direction.conv.{{leaf}}"),
            Rename(f"{_MIXER}.x_proj{suffix}.weight", f"{_MIXER}.{direction}_direction.x_proj.weight"),
            Rename(f"{_MIXER}.dt_proj{suffix}.{{leaf}}", f"{_MIXER}.{direction}_direction.dt_proj.{{leaf}}"),
            Rename(f"{_MIXER}.A{suffix}_log", f"{_MIXER}.{direction}_direction.A_log"),
            Rename(f"{_MIXER}.D{suffix}", f"{_MIXER}.{direction}_direction.D"),
        )
    ),
    Rename("norm_f.weight", "layernorm.weight"),
    Rename("neck.weight", "neck.weight"),
    Rename("norm_neck.weight", "neck_norm.weight"),
    Rename("head.{leaf}", "classifier.{leaf}"),
]


def _configure(info: CheckpointInfo) -> dict:
    width, patch = info.size("patch_embed.proj.weight", 0), info.size("patch_embed.proj.weight", -1)
    mixer = "layers.*.mixer"
    fields = {
        "hidden_size": width,
        "num_hidden_layers": info.depth("layers.*."),
        "num_register_tokens": info.size("cls_token", 1),
        "register_reduction": width // info.size("neck.weight", 0) if info.has("neck.weight") else 1,
        "state_size": info.size(f"{mixer}.A_log", 1),
        "conv_kernel": info.size(f"{mixer}.conv1d.weight", -1),
        "expand": info.size(f"{mixer}.in_proj.weight", 0) // (2 * width),
        "time_step_rank": info.size(f"{mixer}.dt_proj.weight", 1),
        "patch_size": patch,
        "num_channels": info.size("patch_embed.proj.weight", 1),
    }
    if "image_size" not in info.config_overrides:
        fields["image_size"] = image_size_of(info, info.size("pos_embed", 1), (patch, patch))
    return fields | ({"num_labels": info.size("head.weight", 0)} if info.has("head.weight") else {})


def _prepare(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    return prepare_crop(config.image_size, resize=config.image_size, **IMAGENET)


LAYOUT = Layout(
    name="mamba-reg",
    title="wangf3014/Mamba-Reg",
    licence=None,
    rules=lambda config: RULES,
    configure=_configure,
    prepare=_prepare,
    config_class=MambaRConfig,
    models=(MambaRModel, MambaRForImageClassification),
)

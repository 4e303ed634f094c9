"""Which part of a backbone is trained with a head: all of it, nothing, or low-rank adapters (LoRA).

Source: Hu et al. 2021, arXiv 2106.09685 (LoRA), by peft.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable

from torch import nn

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect


# By the type of the backbone.
_TARGETS = {
    "vitreg": ["qkv", "proj"],
    "vitreg_mamba": ["in_proj", "out_proj"],
    "vitreg_hat": ["qkv", "query", "key_value", "proj"],
}


@dataclasses.dataclass(frozen=True)
class AdaptationSettings:
    """Settings of all objectives with a head.

    Args:
        freeze_backbone: train the head alone.
        lora_rank: rank of the adapters beside the linear layers of attention, or around the scan of Mamba-R, which are
            trained with the registers and the head, by peft; 0 trains everything. Saved models have the adapters
            merged. Not with sharding.
    """

    freeze_backbone: bool = False
    lora_rank: int = 0

    def __post_init__(self):
        expect(self, "settings", lora_rank="[0, inf)")
        if self.lora_rank and self.freeze_backbone:
            raise ValueError(
                f"settings: expected lora_rank 0 with freeze_backbone, got {self.lora_rank}: set one of them"
            )


def freeze_or_lora(backbone: ViTWithRegistersModel, settings: AdaptationSettings) -> None:
    """Freeze a backbone, or add adapters to its mixing layers and freeze all else but the registers, in place.

    Raises:
        ValueError: peft is not installed.
    """
    if settings.freeze_backbone or settings.lora_rank:
        backbone.requires_grad_(False)
    if not settings.lora_rank:
        return
    add_lora(backbone, settings.lora_rank, targets=_TARGETS[backbone.config.model_type])
    if backbone.embeddings.register_tokens is not None:
        backbone.embeddings.register_tokens.requires_grad_(True)


def add_lora(
    backbone: ViTWithRegistersModel,
    rank: int,
    *,
    targets: list[str],
    layers: Iterable[int] | None = None,
    dropout: float = 0.0,
) -> list[nn.Parameter]:
    """Add adapters beside linear layers, in place, and return their parameters, which are all that peft trains.

    Args:
        backbone: the model.
        rank: of the adapters; their scale is 2.
        targets: names of the linear layers.
        layers: layers of the backbone with adapters, from 0; None for all.
        dropout: of the input of an adapter.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("settings: lora_rank needs peft, which is not installed: pip install peft") from error
    if layers is not None:  # spelled out: peft 0.17 finds no layers by number in a model that nothing is around
        places = tuple(f"layers.{layer}." for layer in layers)
        names = [name for name, _ in backbone.named_modules() if name.startswith(places)]
        targets = [name for name in names if name.rpartition(".")[2] in targets]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, backbone)
    added = [parameter for name, parameter in backbone.named_parameters() if "lora_" in name]
    for name, parameter in backbone.named_parameters():  # peft freezes all that it does not add
        if name in trained:
            parameter.requires_grad_(True)
    return added


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy with the adapters merged into their layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                child.merge()
                setattr(module, name, child.base_layer)
    return model

"""How much of a backbone learns under a head: all of it, nothing, or products of low rank beside its linear layers.

Source: Hu et al. 2021, arXiv 2106.09685 (LoRA), by peft.
"""

from __future__ import annotations

import copy

from torch import nn

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel


def check_adaptation(*, is_probe: bool, lora_rank: int) -> None:
    """Refuse what contradicts itself.

    Raises:
        ValueError: a negative rank, or a rank where only the head learns.
    """
    if lora_rank < 0 or (lora_rank and is_probe):
        raise ValueError(f"settings: lora_rank is 0 or more, and contradicts is_probe, got {lora_rank}, {is_probe}")


def freeze_or_lora(backbone: ViTWithRegistersModel, *, is_probe: bool, lora_rank: int) -> None:
    """Let nothing of a backbone learn, or products of a rank beside its linear layers of attention, and registers.

    Args:
        backbone: changed in place.
        is_probe: only the head learns.
        lora_rank: 0 for no products.

    Raises:
        ValueError: peft is not installed.
    """
    if is_probe or lora_rank:
        backbone.requires_grad_(False)
    if not lora_rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("settings: lora_rank needs peft, which is not installed: pip install peft") from error
    config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=["qkv", "proj"])
    inject_adapter_in_model(config, backbone)
    if backbone.embeddings.register_tokens is not None:
        backbone.embeddings.register_tokens.requires_grad_(True)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy in which each layer with a product beside it is one with the sum."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                child.merge()
                setattr(module, name, child.base_layer)
    return model


__all__ = ["check_adaptation", "freeze_or_lora", "merge_lora"]

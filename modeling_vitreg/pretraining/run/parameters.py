"""Learning rate and weight decay of each parameter by its name, as in DINOv2."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def learning_rate_multiplier(name: str, *, num_layers: int, layer_decay: float, patch_multiplier: float) -> float:
    """Layer-wise factor of the learning rate of a parameter of the backbone, by its name in `ViTWithRegistersModel`.

    decay ** (num_layers + 1 - depth): depth 0 for tokens (registers among them), positions and the patch embedding,
    i + 1 for layer i, num_layers + 1 for the final norm; the patch embedding also times `patch_multiplier`.
    """
    depth = num_layers + 1
    if name.startswith(("embeddings.", "pre_layernorm.")):
        depth = 0
    elif name.startswith("layers."):
        depth = int(name.split(".")[1]) + 1
    factor = layer_decay ** (num_layers + 1 - depth)
    return factor * patch_multiplier if name.startswith("embeddings.patch_embeddings.") else factor


def is_decayed(name: str, *, decays_tokens: bool) -> bool:
    """Whether weight decay applies: never to biases, gates, norms, LayerScale, and what a scan decays and skips by; to
    tokens and positions as asked.

    DINOv2 decays class token, registers, mask token and positions; DINO, DeiT and MAE do not.
    """
    undecayed = ("norm", "layer_scale", "register_gates")
    if name.endswith((".bias", ".A_log", ".D")) or any(kind in name for kind in undecayed):
        return False
    kinds = {"cls_token", "distillation_token", "register_tokens", "mask_token", "position_embeddings"}
    return decays_tokens or not kinds & set(name.split("."))


def parameter_groups(
    backbone: nn.Module,
    heads: Iterable[nn.Module] = (),
    *,
    layer_decay: float = 1.0,
    patch_multiplier: float = 1.0,
    decays_tokens: bool = True,
) -> list[dict]:
    """Groups for an optimiser, one for each combination of factors.

    Args:
        backbone: `ViTWithRegistersModel`.
        heads: modules with the full learning rate.
        layer_decay, patch_multiplier: see `learning_rate_multiplier`.
        decays_tokens: see `is_decayed`.

    Returns:
        Dictionaries with `params` and, for `set_rates`, `lr_multiplier`, `weight_decay_multiplier`, `is_last_layer`.

    Source: Oquab et al. 2023, arXiv 2304.07193, as released.
    """
    num_layers = len(backbone.layers)
    named = [
        (
            parameter,
            learning_rate_multiplier(
                name, num_layers=num_layers, layer_decay=layer_decay, patch_multiplier=patch_multiplier
            ),
            is_decayed(name, decays_tokens=decays_tokens),
            False,
        )
        for name, parameter in backbone.named_parameters()
    ]
    for head in heads:
        for name, parameter in head.named_parameters():
            named.append((parameter, 1.0, is_decayed(name, decays_tokens=decays_tokens), "last_layer" in name))
    groups = {}
    for parameter, lr_multiplier, decays, is_last_layer in named:
        if parameter.requires_grad:
            groups.setdefault((lr_multiplier, decays, is_last_layer), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": lr_multiplier,
            "weight_decay_multiplier": float(decays),
            "is_last_layer": is_last_layer,
        }
        for (lr_multiplier, decays, is_last_layer), parameters in groups.items()
    ]


def set_rates(optimizer, *, learning_rate: float, weight_decay: float, is_last_layer_frozen: bool = False) -> None:
    """Write learning rate and weight decay of this step into the groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        is_frozen = is_last_layer_frozen and group["is_last_layer"]
        group["lr"] = 0.0 if is_frozen else learning_rate * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]

"""Append registers to a finished model and train them, then low-rank adapters of its attention, on its clean tokens.

The registers have gates that start closed, so the model is unchanged at the first step. The targets are those
of the frozen original: its class token, and its patches averaged over shifted and flipped copies of the image.

Letters: B images, P patches, D width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from modeling_vitreg.settings import expect

from .adaptation import add_lora
from .objective import Panel
from .retrofitting import AverageSettings, RetrofitObjective, cosine_distance, patch_norms, train_only


@dataclasses.dataclass(frozen=True)
class AppendSettings(AverageSettings):
    """Settings of appended registers.

    Args:
        class_weight, patch_weight, norm_weight: weights of the terms.
        registers_only: share of the steps in which only registers and gates are trained.
        lora_rank: rank of the adapters beside the linear layers of attention, which are trained after these steps; 0
            for none. Saved models have the adapters merged.
        first_layer: first layer, from 1, with adapters.
    """

    class_weight: float = 1.0
    patch_weight: float = 1.0
    norm_weight: float = 0.1
    registers_only: float = 0.3
    lora_rank: int = 8
    first_layer: int = 1

    def __post_init__(self):
        super().__post_init__()
        expect(self, "settings", registers_only="[0, 1]", lora_rank="[0, inf)", first_layer="[1, inf)")


class AppendRegisters(RetrofitObjective):
    """Appended registers behind gates; see `RetrofitObjective`."""

    description = "registers appended to a finished model behind gates, trained on the clean tokens of the original"
    settings_class = AppendSettings
    panels = (
        Panel("Loss", {"total": "total", "class_distance": "class token", "patch_distance": "patches"}),
        Panel("Norms above the threshold", {"norm_excess": "mean excess"}),
        Panel("Gates", {"gate": "mean gate"}),
    )

    def _choose_parameters(self) -> None:
        backbone, settings = self.backbone, self.settings
        if not backbone.config.num_gated_registers:
            raise ValueError(
                "settings: the append_registers objective trains gated registers, and the model has none: start with "
                "`vitreg retrofit --method append` or examples/retrofit.py"
            )
        gates = [layer.attention.register_gates for layer in backbone.layers]
        train_only(backbone, backbone.embeddings.register_tokens, *gates)
        self._step = 0
        if settings.lora_rank:
            layers = range(settings.first_layer - 1, len(backbone.layers))
            for parameter in add_lora(backbone, settings.lora_rank, targets=["qkv", "proj"], layers=layers):
                parameter.register_hook(self._hold)

    def _hold(self, gradient: Tensor) -> Tensor:
        """The gradient of an adapter, zero in the first phase."""
        return gradient * float(self._step >= self.settings.registers_only * self.num_steps)

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Distances `class_distance`, `patch_distance`, `norm_excess`, the mean `gate`, and `total`.

        Args:
            batch: `global_views` (1, B, 3, h, w).
            step: number of the step.
        """
        self._step, settings = step, self.settings
        images = batch["global_views"].flatten(0, 1)  # [1, B, ...] -> [B, ...]
        cls_targets, patch_targets = self.average_targets(images)
        layer = settings.layer or len(self.backbone.layers)
        output = self.backbone(images, output_hidden_states=[layer])
        losses = {"patch_distance": cosine_distance(output.patch_tokens, patch_targets)}
        losses["norm_excess"] = excess(
            patch_norms(self.backbone, output.hidden_states[layer]), settings.threshold or torch.inf
        )
        losses["total"] = (
            settings.patch_weight * losses["patch_distance"] + settings.norm_weight * losses["norm_excess"]
        )
        if cls_targets is not None:
            losses["class_distance"] = cosine_distance(output.cls_token, cls_targets)
            losses["total"] = losses["total"] + settings.class_weight * losses["class_distance"]
        with torch.no_grad():
            gates = [layer.attention.register_gates.float().abs().mean() for layer in self.backbone.layers]
            losses["gate"] = torch.stack(gates).mean()
        return losses


def excess(norms: Tensor, threshold: float) -> Tensor:
    """Mean over all patches of how far their norm lies above a threshold, in units of the threshold.

    for each patch: add max(norm / threshold - 1, 0)
    divide by the number of patches
    """
    return (norms / threshold - 1).relu().mean()

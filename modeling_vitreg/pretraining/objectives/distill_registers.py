"""Self-distillation of registers: a copy of a finished model with fresh registers learns its denoised patches.

The target is the frozen original, averaged over shifted and flipped copies of the image. Registers, position table,
patch embedding and last layers are trained; all other weights stay.

Letters: B images, P patches, D width.

Source: Chen et al. 2025, "Vision Transformers with Self-Distilled Registers" (PH-Reg), arXiv 2505.21501. There shifts
are drawn for each image, here for each batch.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.settings import expect

from .objective import Panel
from .retrofitting import AverageSettings, RetrofitObjective, cosine_distance, train_only


@dataclasses.dataclass(frozen=True)
class DistillRegistersSettings(AverageSettings):
    """Settings of the self-distillation of registers.

    Args:
        error_weight: weight of the mean squared error of the patches; that of their cosine is 1.
        class_weight: weight of the cosine of the class token with the original's; 0 in PH-Reg.
        num_layers: last layers that are trained; 1 in PH-Reg. What an earlier layer writes stays.
    """

    error_weight: float = 1.0
    class_weight: float = 0.0
    num_layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        expect(self, "settings", num_layers="[0, inf)")


class DistillRegisters(RetrofitObjective):
    """Fresh registers that learn from the denoised original; see `RetrofitObjective`."""

    description = "self-distillation of registers from the denoised patches of the original (PH-Reg)"
    citation = "phreg"
    settings_class = DistillRegistersSettings
    panels = (
        Panel("Loss", {"total": "total", "patch_distance": "cosine", "squared_error": "squared error"}),
        Panel("Class token", {"class_distance": "cosine distance"}),
    )

    def _choose_parameters(self) -> None:
        embeddings = self.backbone.embeddings
        if embeddings.register_tokens is None:
            raise ValueError(
                "settings: the distill_registers objective trains registers, and the model has none: set "
                "num_register_tokens, or start with `vitreg retrofit --method distill`"
            )
        parts = (embeddings.register_tokens, embeddings.position_embeddings, embeddings.patch_embeddings)
        first = max(len(self.backbone.layers) - self.settings.num_layers, 0)
        train_only(self.backbone, *parts, *self.backbone.layers[first:])

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Terms `patch_distance`, `squared_error`, `class_distance` where there is a class token, and `total`.

        Args:
            batch: `global_views` (1, B, 3, h, w).
            step: number of the step.
        """
        images = batch["global_views"].flatten(0, 1)  # [1, B, ...] -> [B, ...]
        cls_targets, targets = self.average_targets(images)
        output = self.backbone(images)
        losses = {
            "patch_distance": cosine_distance(output.patch_tokens, targets),
            "squared_error": F.mse_loss(output.patch_tokens.float(), targets),
        }
        losses["total"] = losses["patch_distance"] + self.settings.error_weight * losses["squared_error"]
        if cls_targets is not None:
            losses["class_distance"] = cosine_distance(output.cls_token, cls_targets)
            losses["total"] = losses["total"] + self.settings.class_weight * losses["class_distance"]
        return losses

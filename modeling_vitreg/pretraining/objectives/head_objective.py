"""Objectives that train a head on a backbone, which is trained with it, frozen, or adapted by LoRA."""

from __future__ import annotations

import abc
import pathlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from modeling_vitreg.modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.modes import eval_mode

from .adaptation import AdaptationSettings, freeze_or_lora, merge_lora
from .objective import Objective


class HeadObjective(Objective):
    """A model with a head in `model`, around a backbone that `settings` may freeze; see `Objective`."""

    has_head = has_single_view = True
    needs_all_patches = False

    settings: AdaptationSettings
    model: PreTrainedModel

    def adapt_backbone(self) -> None:
        """Freeze the backbone or add adapters to it, as the settings say."""
        freeze_or_lora(self.encoder_of(self.model), self.settings)

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.encoder_of(self.saved)

    @property
    def saved(self) -> PreTrainedModel:
        return self.model

    def train(self, mode: bool = True) -> HeadObjective:
        super().train(mode)
        if self.settings.freeze_backbone:
            self.encoder_of(self.model).eval()
        return self

    def write(self, model: PreTrainedModel, folder: pathlib.Path) -> None:
        super().write(merge_lora(model) if self.settings.lora_rank else model, folder)

    @torch.no_grad()
    def predict(self, model: nn.Module, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Predictions on the CPU of a saved model for normalised images (N, 3, h, w)."""
        with eval_mode(model):
            parts = [self._predict(model, part.to(model.device)).cpu() for part in images.split(batch_size)]
        return torch.cat(parts)

    @abc.abstractmethod
    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Predictions of a saved model for a batch."""


def add_halting(losses: dict[str, Tensor], reduction: ModelOutput | None) -> None:
    """Add `ponder` and `distribution` of halting tokens, weighted in `total`, and their depth; nothing for others."""
    if getattr(reduction, "loss", None) is None:
        return
    losses |= {"ponder": reduction.ponder_loss, "distribution": reduction.distribution_loss}
    losses |= {"total": losses["total"] + reduction.loss, "halting_depth": reduction.halting_depth.float().mean()}


def name_classes(config: ViTWithRegistersConfig, names: tuple[str, ...]) -> None:
    """Write names of classes into a configuration."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}

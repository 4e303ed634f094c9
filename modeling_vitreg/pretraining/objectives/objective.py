"""What the training loop asks of an objective; the loop knows nothing else about it."""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.modeling_vitreg import ViTWithRegistersLayer, ViTWithRegistersModel

from ..views.crops import CropSettings, MultiCrop
from ..views.masking import MaskSettings


class Objective(nn.Module, abc.ABC):
    """Everything that learns, in one module, so that it is wrapped, sharded and saved as one.

    Args:
        num_steps: of the whole run; schedules of an objective end there.
        processes: the processes that share a batch.
    """

    crops: CropSettings
    make_text: Callable[[str], Tensor] | None = None  # tokens of the caption of an image
    masks: MaskSettings | None = None
    num_prototypes: int | None = None

    def __init__(self, *, num_steps: int, processes: DistributedContext = SINGLE_PROCESS):
        super().__init__()
        self.num_steps = num_steps
        self.processes = processes

    @abc.abstractmethod
    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses of a batch from `to_device`.

        Returns:
            Scalars: `total`, which has the gradient; its terms, unweighted; and what else is worth a line in the log.
        """

    @property
    @abc.abstractmethod
    def encoder(self) -> ViTWithRegistersModel:
        """The model that is evaluated and saved."""

    @property
    def make_views(self) -> Callable[..., dict[str, Tensor]]:
        """What cuts views of an image, for `ViewLoader`."""
        return MultiCrop(self.crops)

    @property
    def saved(self) -> PreTrainedModel:
        """What is written for `from_pretrained`: the encoder, or a model with a head around it."""
        return self.encoder

    @property
    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """Modules that learn, by name; `backbone` is one of them. The gradient of each is clipped on its own."""

    def after_step(self, *, step: int) -> None:  # most objectives have no teacher
        """Called after each step of the optimiser; a teacher follows its student here."""

    def encoder_of(self, model: PreTrainedModel) -> ViTWithRegistersModel:
        """The encoder inside what is saved, which may be a copy that was gathered."""
        return model.base_model

    def write(self, model: PreTrainedModel, folder: pathlib.Path) -> None:
        """Write what is saved into a folder."""
        model.save_pretrained(folder)

    def evaluate(self, model: PreTrainedModel, images: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
        """What can be said of held-out images (N, 3, h, w), for the log.

        Args:
            model: what is saved, whole; see `sharding.gather_model`.
            images: normalised.
            truth: what is known of them, out of `labels` (N,), `semantic_masks` and `depths`, both (N, h, w).
        """
        return {}

    def rates(self, *, step: int) -> dict[str, float]:
        """Values of the schedules of this objective, for the log."""
        return {}

    def compile_layers(self) -> None:
        """Compile the layers of every network, in place: all layers share one graph for each size of views."""
        for module in self.modules():
            if isinstance(module, ViTWithRegistersLayer):
                module.compile()

    def to_device(self, batch: dict, *, device: torch.device, mean: list, std: list) -> dict[str, Tensor]:
        """Move a batch of `ViewLoader` and normalise its views: uint8 (V, B, 3, h, w) to float32."""
        # (x / 255 - mean) / std in two operations in place.
        scale = 1 / (255 * torch.tensor(std, device=device).view(3, 1, 1))
        shift = torch.tensor(mean, device=device).view(3, 1, 1) * 255 * scale
        moved = {}
        for name in ("global_views", "local_views"):
            if name in batch:
                moved[name] = batch[name].to(device, non_blocking=True).float().mul_(scale).sub_(shift)
        for name in ("labels", "texts", "semantic_masks", "depths"):
            if name in batch:
                moved[name] = batch[name].to(device, non_blocking=True)
        if batch.get("masks") is not None:
            # Found on the CPU: on a GPU the number of masked patches would have to be waited for.
            masks = batch["masks"].flatten(0, 1)  # [V, B, P] -> [V B, P]
            moved["masks"] = masks.to(device, non_blocking=True)
            moved["masked_patches"] = masks.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return moved


__all__ = ["Objective"]

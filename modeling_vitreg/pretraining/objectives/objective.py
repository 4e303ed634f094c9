"""The interface between an objective and the training loop.

The class attributes of an objective declare its inputs, its metrics and its description on a card. A new one is
a module in this folder and a line in `registry.py`.
"""

from __future__ import annotations

import abc
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.images import check_channels
from modeling_vitreg.modeling_vitreg import ViTWithRegistersLayer, ViTWithRegistersModel
from modeling_vitreg.settings import make_settings

from ..run.recipe import Recipe
from ..views.colors import change_colors
from ..views.crops import CropSettings, MultiCrop
from ..views.masking import MaskSettings


TARGETS = {"label": "labels", "text": "texts", "mask": "semantic_masks", "depth": "depths"}  # annotation: batch


class Panel(NamedTuple):
    """A panel of `curves.png`.

    Args:
        title: above the panel.
        curves: keys of the log and their labels.
        unit: "%" for shares, else empty.
    """

    title: str
    curves: dict[str, str]
    unit: str = ""


class DataSummary(NamedTuple):
    """Facts about the training data.

    Args:
        class_names: names of the labels; empty if there are none.
        mask_names: names of the classes of masks; empty if unknown.
        texts: all captions; None for a stream.
    """

    class_names: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()
    texts: Callable[[], Iterable[str]] | None = None


class Objective(nn.Module, abc.ABC):
    """All modules that are trained, in one module that is wrapped, sharded and saved as a whole.

    Args:
        backbone: the model that learns.
        crops: views of an image.
        num_steps: steps of the run; schedules of the objective end there.
        settings: of `settings_class`.
        masks: masks of the views, if `has_masks`.
        processes: processes that share a batch.

    Attributes:
        description: what the model learned, for cards.
        citation: family in `cards.card`, or a BibTeX entry.
        settings_class: dataclass of `settings` in a recipe, if there are any.
        annotation: what it learns from beside images, a key of `TARGETS`.
        metrics: what `evaluate` measures, the most informative last; names of `modeling_vitreg.metrics`, or any other.
        panels: panels of `curves.png`; panels that all objectives share are added.
        needs_cls_token, needs_mask_token, needs_normed_tokens: of the backbone. A mask token that is not needed is
            refused, because it would not be trained.
        has_masks: `masks` of the recipe are used.
        has_single_view: it takes one global view and no local ones.
        needs_all_patches: it cannot train a model with `config.token_reduction`.
        takes_sizes: it reads views whose sizes change from step to step, `crops.sizes`.
        takes_any_backbone: it trains models of other types than `ViTWithRegistersModel` too.
        has_head: it adds a head to any pretrained backbone.
        has_external_teacher: it needs the weights of another model.

    Raises:
        ValueError: crops or backbone do not fit the objective.
    """

    description: str
    citation: str | None = None
    settings_class: type | None = None
    annotation: str | None = None
    metrics: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = (Panel("Loss", {"total": "total"}),)
    needs_cls_token = needs_mask_token = needs_normed_tokens = False
    needs_all_patches = True
    takes_sizes = takes_any_backbone = has_masks = has_single_view = has_head = has_external_teacher = False

    needs_init: str | None = None  # why a run cannot start from random weights
    make_text: Callable[[str], Tensor] | None = None  # caption of an image to tokens
    num_prototypes: int | None = None

    def __init__(
        self,
        backbone: ViTWithRegistersModel,
        crops: CropSettings,
        *,
        num_steps: int,
        settings: Any = None,
        masks: MaskSettings | None = None,
        processes: DistributedContext = SINGLE_PROCESS,
    ):
        super().__init__()
        self._check(backbone, crops)
        self.crops, self.num_steps, self.processes = crops, num_steps, processes
        self.settings, self.masks = settings, masks

    def _check(self, backbone: ViTWithRegistersModel, crops: CropSettings) -> None:
        config, name = backbone.config, type(self).__name__
        check_channels(config.num_channels, reader="the model")
        if config.num_channels == 4 and crops.color_augmentation == "random":
            raise ValueError(
                "crops: color_augmentation=random also moves pixels, which alpha would not follow: for a model of 4 "
                "channels expected dino, three or none"
            )
        if crops.sizes and not self.takes_sizes:
            raise ValueError(f"crops: sizes are read by the objective dinov2, not by {name}: leave out crops.sizes")
        if self.has_single_view and (crops.num_global, crops.num_local) != (1, 0):
            raise ValueError(
                f"the {name} objective takes one view of an image: expected num_global=1 and num_local=0 in crops, "
                f"got {crops.num_global} and {crops.num_local}"
            )
        if self.needs_cls_token and not config.has_cls_token:
            raise ValueError(f"the {name} objective needs a class token: set has_cls_token=True in the model")
        if self.needs_mask_token and backbone.embeddings.mask_token is None:
            raise ValueError(f"the {name} objective needs a mask token: set has_mask_token=True in the model")
        if not self.needs_mask_token and backbone.embeddings.mask_token is not None:
            raise ValueError(
                f"the {name} objective would not train a mask token: set has_mask_token=False in the model"
            )
        if self.needs_normed_tokens and config.has_pooled_norm:
            raise ValueError(f"the {name} objective reads normed tokens: set has_pooled_norm=False in the model")

    @classmethod
    def from_recipe(cls, backbone: ViTWithRegistersModel, recipe: Recipe, **common: Any) -> Objective:
        """The objective of a recipe around a backbone; `common` are `num_steps` and `processes`.

        Raises:
            ValueError: values of the recipe do not fit the objective.
        """
        return cls(backbone, crops=recipe.crops, **cls.arguments_of(recipe), **common)

    @classmethod
    def arguments_of(cls, recipe: Recipe) -> dict[str, Any]:
        """Arguments of the constructor that come from a recipe."""
        arguments: dict[str, Any] = {}
        if cls.has_masks:
            arguments["masks"] = recipe.masks
        elif recipe.masks != MaskSettings():
            raise ValueError(
                f"masks: expected none for the objective {recipe.objective!r}, got {recipe.masks}: remove masks"
            )
        if cls.settings_class is not None:
            arguments["settings"] = make_settings(cls.settings_class, recipe.settings, of="settings")
        elif recipe.settings:
            raise ValueError(
                f"settings: expected none for the objective {recipe.objective!r}, got {', '.join(recipe.settings)}: "
                "remove them"
            )
        return arguments

    @classmethod
    def settings_from_data(cls, settings: dict[str, Any], data: DataSummary) -> dict[str, Any]:
        """Values of `settings` that a recipe leaves to the data, such as names of classes.

        Raises:
            ValueError: the data lack such a value.
        """
        return {}

    @classmethod
    def settings_for_estimate(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of the same cost that need neither data nor the contents of tensors; see `estimate`."""
        return settings

    @abc.abstractmethod
    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses of a batch from `to_device`.

        Returns:
            Scalars: `total`, which has a gradient; its unweighted terms; and other values for the log.
        """

    @property
    @abc.abstractmethod
    def encoder(self) -> ViTWithRegistersModel:
        """The model that is evaluated and saved."""

    @property
    def make_views(self) -> Callable[..., dict[str, Tensor]]:
        """Function that cuts the views of an image, for `ViewLoader`."""
        return MultiCrop(self.crops, num_channels=self.encoder.config.num_channels)

    @property
    def saved(self) -> PreTrainedModel:
        """Model that is written for `from_pretrained`: the encoder, or a model with a head around it."""
        return self.encoder

    @property
    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """Modules that are trained, by name; `backbone` is one of them. The gradient of each is clipped separately."""

    def begin(self) -> None:
        """Called once before the first step of a run, when all weights to start from are there."""

    def after_step(self, *, step: int) -> None:
        """Called after each step of the optimiser, for example to update an average of the weights."""

    def encoder_of(self, model: PreTrainedModel) -> ViTWithRegistersModel:
        """The encoder inside a saved model, which may be a gathered copy."""
        return model.base_model

    def write(self, model: PreTrainedModel, folder: pathlib.Path) -> None:
        """Write a saved model into a folder."""
        model.save_pretrained(folder)

    def evaluate(self, model: PreTrainedModel, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """Values of `metrics` on evaluation images, for the log.

        Args:
            model: saved model, whole; see `sharding.gather_model`.
            images: normalised, (N, 3, h, w).
            targets: annotations that are known: `labels` (N,), `semantic_masks` and `depths` (N, h, w).
        """
        return {}

    def rates(self, *, step: int) -> dict[str, float]:
        """Values of the objective's schedules at a step, for the log."""
        return {}

    def compile_layers(self) -> None:
        """Compile the branches of the layers of every network, in place; all layers share their graphs.

        Sizes are dynamic: other sizes of views and other numbers of masked patches compile nothing again.
        """
        compile_layers(self)

    def to_device(self, batch: dict, *, device: torch.device, mean: list, std: list) -> dict[str, Tensor]:
        """Move a batch of `ViewLoader`, change the colours of its views and normalise them.

        Views are uint8 (V, B, 3, h, w) and become float32; nothing waits for the device.
        """
        # (x / 255 - mean) / std in two operations in place.
        scale = 1 / (255 * torch.tensor(std).view(-1, 1, 1))
        shift = torch.tensor(mean).view(-1, 1, 1) * 255 * scale
        scale, shift = (values.to(device, non_blocking=True) for values in (scale, shift))
        moved = {}
        for kind in ("global", "local", "gram"):
            if f"{kind}_views" not in batch:
                continue
            views = batch[f"{kind}_views"].to(device, non_blocking=True)
            if f"{kind}_colors" in batch:  # of a CPU, workers have changed them
                changes = batch[f"{kind}_colors"].flatten(0, 1)
                views = change_colors(views.flatten(0, 1), changes).unflatten(0, views.shape[:2])
            moved[f"{kind}_views"] = views.float().mul_(scale).sub_(shift)
        for name in TARGETS.values():
            if name in batch:
                moved[name] = batch[name].to(device, non_blocking=True)
        if batch.get("masks") is not None:
            # Found on the CPU: on a GPU the number of masked patches would have to be waited for.
            masks = batch["masks"].flatten(0, 1)  # [V, B, P] -> [V B, P]
            moved["masks"] = masks.to(device, non_blocking=True)
            moved["masked_patches"] = masks.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return moved

    def example_targets(self, num_images: int) -> dict[str, Tensor]:
        """Annotations of a batch, as shapes; see `estimate`."""
        return {}


def compile_layers(network: nn.Module) -> None:
    """Compile both branches of every layer inside a network, in place."""
    for module in network.modules():
        if isinstance(module, ViTWithRegistersLayer):
            module.attention_branch = torch.compile(module.attention_branch, dynamic=True)
            module.mlp_branch = torch.compile(module.mlp_branch, dynamic=True)

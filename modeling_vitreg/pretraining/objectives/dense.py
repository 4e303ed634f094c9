"""Segmentation and depth: a head on patch tokens and its backbone are trained on maps.

The heads are those of DINOv2, which are linear; registers take part in the forward pass and are never read. What is
summed up over pixels is summed up over the pixels of all processes, statistics of the batch norm too, so that two
processes learn as one does. Micro-batches that are accumulated are each on their own, as everywhere.

Letters: B images, C classes, D channels.
Source: Oquab et al. 2023, arXiv 2304.07193, section 7.4.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from modeling_vitreg.metrics import DEPTH_ERRORS, check_masks, depth_errors, measure_areas
from modeling_vitreg.modeling_vitreg import (
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
    scale_invariant_loss,
)

from ..views.crops import IGNORED
from .adaptation import AdaptationSettings
from .head_objective import HeadObjective, add_halting, name_classes
from .objective import TARGETS, DataSummary, Objective, Panel


@dataclasses.dataclass(frozen=True)
class SegmentationSettings(AdaptationSettings):
    """Settings of segmentation.

    Args:
        class_names: names of the classes 0, 1, ... of a mask; 255 is no class and does not count.
        num_classes: where the classes have no names.
        num_layers: last layers whose patches the head reads, side by side.
    """

    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    num_layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        if bool(self.class_names) == bool(self.num_classes) or not 2 <= len(self.names) <= IGNORED:
            raise ValueError(
                f"settings: expected class_names or num_classes, 2 to {IGNORED} of them, got {len(self.class_names)} "
                f"names and num_classes {self.num_classes}: the classes of masks are not found in the data"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each class."""
        return self.class_names or tuple(f"class {number}" for number in range(self.num_classes))


@dataclasses.dataclass(frozen=True)
class DepthSettings(AdaptationSettings):
    """Settings of depth estimation.

    Args:
        min_depth, max_depth: metres, the range of the bins; true depths outside of it do not count.
        num_bins: whose expected depth is the answer.
        num_layers: number of layers that the head reads, spread over the depth, the last among them.
    """

    min_depth: float = 1e-3
    max_depth: float = 10.0
    num_bins: int = 256
    num_layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.min_depth < self.max_depth and self.num_bins > 1):
            raise ValueError(
                f"settings: expected 0 < min_depth < max_depth and two or more num_bins, got {self.min_depth}, "
                f"{self.max_depth} and {self.num_bins}"
            )


class DensePrediction(HeadObjective):
    """A backbone with a head for each pixel.

    Args:
        backbone: without a mask token.
        crops: one global view.

    Raises:
        ValueError: several views, a backbone with a mask token, or fewer layers than are read.
    """

    target_dtype: torch.dtype

    def __init__(self, backbone: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        depth, num_layers = backbone.config.num_hidden_layers, self.settings.num_layers
        if not 1 <= num_layers <= depth:
            raise ValueError(f"settings: expected num_layers in 1 ... {depth}, got {num_layers}")
        backbone.config.out_indices = self._choose_layers(depth)
        self.model = self._make_model(backbone)
        for name in getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()):  # a norm that the head does not read
            self.model.get_parameter(name).requires_grad_(False)
        self.adapt_backbone()

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """The loss of the pixels and what halting tokens cost, as `total`.

        Args:
            batch: `global_views` (1, B, 3, h, w), and `semantic_masks` or `depths` (1, B, h, w).
            step: number of the step.
        """
        images, maps = batch["global_views"].flatten(0, 1), batch[TARGETS[self.annotation]].flatten(0, 1)
        output = self.model(images)
        losses = {"total": self._loss(output, maps)}
        add_halting(losses, output.reduction)
        return losses

    def example_targets(self, num_images: int) -> dict[str, Tensor]:
        size = self.crops.global_size
        return {TARGETS[self.annotation]: torch.empty((1, num_images, size, size), dtype=self.target_dtype)}

    @abc.abstractmethod
    def _choose_layers(self, depth: int) -> list[int]:
        """Layers that are read, from 1 to depth."""

    @abc.abstractmethod
    def _make_model(self, backbone: ViTWithRegistersModel) -> nn.Module:
        """A model with a new head, around the backbone."""

    @abc.abstractmethod
    def _loss(self, output: ModelOutput, maps: Tensor) -> Tensor:
        """Of the output of the model and maps (B, h, w)."""

    @abc.abstractmethod
    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """Class numbers or metres, (B, 3, h, w) -> (B, h, w)."""


class Segmentation(DensePrediction):
    """Cross-entropy of the class of each pixel; see `DensePrediction`."""

    description = "semantic segmentation with masks"
    citation = "dinov2"
    settings_class = SegmentationSettings
    annotation, target_dtype = "mask", torch.int32
    metrics = ("pixel_accuracy", "mean_iou")
    panels = (
        *Objective.panels,
        Panel(
            "Segmentation of evaluation images", {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}, unit="%"
        ),
    )

    @classmethod
    def settings_from_data(cls, settings: dict, data: DataSummary) -> dict:
        """Names of the classes of masks; see `Objective`."""
        is_known = not data.mask_names or set(settings) & {"class_names", "num_classes"}
        return {} if is_known else {"class_names": list(data.mask_names)}

    @classmethod
    def settings_for_estimate(cls, settings: dict) -> dict:
        """The 150 classes of ADE20k where the data would name them."""
        return (
            settings if settings.get("class_names") or settings.get("num_classes") else settings | {"num_classes": 150}
        )

    @property
    def trained(self) -> dict[str, nn.Module]:
        head = nn.ModuleList([self.model.segmentation_norm, self.model.segmentation_classifier])
        return {"backbone": self.model.vitreg, "head": head}

    def to_device(self, batch: dict, **options) -> dict[str, Tensor]:
        """See `Objective`.

        Raises:
            ValueError: a class that does not exist; found here, where a GPU need not be waited for.
        """
        check_masks(batch[TARGETS[self.annotation]], num_classes=len(self.settings.names), ignore_index=IGNORED)
        return super().to_device(batch, **options)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """`mean_iou` and `pixel_accuracy` over all pixels of evaluation images; see `Objective`."""
        if TARGETS[self.annotation] not in targets:
            return {}
        masks = targets[TARGETS[self.annotation]].long()
        areas = measure_areas(self.predict(model, images), masks, num_classes=len(self.settings.names)).sum(dim=0)
        found, predicted, true = areas
        return {
            "mean_iou": (found / (predicted + true - found)).nanmean().item(),
            "pixel_accuracy": (found.sum() / true.sum()).item(),
        }

    def _choose_layers(self, depth: int) -> list[int]:
        return list(range(depth + 1 - self.settings.num_layers, depth + 1))

    def _make_model(self, backbone: ViTWithRegistersModel) -> ViTWithRegistersForSemanticSegmentation:
        config = backbone.config
        name_classes(config, self.settings.names)
        config.semantic_loss_ignore_index = IGNORED
        model = ViTWithRegistersForSemanticSegmentation(config)
        model.vitreg = backbone
        if self.processes.size > 1:
            model.segmentation_norm = _SharedBatchNorm(model.segmentation_norm, self.processes.all_gather)
        return model

    def _loss(self, output: ModelOutput, maps: Tensor) -> Tensor:
        scores = self._scores(output, maps.shape[1:])
        total = F.cross_entropy(scores, maps.long(), ignore_index=IGNORED, reduction="sum")
        # The mean over processes is taken of gradients: each divides by its share of all pixels that count.
        count = self.processes.all_reduce_sum((maps != IGNORED).sum().float()) / self.processes.size
        return total / count.clamp(min=1)

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return self._scores(model(images), images.shape[2:]).argmax(dim=1)

    def _scores(self, output: ModelOutput, size: tuple[int, int]) -> Tensor:
        return F.interpolate(output.logits.float(), size=size, mode="bilinear", align_corners=False)


class DepthEstimation(DensePrediction):
    """Scale-invariant loss of the depth of each pixel; see `DensePrediction`."""

    description = "estimation of depth with depth maps"
    citation = "dinov2"
    settings_class = DepthSettings
    annotation, target_dtype = "depth", torch.float32
    metrics = ("d1", "rmse")
    panels = (
        *Objective.panels,
        Panel("Error of depth on evaluation images", {"rmse": "RMSE (metres)", "abs_rel": "absolute relative"}),
    )

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.model.vitreg, "head": self.model.depth_classifier}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """Errors `rmse`, `abs_rel` and `d1`, means over evaluation images; see `Objective`."""
        if TARGETS[self.annotation] not in targets:
            return {}
        limits = {"min_depth": self.settings.min_depth, "max_depth": self.settings.max_depth}
        means = depth_errors(self.predict(model, images), targets[TARGETS[self.annotation]], **limits).nanmean(dim=0)
        errors = dict(zip(DEPTH_ERRORS, means.tolist()))
        return {name: errors[name] for name in ("rmse", "abs_rel", "d1")}

    def _choose_layers(self, depth: int) -> list[int]:
        num_layers = self.settings.num_layers
        return [round(depth * number / num_layers) for number in range(1, num_layers + 1)]

    def _make_model(self, backbone: ViTWithRegistersModel) -> ViTWithRegistersForDepthEstimation:
        config = backbone.config
        config.min_depth, config.max_depth = self.settings.min_depth, self.settings.max_depth
        config.num_depth_bins = self.settings.num_bins
        model = ViTWithRegistersForDepthEstimation(config)
        model.vitreg = backbone
        return model

    def _loss(self, output: ModelOutput, maps: Tensor) -> Tensor:
        # The loss is no mean over pixels: all of them are needed at once.
        depths, maps = self.processes.all_gather(output.predicted_depth), self.processes.all_gather(maps)
        return scale_invariant_loss(depths, maps, max_depth=self.settings.max_depth)

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        return model(images).predicted_depth


class _SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm by the pixels of all processes; torch's own works on GPUs only.

    Args:
        norm: whose values it takes.
        gather: see `DistributedContext`.
    """

    def __init__(self, norm: nn.BatchNorm2d, gather: Callable[[Tensor], Tensor]):
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.load_state_dict(norm.state_dict())
        self._gather = gather

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, rows, columns), B the same in all processes."""
        if not self.training:
            return super().forward(features)
        axes = (0, 2, 3)
        mean = self._gather(features.float().mean(dim=axes)[None]).mean(dim=0)  # [processes, D] -> [D]
        centred = features - mean[:, None, None]
        parts = self._gather(centred.float().square().mean(dim=axes)[None])
        variance, count = parts.mean(dim=0), features[:, 0].numel() * len(parts)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

"""Distillation: a small student predicts the tokens of a larger frozen teacher.

Letters: B images, G global views, V local views, P patches, D width of the student, T of the teacher.
Registers of both take part in their forward passes and in no loss.

The teacher sees global views alone. A global view of the student is matched with the same view: class token with class
token, patch with patch. A local view has no counterpart; its class token is matched with those of the teacher's global
views of the same image, averaged over these pairs, as DINO does, and DINOv2 too when it distils its ViT-S, B and L:
a part has to tell what it is a part of.

What DINOv2 compares, assignments to prototypes, needs the heads of the teacher, which its released models lack. The
distance of features is that of AM-RADIO: one minus the cosine; for patches nine parts of it and one of the smooth
absolute error, which also fixes their norms.
Source: Oquab et al. 2023, arXiv 2304.07193, section 5; Ranzinger et al. 2023, arXiv 2312.06709.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect

from ..run.recipe import Recipe
from ..run.schedules import cosine
from ..views.crops import CropSettings
from ..views.packing import encode_views
from .ema import make_ema_model, update_ema
from .objective import Objective, Panel, compile_layers
from .teachers import check_teacher_channels, load_teacher


COSINE_SHARE, ABSOLUTE_SHARE = 0.9, 0.1  # of the distance of patches


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """Settings of distillation.

    Args:
        teacher: folder or name on the Hub of the model to learn from, of this family.
        momentum: momentum of the moving average of the student, first and last value, along half a cosine.
        class_weight, patch_weight: weights of the terms.
        is_packed: as in `DINOv2Settings`.
    """

    teacher: str = ""
    momentum: tuple[float, float] = (0.994, 1.0)
    class_weight: float = 1.0
    patch_weight: float = 1.0
    is_packed: bool | None = None

    def __post_init__(self):
        # A head without gradient would stop distributed training.
        expect(self, "settings", momentum="[0, 1]", class_weight="(0, inf)", patch_weight="(0, inf)")


class Distillation(Objective):
    """A student with two linear layers to the teacher's width, and its moving average, which is saved.

    The teacher is no part of this module: it is not trained, sharded, averaged or saved, and every process has a
    whole one, which moves to the device of the images at the first step.

    Args:
        backbone: the student's, with a class token and without a mask token.
        teacher: with a class token; it is made to evaluate and to need no gradient.
        crops: any number of views; the patches of both models divide the global ones.

    Raises:
        ValueError: student, teacher and crops do not fit together.
    """

    description = "distillation of class and patch tokens of a larger frozen teacher"
    citation = "dinov2"
    settings_class = DistillationSettings
    panels = (Panel("Loss", {"total": "total", "class_distance": "class token", "patch_distance": "patches"}),)
    has_external_teacher = True

    def __init__(self, backbone: ViTWithRegistersModel, *, teacher: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        _check_networks(backbone, teacher, self.crops)
        width, target_width = backbone.config.hidden_size, teacher.config.hidden_size
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "class_head": nn.Linear(width, target_width),
                "patch_head": nn.Linear(width, target_width),
            }
        )
        for head in (self.student["class_head"], self.student["patch_head"]):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.ema_model = make_ema_model(backbone)
        # In a tuple torch does not find it, so that no checkpoint holds the weights of another model.
        self._teacher = (teacher.requires_grad_(False).eval(),)

    @classmethod
    def arguments_of(cls, recipe: Recipe) -> dict:
        arguments = super().arguments_of(recipe)
        return arguments | {"teacher": load_teacher(arguments["settings"].teacher, recipe)}

    @classmethod
    def settings_for_estimate(cls, settings: dict) -> dict:
        """Views packed, as on a GPU."""
        return settings | {"is_packed": True}

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.ema_model

    @property
    def trained(self) -> dict[str, nn.Module]:
        return dict(self.student.items())

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.ema_model.eval()
        return self

    def after_step(self, *, step: int) -> None:
        update_ema(self.ema_model, self.student["backbone"], decay=self.rates(step=step)["momentum"])

    def rates(self, *, step: int) -> dict[str, float]:
        first, last = self.settings.momentum
        return {"momentum": cosine(step, base=first, final=last, num_steps=self.num_steps)}

    def compile_layers(self) -> None:
        super().compile_layers()
        compile_layers(self._teacher[0])

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Distances `class_distance`, `patch_distance` and their weighted sum `total`.

        Args:
            batch: `global_views` (G, B, 3, h, w), `local_views` (V, B, 3, h', w') or absent.
            step: number of the step.
        """
        num_global, num_images = batch["global_views"].shape[:2]
        views = [(batch["global_views"].flatten(0, 1), None)]  # [G, B, ...] -> [G B, ...]
        if "local_views" in batch:
            views.append((batch["local_views"].flatten(0, 1), None))
        backbone, (images, _) = self.student["backbone"], views[0]
        class_targets, patch_targets = self._targets(images, grid=backbone.embeddings.grid_of(images))
        patches = [torch.arange(len(patch_targets), device=images.device), None][: len(views)]
        tokens = encode_views(backbone, views, patches=patches, is_packed=self.settings.is_packed)

        cls_tokens = torch.cat([view_tokens for view_tokens, _ in tokens])  # [G B + V B, D]
        cls_tokens = self.student["class_head"](cls_tokens).unflatten(0, (-1, num_images))  # [G + V, B, T]
        losses = {
            "class_distance": class_distance(cls_tokens, class_targets.unflatten(0, (num_global, num_images))),
            "patch_distance": patch_distance(self.student["patch_head"](tokens[0][1]), patch_targets),
        }
        losses["total"] = (
            self.settings.class_weight * losses["class_distance"]
            + self.settings.patch_weight * losses["patch_distance"]
        )
        return losses

    @torch.no_grad()
    def _targets(self, images: Tensor, *, grid: tuple) -> tuple[Tensor, Tensor]:
        """Class tokens (G B, T) and patches (G B P, T) of the teacher, the latter on the grid of the student."""
        (teacher,) = self._teacher
        if teacher.device != images.device:
            teacher.to(images.device)
        tokens = teacher(images)
        return tokens.cls_token, resize_patches(tokens.patch_grid, grid=grid).flatten(0, 2)


def class_distance(student: Tensor, targets: Tensor) -> Tensor:
    """One minus the cosine, of global views with the same view, of local ones with all global ones.

    for each view s of the student, image b:
        add  1 - cos(student[s, b], targets[s, b])                   if s is global
        add  mean over t of (1 - cos(student[s, b], targets[t, b]))  if s is local
    divide by the number of views and of images

    Args:
        student: class tokens in the width of the teacher, global views first, (G + V, B, T).
        targets: (G, B, T).
    """
    student, targets = F.normalize(student.float(), dim=-1), F.normalize(targets.float(), dim=-1)
    num_local = len(student) - len(targets)
    # The mean of the cosines with unit vectors is the product with their mean.
    targets = torch.cat([targets, targets.mean(dim=0).expand(num_local, -1, -1)])  # [G, B, T] -> [G + V, B, T]
    return 1 - (student * targets).sum(dim=-1).mean()


def patch_distance(student: Tensor, targets: Tensor) -> Tensor:
    """Nine parts of one minus the cosine and one part of the smooth absolute error, averaged over all patches.

    for each patch i:
        add  0.9 * (1 - cos(student[i], targets[i]))
        add  0.1 * mean over d of smooth(student[i, d] - targets[i, d]),
            smooth(e) = e^2 / 2 if |e| < 1, else |e| - 1 / 2
    divide by the number of patches

    Args:
        student: patches in the width of the teacher, (..., T).
        targets: as `student`.

    Source: Ranzinger et al. 2023, arXiv 2312.06709.
    """
    student, targets = student.float(), targets.float()
    distances = 1 - F.cosine_similarity(student, targets, dim=-1)
    return COSINE_SHARE * distances.mean() + ABSOLUTE_SHARE * F.smooth_l1_loss(student, targets)


def resize_patches(patches: Tensor, *, grid: tuple) -> Tensor:
    """Resize patches (B, rows, columns, T) to another grid, bilinearly and antialiased."""
    if tuple(patches.shape[1:3]) == tuple(grid):
        return patches
    maps = patches.float().permute(0, 3, 1, 2)  # [B, rows, columns, T] -> [B, T, rows, columns]
    maps = F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)
    return maps.permute(0, 2, 3, 1)


def _check_networks(backbone: ViTWithRegistersModel, teacher: ViTWithRegistersModel, crops: CropSettings) -> None:
    check_teacher_channels(teacher, backbone)
    for name, network in (("student", backbone), ("teacher", teacher)):
        config = network.config
        if not config.has_cls_token:
            raise ValueError(
                f"distillation matches class tokens: expected has_cls_token=True in the {name}, got False"
            )
        if config.has_pooled_norm:
            raise ValueError(
                f"distillation matches normed tokens: expected has_pooled_norm=False in the {name}, got True"
            )
        if any(crops.global_size % side for side in config.patch_shape):
            raise ValueError(
                f"crops: expected global_size to be a multiple of the patches of the {name}, {config.patch_shape}, "
                f"got {crops.global_size}: change crops.global_size, student or teacher"
            )

"""Objectives that give registers to a finished model: its frozen original is the teacher."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.modes import eval_mode
from modeling_vitreg.settings import expect

from ..run.recipe import Recipe
from .adaptation import merge_lora
from .objective import Objective, compile_layers
from .shift_average import average_patches, draw_copies
from .teachers import load_teacher


@dataclasses.dataclass(frozen=True)
class OriginalSettings:
    """Settings of all objectives that retrofit; `retrofit` fills them in from the model.

    Args:
        teacher: folder or name on the Hub of the original.
        layer: layer, from 1, whose patch norms show outliers; 0: unknown.
        threshold: norm above which a patch of this layer is an outlier.
    """

    teacher: str = ""
    layer: int = 0
    threshold: float = 0.0

    def __post_init__(self):
        if self.layer < 0 or self.threshold < 0:
            raise ValueError(
                f"settings: expected layer and threshold of 0 or more, got {self.layer} and {self.threshold}: let "
                "`retrofit` find them, or set both"
            )
        expect(self, "settings", **{name: "[0, inf)" for name in vars(self) if name.endswith("_weight")})


@dataclasses.dataclass(frozen=True)
class AverageSettings(OriginalSettings):
    """Settings of objectives whose targets are averages over shifted and flipped copies.

    Args:
        num_copies: copies of an image, each a pass of the teacher; 1 takes its patches as they are.
        shift: largest shift as a share of the grid.
    """

    num_copies: int = 10
    shift: float = 0.15

    def __post_init__(self):
        super().__post_init__()
        expect(self, "settings", num_copies="[1, inf)", shift="[0, 1)")


class RetrofitObjective(Objective):
    """A model that learns from its frozen original; see `Objective`.

    The original is no part of this module: it is not trained, sharded or saved, and moves to the device of the images
    at the first step.

    Args:
        backbone: the original with added registers.
        teacher: the original.
        white: values of white, one for each channel, normalised as the images are.
        crops: one global view.

    Raises:
        ValueError: backbone and teacher do not fit together.
    """

    settings_class = OriginalSettings
    has_single_view = has_external_teacher = True
    metrics = ("outlier_share", "class_cosine")

    def __init__(
        self,
        backbone: ViTWithRegistersModel,
        *,
        teacher: ViTWithRegistersModel,
        white: tuple[float, ...],
        **options: Any,
    ):
        super().__init__(backbone, **options)
        for name in ("hidden_size", "num_hidden_layers", "patch_shape", "has_cls_token", "num_channels"):
            own, its = getattr(backbone.config, name), getattr(teacher.config, name)
            if own != its:
                raise ValueError(
                    f"settings: the teacher is the original of the model, but {name} is {its} there and {own} here: "
                    "start with `vitreg retrofit` or examples/retrofit.py"
                )
        layer, depth = self.settings.layer, backbone.config.num_hidden_layers
        if layer > depth:
            raise ValueError(f"settings: expected layer in 0 ... {depth}, got {layer}")
        self.backbone, self.white = backbone, white
        # In a tuple torch does not find it, so that no checkpoint holds the weights of another model.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self._choose_parameters()

    def _choose_parameters(self) -> None:
        """Freeze parameters that are not trained, and add adapters."""

    @classmethod
    def arguments_of(cls, recipe: Recipe) -> dict:
        arguments = super().arguments_of(recipe)
        teacher = load_teacher(arguments["settings"].teacher, recipe)
        pixels = recipe.statistics(teacher.config.num_channels)
        white = tuple((1 - mean) / std for mean, std in zip(pixels["mean"], pixels["std"]))
        return arguments | {"teacher": teacher, "white": white}

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.backbone

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone}

    def encoder_of(self, model: PreTrainedModel) -> ViTWithRegistersModel:
        return model

    def compile_layers(self) -> None:
        super().compile_layers()
        compile_layers(self._teacher[0])

    def write(self, model: PreTrainedModel, folder: pathlib.Path) -> None:
        super().write(merge_lora(model), folder)

    def teacher_for(self, images: Tensor) -> ViTWithRegistersModel:
        """The original, on the device of the images."""
        (teacher,) = self._teacher
        return teacher if teacher.device == images.device else teacher.to(images.device)

    @torch.no_grad()
    def average_targets(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class tokens (B, D) of the original, None without one, and its patches averaged over copies (B, P, D)."""
        teacher, cls_tokens = self.teacher_for(images), []

        def encode(copy: Tensor) -> Tensor:
            output = teacher(copy)
            cls_tokens.append(output.cls_token)
            return output.patch_grid

        grid = teacher.embeddings.grid_of(images)
        shifts, flips = draw_copies(self.settings.num_copies, grid=grid, share=self.settings.shift)
        patches = average_patches(
            encode,
            images,
            shifts=shifts,
            flips=flips,
            patch_shape=teacher.config.patch_shape,
            fill=torch.tensor(self.white, device=images.device),
        )
        return cls_tokens[0], patches.flatten(1, 2)

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """Share of outliers, and cosine of the class tokens with the original's; see `Objective`."""
        layer, found = self.settings.layer or model.config.num_hidden_layers, []
        with eval_mode(model):
            for part in images.split(64):
                part = part.to(model.device)
                output = model(part, output_hidden_states=[layer])
                original = self.teacher_for(part)(part)
                norms = patch_norms(model, output.hidden_states[layer])
                is_outlier = norms > (self.settings.threshold or torch.inf)
                cosine = F.cosine_similarity(_vector(output), _vector(original), dim=-1)
                found.append(torch.stack([is_outlier.float().mean(dim=1), cosine]))
        share, cosine = torch.cat(found, dim=1).mean(dim=1).tolist()
        return {"outlier_share": share, "class_cosine": cosine}


def patch_norms(model: ViTWithRegistersModel, state: Tensor) -> Tensor:
    """Norms (B, P) of the patches of a hidden state (B, N, D)."""
    return state[:, model.config.token_slices["patches"]].float().norm(dim=-1)


def cosine_distance(tokens: Tensor, targets: Tensor) -> Tensor:
    """One minus the mean cosine of tokens and targets (..., D), each divided by its norm + 1e-8."""
    tokens, targets = (each / (each.norm(dim=-1, keepdim=True) + 1e-8) for each in (tokens.float(), targets.float()))
    return 1 - (tokens * targets).sum(dim=-1).mean()


def train_only(backbone: ViTWithRegistersModel, *parts: nn.Module | nn.Parameter | None) -> None:
    """Freeze all parameters of a model but those of some parts; None is skipped."""
    backbone.requires_grad_(False)
    for part in parts:
        if part is not None:
            part.requires_grad_(True)


def _vector(output) -> Tensor:
    """Class tokens, or the mean of the patches of a model without one."""
    return output.patch_tokens.mean(dim=1) if output.cls_token is None else output.cls_token

"""LeJEPA: embeddings of all views of an image are pulled together, and those of all images towards a Gaussian.

No teacher, no prototypes, no schedule. Registers take part in every forward pass and in no loss.

Letters: B images, G global views, V global and local views, C width of the embeddings, K directions, T frequencies.
Source: Balestriero and LeCun 2025, arXiv 2511.08544.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.images.sources import derive_seed
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect

from ..views.packing import encode_views
from .heads import SyncedBatchNorm
from .losses import characteristic_function
from .objective import Objective, Panel


@dataclasses.dataclass(frozen=True)
class LeJEPASettings:
    """Settings of LeJEPA.

    Args:
        sigreg_weight: weight of the distance to a Gaussian, in [0, 1]; the distance between views gets the rest.
        num_directions: random directions of a step, onto which embeddings are projected.
        num_frequencies, max_frequency: the characteristic function is compared at so many points of
            [0, max_frequency].
        hidden_width, projection_width: widths of the projector; C is `projection_width`.
        is_packed: see `DINOv2Settings`.
    """

    sigreg_weight: float = 0.05
    num_directions: int = 1024
    num_frequencies: int = 17
    max_frequency: float = 3.0
    hidden_width: int = 2048
    projection_width: int = 128
    is_packed: bool | None = None

    def __post_init__(self):
        positive = ("num_directions", "max_frequency", "hidden_width", "projection_width")
        limits = dict.fromkeys(positive, "(0, inf)")
        expect(self, "settings", sigreg_weight="[0, 1]", num_frequencies="[2, inf)", **limits)


class LeJEPA(Objective):
    """A backbone and a projector from its class token to the embeddings that are compared.

    Args:
        backbone: a model with a class token.
        crops: two views of an image or more, at least one of them global.

    Raises:
        ValueError: crops or backbone do not fit the objective.
    """

    description = "agreement of views with embeddings held to a Gaussian, without labels (LeJEPA)"
    citation = "lejepa"
    settings_class = LeJEPASettings
    panels = (
        Panel("Loss", {"total": "total", "invariance": "views of an image"}),
        Panel("Distance to a Gaussian", {"sigreg": "SIGReg", "sigreg_of_gaussian": "expected of a Gaussian"}),
    )
    needs_cls_token = needs_normed_tokens = True

    def __init__(self, backbone: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        if self.crops.num_global + self.crops.num_local < 2:
            raise ValueError(
                "the LeJEPA objective compares views of an image: expected two or more, got num_global=1 and "
                "num_local=0 in crops"
            )
        self.backbone, settings, processes = backbone, self.settings, self.processes
        widths = backbone.config.hidden_size, settings.hidden_width, settings.hidden_width
        hidden = [
            module
            for width, next_width in itertools.pairwise(widths)
            for module in (nn.Linear(width, next_width), SyncedBatchNorm(next_width, processes=processes), nn.ReLU())
        ]
        self.projector = nn.Sequential(*hidden, nn.Linear(settings.hidden_width, settings.projection_width))

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.backbone

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "projector": self.projector}

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses `invariance`, `sigreg` and their weighted mean `total`.

        Args:
            batch: `global_views` (G, B, 3, h, w), `local_views` (V - G, B, 3, h', w') or absent.
            step: number of the step; directions are drawn from it, the same in all processes.
        """
        settings, views = self.settings, [batch[name] for name in ("global_views", "local_views") if name in batch]
        groups = [(view.flatten(0, 1), None) for view in views]  # [G, B, ...] -> [G B, ...]
        tokens = encode_views(self.backbone, groups, patches=[None] * len(groups), is_packed=settings.is_packed)
        embeddings = self.projector(torch.cat([cls_token for cls_token, _ in tokens])).float()
        embeddings = embeddings.unflatten(0, (sum(map(len, views)), -1))  # [V B, C] -> [V, B, C]
        losses = {
            "invariance": invariance_loss(embeddings, num_global=len(views[0])),
            "sigreg": sigreg_loss(
                embeddings,
                directions=draw_directions(settings, step=step, device=embeddings.device),
                num_frequencies=settings.num_frequencies,
                max_frequency=settings.max_frequency,
                processes=self.processes,
            ),
        }
        weight = settings.sigreg_weight
        losses["total"] = weight * losses["sigreg"] + (1 - weight) * losses["invariance"]
        expected = sigreg_of_gaussian(settings.num_frequencies, settings.max_frequency)
        losses["sigreg_of_gaussian"] = embeddings.new_full((), expected)
        return losses


def invariance_loss(embeddings: Tensor, *, num_global: int) -> Tensor:
    """Mean squared difference between the embeddings of all views and the mean of the global ones.

    for each image b, view v, component c:  add  (embeddings[v, b, c] - mean over global views g of [g, b, c])^2
    divide by V x B x C

    Args:
        embeddings: (V, B, C), global views first.
        num_global: G.
    """
    return (embeddings - embeddings[:num_global].mean(dim=0)).square().mean()


def sigreg_loss(
    embeddings: Tensor,
    *,
    directions: Tensor,
    num_frequencies: int,
    max_frequency: float,
    processes: DistributedContext = SINGLE_PROCESS,
) -> Tensor:
    """Distance between embeddings and an isotropic Gaussian: the test of Epps and Pulley along random directions.

    for each view, direction, and frequency t of linspace(0, max_frequency, num_frequencies):
        x = products of the embeddings of all images with the direction
        error = (mean of cos(t x) - exp(-t^2 / 2))^2 + (mean of sin(t x))^2
    integrate error x exp(-t^2 / 2) over [-max_frequency, max_frequency] by trapezoids; times the number of images;
    mean over directions and views

    Args:
        embeddings: (V, B, C), float32.
        directions: unit columns, (C, K).
        num_frequencies, max_frequency: see `LeJEPASettings`.
        processes: images of all of them are compared with the Gaussian together.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        weights, gaussian = _quadrature(num_frequencies, max_frequency, device=embeddings.device)
        sums = characteristic_function(embeddings @ directions, num_frequencies, max_frequency)  # [2, T, V, K]
        sums = processes.all_gather(sums.unsqueeze(0)).sum(dim=0)
        num_images = embeddings.shape[1] * processes.size
        cosine, sine = sums / num_images
        error = (cosine - gaussian.view(-1, 1, 1)).square() + sine.square()
        return num_images * torch.tensordot(weights, error, dims=1).mean()


def sigreg_of_gaussian(num_frequencies: int, max_frequency: float) -> float:
    """The expected `sigreg_loss` of embeddings that are drawn from an isotropic Gaussian, of any number of images."""
    spacing = max_frequency / (num_frequencies - 1)
    gaussian = [math.exp(-((number * spacing) ** 2) / 2) for number in range(num_frequencies)]
    # The variance of the empirical characteristic function, integrated as in the loss.
    values = [2 * spacing * value * (1 - value**2) for value in gaussian]
    return sum(values) - (values[0] + values[-1]) / 2


def draw_directions(settings: LeJEPASettings, *, step: int, device: torch.device) -> Tensor:
    """Random unit columns (C, K) of a step; the same in all processes, and again when a run resumes."""
    generator = torch.Generator(device).manual_seed(derive_seed(step))
    shape = settings.projection_width, settings.num_directions
    directions = torch.randn(shape, generator=generator, device=device)
    return directions / directions.norm(dim=0)


def _quadrature(
    num_frequencies: int, max_frequency: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Weights of the integral over both signs, and the Gaussian's characteristic function, (T,) each."""
    frequencies = torch.linspace(0, max_frequency, num_frequencies, device=device)
    gaussian = torch.exp(-frequencies.square() / 2)
    weights = 2 * max_frequency / (num_frequencies - 1) * gaussian
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    return weights, gaussian

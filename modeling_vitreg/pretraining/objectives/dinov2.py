"""DINOv2: class tokens and masked patches of a student are trained towards those of its moving average, the teacher.

Letters: B images, G global views, V local views, K prototypes, M masked patches, P patches, D width.
Registers take part in every forward pass and in no loss.
Gram anchoring, an option, is described in `gram`.
Source: Oquab et al. 2023, arXiv 2304.07193; Zhou et al. 2021, arXiv 2111.07832; Caron et al. 2021, arXiv 2104.14294.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.settings import expect

from ..monitoring.instruments import entropy, entropy_of_mean
from ..run.recipe import Recipe
from ..run.schedules import cosine, linear
from ..views.crops import CropSettings, MultiCrop, SizedCrops
from ..views.packing import encode_views
from .ema import make_ema_model, update_ema
from .gram import EMA, START, GramSettings, check_gram, gram_loss, gram_targets
from .heads import PrototypeHead
from .losses import EmaCenter, cross_view_loss, koleo_loss, masked_patch_loss, sinkhorn
from .objective import Objective, Panel
from .teachers import check_teacher_channels, load_teacher


@dataclasses.dataclass(frozen=True)
class DINOv2Settings:
    """Settings of DINOv2. Defaults are those of its ViT-L/16 recipe.

    Args:
        num_prototypes: number of prototypes of the head for class tokens.
        num_patch_prototypes: size of a head of its own for patches; None shares one head.
        hidden_width, bottleneck_width, patch_bottleneck_width: widths of the heads.
        centering: "sinkhorn" or "moving_mean".
        student_temperature: temperature of the student.
        teacher_temperature: first and last value, over `temperature_warmup` of the run.
        temperature_warmup: share of the steps.
        momentum: momentum of the teacher, first and last value, along half a cosine.
        dino_weight, ibot_weight, koleo_weight: weights of the terms; KoLeo is summed over the global views.
        is_packed: send global and local views through the linear layers of the student together; None decides by
            the device.
        gram: `GramSettings`, of a term that holds similarities of patches near those of an earlier model.
    """

    num_prototypes: int = 65536
    num_patch_prototypes: int | None = None
    hidden_width: int = 2048
    bottleneck_width: int = 256
    patch_bottleneck_width: int = 256
    centering: str = "sinkhorn"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    momentum: tuple[float, float] = (0.992, 1.0)
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    is_packed: bool | None = None
    gram: GramSettings = dataclasses.field(default_factory=GramSettings)

    def __post_init__(self):
        positive = ("student_temperature", "teacher_temperature", "num_prototypes", "num_patch_prototypes")
        limits = dict.fromkeys((*positive, "hidden_width", "bottleneck_width"), "(0, inf)")
        expect(self, "settings", centering=("sinkhorn", "moving_mean"), momentum="[0, 1]", **limits)


class DINOv2(Objective):
    """Student and teacher, each a backbone with one or two heads.

    Args:
        backbone: the student's, with class token and mask token.
        crops: at least two global views, or one and local ones.
        masks: masks of the student's global views.
        gram_teacher: model that `settings.gram.teacher` names, if it is a folder or a name.

    Raises:
        ValueError: the backbone lacks a class token or a mask token.
    """

    description = "self-distillation of class tokens and hidden patches, without labels (DINOv2)"
    citation = "dinov2"
    settings_class = DINOv2Settings
    panels = (
        Panel(
            "Loss",
            {
                "total": "total",
                "dino": "class token (DINO)",
                "ibot": "masked patches (iBOT)",
                "koleo": "spread (KoLeo)",
                "gram": "similarities (Gram)",
            },
        ),
        Panel("Entropy of the targets (nats)", {"teacher_entropy": "single targets", "mean_entropy": "their mean"}),
    )
    needs_cls_token = needs_mask_token = needs_normed_tokens = has_masks = takes_sizes = True

    def __init__(
        self, backbone: ViTWithRegistersModel, *, gram_teacher: ViTWithRegistersModel | None = None, **options: Any
    ):
        super().__init__(backbone, **options)
        settings = self.settings
        self.num_prototypes = settings.num_prototypes
        check_sizes(self.crops, backbone.config.patch_shape)
        width = backbone.config.hidden_size
        heads = {
            "class_head": PrototypeHead(
                width,
                num_prototypes=settings.num_prototypes,
                hidden_width=settings.hidden_width,
                bottleneck_width=settings.bottleneck_width,
            )
        }
        if settings.num_patch_prototypes is not None:
            heads["patch_head"] = PrototypeHead(
                width,
                num_prototypes=settings.num_patch_prototypes,
                hidden_width=settings.hidden_width,
                bottleneck_width=settings.patch_bottleneck_width,
            )
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = make_ema_model(self.student)
        self.class_center = self.patch_center = None
        if settings.centering == "moving_mean":
            self.class_center = EmaCenter(settings.num_prototypes)
            self.patch_center = EmaCenter(settings.num_patch_prototypes or settings.num_prototypes)
        self.gram_teacher = None
        if settings.gram.weight:
            self.gram_teacher = make_ema_model(gram_teacher or backbone)
            check_teacher_channels(self.gram_teacher, backbone)
            words = {"student": backbone, "crops": self.crops, "num_steps": self.num_steps}
            check_gram(settings.gram, self.gram_teacher, **words)

    @classmethod
    def arguments_of(cls, recipe: Recipe) -> dict[str, Any]:
        arguments = super().arguments_of(recipe)
        if (name := arguments["settings"].gram.teacher) in (START, EMA):
            return arguments
        return arguments | {"gram_teacher": load_teacher(name, recipe, of="gram.teacher")}

    @classmethod
    def settings_for_estimate(cls, settings: dict) -> dict:
        """Views packed, as on a GPU; a Gram teacher as large as the student."""
        gram = {**settings.get("gram", {}), "begin": 0, "ramp": 0, "teacher": START}
        return settings | {"is_packed": True, "gram": gram}

    @property
    def encoder(self) -> ViTWithRegistersModel:
        return self.teacher["backbone"]

    @property
    def make_views(self) -> Callable[..., dict[str, Tensor]] | SizedCrops:
        channels, has_gram = self.encoder.config.num_channels, self.gram_teacher is not None
        if self.crops.sizes:
            return SizedCrops(self.crops, channels, has_gram)
        gram_size = max(self.settings.gram.view_sizes(self.crops)) if has_gram else None
        return MultiCrop(self.crops, num_channels=channels, gram_size=gram_size)

    @property
    def needs_init(self) -> str | None:
        if self.gram_teacher is None or self.settings.gram.teacher != START:
            return None
        return (
            "settings: gram.teacher 'init' and a start from random weights contradict each other: start from a model "
            "with --init, or set gram.teacher=ema and gram.begin"
        )

    @property
    def trained(self) -> dict[str, nn.Module]:
        return dict(self.student.items())

    def begin(self) -> None:
        if self.gram_teacher is not None and self.settings.gram.teacher in (START, EMA):
            self.gram_teacher = make_ema_model(self.encoder)

    def train(self, mode: bool = True) -> DINOv2:
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    def after_step(self, *, step: int) -> None:
        update_ema(self.teacher, self.student, decay=self.rates(step=step)["momentum"])
        if self.settings.gram.is_refreshed_after(step):
            update_ema(self.gram_teacher, self.encoder, decay=0.0)

    def rates(self, *, step: int) -> dict[str, float]:
        first, last = self.settings.momentum
        coldest, warmest = self.settings.teacher_temperature
        num_warmup = int(self.settings.temperature_warmup * self.num_steps)
        gram = self.settings.gram
        return ({"gram_weight": gram.weight_at(step)} if gram.weight else {}) | {
            "momentum": cosine(step, base=first, final=last, num_steps=self.num_steps),
            "teacher_temperature": linear(step, start=coldest, final=warmest, num_steps=num_warmup),
        }

    def example_targets(self, num_images: int) -> dict[str, Tensor]:
        """Views of the Gram teacher."""
        if self.gram_teacher is None:
            return {}
        side = max(self.settings.gram.view_sizes(self.crops))
        channels = self.encoder.config.num_channels
        return {"gram_views": torch.empty(self.crops.num_global, num_images, channels, side, side)}

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses `dino`, `ibot`, `koleo`, `gram` if it has a weight, and their weighted sum `total`.

        With them the entropies of the teacher's targets.

        Args:
            batch: `global_views` (G, B, 3, h, w), `local_views` (V, B, 3, h', w') or absent, `masks` (G B, P) and
                `masked_patches` (M,), indices into (G B P); with the Gram term `gram_views` (G, B, 3, h'', w'').
            step: number of the step.
        """
        settings = self.settings
        num_global, num_images = batch["global_views"].shape[:2]
        num_local = len(batch["local_views"]) if "local_views" in batch else 0
        class_targets, patch_targets = self._targets(batch, self.rates(step=step)["teacher_temperature"])

        views = [(batch["global_views"].flatten(0, 1), batch["masks"])]  # [G, B, ...] -> [G B, ...]
        if num_local:
            views.append((batch["local_views"].flatten(0, 1), None))
        gram_weight, masked = settings.gram.weight_at(step), batch["masked_patches"]
        read = torch.arange(batch["masks"].numel(), device=masked.device) if gram_weight else masked
        patches = [read, None][: len(views)]
        tokens = encode_views(self.student["backbone"], views, patches=patches, is_packed=settings.is_packed)
        global_tokens, patches = tokens[0]  # [G B, D], [M, D]
        all_patches, patches = patches, patches[masked] if gram_weight else patches  # [G B P, D], [M, D]
        cls_tokens = torch.cat([view_tokens for view_tokens, _ in tokens])  # [G B + V B, D]
        class_logits, patch_logits = self._project(self.student, cls_tokens, patches)
        class_logits = class_logits.unflatten(0, (num_global + num_local, num_images))

        losses = {
            "dino": cross_view_loss(
                class_logits[:num_global],
                class_logits[num_global:] if num_local else None,
                class_targets.unflatten(0, (num_global, num_images)),
                temperature=settings.student_temperature,
            ),
            "ibot": masked_patch_loss(
                patch_logits,
                patch_targets,
                weights=_patch_weights(batch["masks"], batch["masked_patches"]),
                num_views=num_global * num_images,
                temperature=settings.student_temperature,
            ),
            "koleo": sum(koleo_loss(view, processes=self.processes) for view in global_tokens.chunk(num_global)),
        }
        losses["total"] = sum(getattr(settings, f"{name}_weight") * term for name, term in losses.items())
        if gram_weight:
            losses["gram"] = self._gram(batch, all_patches)
            losses["total"] = losses["total"] + gram_weight * losses["gram"]
        with torch.no_grad():
            losses["teacher_entropy"] = entropy(class_targets)
            losses["mean_entropy"] = entropy_of_mean(class_targets, processes=self.processes)
        return losses

    def _gram(self, batch: dict[str, Tensor], patches: Tensor) -> Tensor:
        """The Gram term of the student's patches (G B P, D)."""
        gram, (height, width) = self.settings.gram, batch["global_views"].shape[-2:]
        rows, columns = self.student["backbone"].config.patch_shape
        grid = (height // rows, width // columns)
        targets = gram_targets(self.gram_teacher, batch["gram_views"].flatten(0, 1), grid)
        own = patches.unflatten(0, (len(targets), -1))  # [G B P, D] -> [G B, P, D]
        if gram.tokens != "all":
            chosen = batch["masks"] if gram.tokens == "masked" else ~batch["masks"]
            own, targets = own[chosen][None], targets[chosen][None]  # [G B, P, D] -> [1, M, D]
        return gram_loss(own, targets, settings=gram)

    @torch.no_grad()
    def _targets(self, batch: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Targets of class tokens (G B, K) and of the masked patches (M, K), as the teacher sees them unmasked."""
        views = [(batch["global_views"].flatten(0, 1), None)]
        (tokens,) = encode_views(self.teacher["backbone"], views, patches=[batch["masked_patches"]])
        logits = self._project(self.teacher, *tokens)
        if self.settings.centering == "sinkhorn":
            return tuple(sinkhorn(part, temperature=temperature, processes=self.processes) for part in logits)
        centers = self.class_center, self.patch_center
        return tuple(
            center(part, temperature=temperature, processes=self.processes) for center, part in zip(centers, logits)
        )

    def _project(self, network: nn.ModuleDict, cls_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens and patches through their heads; a shared head is called once."""
        if "patch_head" in network:
            return network["class_head"](cls_tokens), network["patch_head"](patches)
        logits = network["class_head"](torch.cat([cls_tokens, patches]))
        return logits[: len(cls_tokens)], logits[len(cls_tokens) :]


def check_sizes(crops: CropSettings, patch_shape: tuple[int, int]) -> None:
    """Check that the sizes of views that are drawn for each step are multiples of the patch.

    Raises:
        ValueError: one is not.
    """
    for row in crops.sizes or ():
        for side in row[:2]:
            if any(side % patch for patch in patch_shape):
                raise ValueError(
                    f"crops: sizes has views of {side} pixels, no multiple of the patch of {max(patch_shape)}: "
                    f"take {side - side % max(patch_shape)}, or another model"
                )


def _patch_weights(masks: Tensor, masked_patches: Tensor) -> Tensor:
    """One over the number of masked patches in the view of each masked patch, (M,)."""
    per_view = 1 / masks.sum(dim=1).clamp(min=1)
    return per_view[masked_patches // masks.shape[1]]

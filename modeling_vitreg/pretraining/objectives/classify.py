"""Supervised classification: fine-tuning, training from scratch, linear probing, learning from a teacher's classes.

Mixing of images and labels, binary or softmax cross-entropy, and DeiT's distillation through the distillation token.
Registers take part in the forward pass; the classifier reads what `config.pooling` says, never a register.

Letters: B images, C classes.
Source: DeiT-III, Touvron et al. 2022, arXiv 2204.07118; DeiT, Touvron et al. 2021, arXiv 2012.12877.
"""

from __future__ import annotations

import dataclasses
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modes import eval_mode

from ..views.crops import CropSettings
from .adaptation import check_adaptation, freeze_or_lora, merge_lora
from .ema import make_ema_model, update_ema
from .mae import check_single_view
from .objective import Objective


LOSSES, DISTILLATIONS = ("softmax", "binary"), ("none", "hard", "soft")


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """What is particular to a classifier. Defaults are those of fine-tuning in DeiT-III.

    Args:
        class_names: of the labels 0, 1, ...; found in the data where none are given.
        loss: "softmax", or "binary", one decision for each class (DeiT-III from scratch).
        smoothing: of the labels; 0 with the binary loss, which would make every class true.
        mixup, cutmix: parameters of the distributions of shares; 0 for none. With both, either with probability 1/2.
        average_momentum: of a moving average of the weights, which is then what is evaluated and saved; 0 for none.
            DeiT's script keeps one of 0.99996 beside the weights, and reports the accuracy of the weights.
        is_probe: learn the classifier alone; the backbone stays as it is.
        lora_rank: learn a product of this rank beside each linear layer of attention, registers and classifier, by
            peft; 0 learns everything. What is saved has the products merged into its weights. Not with sharding.
        distillation: "hard" (the teacher's class) or "soft" (its probabilities) through the distillation token.
        teacher: folder or Hub name of the classifier that is learned from.
        distillation_weight: share of the teacher in the loss.
        temperature: of soft distillation.
    """

    class_names: tuple[str, ...] = ()
    loss: str = "softmax"
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    average_momentum: float = 0.0
    is_probe: bool = False
    lora_rank: int = 0
    distillation: str = "none"
    teacher: str = ""
    distillation_weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self):
        if self.loss not in LOSSES or self.distillation not in DISTILLATIONS:
            raise ValueError(
                f"settings: loss is one of {', '.join(LOSSES)}, distillation of {', '.join(DISTILLATIONS)}, got "
                f"{self.loss!r} and {self.distillation!r}"
            )
        if self.loss == "binary" and self.smoothing:
            raise ValueError(f"settings: the binary loss needs smoothing 0, got {self.smoothing}: all would be true")
        if not (0 <= self.smoothing < 1 and self.mixup >= 0 and self.cutmix >= 0 and self.temperature > 0):
            raise ValueError(
                "settings: expected smoothing in [0, 1), mixup and cutmix of 0 or more, a positive temperature, got "
                f"{self.smoothing}, {self.mixup}, {self.cutmix} and {self.temperature}"
            )
        if not 0 <= self.average_momentum < 1:
            raise ValueError(f"settings: average_momentum is in [0, 1), got {self.average_momentum}")
        check_adaptation(is_probe=self.is_probe, lora_rank=self.lora_rank)
        if (self.distillation != "none") != bool(self.teacher):
            raise ValueError(
                f"settings: distillation {self.distillation!r} and teacher {self.teacher!r} contradict each other: "
                "give both or neither"
            )


class Classification(Objective):
    """A backbone with its classifier, or DeiT's two.

    Args:
        backbone: with a distillation token if there is a teacher.
        settings: of the objective.
        crops: one global view.
        teacher: images (B, 3, h, w) to logits (B, C), without gradient; None without distillation.
        num_steps, processes: see `Objective`.

    Raises:
        ValueError: fewer than two classes, several views, or a backbone that lacks what is read.
    """

    def __init__(
        self,
        backbone: ViTWithRegistersModel,
        *,
        settings: ClassificationSettings,
        crops: CropSettings,
        teacher: nn.Module | None = None,
        num_steps: int,
        processes: DistributedContext = SINGLE_PROCESS,
    ):
        super().__init__(num_steps=num_steps, processes=processes)
        check_single_view(crops, objective="classification")
        self.settings, self.crops = settings, crops
        num_classes = len(settings.class_names)
        if num_classes < 2:
            raise ValueError(f"settings: class_names are two or more, got {num_classes}: the data needs labels")
        self.model = _make_classifier(backbone, settings)
        self.average = make_ema_model(self.model) if settings.average_momentum else None
        self._teacher = (teacher,)  # in a tuple: it is no part of the state
        mixers = [v2.MixUp(alpha=settings.mixup, num_classes=num_classes)] if settings.mixup else []
        mixers += [v2.CutMix(alpha=settings.cutmix, num_classes=num_classes)] if settings.cutmix else []
        self._mix = v2.RandomChoice(mixers) if mixers else None

    @property
    def encoder(self) -> ViTWithRegistersModel:
        """The backbone, that of the average if there is one."""
        return self.saved.vitreg

    @property
    def saved(self) -> ViTWithRegistersForImageClassification:
        """Backbone and classifier, their average if there is one."""
        return self.model if self.average is None else self.average

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Backbone and classifiers."""
        heads = {"classifier": self.model.classifier, "distillation_classifier": self.model.distillation_classifier}
        return {"backbone": self.model.vitreg, **{name: head for name, head in heads.items() if head is not None}}

    def write(self, model: ViTWithRegistersForImageClassification, folder: pathlib.Path) -> None:
        """See `Objective`; products of LoRA are merged into a copy."""
        super().write(merge_lora(model) if self.settings.lora_rank else model, folder)

    def train(self, mode: bool = True) -> Classification:
        """Set the mode; a backbone that is only probed evaluates."""
        super().train(mode)
        if self.settings.is_probe:
            self.model.vitreg.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def after_step(self, *, step: int) -> None:
        """Move the average towards the weights."""
        if self.average is not None:
            update_ema(self.average, self.model, decay=self.settings.average_momentum)

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses `classes`, with a teacher `teacher`, and their weighted sum `total`.

        Args:
            batch: `global_views` (1, B, 3, h, w) and `labels` (B,).
            step: number of the step.
        """
        images, labels = batch["global_views"].flatten(0, 1), batch["labels"]
        targets = F.one_hot(labels, len(self.settings.class_names)).float()
        if self._mix is not None and self.training:
            images, targets = self._mix(images, labels)  # (B,) -> (B, C)
        output = self.model(images)
        own = output.logits if self.settings.distillation == "none" else output.cls_logits
        losses = {"classes": classification_loss(own, targets, settings=self.settings)}
        losses["total"] = losses["classes"]
        if self.settings.distillation != "none":
            (teacher,) = self._teacher
            with torch.no_grad():
                taught = teacher.to(images.device)(images).logits
            losses["teacher"] = distillation_loss(output.distillation_logits, taught, settings=self.settings)
            share = self.settings.distillation_weight
            losses["total"] = (1 - share) * losses["classes"] + share * losses["teacher"]
        return losses

    def to_device(self, batch: dict, **options) -> dict[str, Tensor]:
        """See `Objective`.

        Raises:
            ValueError: an image without a label; found here, where a GPU need not be waited for.
        """
        if bool((batch["labels"] < 0).any()):
            raise ValueError("classification: an image has no label: expected a class for each image of the data")
        return super().to_device(batch, **options)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, images: Tensor, truth: dict[str, Tensor], *, batch_size: int = 250
    ) -> dict[str, float]:
        """Share of held-out images whose class is found, as `accuracy`; see `Objective`."""
        if "labels" not in truth:
            return {}
        with eval_mode(model):
            found = [model(part.to(model.device)).logits.argmax(dim=1).cpu() for part in images.split(batch_size)]
        return {"accuracy": (torch.cat(found) == truth["labels"]).float().mean().item()}


def classification_loss(logits: Tensor, targets: Tensor, *, settings: ClassificationSettings) -> Tensor:
    """Softmax cross-entropy with smoothed labels, or binary cross-entropy where any share makes a class true.

    softmax:  - mean over images of  sum_c ((1 - s) target[c] + s / C) log softmax(logits)[c]
    binary:   mean over images and classes of the binary cross-entropy with  target[c] > 0

    Args:
        logits: (B, C).
        targets: shares of the classes (B, C).
        settings: `loss` and `smoothing` are read.
    """
    if settings.loss == "binary":
        return F.binary_cross_entropy_with_logits(logits.float(), (targets > 0).float())
    return F.cross_entropy(logits.float(), targets, label_smoothing=settings.smoothing)


def distillation_loss(logits: Tensor, taught: Tensor, *, settings: ClassificationSettings) -> Tensor:
    """Cross-entropy with the teacher's class, or the divergence from its softened probabilities.

    hard:  - mean over images of  log softmax(logits)[argmax taught]
    soft:  t^2 * mean over images of  sum_c p[c] (log p[c] - log softmax(logits / t)[c]),  p = softmax(taught / t)

    Args:
        logits: of the distillation token, (B, C).
        taught: (B, C).
        settings: `distillation` and `temperature` are read.
    """
    if settings.distillation == "hard":
        return F.cross_entropy(logits.float(), taught.argmax(dim=1))
    own, target = (part.float() / settings.temperature for part in (logits, taught))
    divergence = F.kl_div(own.log_softmax(dim=1), target.log_softmax(dim=1), reduction="batchmean", log_target=True)
    return divergence * settings.temperature**2


def _make_classifier(
    backbone: ViTWithRegistersModel, settings: ClassificationSettings
) -> ViTWithRegistersForImageClassification:
    config = backbone.config
    is_distilled = settings.distillation != "none"
    if is_distilled and not config.has_distillation_token:
        raise ValueError("distillation reads the distillation token: set has_distillation_token=True in the model")
    if backbone.embeddings.mask_token is not None:
        raise ValueError("classification hides no patch: set has_mask_token=False in the model")
    config.id2label = dict(enumerate(settings.class_names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    if is_distilled:
        config.pooling = "cls_distillation"
    model = ViTWithRegistersForImageClassification(config)
    model.vitreg = backbone
    freeze_or_lora(backbone, is_probe=settings.is_probe, lora_rank=settings.lora_rank)
    return model


__all__ = ["Classification", "ClassificationSettings", "classification_loss", "distillation_loss"]

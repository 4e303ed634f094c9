"""Supervised classification: fine-tuning, linear probe, LoRA, training from scratch, distillation of classes.

Mixing of images and labels, binary or softmax cross-entropy, and DeiT's distillation through the distillation token.
The classifier reads the tokens that `config.pooling` names, never a register.

Letters: B images, C classes.
Source: DeiT-III, Touvron et al. 2022, arXiv 2204.07118; DeiT, Touvron et al. 2021, arXiv 2012.12877.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from modeling_vitreg.metrics import average_precisions
from modeling_vitreg.modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.settings import expect

from ..run.recipe import Recipe
from .adaptation import AdaptationSettings
from .ema import make_ema_model, update_ema
from .head_objective import HeadObjective, add_halting, name_classes
from .objective import DataSummary, Objective, Panel
from .teachers import check_teacher_channels, load_class_teacher


LOSSES, DISTILLATIONS = ("softmax", "binary", "multi_label"), ("none", "hard", "soft")


@dataclasses.dataclass(frozen=True)
class ClassificationSettings(AdaptationSettings):
    """Settings of classification. Defaults are those of fine-tuning in DeiT-III.

    Args:
        class_names: names of the labels 0, 1, ...; found in the data where none are given.
        loss: "softmax"; "binary", one decision for each class (DeiT-III from scratch); "multi_label", the same where
            an image has any number of classes, measured by mean average precision.
        smoothing: smoothing of the labels; 0 with the binary loss, which would make every class true.
        mixup, cutmix: parameters of the distributions of shares; 0 for none. With both, either with probability 1/2.
        ema_decay: of an exponential moving average of the weights, which is then evaluated and saved; 0 for none.
            DeiT's script keeps one of 0.99996 beside the weights, and reports the accuracy of the weights.
        distillation: "hard" (the teacher's class) or "soft" (its probabilities) through the distillation token.
        teacher: folder or Hub name of the classifier that is learned from.
        distillation_weight: share of the teacher in the loss.
        temperature: temperature of soft distillation.
    """

    class_names: tuple[str, ...] = ()
    loss: str = "softmax"
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    ema_decay: float = 0.0
    distillation: str = "none"
    teacher: str = ""
    distillation_weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        expect(self, "settings", loss=LOSSES, distillation=DISTILLATIONS, smoothing="[0, 1)", ema_decay="[0, 1)")
        expect(self, "settings", mixup="[0, inf)", cutmix="[0, inf)", temperature="(0, inf)")
        if self.loss == "binary" and self.smoothing:
            raise ValueError(
                f"settings: expected smoothing 0 with the binary loss, got {self.smoothing}: with smoothing, every "
                "class would be a target"
            )
        wrong = [name for name in ("mixup", "cutmix") if getattr(self, name)] + ["distillation"] * bool(self.teacher)
        if self.loss == "multi_label" and wrong:
            raise ValueError(
                f"settings: the multi_label loss takes no {' and no '.join(wrong)}: set mixup and cutmix to 0, and no "
                "teacher"
            )
        if (self.distillation != "none") != bool(self.teacher):
            raise ValueError(
                f"settings: distillation {self.distillation!r} and teacher {self.teacher!r} contradict each other: "
                "set both or neither"
            )


class Classification(HeadObjective):
    """A backbone with its classifier, or DeiT's two.

    Args:
        backbone: with a distillation token if there is a teacher.
        crops: one global view.
        teacher: images (B, 3, h, w) to logits (B, C), without gradient; None without distillation.

    Raises:
        ValueError: fewer than two classes, several views, or a backbone without a token that is read.
    """

    description = "classification with labels"
    citation = "deit"
    settings_class = ClassificationSettings
    annotation = "label"
    metrics = ("accuracy", "mean_average_precision")
    takes_any_backbone = True
    panels = (
        *Objective.panels,
        Panel("Accuracy on evaluation images", {"accuracy": "classifier"}, unit="%"),
        Panel("mAP on evaluation images", {"mean_average_precision": "classifier"}, unit="%"),
        Panel("Layers that a patch runs", {"halting_depth": "mean"}),
        Panel("Losses of halting", {"ponder": "ponder", "distribution": "distribution"}),
    )

    def __init__(self, backbone: ViTWithRegistersModel, *, teacher: nn.Module | None = None, **options: Any):
        super().__init__(backbone, **options)
        settings = self.settings
        if teacher is not None:
            check_teacher_channels(teacher, backbone)
        num_classes = len(settings.class_names)
        if num_classes < 2:
            raise ValueError(f"settings: expected two or more class_names, got {num_classes}: the data needs labels")
        self.model = _make_classifier(backbone, settings)
        self.adapt_backbone()
        self.ema_model = make_ema_model(self.model) if settings.ema_decay else None
        self._teacher = (teacher,)  # in a tuple: it is no part of the state
        mixers = [v2.MixUp(alpha=settings.mixup, num_classes=num_classes)] if settings.mixup else []
        mixers += [v2.CutMix(alpha=settings.cutmix, num_classes=num_classes)] if settings.cutmix else []
        self._mix = v2.RandomChoice(mixers) if mixers else None

    @classmethod
    def arguments_of(cls, recipe: Recipe) -> dict:
        arguments = super().arguments_of(recipe)
        settings = arguments["settings"]
        teacher = load_class_teacher(settings.teacher, settings.class_names) if settings.teacher else None
        return arguments | {"teacher": teacher}

    @classmethod
    def settings_from_data(cls, settings: dict, data: DataSummary) -> dict:
        """Names of classes; see `Objective`."""
        if settings.get("class_names"):
            return {}
        if not data.class_names:
            raise ValueError(
                "classification needs classes: give --data a folder with a subfolder for each class, a dataset with a "
                "column of classes (--columns label=NAME), or name them with --set settings.class_names=[cat,dog]"
            )
        return {"class_names": list(data.class_names)}

    @classmethod
    def settings_for_estimate(cls, settings: dict) -> dict:
        """The 1000 classes of ImageNet where the data would name them; no mixing, whose shares are random."""
        names = settings.get("class_names") or [str(number) for number in range(1000)]
        return settings | {"class_names": names, "mixup": 0.0, "cutmix": 0.0}

    @property
    def saved(self) -> ViTWithRegistersForImageClassification:
        return self.model if self.ema_model is None else self.ema_model

    @property
    def trained(self) -> dict[str, nn.Module]:
        heads = {"classifier": self.model.classifier, "distillation_classifier": self.model.distillation_classifier}
        return {"backbone": self.model.vitreg, **{name: head for name, head in heads.items() if head is not None}}

    def train(self, mode: bool = True) -> Classification:
        super().train(mode)
        if self.ema_model is not None:
            self.ema_model.eval()
        return self

    def after_step(self, *, step: int) -> None:
        if self.ema_model is not None:
            update_ema(self.ema_model, self.model, decay=self.settings.ema_decay)

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """Losses `classes`, with a teacher `teacher`, and their weighted sum `total`; and what halting tokens cost.

        Args:
            batch: `global_views` (1, B, 3, h, w) and `labels` (B,), or (B, C) where images have any number of classes.
            step: number of the step.
        """
        images, labels = batch["global_views"].flatten(0, 1), batch["labels"]
        classes = torch.arange(len(self.settings.class_names), device=labels.device)
        # F.one_hot looks at the labels.
        targets = (labels[:, None] == classes).float() if labels.ndim == 1 else labels.float()
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
        add_halting(losses, getattr(output, "reduction", None))
        return losses

    def to_device(self, batch: dict, **options) -> dict[str, Tensor]:
        """See `Objective`.

        Raises:
            ValueError: an image without a label; found here, where a GPU need not be waited for.
        """
        if bool((batch["labels"] < 0).any()):
            raise ValueError("classification: an image has no label: expected a class for each image of the data")
        return super().to_device(batch, **options)

    def evaluate(self, model: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """`accuracy`: share of evaluation images with the right class; see `Objective`.

        With lists of labels `mean_average_precision`, over the classes that occur in one image or more.
        """
        if "labels" not in targets:
            return {}
        if targets["labels"].ndim == 2:
            scores = self.predict(model, images)
            return {"mean_average_precision": average_precisions(scores, targets["labels"]).nanmean().item()}
        predicted = self.predict(model, images)
        predicted = predicted.argmax(dim=1) if predicted.ndim == 2 else predicted
        return {"accuracy": (predicted == targets["labels"]).float().mean().item()}

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(images).logits
        return logits if self.settings.loss == "multi_label" else logits.argmax(dim=1)

    def example_targets(self, num_images: int) -> dict[str, Tensor]:
        return {"labels": torch.empty(num_images, dtype=torch.long)}


def classification_loss(logits: Tensor, targets: Tensor, *, settings: ClassificationSettings) -> Tensor:
    """Softmax cross-entropy with smoothed labels, or binary cross-entropy where any share makes a class true.

    softmax:  - mean over images of  sum_c ((1 - s) target[c] + s / C) log softmax(logits)[c]
    binary:   mean over images and classes of the binary cross-entropy with  target[c] > 0
    multi_label:  the same with  (1 - s) target[c] + s / 2

    Args:
        logits: (B, C).
        targets: shares of the classes (B, C).
        settings: `loss` and `smoothing` are read.
    """
    if settings.loss == "multi_label":
        targets = (1 - settings.smoothing) * targets + settings.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), targets)
    if settings.loss == "binary":
        return F.binary_cross_entropy_with_logits(logits.float(), (targets > 0).float())
    return F.cross_entropy(logits.float(), targets, label_smoothing=settings.smoothing)


def distillation_loss(logits: Tensor, taught: Tensor, *, settings: ClassificationSettings) -> Tensor:
    """Cross-entropy with the teacher's class, or the divergence from its softened probabilities.

    hard:  - mean over images of  log softmax(logits)[argmax taught]
    soft:  t^2 * mean over images of  sum_c p[c] (log p[c] - log softmax(logits / t)[c]),  p = softmax(taught / t)

    Args:
        logits: logits of the distillation token, (B, C).
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
    name_classes(config, settings.class_names)
    if settings.loss == "multi_label":
        config.problem_type = "multi_label_classification"
    if is_distilled:
        config.pooling = "cls_distillation"
    model = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[backbone.config_class](config)
    model.vitreg = backbone
    return model

"""The tasks by name: which features and annotations each one needs, and what it measures.

Letters: I images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_vitreg.discovery.finder import ObjectFinder
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.knn import knn_accuracy
from modeling_vitreg.images import LabelledData
from modeling_vitreg.images.splits import require_classes
from modeling_vitreg.metrics import average_precisions, depth_errors, measure_areas

from .cache import Features
from .depth import fit_depth, join_class_token, measure_depth
from .inputs import ROWS_AT_ONCE, count_mask_classes, linear_inputs, name_of_vector, one_vector, with_labels
from .intervals import MetricValue, share_of_counts, statistic_of_images
from .linear import fit_linear
from .logistic import fit_logistic
from .segmentation import fit_segmentation, measure_segmentation
from .top_k import best_counts, rank_classes
from .zero_shot import embed_classes, similarities


OBJECTS = "objects"  # found by `ObjectFinder`; all other kinds of features are those of `cache`


@dataclass(frozen=True)
class Prompts:
    """Classes of zero-shot classification, as prompts, which need a tokenizer, or as embeddings.

    Args:
        tokenizer: tokenizer of the text tower of a dual encoder.
        class_embeddings: (classes, E), in the order of the labels.
    """

    tokenizer: Callable | None = None
    class_embeddings: Tensor | None = None


@dataclass(frozen=True)
class TaskInputs:
    """Inputs of a task.

    Args:
        encoder: model whose features are measured; heads are trained on its device.
        data: images of the features.
        train, test: features of the kind that the task needs, or objects; `train` is None if it needs no training
            images.
        settings: settings of the task.
        seed: random seed of heads, order of images and draws.
        has_progress_bar: show a progress bar.
        prompts: for zero-shot classification.
    """

    encoder: Encoder
    data: LabelledData
    train: Features | None
    test: Features | ObjectFinder
    settings: object
    seed: int
    has_progress_bar: bool
    prompts: Prompts


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        kind: kind of features; see `cache`.
        measure: function of the inputs that returns the numbers, and facts about them.
        reads_train: whether training images are encoded.
        unavailable_reason: function of encoder, data and prompts; returns why the task does not apply, None if it
        does.
    """

    kind: str
    measure: Callable[[TaskInputs], tuple[list[MetricValue], dict]]
    reads_train: bool = True
    unavailable_reason: Callable[[Encoder, LabelledData, Prompts], str | None] = lambda *_: None


def measure_knn(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Top-1 accuracy of the nearest training images."""
    (train, labels), (test, truth) = (with_labels(part, one_vector(part)) for part in (inputs.train, inputs.test))
    require_classes(labels)
    settings, device = inputs.settings, inputs.encoder.device
    options = {"num_neighbors": settings.num_neighbors, "temperature": settings.temperature}
    options["max_neighbors"] = max(200, settings.num_neighbors)
    accuracy = knn_accuracy(train.to(device), labels, test, truth, **options)
    facts = {"input": name_of_vector(inputs.train), "num_train": len(labels)}
    return [share_of_counts("top1", round(accuracy * len(truth)), len(truth))], facts


def measure_linear(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Top-1 and top-5 accuracy of the head chosen by the sweep; mean average precision with lists of labels."""
    settings, has_bar = inputs.settings, inputs.has_progress_bar
    options = {"num_layers": settings.num_layers, "device": inputs.encoder.device}
    train, labels = linear_inputs(inputs.train, **options)
    head = fit_linear(train, labels, settings=settings, seed=inputs.seed, has_progress_bar=has_bar)
    test, truth = linear_inputs(inputs.test, **options)
    facts = {
        "input": head.input,
        "learning_rate": head.learning_rate,
        "validation_accuracy": head.validation_accuracy,
        "num_train": len(labels),
    }
    if truth.ndim == 1:
        return _top(head.scores(test), truth, head.classes), facts
    scores, names = head.scores(test).cpu(), inputs.data.test.class_names
    facts |= {"num_classes": len(names)}
    facts["classes_without_positives"] = [name for name, count in zip(names, truth.sum(dim=0)) if not count]

    def measure(weights: Tensor) -> Tensor:
        return average_precisions(scores, truth, weights).nanmean(dim=1)

    words = {"num_images": len(truth), "seed": inputs.seed, "is_centred": True}
    return [statistic_of_images("mean_average_precision", measure, **words)], facts


def measure_logistic(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Top-1 and top-5 accuracy of the regression with the chosen C."""
    (train, labels), (test, truth) = (with_labels(part, one_vector(part)) for part in (inputs.train, inputs.test))
    settings, seed = inputs.settings, inputs.seed
    fit = fit_logistic(train, labels, settings=settings, seed=seed, has_progress_bar=inputs.has_progress_bar)
    scores = torch.from_numpy(fit.model.predict_proba(test.double().numpy()))
    facts = {
        "input": name_of_vector(inputs.train),
        "strength": fit.strength,
        "validation_accuracy": fit.validation_accuracy,
        "is_converged": fit.is_converged,
        "num_train": len(labels),
    }
    return _top(scores, truth, torch.from_numpy(fit.model.classes_)), facts


def measure_masks(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Intersection over union and accuracies of a linear head on normed patches."""
    ignore_index, device = inputs.data.ignore_index, inputs.encoder.device
    num_classes = len(inputs.data.mask_names or ()) or inputs.data.test.options.num_classes
    num_classes = num_classes or count_mask_classes([inputs.train, inputs.test], ignore_index=ignore_index)
    head = fit_segmentation(
        lambda rows: (inputs.train.take("patches", rows), inputs.train.take("masks", rows)),
        num_images=len(inputs.train),
        num_classes=num_classes,
        settings=inputs.settings,
        ignore_index=ignore_index,
        seed=inputs.seed,
        device=device,
        title="segmentation" if inputs.has_progress_bar else None,
    )
    areas = []
    for rows in torch.arange(len(inputs.test)).split(ROWS_AT_ONCE):
        masks = inputs.test.take("masks", rows).long()
        with torch.no_grad():
            scores = head(inputs.test.take("patches", rows).to(device).float(), tuple(masks.shape[1:]))
        own = scores.argmax(dim=1).cpu()
        areas.append(measure_areas(own, masks, num_classes=num_classes, ignore_index=ignore_index))
    facts = {"num_classes": num_classes, "num_train": len(inputs.train)}
    return measure_segmentation(torch.cat(areas), seed=inputs.seed), facts


def measure_depths(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Errors of a linear head on patches and class token of the last layer, before its norm."""
    device, max_depth = inputs.encoder.device, inputs.data.max_depth
    settings, title = inputs.settings, "depth" if inputs.has_progress_bar else None

    def read(part: Features, rows: Tensor) -> Tensor:
        classes = part.take("class_tokens", rows) if "class_tokens" in part.names else None
        return join_class_token(part.take("patches", rows).float(), classes)

    head = fit_depth(
        lambda rows: (read(inputs.train, rows), inputs.train.take("depths", rows)),
        num_images=len(inputs.train),
        max_depth=max_depth,
        settings=settings,
        seed=inputs.seed,
        device=device,
        title=title,
    )
    errors = []
    for rows in torch.arange(len(inputs.test)).split(ROWS_AT_ONCE):
        depths = inputs.test.take("depths", rows)
        with torch.no_grad():
            own = head(read(inputs.test, rows).to(device), tuple(depths.shape[1:])).cpu()
        errors.append(depth_errors(own, depths, min_depth=settings.min_depth, max_depth=max_depth))
    return measure_depth(torch.cat(errors), seed=inputs.seed), {"max_depth": max_depth, "num_train": len(inputs.train)}


def measure_zero_shot(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """Top-1 and top-5 accuracy of the classes whose prompts are most similar."""
    names, classes = inputs.data.test.class_names, inputs.prompts.class_embeddings
    if classes is None:
        templates = inputs.settings.templates
        classes = embed_classes(inputs.encoder.model, inputs.prompts.tokenizer, names, templates=templates)
    embeddings, truth = with_labels(inputs.test, inputs.test.load("embeddings"))
    if truth.max() >= len(classes):
        raise ValueError(f"expected an embedding for each class, got {len(classes)} and the label {int(truth.max())}")
    scores = similarities(embeddings, classes.cpu())
    is_given = inputs.prompts.class_embeddings is not None
    return _top(scores, truth, torch.arange(len(classes))), {
        "num_classes": len(classes),
        "classes": "given embeddings" if is_given else "prompts of the class names",
    }


def measure_discovery(inputs: TaskInputs) -> tuple[list[MetricValue], dict]:
    """CorLoc: share of annotated images whose object has an IoU of `iou_threshold` or more with a true box."""
    ((settings,), (found,)) = inputs.test.settings, inputs.test.compute()
    if not (ious := inputs.test.ious()):
        raise ValueError("expected images with boxes, got none: check the column of boxes (--columns box=NAME)")
    facts = {"layer": settings.layer, "mean_iou": found["mean_iou"], "num_degenerate": found["num_degenerate"]}
    facts["point_in_box"] = inputs.test.point_in_box()
    return [share_of_counts("corloc", found["num_hits"], len(ious))], facts


def _top(scores: Tensor, truth: Tensor, classes: Tensor) -> list[MetricValue]:
    # Imported here, for k-NN during training needs no `evaluate`.
    from modeling_vitreg.hf_metrics import Accuracy

    counts, num_images = best_counts(len(classes)), len(truth)
    if len(scores) != num_images:
        raise ValueError(f"expected scores of {num_images} images, got {len(scores)}")
    ranked = rank_classes(scores, classes=classes, num_best=counts[-1])
    metric = Accuracy(keep_in_memory=True)
    shares = metric.compute(predictions=ranked.tolist(), references=truth.tolist(), top_k=counts)
    return [share_of_counts(name, round(share * num_images), num_images) for name, share in shares.items()]


def _has_lists(_: Encoder, data: LabelledData, __: Prompts) -> str | None:
    return "images have lists of labels: use --tasks linear" if data.test.has_label_lists else None


def _no_masks(_: Encoder, data: LabelledData, __: Prompts) -> str | None:
    is_there = data.train.options.mask_column and data.test.options.mask_column
    return None if is_there else "the images have no masks: name their column with --columns mask=NAME"


def _no_depths(_: Encoder, data: LabelledData, __: Prompts) -> str | None:
    is_there = data.train.options.depth_column and data.test.options.depth_column
    return None if is_there else "the images have no depth: name its column with --columns depth=NAME"


def _no_boxes(_: Encoder, data: LabelledData, __: Prompts) -> str | None:
    if data.test.options.box_column:
        return None
    return "the images have no boxes: name their column with --columns box=NAME, or their file with --annotations"


def _no_text(encoder: Encoder, data: LabelledData, prompts: Prompts) -> str | None:
    if data.test.has_label_lists or prompts.class_embeddings is not None:
        return _has_lists(encoder, data, prompts)
    if not hasattr(encoder.model, "get_text_features"):
        return "the model has no text tower: use a dual encoder, or pass embeddings of the classes"
    if prompts.tokenizer is None:
        return "the prompts need a tokenizer: pass one, or embeddings of the classes"
    return None if data.test.class_names else "the labels have no names, so there are no prompts"


TASKS = {
    "knn": Task("pooled", measure_knn, unavailable_reason=_has_lists),
    "linear": Task("pooled", measure_linear),
    "logistic": Task("pooled", measure_logistic, unavailable_reason=_has_lists),
    "segmentation": Task("normed_patches", measure_masks, unavailable_reason=_no_masks),
    "depth": Task("raw_patches", measure_depths, unavailable_reason=_no_depths),
    "zero_shot": Task("embeddings", measure_zero_shot, reads_train=False, unavailable_reason=_no_text),
    "discovery": Task(OBJECTS, measure_discovery, reads_train=False, unavailable_reason=_no_boxes),
}

"""The tasks by name: which features and truth each needs, and what it measures.

Letters: I images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling_vitreg.features import Encoder, layer_numbers
from modeling_vitreg.metrics import depth_errors, measure_areas

from .data import EvaluationData
from .depth import fit_depth, join_class_token, measure_depth
from .inputs import ROWS_AT_ONCE, count_mask_classes, linear_inputs, name_of_vector, one_vector, with_labels
from .intervals import Measured, share_of_counts, share_of_images
from .knn import knn_accuracy
from .linear import fit_linear
from .logistic import fit_logistic
from .objects import OBJECTS, measure_objects
from .segmentation import fit_segmentation, measure_segmentation
from .shards import Features
from .splits import require_classes
from .top_k import best_counts, is_in_top
from .zero_shot import embed_classes, similarities


@dataclass(frozen=True)
class Text:
    """What zero-shot classification compares images with: one of the two.

    Args:
        tokenizer: of the text tower of a dual encoder.
        class_embeddings: (classes, E), in the order of the labels.
    """

    tokenizer: Callable | None = None
    class_embeddings: Tensor | None = None


@dataclass(frozen=True)
class Bench:
    """Everything that a task may look at.

    Args:
        encoder: whose features are measured; heads are trained on its device.
        data: what they are features of.
        train, test: of the kind that the task needs; the first is None where it reads no training images.
        settings: of the task.
        seed: of heads, orders and draws.
        has_progress_bar: show one.
        text: for zero-shot classification.
    """

    encoder: Encoder
    data: EvaluationData
    train: Features | None
    test: Features
    settings: object
    seed: int
    has_progress_bar: bool
    text: Text


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        kind: of features; see `encoding` and `objects`.
        measure: from a bench to numbers, and to facts about them.
        reads_train: whether training images are encoded.
        obstacle: from encoder, data and text to the reason why there is nothing to measure, None if there is.
    """

    kind: str
    measure: Callable[[Bench], tuple[list[Measured], dict]]
    reads_train: bool = True
    obstacle: Callable[[Encoder, EvaluationData, Text], str | None] = lambda *_: None


def measure_knn(bench: Bench) -> tuple[list[Measured], dict]:
    """Share of test images whose class wins the vote."""
    (train, labels), (test, truth) = (with_labels(part, one_vector(part)) for part in (bench.train, bench.test))
    require_classes(labels)
    settings, device = bench.settings, bench.encoder.device
    options = {"num_neighbours": settings.num_neighbours, "temperature": settings.temperature}
    options["max_neighbours"] = max(200, settings.num_neighbours)
    accuracy = knn_accuracy(train.to(device), labels, test, truth, **options)
    facts = {"input": name_of_vector(bench.train), "num_train": len(labels)}
    return [share_of_counts("top1", round(accuracy * len(truth)), len(truth))], facts


def measure_linear(bench: Bench) -> tuple[list[Measured], dict]:
    """Top-1 and top-5 of the head that the sweep chose."""
    settings, seed = bench.settings, bench.seed
    options = {"num_layers": settings.num_layers, "device": bench.encoder.device}
    inputs, labels = linear_inputs(bench.train, **options)
    head = fit_linear(inputs, labels, settings=settings, seed=seed, has_progress_bar=bench.has_progress_bar)
    inputs, truth = linear_inputs(bench.test, **options)
    facts = {
        "input": head.input,
        "learning_rate": head.learning_rate,
        "validation_accuracy": head.validation_accuracy,
        "num_train": len(labels),
    }
    return _top(head.scores(inputs), truth, head.classes), facts


def measure_logistic(bench: Bench) -> tuple[list[Measured], dict]:
    """Top-1 and top-5 of the regression with the C that was chosen."""
    (train, labels), (test, truth) = (with_labels(part, one_vector(part)) for part in (bench.train, bench.test))
    settings, seed = bench.settings, bench.seed
    fit = fit_logistic(train, labels, settings=settings, seed=seed, has_progress_bar=bench.has_progress_bar)
    scores = torch.from_numpy(fit.model.predict_proba(test.double().numpy()))
    facts = {
        "input": name_of_vector(bench.train),
        "strength": fit.strength,
        "validation_accuracy": fit.validation_accuracy,
        "is_converged": fit.is_converged,
        "num_train": len(labels),
    }
    return _top(scores, truth, torch.from_numpy(fit.model.classes_)), facts


def measure_masks(bench: Bench) -> tuple[list[Measured], dict]:
    """Intersection over union, and accuracies, of a linear head on normed patches."""
    ignore_index, device = bench.data.ignore_index, bench.encoder.device
    num_classes = len(bench.data.mask_names or ()) or count_mask_classes(
        [bench.train, bench.test], ignore_index=ignore_index
    )
    head = fit_segmentation(
        lambda rows: (bench.train.take("patches", rows), bench.train.take("masks", rows)),
        num_images=len(bench.train),
        num_classes=num_classes,
        settings=bench.settings,
        ignore_index=ignore_index,
        seed=bench.seed,
        device=device,
        title="segmentation" if bench.has_progress_bar else None,
    )
    areas = []
    for rows in torch.arange(len(bench.test)).split(ROWS_AT_ONCE):
        masks = bench.test.take("masks", rows).long()
        with torch.no_grad():
            scores = head(bench.test.take("patches", rows).to(device).float(), tuple(masks.shape[1:]))
        own = scores.argmax(dim=1).cpu()
        areas.append(measure_areas(own, masks, num_classes=num_classes, ignore_index=ignore_index))
    facts = {"num_classes": num_classes, "num_train": len(bench.train)}
    return measure_segmentation(torch.cat(areas), seed=bench.seed), facts


def measure_depths(bench: Bench) -> tuple[list[Measured], dict]:
    """Errors of a linear head on patches and class token of the last layer, before its norm."""
    device, max_depth = bench.encoder.device, bench.data.max_depth
    settings, title = bench.settings, "depth" if bench.has_progress_bar else None

    def read(part: Features, rows: Tensor) -> Tensor:
        classes = part.take("class_tokens", rows) if "class_tokens" in part.names else None
        return join_class_token(part.take("patches", rows).float(), classes)

    head = fit_depth(
        lambda rows: (read(bench.train, rows), bench.train.take("depths", rows)),
        num_images=len(bench.train),
        max_depth=max_depth,
        settings=settings,
        seed=bench.seed,
        device=device,
        title=title,
    )
    errors = []
    for rows in torch.arange(len(bench.test)).split(ROWS_AT_ONCE):
        depths = bench.test.take("depths", rows)
        with torch.no_grad():
            own = head(read(bench.test, rows).to(device), tuple(depths.shape[1:])).cpu()
        errors.append(depth_errors(own, depths, min_depth=settings.min_depth, max_depth=max_depth))
    return measure_depth(torch.cat(errors), seed=bench.seed), {"max_depth": max_depth, "num_train": len(bench.train)}


def measure_zero_shot(bench: Bench) -> tuple[list[Measured], dict]:
    """Top-1 and top-5 of the classes whose prompts are most similar."""
    names, classes = bench.data.test.class_names, bench.text.class_embeddings
    if classes is None:
        templates = bench.settings.templates
        classes = embed_classes(bench.encoder.model, bench.text.tokenizer, names, templates=templates)
    embeddings, truth = with_labels(bench.test, bench.test.load("embeddings"))
    if truth.max() >= len(classes):
        raise ValueError(f"expected an embedding for each class, got {len(classes)} and the label {int(truth.max())}")
    scores = similarities(embeddings, classes.cpu())
    is_given = bench.text.class_embeddings is not None
    return _top(scores, truth, torch.arange(len(classes))), {
        "num_classes": len(classes),
        "classes": "embeddings that were given" if is_given else "prompts of the class names",
    }


def measure_discovery(bench: Bench) -> tuple[list[Measured], dict]:
    """CorLoc of the object that was found in each image."""
    (layer,) = layer_numbers(bench.settings.layer, bench.encoder.num_layers, first=1)
    measured, facts = measure_objects(bench.test, hit=bench.settings.hit)
    return measured, {"layer": layer, **facts}


def _top(scores: Tensor, truth: Tensor, classes: Tensor) -> list[Measured]:
    return [
        share_of_images(f"top{number}", is_in_top(scores, truth, classes=classes, num_best=number))
        for number in best_counts(len(classes))
    ]


def _no_masks(_: Encoder, data: EvaluationData, __: Text) -> str | None:
    is_there = data.train.options.mask_column and data.test.options.mask_column
    return None if is_there else "the images have no masks: name their column by --columns mask=NAME"


def _no_depths(_: Encoder, data: EvaluationData, __: Text) -> str | None:
    is_there = data.train.options.depth_column and data.test.options.depth_column
    return None if is_there else "the images have no depth: name its column by --columns depth=NAME"


def _no_boxes(_: Encoder, data: EvaluationData, __: Text) -> str | None:
    if data.test.box_column:
        return None
    return "the images have no boxes: name their column by --columns box=NAME, or their file by --annotations"


def _no_text(encoder: Encoder, data: EvaluationData, text: Text) -> str | None:
    if text.class_embeddings is not None:
        return None
    if not hasattr(encoder.model, "get_text_features"):
        return "the model has no text tower: give a dual encoder, or embeddings of the classes"
    if text.tokenizer is None:
        return "there is no tokenizer for the prompts: give one, or embeddings of the classes"
    return None if data.test.class_names else "the labels have no names that prompts could be made of"


TASKS = {
    "knn": Task("pooled", measure_knn),
    "linear": Task("pooled", measure_linear),
    "logistic": Task("pooled", measure_logistic),
    "segmentation": Task("normed_patches", measure_masks, obstacle=_no_masks),
    "depth": Task("raw_patches", measure_depths, obstacle=_no_depths),
    "zero_shot": Task("embeddings", measure_zero_shot, reads_train=False, obstacle=_no_text),
    "discovery": Task(OBJECTS, measure_discovery, reads_train=False, obstacle=_no_boxes),
}


__all__ = ["TASKS", "Bench", "Task", "Text"]

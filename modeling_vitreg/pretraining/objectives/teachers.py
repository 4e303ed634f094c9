"""Frozen teachers that a recipe names; they are not part of a saved state."""

from __future__ import annotations

import pathlib

import torch
from transformers import AutoModelForImageClassification, PretrainedConfig

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.features.folders import conversion_command
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel

from ..run.recipe import Recipe


def model_of_run(source: str | pathlib.Path) -> str | pathlib.Path:
    """The model of the output folder of a run; any other folder or name is a model itself."""
    folder = pathlib.Path(source)
    return folder / "model" if (folder / "model" / "config.json").exists() else source


def load_teacher(name: str, recipe: Recipe, *, of: str = "teacher") -> ViTWithRegistersModel:
    """A complete model of this package, made for the image statistics of the recipe.

    Raises:
        ValueError: no name, no model, another family, missing tensors, or other mean and std.
    """
    if not name:
        raise ValueError(f"settings: {of} is the folder or Hub name of the teacher model, got none")
    source = model_of_run(name)
    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"settings: {of} {name} is neither a folder of a model nor on the Hub: {error}") from None
    if kind != ViTWithRegistersConfig.model_type:
        raise ValueError(
            f"settings: expected a teacher of model_type {ViTWithRegistersConfig.model_type!r}, got {kind!r}; "
            f"{conversion_command(source)}"
        )
    teacher, report = ViTWithRegistersModel.from_pretrained(
        source, dtype=torch.float32, has_mask_token=False, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"settings: {of} {name} lacks {len(report['missing_keys'])} tensors, for example "
            f"{min(report['missing_keys'])}, which would be random"
        )
    pixels = teacher.image_processor_settings()
    for key, own in zip(("image_mean", "image_std"), recipe.statistics(teacher.config.num_channels).values()):
        if any(abs(theirs - ours) > 1e-3 for theirs, ours in zip(pixels[key], own)):
            raise ValueError(
                f"recipe: student and teacher see the same pixels, but {key} of {name} is {pixels[key]} and that of "
                f"the recipe {list(own)}: give the recipe the mean and std of the teacher"
            )
    return teacher


def load_class_teacher(name: str, class_names: tuple[str, ...]) -> torch.nn.Module:
    """A classifier of the same classes in the same order.

    Raises:
        ValueError: no classifier, or other classes.
    """
    try:
        teacher = AutoModelForImageClassification.from_pretrained(model_of_run(name), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"settings: teacher {name} cannot be loaded as a classifier: {error}") from None
    known = tuple(teacher.config.id2label[number] for number in range(teacher.config.num_labels))
    if known != class_names:
        raise ValueError(
            f"settings: teacher {name} has {len(known)} classes, {', '.join(known[:3])} ..., the data has "
            f"{len(class_names)}, {', '.join(class_names[:3])} ...: they must be the same"
        )
    return teacher.requires_grad_(False).eval()


def check_teacher_channels(teacher: torch.nn.Module, student: ViTWithRegistersModel) -> None:
    """Check that a teacher reads the views of its student.

    Raises:
        ValueError: it has another number of channels.
    """
    own = student.config.num_channels
    theirs = getattr(getattr(teacher, "config", None), "num_channels", own)
    if theirs != own:
        raise ValueError(
            f"settings: expected a teacher with num_channels {own}, that of the student, got {theirs}: set "
            f"model.num_channels={theirs}, or choose another teacher"
        )

"""Facts in words: what a model is, how it was trained, and what one must not expect of it."""

from __future__ import annotations

import pathlib

from modeling_vitreg.pretraining.objectives.registry import describe_objective

from .facts import Facts
from .snippets import pipeline_tag


_DOES = {
    "image-feature-extraction": "It turns an image into features",
    "image-classification": "It classifies images",
    "image-segmentation": "It names the class of every pixel",
    "depth-estimation": "It estimates the depth of every pixel",
    "zero-shot-image-classification": "It compares images with texts",
}
# Names of facts of a run in words; others keep theirs.
_WORDS = {
    "unreadable": "images that could not be read",
    "knn": "k-NN accuracy",
    "zero_shot": "zero-shot accuracy",
    "pixel_accuracy": "accuracy of pixels",
    "mean_iou": "mean IoU",
    "d1": "share of depths within 25 %",
    "rmse": "error of depth (RMSE, metres)",
}
_NOT_ROWS = ("recipe", "data", "init", "versions", "untrained_chance")


def describe_model(facts: Facts) -> str:
    """What it is, in two sentences."""
    folder = facts.folder
    if folder.is_adapter:
        kind = str(folder.settings.get("peft_type", "an adapter"))
        rank = f" of rank {folder.settings['r']}" if folder.settings.get("r") else ""
        return f"An adapter ({kind}{rank}, {_count(folder.num_parameters)} parameters) for `{facts.parent.name}`."
    config = folder.architecture
    registers = config["num_register_tokens"]
    tokens = f"{registers} register{'s' * (registers != 1)}" if registers else "no registers"
    what = (
        f"A Vision Transformer with {tokens}: {_count(folder.num_parameters)} parameters, "
        f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, {config['num_attention_heads']} heads, "
        f"patches of {_sides(config['patch_size'])} pixels, positions: {config['position_embedding_type']}"
    )
    return f"{what}. {_DOES[pipeline_tag(folder.class_name)]}."


def describe_limits(facts: Facts) -> list[str]:
    """What follows from the facts, and from those that are missing."""
    limits = []
    if not facts.results:
        limits.append("How good its features or predictions are is not known: measure it on your data first.")
    if facts.conversion is not None and not facts.conversion.verification["is_verified"]:
        limits.append("It was not compared with the model that it was converted from, and may differ from it.")
    if _data_of(facts) == "scenes" and facts.parent is None:
        limits.append("It has seen rendered scenes of simple solids only: expect little of it on photographs.")
    elif facts.training is not None:
        limits.append("It shares what is lopsided in the images that it learned from.")
    if facts.folder.is_adapter:
        return [*limits, "It has the limits of the model that it belongs to."]
    config = facts.folder.architecture
    limits.append(
        f"Sides of images must be multiples of the patch, {_sides(config['patch_size'])} pixels. It was made for "
        f"{_sides(config['image_size'])} pixels, and at other sizes its quality differs."
    )
    if not config["num_register_tokens"]:
        limits.append("It has no registers: some patch tokens of large models of this kind hold artifacts.")
    if facts.artifacts is not None and facts.artifacts.verdict["level"] in ("few", "many"):
        limits.append("Some of its patch tokens are artifacts, as measured above: dense tasks may suffer from them.")
    return limits


def training_rows(training: dict | None) -> list[tuple[str, object]]:
    """The table of a training run, from what it recorded."""
    if training is None:
        return []
    recipe, data = training.get("recipe") or {}, training.get("data")
    rows: list[tuple[str, object]] = []
    if isinstance(recipe, dict) and "objective" in recipe:
        rows.append(("objective", describe_objective(recipe["objective"])))
    if isinstance(data, dict) and "name" in data:
        rows.append(("images", _name_data(data)))
    if training.get("init"):
        rows.append(("started from", _without_folders(training["init"])))
    if isinstance(recipe, dict) and "batch_size" in recipe and "steps" in training:
        rows.append(("images seen, repeated ones counted again", training["steps"] * recipe["batch_size"]))
    rows += [
        (_name_fact(name, training), f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in training.items()
        if name not in _NOT_ROWS and isinstance(value, (str, int, float))
    ]
    versions = training.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _data_of(facts: Facts) -> str | None:
    data = (facts.training or {}).get("data")
    return data.get("name") if isinstance(data, dict) else None


def _name_data(data: dict) -> str:
    split = f", split {data['split']}" if data.get("split") else ""
    revision = f", revision {data['revision']}" if data.get("revision") else ""
    return f"{_without_folders(data['name'])}{split}{revision}"


def _without_folders(name: str) -> str:
    """The path to a file on somebody's disk is nobody else's business."""
    path = pathlib.PurePath(str(name))
    return path.name if path.is_absolute() else str(name)


def _name_fact(name: str, training: dict) -> str:
    """What was measured before and after has the same name, but for a word."""
    plain = name.removeprefix("untrained_")
    words = _WORDS.get(plain, plain)
    if f"untrained_{plain}" not in training or plain == "chance":
        return words
    return f"{words} {'before the first step' if name != plain else 'after the last step'}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _sides(side: int | list[int]) -> str:
    rows, columns = (side, side) if isinstance(side, int) else side
    return f"{rows} x {columns}"


__all__ = ["describe_limits", "describe_model", "training_rows"]

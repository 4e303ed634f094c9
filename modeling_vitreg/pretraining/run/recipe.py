"""A recipe: everything that decides the numbers of a run, in one frozen dataclass, from a YAML file.

What a run needs beside it (where to write, how many workers) does not change a number and is not part of it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import yaml

from modeling_vitreg.settings import make_settings, suggest_name

from ..views.crops import CropSettings
from ..views.masking import MaskSettings
from .schedules import scale_learning_rate


OPTIMIZERS = ("adamw", "lamb")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        objective: "dinov2", "mae", "simmim", "distill", "classify", "clip", "segment" or "depth".
        model: keywords of `ViTWithRegistersConfig`, or `preset` and what differs from it.
        num_register_tokens: registers of the model.
        crops: `CropSettings`.
        masks: `MaskSettings`.
        settings: of the objective, for example `DINOv2Settings`.
        mean, std: of the pixels in [0, 1], saved with the model.
        num_steps: steps of the optimiser.
        batch_size: images a step, over all processes and accumulations.
        num_repeats: how often an image is in a step, each time cut anew (repeated augmentation; DeiT takes 3).
        learning_rate: for the batch size that `learning_rate_rule` names.
        learning_rate_rule: see `scale_learning_rate`.
        last_learning_rate: at the end of the cosine.
        warmup: share of the steps with a rising learning rate.
        weight_decay: first and last value, along half a cosine.
        decays_tokens: decay class token, registers, mask token and positions too, as DINOv2 does.
        layer_decay: factor of the learning rate from a layer to the one before it.
        patch_multiplier: factor of the learning rate of the patch embedding.
        optimizer: "adamw" or "lamb".
        betas: of its moments.
        clip: largest norm of the gradient of each part; 0 for none.
        freeze_last_layer: share of the steps in which the prototypes do not learn.
        seed: of everything that is drawn.
    """

    objective: str = "dinov2"
    model: dict = dataclasses.field(default_factory=lambda: {"preset": "small/16"})
    num_register_tokens: int = 4
    crops: CropSettings = dataclasses.field(default_factory=CropSettings)
    masks: MaskSettings = dataclasses.field(default_factory=MaskSettings)
    settings: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_steps: int = 125_000
    batch_size: int = 1024
    num_repeats: int = 1
    learning_rate: float = 4e-3
    learning_rate_rule: str = "sqrt1024"
    last_learning_rate: float = 1e-6
    warmup: float = 0.1
    weight_decay: tuple[float, float] = (0.04, 0.4)
    decays_tokens: bool = True
    layer_decay: float = 0.9
    patch_multiplier: float = 0.2
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 3.0
    freeze_last_layer: float = 0.01
    seed: int = 0

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "num_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} is a positive integer, got {getattr(self, name)!r}")
        for name in ("warmup", "freeze_last_layer"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe: {name} is a share of the steps in [0, 1], got {getattr(self, name)!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"recipe: optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.num_register_tokens < 0:
            raise ValueError(f"recipe: num_register_tokens is 0 or more, got {self.num_register_tokens!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"recipe: learning_rate is positive, got {self.learning_rate!r}")
        self.peak_learning_rate  # noqa: B018 - refuses an unknown rule now

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after the warm-up."""
        return scale_learning_rate(self.learning_rate, batch_size=self.batch_size, rule=self.learning_rate_rule)

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, for YAML and JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """The recipe with other values; a key may name a value inside another as "crops.num_local".

        Raises:
            ValueError: a name that does not exist, or a value of the wrong type.
        """
        values = self.as_dict()
        for name, value in changes.items():
            *path, last = name.split(".")
            inner = values
            for part in path:
                inner = inner.get(part) if isinstance(inner, dict) else None
                if not isinstance(inner, dict):
                    raise ValueError(f"recipe: {name}: {part} has no values of its own; {suggest_name(part, values)}")
            if inner is values and last not in values:
                raise ValueError(f"recipe: no value is called {last!r}; {suggest_name(last, values)}")
            inner[last] = value
        return make_recipe(values)


def read_recipe(path: str | pathlib.Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        ValueError: the file is not a mapping, or a name or value in it does not fit.
    """
    values = yaml.safe_load(pathlib.Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"recipe: {path} holds no mapping of names to values")
    try:
        return make_recipe(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from nested dictionaries; the inverse of `Recipe.as_dict`."""
    values = dict(values)
    for name, kind in (("crops", CropSettings), ("masks", MaskSettings)):
        if isinstance(values.get(name), dict):
            values[name] = make_settings(kind, values[name], of=name)
    return make_settings(Recipe, values, of="recipe")


__all__ = ["Recipe", "make_recipe", "read_recipe"]

"""Recipe of a training run: all settings that change its numbers, as a frozen dataclass, read from a YAML file.

Settings that change no number, such as the output folder and the number of workers, are options of the program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import yaml

from modeling_vitreg.modeling_vitreg import IMAGENET_MEAN, IMAGENET_STD
from modeling_vitreg.settings import expect, make_settings, suggest_name

from ..views.crops import CropSettings
from ..views.masking import MaskSettings
from .schedules import DECAY_SHAPES, cosine, scale_learning_rate, warmup_stable_decay


OPTIMIZERS, SCHEDULES = ("adamw", "lamb"), ("cosine", "wsd")
RENAMED = {  # names of older versions
    "clip": "max_grad_norm",
    "warmup": "warmup_ratio",
    "last_learning_rate": "min_learning_rate",
    "num_repeats": "repeated_augmentation",
    "crops.colours": "crops.color_augmentation",
    "crops.jitter": "crops.color_jitter",
    "crops.jitter_probability": "crops.color_jitter_probability",
    "settings.is_probe": "settings.freeze_backbone",
    "settings.average_momentum": "settings.ema_decay",
    "settings.centring": "settings.centering",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        objective: a name of `objectives.registry.OBJECTIVES`.
        model: keywords of `ViTWithRegistersConfig`, or `preset` and what differs from it; `model_type: vitreg_mamba`
            makes them those of `MambaRConfig`, `vitreg_hat` those of `HATNetConfig`.
        num_register_tokens: registers of the model.
        crops: `CropSettings`.
        masks: `MaskSettings`.
        settings: settings of the objective, for example `DINOv2Settings`.
        mean, std: mean and standard deviation of the pixels in [0, 1], one for all channels or one for each; saved
            with the model. A grey model takes the average of three values, and a model of RGBA takes it for alpha.
        num_steps: steps of the optimiser.
        batch_size: images per step, over all processes and accumulations.
        repeated_augmentation: how many times an image is in a step, each time with other crops (3 in DeiT).
        learning_rate: for the batch size that `learning_rate_rule` names.
        learning_rate_rule: see `scale_learning_rate`.
        schedule: of the learning rate: "cosine", or "wsd", which is constant between warm-up and decay.
        min_learning_rate: at the end of the run; "wsd" starts there too.
        warmup_ratio: share of the steps with a rising learning rate.
        decay_ratio: share of the steps, the last ones, with a falling learning rate; only of "wsd".
        decay_shape: "1-sqrt", "linear" or "cosine"; only of "wsd".
        weight_decay: at the first step.
        weight_decay_end: at the last step, along half a cosine; if it is left out, `weight_decay` is constant.
        decays_tokens: decay class token, registers, mask token and positions too, as DINOv2 does.
        layer_decay: factor of the learning rate from a layer to the one before it.
        patch_multiplier: factor of the learning rate of the patch embedding.
        optimizer: "adamw" or "lamb".
        betas: betas of the optimiser.
        max_grad_norm: largest norm of the gradient of each part; 0 does not clip.
        freeze_last_layer: share of the steps in which the prototypes are not trained.
        seed: seed of all random numbers.
    """

    objective: str = "dinov2"
    model: dict = dataclasses.field(default_factory=lambda: {"preset": "small/16"})
    num_register_tokens: int = 4
    crops: CropSettings = dataclasses.field(default_factory=CropSettings)
    masks: MaskSettings = dataclasses.field(default_factory=MaskSettings)
    settings: dict = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    num_steps: int = 125_000
    batch_size: int = 1024
    repeated_augmentation: int = 1
    learning_rate: float = 4e-3
    learning_rate_rule: str = "sqrt1024"
    schedule: str = "cosine"
    min_learning_rate: float = 1e-6
    warmup_ratio: float = 0.1
    decay_ratio: float = 0.2
    decay_shape: str = "1-sqrt"
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    decays_tokens: bool = True
    layer_decay: float = 0.9
    patch_multiplier: float = 0.2
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 3.0
    freeze_last_layer: float = 0.01
    seed: int = 0

    def __post_init__(self):
        counts = dict.fromkeys(("num_steps", "batch_size", "repeated_augmentation"), "[1, inf)")
        shares = dict.fromkeys(("warmup_ratio", "decay_ratio", "freeze_last_layer"), "[0, 1]")
        choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "decay_shape": DECAY_SHAPES}
        expect(self, "recipe", num_register_tokens="[0, inf)", learning_rate="(0, inf)", **counts, **shares, **choices)
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"recipe: warmup_ratio {self.warmup_ratio} and decay_ratio {self.decay_ratio} are more than all steps "
                "(together at most 1): lower one of them"
            )
        self.peak_learning_rate  # noqa: B018 - refuses an unknown rule now

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after the warm-up."""
        return scale_learning_rate(self.learning_rate, batch_size=self.batch_size, rule=self.learning_rate_rule)

    def statistics(self, num_channels: int) -> dict[str, tuple[float, ...]]:
        """`mean` and `std` with a value for each channel.

        Raises:
            ValueError: they have another number of values.
        """
        return {name: _for_channels(getattr(self, name), num_channels, name) for name in ("mean", "std")}

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, for YAML and JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """The recipe with other values; a key may name an inner value, such as "crops.num_local".

        Raises:
            ValueError: a name that does not exist, or a value of the wrong type.
        """
        values = self.as_dict()
        if values["weight_decay"] == values["weight_decay_end"] and "weight_decay" in changes:
            del values["weight_decay_end"]  # a constant stays constant
        for old, value in changes.items():
            name = _new_name(old, tell=True)
            *path, last = name.split(".")
            inner = values
            for number, part in enumerate(path):
                if number and isinstance(inner, dict):
                    inner.setdefault(part, {})
                inner = inner.get(part) if isinstance(inner, dict) else None
                if not isinstance(inner, dict):
                    raise ValueError(f"recipe: {name}: {part} is a single value; {suggest_name(part, values)}")
            if inner is values and last not in values:
                raise ValueError(f"recipe: there is no value {last!r}; {suggest_name(last, values)}")
            inner[last] = value
        return make_recipe(values)

    def rates(self, step: int) -> dict[str, Any]:
        """Arguments of `parameters.set_rates` at a step."""
        num_steps = self.num_steps
        words = {"base": self.peak_learning_rate, "final": self.min_learning_rate, "num_steps": num_steps}
        words["num_warmup"] = int(self.warmup_ratio * num_steps)
        if self.schedule == "wsd":
            num_decay = int(self.decay_ratio * num_steps)
            learning_rate = warmup_stable_decay(step, **words, num_decay=num_decay, shape=self.decay_shape)
        else:
            learning_rate = cosine(step, **words)
        return {
            "learning_rate": learning_rate,
            "weight_decay": cosine(step, base=self.weight_decay, final=self.weight_decay_end, num_steps=num_steps),
            "is_last_layer_frozen": step < self.freeze_last_layer * num_steps,
        }


def read_recipe(path: str | pathlib.Path) -> Recipe:
    """Read a recipe from a YAML file.

    Raises:
        ValueError: the file cannot be read or is not a mapping, or a name or value in it does not fit.
    """
    try:
        values = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"recipe: {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe: {path} holds no mapping of names to values")
    try:
        return make_recipe(values, tell=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_recipe(values: dict[str, Any], *, tell: bool = False) -> Recipe:
    """A recipe from nested dictionaries, the inverse of `Recipe.as_dict`; older names are read too.

    Args:
        values: names and values.
        tell: name older names on stderr.
    """
    values = _rename(values, tell=tell)
    decay = values.get("weight_decay")
    if isinstance(decay, (list, tuple)) and len(decay) == 2:
        values["weight_decay"], values["weight_decay_end"] = decay
    elif decay is not None:
        values.setdefault("weight_decay_end", decay)
    for name, kind in (("crops", CropSettings), ("masks", MaskSettings)):
        if isinstance(values.get(name), dict):
            values[name] = make_settings(kind, values[name], of=name)
    statistics = {name: values.pop(name) for name in ("mean", "std") if name in values}
    for name, found in statistics.items():
        numbers = found if isinstance(found, (list, tuple)) else [found]
        if not numbers or any(type(number) not in (int, float) or not math.isfinite(number) for number in numbers):
            raise ValueError(
                f"recipe: {name}: expected finite numbers such as [0.5] or [0.5, 0.5, 0.5], got {found!r}"
            )
        statistics[name] = tuple(map(float, numbers))
    return dataclasses.replace(make_settings(Recipe, values, of="recipe"), **statistics)


def _for_channels(values: tuple[float, ...], num_channels: int, name: str) -> tuple[float, ...]:
    average = sum(values) / len(values)
    known = {1: (average,) * num_channels, num_channels: values}
    if len(values) == 3:
        known[3] = values if num_channels == 3 else (average,) if num_channels == 1 else (*values, average)
    if len(values) not in known:
        raise ValueError(
            f"recipe: {name}: expected one value, or one for each of the {num_channels} channels of the model, got "
            f"{list(values)}"
        )
    return known[len(values)]


def _rename(values: dict[str, Any], *, tell: bool, path: str = "") -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for old, value in values.items():
        name = _new_name(path + str(old), tell=tell)
        new = name.removeprefix(path)
        if new != old and new in values:
            raise ValueError(f"recipe: {path}{old} is the old name of {name}: set only one of them")
        renamed[new] = _rename(value, tell=tell, path=f"{name}.") if isinstance(value, dict) else value
    return renamed


def _new_name(name: str, *, tell: bool) -> str:
    new = RENAMED.get(name, name)
    if new != name and tell:
        print(f"recipe: {name} was renamed to {new}", file=sys.stderr)
    return new

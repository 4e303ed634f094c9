"""Retrofits that train: what a run starts from, and the model that is made of its end.

    RUN/start/   original/       the whole model, of this family
                 teacher/        its image tower, which stays as it is
                 model/          the tower with added registers, where training begins
                 prepared.json   outliers of the original, and what the recipe takes from it

The run itself is that of every training program; see `examples/retrofit.py`.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import shutil

import torch
from torch import Tensor, nn

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.features import load_encoder
from modeling_vitreg.files import atomic_folder, check_writable
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.names import count_of
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.reports import RetrofitReport

from .added_registers import add_registers, cluster_means, outlier_embeddings, replace_tower
from .register_neurons import NothingToRepair, Outliers, find_outliers, image_tower, measure_repair, observe
from .repair import (
    RetrofitError,
    RetrofitSettings,
    as_folder,
    describe_outliers,
    finish,
    judge,
    load_model,
    read_images,
    refuse_second,
    time_ratio,
)


METHODS = {"append": "append_registers", "distill": "distill_registers", "refine": "refine_registers"}
NUM_REGISTERS = {"append": 4, "distill": 16, "refine": 16}
ADAPTED_BEFORE = 2  # layers in front of the first one with outliers that get adapters


def prepare_training(
    source: str | os.PathLike,
    run: str | os.PathLike,
    *,
    method: str,
    recipe: Recipe,
    images: object,
    settings: RetrofitSettings,
    device: str | torch.device | None = None,
) -> Recipe:
    """Make the folder that a run starts from, unless it is there; returns the recipe for this model.

    Args:
        source: a folder of this family, or anything that `conversion.convert` takes.
        run: output folder of the run.
        method: a key of `METHODS`.
        recipe: of its objective. Architecture, statistics of the pixels and size of the images become those of the
            model, and settings those of its outliers.
        images: to find outliers on; see `retrofit`.
        settings: `num_units` is not used.
        device: where to look for outliers; None: the CPU.

    Raises:
        NothingToRepair, RetrofitError, ConversionError: see `retrofit`.
        ValueError: another objective, or a model that cannot be trained on square images.
    """
    if recipe.objective != METHODS[method]:
        raise ValueError(
            f"method {method!r} trains the objective {METHODS[method]!r}, the recipe has {recipe.objective!r}"
        )
    start = pathlib.Path(run) / "start"
    if not (start / "prepared.json").exists():
        with as_folder(source) as folder:
            _prepare(folder, start, source, method, recipe, images, settings, device)
    prepared = json.loads((start / "prepared.json").read_text())
    if prepared["method"] != method or prepared["source"] != os.fspath(source):
        raise RetrofitError(
            f"{run} holds a run of method {prepared['method']!r} for {prepared['source']}: use the same to continue "
            "it, or another output"
        )
    return _complete(recipe, prepared, start)


def finish_training(
    run: str | os.PathLike,
    output: str | os.PathLike,
    *,
    images: object,
    settings: RetrofitSettings,
    report_folder: str | os.PathLike | None = None,
    source_of_images: str = "",
    device: str | torch.device | None = None,
    command: str = "",
) -> RetrofitReport:
    """Put the model of a finished run into the whole original, judge it on held-out images, and write it.

    Args:
        run: output folder of the run, of `prepare_training`.
        output, images, settings, report_folder, source_of_images, device, command: see `retrofit`.

    Raises:
        RetrofitError: the result is no repair; see `retrofit`.
    """
    run, output = pathlib.Path(run), pathlib.Path(output)
    page = None if report_folder is None else check_writable(report_folder)
    prepared = json.loads((run / "start" / "prepared.json").read_text())
    folder = run / "start" / "original"
    model = load_model(folder).to(device or "cpu")
    tower, trained = image_tower(model), ViTWithRegistersModel.from_pretrained(run / "model").to(device or "cpu")
    repaired = replace_tower(model, trained)
    encoder = load_encoder(tower, name=prepared["source"])
    split = read_images(encoder, images, settings)
    result, verdict = {}, {"is_repaired": False, "sentence": "The original has no outliers that could be compared."}
    held_out = split.batches[1]
    if prepared["outliers"]:
        outliers = Outliers(**{name: prepared["outliers"][name] for name in _FIELDS}, masks=())
        seen = (observe(each, held_out, outliers) for each in (tower, image_tower(repaired)))
        result = measure_repair(*seen, outliers)
        result["time_ratio"] = time_ratio(tower, image_tower(repaired), held_out[0])
        count = trained.config.num_register_tokens - tower.config.num_register_tokens
        verdict = judge(result, outliers, change=f"with {prepared['method']} and {count_of(count, 'register')}")
    report = RetrofitReport(
        model=prepared["source"],
        method=prepared["method"],
        images={"source": source_of_images, **split.facts},
        outliers=prepared["outliers"],
        register_neurons={},
        tried=[],
        control={},
        result=result,
        verdict=verdict,
        command=command,
        made_with=encoder.made_with(),
    )
    data = split.data(images, settings, source_of_images) if page is not None and result else None
    return finish(report, (model, repaired), folder, output, page=page, data=data, is_forced=settings.force)


_FIELDS = ("layer", "threshold", "highest_layer", "shares")


def _prepare(folder, start, source, method, recipe, images, settings, device) -> None:
    model = load_model(folder).to(device or "cpu")
    tower = image_tower(model)
    if not settings.force:
        refuse_second(tower, source)
    sides = tower.config.image_size
    if not isinstance(sides, int) and len(set(sides)) > 1:
        raise RetrofitError(
            f"training cuts square images, and {source} is made for {sides[0]} x {sides[1]} pixels: use --method "
            "test-time"
        )
    batches, _ = read_images(load_encoder(tower, name=os.fspath(source)), images, settings).batches
    chosen = {name: getattr(settings, name) for name in ("layer", "threshold", "highest_layer")}
    outliers = None
    try:
        outliers = find_outliers(tower, batches, **chosen)
    except NothingToRepair:
        if not settings.force:
            raise
    torch.manual_seed(recipe.seed)
    count = 0 if recipe.settings.get("registers") == "ring" else settings.num_registers
    values = _first_values(tower, batches, outliers, method=method, count=count)
    student = add_registers(tower, values, is_gated=method != "distill") if count else tower
    pixels = tower.image_processor_settings()
    prepared = {
        "source": os.fspath(source),
        "method": method,
        "outliers": describe_outliers(outliers) if outliers else {},
        "num_register_tokens": student.config.num_register_tokens,
        "mean": pixels["image_mean"],
        "std": pixels["image_std"],
        "image_size": sides if isinstance(sides, int) else sides[0],
        "model": _keywords(student.config),
    }
    with atomic_folder(start) as part:
        shutil.copytree(folder, part / "original")
        for name, each in (("teacher", tower), ("model", student)):
            each.save_pretrained(part / name)
        (part / "prepared.json").write_text(json.dumps(prepared, indent=1) + "\n")


def _first_values(tower: nn.Module, batches: list, outliers: Outliers | None, *, method: str, count: int) -> Tensor:
    """First values (R, D) of the new registers: appended ones from the outliers, others random."""
    width, device = tower.config.hidden_size, tower.device
    if method == "append" and outliers is not None:
        return cluster_means(outlier_embeddings(tower, batches, outliers).float(), count)
    if method == "distill":
        return torch.randn(count, width, device=device) / width**0.5
    return nn.init.trunc_normal_(torch.empty(count, width, device=device), std=tower.config.initializer_range)


def _keywords(config: ViTWithRegistersConfig) -> dict:
    """Arguments of a configuration that differ from their defaults, for `model` of a recipe."""
    left_out = {"self", "kwargs", "num_register_tokens", "has_mask_token", "out_features", "out_indices"}
    left_out |= {"drop_path_rate", "projection_size"}
    own = {name: getattr(config, name) for name in inspect.signature(type(config)).parameters if name not in left_out}
    usual = type(config)(hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
    return {name: value for name, value in own.items() if name == "hidden_size" or value != getattr(usual, name)} | {
        name: own[name] for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size", "image_size")
    }


def _complete(recipe: Recipe, prepared: dict, start: pathlib.Path) -> Recipe:
    found = prepared["outliers"]
    settings = {"teacher": str(start / "teacher")}
    if found:
        settings |= {"layer": found["layer"], "threshold": found["threshold"]}
        if prepared["method"] == "append":
            settings["first_layer"] = max(found["highest_layer"] - ADAPTED_BEFORE, 1)
    changes = {name: prepared[name] for name in ("model", "num_register_tokens", "mean", "std")}
    changes["crops.global_size"] = prepared["image_size"]
    changes |= {f"settings.{name}": value for name, value in settings.items()}
    return recipe.with_changes(changes)

"""Import: from the checkpoint of another project to a folder of this family.

The folder holds `config.json`, `model.safetensors`, `preprocessor_config.json`, and the code of the family.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import torch
from torch import nn
from tqdm import tqdm

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
)
from modeling_vitreg.modeling_vitreg import PROCESSOR_FILE, read_image_processor

from .layouts import describe_checkpoint, inner_model, recognise
from .layouts.dinov2 import configure_head
from .layouts.layout import CheckpointInfo, Layout
from .ledger import Ledger, balance_to_target
from .plan import ConversionPlan, ConversionSettings, check_types, make_empty, quietly, short
from .references import find_reference, repository_reference
from .rules import ConversionError, Drop, Join, Rename, Rule, matches, stage
from .sources import Source, open_source
from .timm_models import build_folder, create
from .writer import check_finite, write_safetensors


_HEADS = {
    "classification": ViTWithRegistersForImageClassification,
    "segmentation": ViTWithRegistersForSemanticSegmentation,
    "depth": ViTWithRegistersForDepthEstimation,
}
# Tensors that a class with a head does not have.
_NOT_IN_HEADS = ("embeddings.mask_token", "projection.weight")
_ASSUMED = ("num_attention_heads", "layer_norm_eps", "hidden_act", "interpolate_antialias", "interpolate_offset")
_ASSUMED += ("head_size", "window_sizes", "pool_sizes")
_OF_PROCESSORS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")


def plan_import(source: str | pathlib.Path | nn.Module, settings: ConversionSettings) -> ConversionPlan:
    """Read a checkpoint, infer its architecture and balance its ledger.

    Raises:
        ConversionError: see `pipeline.convert`.
    """
    settings, reduction = _without_reduction(settings)
    opened, module = _open(source, settings)
    opened = inner_model(opened, family=settings.family)
    layout = recognise(opened, family=settings.family, module=module)
    info = describe_checkpoint(opened, layout, module=module, config_overrides=settings.config_overrides)
    kind, config, rules, head = _decide(layout, info, settings, opened)
    with stage(f"{opened.path}: its tokens cannot be reduced", remedy="choose other values, or leave them out"):
        type(config)(**{**config.to_dict(), **reduction})
    title = f"{layout.title} to vitreg"
    original = opened.renamed(layout.canonical(list(opened.shapes)))
    tensors = original if head is None else original.beside(head)
    with stage(f"{opened.path}: read as {layout.name}, no model can be built", remedy="check its config.json"):
        model = make_empty(kind, config)
        targets = {short(name): tensor for name, tensor in model.state_dict().items()}
        processor = _processor(opened, layout, info, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    ledger = balance_to_target(rules, tensors.shapes, shapes, title=title)
    check_types(ledger.entries, tensors, {name: tensor.dtype for name, tensor in targets.items()})
    _check_dropped(rules, tensors, ledger)

    def compare(folder: pathlib.Path) -> tuple:
        with quietly():
            converted = kind.from_pretrained(folder)
            if settings.code is not None:
                return converted, repository_reference(layout.name, settings.code, original, config)
            theirs = opened if layout.name.startswith("transformers") else original
            return converted, find_reference(layout.name, theirs, config, module)

    return ConversionPlan(
        title=title,
        source={
            "path": str(source) if isinstance(source, (str, pathlib.Path)) else type(source).__name__,
            "layout": layout.name,
            "checkpoint_key": opened.checkpoint_key,
            "licence": layout.licence,
            "assumed": _assumed(info, config),
            "notes": opened.notes,
        },
        target={
            "layout": "vitreg",
            "class": kind.__name__,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        ledger=ledger,
        tensors=tensors,
        files=opened.files,
        hashes=layout.hashes,
        left=opened.left,
        write=lambda folder: _write(folder, model, ledger, tensors, processor, title, settings.is_quiet),
        compare=compare,
        notes=(["only the tokens were compared, not the outputs of the head"] if head else [])
        + (["compared without token_reduction, which was set afterwards"] if reduction else []),
        finish=functools.partial(_reduce_tokens, reduction=reduction),
    )


def _open(source: str | pathlib.Path | nn.Module, settings: ConversionSettings) -> tuple[Source, nn.Module | None]:
    if isinstance(source, nn.Module):
        name = f"{type(source).__module__}.{type(source).__name__}"
        if not any(kind.__module__.startswith("timm.") for kind in type(source).__mro__):
            raise ConversionError(
                f"expected a file, a folder, or a model of timm or transformers, got {name}: save it with "
                "torch.save(model.state_dict(), FILE), and convert the file"
            )
        return Source.of_module(source, type(source).__name__), source
    if str(source).startswith(("timm:", "hf-hub:")):
        module = create(str(source))
        return Source.of_module(module, str(source)), module
    opened = open_source(source, checkpoint_key=settings.checkpoint_key)
    if (opened.settings or {}).get("architecture") is None:
        return opened, None
    return opened, build_folder(opened)


def _decide(layout: Layout, info: CheckpointInfo, settings: ConversionSettings, opened: Source) -> tuple:
    """Class, configuration and rules; and the open head, if there is one."""
    remedy = "check its config.json, or state fields with --set FIELD=VALUE"
    with stage(f"{opened.path}: its architecture cannot be read as {layout.name}", remedy=remedy):
        fields, head = layout.configure(info), None
    kind = layout.models["num_labels" in fields]
    fields |= settings.config_overrides
    extra_rules: list[Rule] = []
    if settings.head is not None:
        if layout.name != "dinov2":
            raise ConversionError(
                f"--head holds a linear head of facebookresearch/dinov2, the backbone is {layout.name}"
            )
        head = open_source(settings.head)
        head = head.renamed({name: _head_name(name) for name in head.shapes})
        with stage(f"{settings.head}: is no linear head of this backbone", remedy="name the head of the same model"):
            word, more, extra_rules = configure_head(
                head.shapes, ViTWithRegistersConfig(**fields), title=str(settings.head)
            )
        kind, fields = _HEADS[word], {**fields, **more}
    if kind is not layout.models[0]:
        fields["has_mask_token"] = False
    try:
        config = layout.config_class(**fields, architectures=[kind.__name__])
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(
            f"{info.file_name}: read as {layout.name}, its architecture is not valid: {error}"
        ) from error
    if config.num_hidden_layers > len(opened.shapes):
        raise ConversionError(
            f"{info.file_name}: expected {config.num_hidden_layers:,} layers, got {len(opened.shapes)} tensors"
        )
    rules = [*layout.rules(config), *extra_rules]
    if kind is not layout.models[0]:
        rules = [_without(rule) for rule in rules]
    return kind, config, rules, head


def _head_name(name: str) -> str:
    """The name in a separate head, without the prefix of its wrapper."""
    return name.removeprefix("linear_head.")


def _without(rule: Rule) -> Rule:
    if isinstance(rule, (Rename, Join)) and rule.target in _NOT_IN_HEADS and isinstance(rule.source, str):
        return Drop(rule.source, why="a model with a head does not have it")
    return rule


def _assumed(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    """Fields that no tensor shows, set to the usual value of the family; a reference built with them agrees."""
    if info.settings is not None or info.module is not None:
        return {}
    known = config.to_dict()
    return {name: getattr(config, name) for name in _ASSUMED if name in known and name not in info.config_overrides}


def _check_dropped(rules: list[Rule], tensors: Source, ledger: Ledger) -> None:
    """Tensors that the configuration determines must have the values that it determines."""
    valued = [rule for rule in rules if isinstance(rule, Drop) and rule.value is not None]
    for name in ledger.dropped:
        for rule in valued:
            if matches(rule, name):
                found, expected = tensors.read(name).float(), rule.value(name)
                check_finite(name, found)
                if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    raise ConversionError(
                        f"{name} is {rule.why}, but its values differ: this architecture cannot be represented"
                    )


def _processor(opened: Source, layout: Layout, info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    """Settings of the image processor: those of the source, else those of the family."""
    if info.processor is None:
        return layout.prepare(info, config)
    file = opened.path / PROCESSOR_FILE
    try:
        read_image_processor(file, num_channels=config.num_channels)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    known = {
        name: value for name, value in info.processor.items() if name in (*_OF_PROCESSORS, "image_mean", "image_std")
    }
    for name, value in known.items():
        if not _is_plausible(name, value):
            raise ConversionError(
                f"{file}: {name} is {value!r:.80}, which is no valid setting of an image processor: correct the file"
            )
    return {"do_center_crop": False, **known}  # processors that never crop do not say so


def _is_plausible(name: str, value: object) -> bool:
    if value is None or name in ("image_mean", "image_std", "rescale_factor"):  # checked before
        return True
    if name.startswith("do_"):
        return isinstance(value, bool)
    if name == "resample":
        return type(value) is int and 0 <= value <= 5
    sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return bool(sides) and all(type(side) is int and 1 <= side <= 32_768 for side in sides)


def _write(folder: pathlib.Path, model, ledger: Ledger, tensors: Source, processor: dict, title: str, is_quiet: bool):
    settings = {**model.image_processor_settings(), **processor}
    settings["image_processor_type"] = model.image_processor_settings()["image_processor_type"]
    if settings.get("do_center_crop") is False:
        settings.pop("crop_size", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    names = {short(name): name for name in model.state_dict()}
    entries = [dataclasses.replace(entry, name=names[entry.name]) for entry in ledger.entries]
    with tqdm(total=len(entries), desc=title, unit="tensor", disable=is_quiet) as bar:
        with quietly():
            model.save_pretrained(folder, state_dict={})
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        write_safetensors(folder / "model.safetensors", entries, read=tensors.read, on_tensor=lambda _: bar.update())
    return folder


def _without_reduction(settings: ConversionSettings) -> tuple[ConversionSettings, dict]:
    """The settings without a reduction of tokens, and the field with that reduction, if there is one."""
    overrides = dict(settings.config_overrides)
    reduction = overrides.pop("token_reduction", None)
    fields = {} if reduction is None else {"token_reduction": reduction}
    return dataclasses.replace(settings, config_overrides=overrides), fields


def _reduce_tokens(folder: pathlib.Path, *, reduction: dict) -> None:
    if reduction:
        fields = json.loads((folder / "config.json").read_text()) | reduction
        (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")

"""Our folders to the layouts of others: facebookresearch/dinov2's file, a folder of timm's, a folder of transformers'.

The tables of the way in are read backwards. What a layout cannot say about an architecture is found by reading back
what was written, and comparing it field by field.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib

import torch
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg import modeling_vitreg as models
from modeling_vitreg.files import atomic_folder
from modeling_vitreg.reports import ConversionReport, command_line, made_with, write_report

from .layouts import dinov2, timm
from .layouts.layout import CheckpointInfo, Layout
from .layouts.transformers import LAYOUTS as TRANSFORMERS
from .layouts.transformers import name_in_file, transformers_settings
from .pipeline import (
    REPORT_FILE,
    ConversionSettings,
    check_output,
    describe_ledger,
    prove,
    quietly,
    short,
)
from .references import find_reference, run_timm, timm_arguments, timm_positions, title_of
from .repositories import repository_reference
from .rules import ConversionError, Entry, balance_to_source
from .sources import Source, hash_files, open_source
from .verify import Reference
from .writer import make, write_safetensors


TARGETS = ("dinov2", "timm", "transformers")
# What a layout must say as we do. Rules for positions away from the native size are not among them: they are arguments
# of the others' code, which the record names.
_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "norm_type",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "has_cls_token",
    "has_distillation_token",
    "position_embedding_type",
    "has_prefix_positions",
    "rope_style",
    "rope_theta",
    "has_patch_bias",
    "has_pre_norm",
    "has_query_bias",
    "has_key_bias",
    "has_value_bias",
    "has_pooled_norm",
    "projection_size",
)
_IN_CLASSIFIERS = ("pooling", "num_classifier_layers", "num_labels")
_TABLE = "embeddings.position_embeddings.weight"


def export(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    to: str,
    settings: ConversionSettings | None = None,
    command: str | None = None,
) -> ConversionReport:
    """Write a model of ours in another layout, and prove it.

    Args:
        source: folder of ours.
        output: a file ending in `.pth` for "dinov2", else a folder to make.
        to: "dinov2", "timm" or "transformers".
        settings: `code`, `tolerance` and `is_quiet` count.
        command: for the record; default that of the process.

    Returns:
        What lies in `conversion.json`; beside a file, its name stands in front.

    Raises:
        ConversionError: the layout cannot represent the architecture, and the message names the field; or the proof
            failed, and then nothing was saved.
    """
    settings = settings or ConversionSettings()
    output = pathlib.Path(output)
    check_output(output)
    if to not in TARGETS:
        raise ConversionError(f"expected a layout out of {', '.join(TARGETS)}, got {to!r}")
    if to == "dinov2" and output.suffix != ".pth":
        raise ConversionError(f"{output}: the layout of dinov2 is a file: let its name end in .pth")
    opened = open_source(source)
    if (opened.settings or {}).get("model_type") != "vitreg":
        raise ConversionError(f"{source}: expected a folder of a model of this family, with its config.json")
    config = ViTWithRegistersConfig.from_pretrained(source)
    kind = getattr(models, (config.architectures or ["ViTWithRegistersModel"])[0])
    tensors = opened.renamed({name: short(name) for name in opened.shapes})
    title = f"vitreg to {to}"
    layout, tensors, config = _choose(to, tensors, config, title)
    tensors, dropped = _without_mask(layout, tensors, config)
    ledger, check = balance_to_source(layout.rules(config), tensors.shapes, title=title)
    check(tensors.read)
    entries = [*ledger.entries, *_extra(to, tensors, config)]
    with quietly():
        ours = kind.from_pretrained(source)
    written = _settings(to, layout, config, kind)
    module = _make_module(written) if to == "timm" else None
    _compare(config, layout, entries, tensors, settings=written, module=module, title=title)

    report_name = f"{output.stem}.{REPORT_FILE}" if to == "dinov2" else REPORT_FILE
    if to == "transformers":
        entries = [dataclasses.replace(entry, name=name_in_file(layout, written, entry.name)) for entry in entries]
    with atomic_folder(output, files=[output.name, report_name] if to == "dinov2" else None) as folder:
        place = folder / output.name if to == "dinov2" else folder
        target = _write(to, place, entries, tensors, written, module)
        reference = _reference(to, target, config, module, settings.code)
        proof = prove(ours, reference, tolerance=settings.tolerance, title=title, is_quiet=settings.is_quiet)
        report = ConversionReport(
            source={
                "path": str(source),
                "layout": "vitreg",
                "checkpoint_key": None,
                "sha256": hash_files(opened.files),
                "num_bytes": opened.num_bytes,
                "licence": None,
                "assumed": {},
            },
            target={"layout": layout.name, "settings": written},
            ledger=describe_ledger(dataclasses.replace(ledger, dropped=ledger.dropped | dropped), title),
            proof=proof,
            command=command or command_line(),
            made_with=made_with(),
        )
        write_report(report, folder / report_name)
    return report


def _choose(
    to: str, tensors: Source, config: ViTWithRegistersConfig, title: str
) -> tuple[Layout, Source, ViTWithRegistersConfig]:
    """The layout, and our tensors with or without slots of the class token, as the layout needs them."""
    is_learned = config.position_embedding_type == "learned"
    if to == "timm":
        if config.has_prefix_positions and config.num_register_tokens:
            return timm.LAYOUT, *_without_slots(tensors, config)
        return timm.LAYOUT, tensors, config
    layout = dinov2.LAYOUT if to == "dinov2" else TRANSFORMERS[_model_type(config, title)]
    if is_learned and config.has_cls_token and not config.has_prefix_positions:
        return layout, *_with_slots(tensors, config)
    return layout, tensors, config


def _model_type(config: ViTWithRegistersConfig, title: str) -> str:
    """The class of transformers that is nearest; whether it fits is found afterwards."""
    if config.position_embedding_type == "rope":
        return "dinov3_vit"
    if config.has_pre_norm:
        return "clip_vision_model"
    if config.layer_scale_init_value is not None:
        return "dinov2_with_registers" if config.num_register_tokens else "dinov2"
    if config.num_register_tokens:
        raise ConversionError(
            f"{title}: no class of transformers has registers (num_register_tokens={config.num_register_tokens}) "
            "without LayerScale (layer_scale_init_value=None)"
        )
    if not config.has_cls_token:
        return "ijepa"
    return "deit" if config.has_distillation_token else "vit"


def _without_slots(tensors: Source, config: ViTWithRegistersConfig) -> tuple[Source, ViTWithRegistersConfig]:
    """Positions of class and distillation token added to the tokens: the sums are the same numbers."""
    slots = {"embeddings.cls_token": 0, "embeddings.distillation_token": 1}
    count = config.num_prefix_positions

    def read(name: str) -> Tensor:
        if name == _TABLE:
            return tensors.read(name)[:, count:]
        if name in slots:
            return tensors.read(name) + tensors.read(_TABLE)[:, slots[name] : slots[name] + 1]
        return tensors.read(name)

    _, rows, width = tensors.shapes[_TABLE]
    shapes = tensors.shapes | {_TABLE: (1, rows - count, width)}
    return dataclasses.replace(tensors, shapes=shapes, read=read), _changed(config, has_prefix_positions=False)


def _with_slots(tensors: Source, config: ViTWithRegistersConfig) -> tuple[Source, ViTWithRegistersConfig]:
    """Slots of zeros for class and distillation token."""
    changed = _changed(config, has_prefix_positions=True)
    count = changed.num_prefix_positions

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        return torch.cat([tensor.new_zeros(1, count, tensor.shape[-1]), tensor], dim=1) if name == _TABLE else tensor

    _, rows, width = tensors.shapes[_TABLE]
    return dataclasses.replace(tensors, shapes=tensors.shapes | {_TABLE: (1, rows + count, width)}, read=read), changed


def _without_mask(layout: Layout, tensors: Source, config) -> tuple[Source, dict[str, str]]:
    """The mask token is left where the layout has none: no inference reads it."""
    name = "embeddings.mask_token"
    if name not in tensors.shapes or any(getattr(rule, "target", None) == name for rule in layout.rules(config)):
        return tensors, {}
    shapes = {other: shape for other, shape in tensors.shapes.items() if other != name}
    return dataclasses.replace(tensors, shapes=shapes), {name: "the layout has no mask token"}


def _changed(config: ViTWithRegistersConfig, **fields) -> ViTWithRegistersConfig:
    return ViTWithRegistersConfig.from_dict({**config.to_dict(), **fields})


def _extra(to: str, tensors: Source, config: ViTWithRegistersConfig) -> list[Entry]:
    """dinov2 loads strictly, with a mask token that no inference reads."""
    if to != "dinov2" or "embeddings.mask_token" in tensors.shapes:
        return []
    return [Entry("mask_token", (), functools.partial(torch.zeros, 1, config.hidden_size))]


def _make_module(settings: dict) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConversionError(
            "a folder of timm is proved by timm, which is not installed: pip install timm"
        ) from error
    return timm.create_model(settings["architecture"], num_classes=settings["num_classes"], **settings["model_args"])


def _compare(config, layout: Layout, entries: list[Entry], tensors: Source, *, settings, module, title: str) -> None:
    """Read back what is written, and name the first field that would be another."""
    by_name = {entry.name: entry for entry in entries}

    def read(name: str) -> Tensor:
        entry = by_name[name]
        return entry.make(*(tensors.read(source) for source in entry.sources))

    info = CheckpointInfo(
        shapes={name: tuple(read(name).shape) for name in by_name},
        read=read,
        file_name=title,
        settings=settings,
        module=module,
        config_overrides={"num_attention_heads": config.num_attention_heads},
    )
    try:
        fields = layout.configure(info)
    except ConversionError as error:  # a tensor by which the layout is read does not exist
        kind = config.position_embedding_type
        raise ConversionError(f"{title}: the layout cannot represent position_embedding_type={kind!r}") from error
    found = ViTWithRegistersConfig(**fields)
    is_classifier = "num_labels" in fields
    if (found.layer_scale_init_value is None) != (config.layer_scale_init_value is None):
        raise ConversionError(
            f"{title}: the layout cannot represent layer_scale_init_value={config.layer_scale_init_value}"
        )
    for name in (*_FIELDS, *(_IN_CLASSIFIERS if is_classifier else ())):
        there, here = getattr(found, name), getattr(config, name)
        if there != here and list(_pair(there)) != list(_pair(here)):
            raise ConversionError(
                f"{title}: the layout cannot represent {name}={here!r}: it would be read as {name}={there!r}"
            )


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _settings(to: str, layout: Layout, config: ViTWithRegistersConfig, kind: type) -> dict:
    """What stands beside the tensors."""
    is_classifier = kind is models.ViTWithRegistersForImageClassification
    if to == "transformers":
        return transformers_settings(layout, config, is_classifier=is_classifier)
    if to == "timm":
        name, arguments = timm_arguments(config, has_prefix_positions=config.has_prefix_positions)
        num_classes = config.num_labels if is_classifier else 0
        return {"architecture": name, "num_classes": num_classes, "model_args": arguments, "pretrained_cfg": {}}
    names = ("num_register_tokens", "interpolate_antialias", "interpolate_offset")
    return {"arguments": {name: getattr(config, name) for name in names}}


def _write(to: str, place: pathlib.Path, entries: list[Entry], tensors: Source, settings: dict, module) -> Source:
    """Write the tensors, with the settings beside them where the layout has a place for them."""
    if to == "dinov2":
        # torch.save wants all tensors at once.
        torch.save({entry.name: make(entry, tensors.read).clone() for entry in entries}, place)
        return open_source(place)
    write_safetensors(place / "model.safetensors", entries, read=tensors.read)
    (place / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return open_source(place)


def _reference(
    to: str, target: Source, config: ViTWithRegistersConfig, module: nn.Module | None, code: pathlib.Path | None
) -> Reference | str:
    """What the others' code makes of what was written."""
    if to == "timm":
        module.load_state_dict({name: target.read(name) for name in target.shapes}, strict=True)
        return Reference(title_of("timm"), functools.partial(run_timm, module), module, timm_positions(config))
    if to == "dinov2" and code is not None:
        return repository_reference("dinov2", code, target, config)
    with quietly():
        return find_reference("dinov2" if to == "dinov2" else "transformers", target, config)


__all__ = ["TARGETS", "export"]

"""Export: from a folder of this family to a file of facebookresearch/dinov2, or a folder of timm or transformers.

The tables of the import are used backwards. To find settings that a layout cannot express, the plan reads the result
back and compares the architectures field by field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import torch
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig
from modeling_vitreg import modeling_vitreg as models

from .layouts import OF_BACKBONES, dinov2, timm
from .layouts.layout import CheckpointInfo, Layout
from .layouts.transformers_files import LAYOUTS as TRANSFORMERS
from .layouts.transformers_files import name_in_file, transformers_settings
from .ledger import Entry, balance_to_source
from .plan import ConversionPlan, ConversionSettings, quietly, short
from .references import find_reference, repository_reference
from .rules import ConversionError, stage
from .sources import Source, open_source
from .timm_models import build, run_timm, sizes_of, timm_arguments, timm_positions
from .verify import Reference, title_of
from .writer import make, write_safetensors


TARGETS = ("dinov2", "timm", "transformers", *(layout.name for layout in OF_BACKBONES.values()))
IN_ONE_FILE = ("dinov2", *TARGETS[3:])
# Fields that have to survive. Rules for resizing positions are not among them: they are arguments of the other code,
# and the report names them.
_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "key_value_heads",
    "has_query_key_norm",
    "attention_gate",
    "has_attention_norm",
    "intermediate_size",
    "has_mlp_norm",
    "hidden_act",
    "norm_type",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "has_cls_token",
    "num_cls_tokens",
    "has_distillation_token",
    "position_embedding_type",
    "has_prefix_positions",
    "rope_style",
    "rope_theta",
    "rope_grid_offset",
    "rope_reference_grid",
    "rope_columns_first",
    "relative_position_bias",
    "has_patch_bias",
    "has_patch_norm",
    "has_pre_norm",
    "has_final_norm",
    "has_query_bias",
    "has_key_bias",
    "has_value_bias",
    "has_mlp_layer_scale",
    "has_pooled_norm",
    "projection_size",
    "token_reduction",
)
# Fields of poolings with parameters of their own, or that no other layout has.
_OF_POOLING = ("pooling", "pooled_cls_tokens", "pooling_num_heads", "pooling_intermediate_size")
_OF_POOLING += ("has_pooling_query", "has_pooling_bias")
_WITH_PARTS = ("attention", "cls_average", "cls_concat", "prr")
_IN_CLASSIFIERS = ("pooling", "num_classifier_layers", "num_labels")
_TABLE = "embeddings.position_embeddings.weight"


def plan_export(source: str | pathlib.Path, to: str, file_name: str, settings: ConversionSettings) -> ConversionPlan:
    """Read a model of this family, choose the layout and balance its ledger.

    Args:
        source: folder of the model.
        to: one of `TARGETS`.
        file_name: name of the file to write, for "dinov2".
        settings: choices of the caller.

    Raises:
        ConversionError: see `pipeline.export`.
    """
    opened = open_source(source)
    if layout := OF_BACKBONES.get((opened.settings or {}).get("model_type")):
        return _plan_backbone(source, opened, layout, to, file_name, settings.code)
    if to not in TARGETS[:3]:
        raise ConversionError(f"{source}: {to} takes its own backbone only: choose one of {', '.join(TARGETS[:3])}")
    if (opened.settings or {}).get("model_type") != "vitreg":
        raise ConversionError(f"{source}: expected a folder of a model of this family, with its config.json")
    with stage(f"{source}: is no valid model of this family", remedy="check it with vitreg doctor FOLDER"):
        config = ViTWithRegistersConfig.from_pretrained(source)
        kind = getattr(models, (config.architectures or ["ViTWithRegistersModel"])[0])
    tensors = opened.renamed({name: short(name) for name in opened.shapes})
    title = f"vitreg to {to}"
    layout, tensors, config = _choose(to, tensors, config, title)
    tensors, dropped = _without_mask(layout, tensors, config)
    ledger, check = balance_to_source(layout.rules(config), tensors.shapes, title=title)
    check(tensors.read)
    ledger = dataclasses.replace(ledger, dropped=ledger.dropped | dropped)
    entries = [*ledger.entries, *_extra(to, layout, tensors, config)]
    written = _settings(to, layout, config, kind)
    module = None
    if to == "timm":
        module = build(written["architecture"], num_classes=written["num_classes"], **written["model_args"])
    _compare(config, layout, entries, tensors, settings=written, module=module, title=title)
    if to == "transformers":
        entries = [dataclasses.replace(entry, name=name_in_file(layout, written, entry.name)) for entry in entries]

    def compare(target: Source) -> tuple:
        with quietly():
            return kind.from_pretrained(source), _reference(to, target, config, module, settings.code)

    return ConversionPlan(
        title=title,
        source={"path": str(source), "layout": "vitreg", "checkpoint_key": None, "licence": None, "assumed": {}},
        target={"layout": layout.name, "settings": written},
        ledger=ledger,
        tensors=tensors,
        files=opened.files,
        hashes={},
        left={},
        write=lambda folder: _write(folder / file_name if to == "dinov2" else folder, entries, tensors, written),
        compare=compare,
    )


def _plan_backbone(source, opened: Source, layout: Layout, to: str, file_name: str, code) -> ConversionPlan:
    """A backbone that is no Vision Transformer, for its own project; the tensors show all of its architecture."""
    if to != layout.name:
        raise ConversionError(f"{source}: {to} has no such backbone: export it with --to {layout.name}")
    with stage(f"{source}: is no valid model of this family", remedy="check it with vitreg doctor FOLDER"):
        config = layout.config_class.from_pretrained(source)
    tensors, title = opened.renamed({name: short(name) for name in opened.shapes}), f"vitreg to {to}"
    ledger, check = balance_to_source(layout.rules(config), tensors.shapes, title=title)
    check(tensors.read)
    entries = [*ledger.entries, *_extra(to, layout, tensors, config)]
    shapes = {entry.name: tuple(make(entry, tensors.read).shape) for entry in entries}
    info = CheckpointInfo(shapes=shapes, read=tensors.read, file_name=title, config_overrides={"image_size": 0})
    with stage(f"{title}: the layout cannot represent this architecture", remedy="it is read from all tensors"):
        fields = layout.configure(info)
    fixed = {"layer_norm_eps": layout.config_class().layer_norm_eps}
    for name, there in (fields | fixed).items():
        if there != getattr(config, name):
            here = getattr(config, name)
            raise ConversionError(
                f"{title}: the layout cannot represent {name}={here!r}: it would be read as {there!r}"
            )

    def write(folder: pathlib.Path) -> Source:
        state = {entry.name: make(entry, tensors.read).clone() for entry in entries}
        torch.save({"model": state}, folder / file_name)
        return open_source(folder / file_name)

    def compare(target: Source) -> tuple:
        if code is None:
            return None, find_reference(layout.name, target, config)
        kind = next(kind for kind in layout.models if kind.__name__ in (config.architectures or [kind.__name__]))
        with quietly():
            return kind.from_pretrained(source), repository_reference(layout.name, code, target, config)

    return ConversionPlan(
        title=title,
        source={"path": str(source), "layout": "vitreg", "checkpoint_key": None, "licence": None, "assumed": {}},
        target={"layout": layout.name, "settings": {}},
        ledger=ledger,
        tensors=tensors,
        files=opened.files,
        hashes={},
        left={},
        write=write,
        compare=compare,
    )


def _choose(
    to: str, tensors: Source, config: ViTWithRegistersConfig, title: str
) -> tuple[Layout, Source, ViTWithRegistersConfig]:
    """The layout, and the tensors with or without positions of the class token, as the layout needs them."""
    is_learned = config.position_embedding_type == "learned"
    if to == "timm":
        if config.has_prefix_positions and config.num_register_tokens:
            return timm.LAYOUT, *_without_slots(tensors, config)
        return timm.LAYOUT, tensors, config
    layout = dinov2.LAYOUT if to == "dinov2" else TRANSFORMERS[_model_type(config, title)]
    has_slots = layout is not TRANSFORMERS["radio"]
    if is_learned and has_slots and config.has_cls_token and not config.has_prefix_positions:
        return layout, *_with_slots(tensors, config)
    return layout, tensors, config


def _model_type(config: ViTWithRegistersConfig, title: str) -> str:
    """The nearest class of transformers; `_compare` finds out whether it fits."""
    signs = {
        "radio": config.num_cls_tokens > 1 and not config.has_final_norm,
        "pixio": config.num_cls_tokens > 1,
        "sapiens2": config.position_embedding_type == "rope" and config.has_query_key_norm,
        "dinov3_vit": config.position_embedding_type == "rope",
        "beit": config.relative_position_bias is not None,
        "aimv2_vision_model": config.has_patch_norm,
        "siglip_vision_model": config.pooling == "attention",
        "tipsv2_vision_model": config.interpolate_mode == "bilinear" and config.num_register_tokens > 0,
    }
    if found := next((name for name, is_so in signs.items() if is_so), None):
        return found
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
    """Positions of class and distillation token added to the tokens, which gives the same sums."""
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
    """Positions of zeros for class and distillation token."""
    changed = _changed(config, has_prefix_positions=True)
    count = changed.num_prefix_positions

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        return torch.cat([tensor.new_zeros(1, count, tensor.shape[-1]), tensor], dim=1) if name == _TABLE else tensor

    _, rows, width = tensors.shapes[_TABLE]
    return dataclasses.replace(tensors, shapes=tensors.shapes | {_TABLE: (1, rows + count, width)}, read=read), changed


def _without_mask(layout: Layout, tensors: Source, config) -> tuple[Source, dict[str, str]]:
    """Leave the mask token out if the layout has none; inference does not read it."""
    name = "embeddings.mask_token"
    if name not in tensors.shapes or any(getattr(rule, "target", None) == name for rule in layout.rules(config)):
        return tensors, {}
    shapes = {other: shape for other, shape in tensors.shapes.items() if other != name}
    return dataclasses.replace(tensors, shapes=shapes), {name: "the layout has no mask token"}


def _changed(config: ViTWithRegistersConfig, **fields) -> ViTWithRegistersConfig:
    return ViTWithRegistersConfig.from_dict({**config.to_dict(), **fields})


def _extra(to: str, layout: Layout, tensors: Source, config: ViTWithRegistersConfig) -> list[Entry]:
    """Tensors of the layout that no tensor of ours becomes."""
    entries = [Entry(name, (), value.clone) for name, value in layout.extras(config).items()]
    # A mask token of zeros for dinov2, which loads strictly; inference does not read it.
    if to != "dinov2" or "embeddings.mask_token" in tensors.shapes:
        return entries
    return [*entries, Entry("mask_token", (), functools.partial(torch.zeros, 1, config.hidden_size))]


def _compare(config, layout: Layout, entries: list[Entry], tensors: Source, *, settings, module, title: str) -> None:
    """Read back what would be written, and name the first field that would differ."""
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
    of_pooling = _OF_POOLING if {config.pooling, found.pooling} & set(_WITH_PARTS) else ()
    for name in (*_FIELDS, *of_pooling, *(_IN_CLASSIFIERS if is_classifier else ())):
        there, here = getattr(found, name), getattr(config, name)
        if there != here and list(_pair(there)) != list(_pair(here)):
            raise ConversionError(
                f"{title}: the layout cannot represent {name}={here!r}: it would be read as {name}={there!r}"
            )


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _settings(to: str, layout: Layout, config: ViTWithRegistersConfig, kind: type) -> dict:
    """Settings to write beside the tensors."""
    is_classifier = kind is models.ViTWithRegistersForImageClassification
    if to == "transformers":
        return transformers_settings(layout, config, is_classifier=is_classifier)
    if to == "timm":
        name, arguments = timm_arguments(config, has_prefix_positions=config.has_prefix_positions)
        num_classes = config.num_labels if is_classifier else 0
        return {"architecture": name, "num_classes": num_classes, "model_args": arguments, "pretrained_cfg": {}}
    names = ("num_register_tokens", "interpolate_antialias", "interpolate_offset")
    return {"arguments": {name: getattr(config, name) for name in names}}


def _write(place: pathlib.Path, entries: list[Entry], tensors: Source, settings: dict) -> Source:
    """Write the tensors, and beside them the settings where the layout has a place for them."""
    if not place.is_dir():  # torch.save needs all tensors at once
        torch.save({entry.name: make(entry, tensors.read).clone() for entry in entries}, place)
        return open_source(place)
    write_safetensors(place / "model.safetensors", entries, read=tensors.read)
    (place / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return open_source(place)


def _reference(
    to: str, target: Source, config: ViTWithRegistersConfig, module: nn.Module | None, code: pathlib.Path | None
) -> Reference | str:
    """The original code with the weights that were written."""
    if to == "timm":
        module.load_state_dict({name: target.read(name) for name in target.shapes}, strict=True)
        positions, sizes = timm_positions(config), sizes_of(module)
        return Reference(title_of("timm"), functools.partial(run_timm, module), module, positions, sizes=sizes)
    if to == "dinov2" and code is not None:
        return repository_reference("dinov2", code, target, config)
    return find_reference("dinov2" if to == "dinov2" else "transformers", target, config)

"""A checkpoint to a folder that `from_pretrained` loads: open, infer, balance, write, prove, and only then rename.

The folder holds `config.json`, `model.safetensors`, `preprocessor_config.json`, the code of the family, and
`conversion.json`, a `ConversionReport`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
    ViTWithRegistersPreTrainedModel,
)
from modeling_vitreg.files import atomic_folder
from modeling_vitreg.reports import ConversionReport, command_line, made_with, write_report

from .layouts import describe_checkpoint, recognise
from .layouts.dinov2 import configure_head
from .layouts.layout import CheckpointInfo, Layout
from .references import find_reference
from .repositories import repository_reference
from .rules import ConversionError, Drop, Join, Ledger, Rename, Rule, balance_to_target, matches
from .sources import Source, hash_files, open_source
from .verify import TOLERANCE, Reference, check_errors, verify
from .writer import check_finite, write_safetensors


REPORT_FILE = "conversion.json"
_HEADS = {
    "classification": ViTWithRegistersForImageClassification,
    "segmentation": ViTWithRegistersForSemanticSegmentation,
    "depth": ViTWithRegistersForDepthEstimation,
}
# What a class with a head does not own.
_NOT_IN_HEADS = ("embeddings.mask_token", "projection.weight")


@dataclasses.dataclass(frozen=True)
class ConversionSettings:
    """What a caller may know better.

    Args:
        family: name of the layout; None infers it.
        checkpoint_key: word under which the tensors stand in the file; None takes the usual ones.
        head: file with a linear head of DINOv2 for this backbone.
        config_overrides: fields of the configuration that nothing shows.
        code: clone of the original repository to compare with; None uses installed libraries.
        tolerance: largest relative error.
        skip_verification: compare with nothing, for models that do not fit into memory twice; the record says so.
        is_quiet: show no progress.
    """

    family: str | None = None
    checkpoint_key: str | None = None
    head: pathlib.Path | None = None
    config_overrides: dict = dataclasses.field(default_factory=dict)
    code: pathlib.Path | None = None
    tolerance: float = TOLERANCE
    skip_verification: bool = False
    is_quiet: bool = False


def convert(
    source: str | pathlib.Path | nn.Module,
    output: str | pathlib.Path,
    *,
    settings: ConversionSettings | None = None,
    command: str | None = None,
) -> ConversionReport:
    """Convert a checkpoint and prove it.

    Args:
        source: file, folder, "timm:NAME", or a model of timm.
        output: folder to make; it must not exist, or be empty.
        settings: what the caller knows better.
        command: for the record; default that of the process.

    Returns:
        What lies in `conversion.json`.

    Raises:
        ConversionError: the source is not what it claims to be, the ledger does not balance, or the proof failed; then
            nothing was saved.
    """
    settings = settings or ConversionSettings()
    output = pathlib.Path(output)
    check_output(output)
    opened, module = _open(source, settings)
    layout = recognise(opened, family=settings.family, module=module)
    info = describe_checkpoint(opened, layout, module=module, config_overrides=settings.config_overrides)
    kind, config, rules, extra = _decide(layout, info, settings)
    model = make_empty(kind, config)
    title = f"{layout.title} to vitreg"
    original = opened.renamed(layout.canonical(list(opened.shapes)))
    tensors = original if extra is None else _beside(original, extra)
    targets = {short(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ledger = balance_to_target(rules, tensors.shapes, targets, title=title)
    _check_dropped(rules, tensors, ledger)
    _check_room(output, tensors.num_bytes)
    digest = hash_files(opened.files, known=layout.hashes) if opened.files else None

    with atomic_folder(output) as folder:
        _write(folder, model, ledger, tensors, _processor(layout, info, config), title, settings.is_quiet)
        proof = _prove(kind, folder, layout, original, module, settings, title)
        report = ConversionReport(
            source={
                "path": str(source) if isinstance(source, (str, pathlib.Path)) else type(source).__name__,
                "layout": layout.name,
                "checkpoint_key": opened.checkpoint_key,
                "sha256": digest,
                "num_bytes": opened.num_bytes,
                "licence": layout.licence,
                "assumed": _assumed(info, config),
            },
            target={
                "layout": "vitreg",
                "class": kind.__name__,
                "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            },
            ledger=describe_ledger(ledger, title, left=opened.left),
            proof=proof,
            command=command or command_line(),
            made_with=made_with(),
        )
        write_report(report, folder / REPORT_FILE)
    return report


def _assumed(info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    """Fields that no tensor shows, taken from what is usual in the family: a reference built with them shares them."""
    if info.settings is not None or info.module is not None:
        return {}
    names = ("num_attention_heads", "layer_norm_eps", "hidden_act", "interpolate_antialias", "interpolate_offset")
    return {name: getattr(config, name) for name in names if name not in info.config_overrides}


def describe_ledger(ledger: Ledger, title: str, *, left: dict[str, str] | None = None) -> dict:
    """The ledger as a report holds it."""
    return {
        "coverage": ledger.coverage(title),
        "num_used": ledger.num_used,
        "num_written": len(ledger.entries),
        "dropped": ledger.dropped,
        "filled": ledger.filled,
        "left": left or {},
    }


def check_output(output: pathlib.Path) -> None:
    """Refuse to write where something lies.

    Raises:
        ConversionError: it does.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConversionError(f"{output}: exists and is not empty: name another place, or remove it")


def make_empty(
    kind: type[ViTWithRegistersPreTrainedModel], config: ViTWithRegistersConfig
) -> ViTWithRegistersPreTrainedModel:
    """A model of shapes without values."""
    with torch.device("meta"):
        return kind(config)


def short(name: str) -> str:
    """The name of a tensor in the base model, whatever the class with a head puts in front."""
    return name.removeprefix("vitreg.")


def _open(source: str | pathlib.Path | nn.Module, settings: ConversionSettings) -> tuple[Source, nn.Module | None]:
    is_module = isinstance(source, nn.Module)
    if is_module or str(source).startswith(("timm:", "hf-hub:")):
        module = source if is_module else _make_timm(str(source))
        return _of_module(module, str(type(module).__name__ if is_module else source)), module
    opened = open_source(source, checkpoint_key=settings.checkpoint_key)
    name = (opened.settings or {}).get("architecture")
    if name is None:
        return opened, None
    options = opened.settings.get("model_args") or {}
    count = {"num_classes": opened.settings["num_classes"]} if "num_classes" in opened.settings else {}
    module = _import_timm().create_model(name, pretrained=False, **{**count, **options})
    module.load_state_dict({key: opened.read(key) for key in opened.shapes}, strict=True)
    return opened, module


def _make_timm(name: str) -> nn.Module:
    name = name.removeprefix("timm:")
    try:
        return _import_timm().create_model(name, pretrained=True)
    except RuntimeError as error:
        raise ConversionError(f"timm: {error}: list names with timm.list_models('vit*', pretrained=True)") from error


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ConversionError("the source is a model of timm, which is not installed: pip install timm") from error
    return timm


def _of_module(module: nn.Module, title: str) -> Source:
    state = module.state_dict()
    return Source(
        path=pathlib.Path(title),
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        read=lambda name: state[name].detach().cpu(),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        files=[],
    )


def _decide(layout: Layout, info: CheckpointInfo, settings: ConversionSettings) -> tuple:
    """Class, configuration and rules; and the open head, if there is one."""
    fields, head = layout.configure(info), None
    kind = ViTWithRegistersForImageClassification if "num_labels" in fields else ViTWithRegistersModel
    fields |= settings.config_overrides
    extra_rules: list[Rule] = []
    if settings.head is not None:
        if layout.name != "dinov2":
            raise ConversionError(
                f"--head holds a linear head of facebookresearch/dinov2, the backbone is {layout.name}"
            )
        head = open_source(settings.head)
        shapes = {_head_name(name): shape for name, shape in head.shapes.items()}
        word, more, extra_rules = configure_head(shapes, ViTWithRegistersConfig(**fields), title=str(settings.head))
        kind, fields = _HEADS[word], {**fields, **more}
        head = head.renamed({name: _head_name(name) for name in head.shapes})
    if kind is not ViTWithRegistersModel:
        fields["has_mask_token"] = False
    try:
        config = ViTWithRegistersConfig(**fields, architectures=[kind.__name__])
    except (ValueError, TypeError) as error:
        raise ConversionError(
            f"{info.file_name}: read as {layout.name}, its architecture makes no sense: {error}"
        ) from error
    rules = [*layout.rules(config), *extra_rules]
    if kind is not ViTWithRegistersModel:
        rules = [_without(rule) for rule in rules]
    return kind, config, rules, head


def _head_name(name: str) -> str:
    """A head as it stands alone, whatever wrapped it."""
    return (
        name.removeprefix("module.").removeprefix("linear_head.").replace("decode_head.bn.module.", "decode_head.bn.")
    )


def _without(rule: Rule) -> Rule:
    if isinstance(rule, (Rename, Join)) and rule.target in _NOT_IN_HEADS and isinstance(rule.source, str):
        return Drop(rule.source, why="a model with a head does not have it")
    return rule


def _beside(tensors: Source, head: Source) -> Source:
    return dataclasses.replace(
        tensors,
        shapes=tensors.shapes | head.shapes,
        read=lambda name: head.read(name) if name in head.shapes else tensors.read(name),
        num_bytes=tensors.num_bytes + head.num_bytes,
    )


def _check_dropped(rules: list[Rule], tensors: Source, ledger: Ledger) -> None:
    """Tensors that are computed from the configuration must be what is computed."""
    valued = [rule for rule in rules if isinstance(rule, Drop) and rule.value is not None]
    for name in ledger.dropped:
        for rule in valued:
            if matches(rule, name):
                found, expected = tensors.read(name).float(), rule.value(name)
                check_finite(name, found)
                if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    raise ConversionError(
                        f"{name} is {rule.why}, but differs from what that gives: this architecture cannot be "
                        "represented"
                    )


def _check_room(output: pathlib.Path, num_bytes: int) -> None:
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.05 * num_bytes:
        raise ConversionError(f"{output}: needs {num_bytes:,} bytes, the disk has {free:,} left: name another place")


def _processor(layout: Layout, info: CheckpointInfo, config: ViTWithRegistersConfig) -> dict:
    """How images are prepared: as the source's own settings say, else as the family does."""
    if info.processor is None:
        return layout.prepare(info, config)
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    known = {name: value for name, value in info.processor.items() if name in (*names, "image_mean", "image_std")}
    return {"do_center_crop": False, **known}  # processors that never cut do not say so


def _write(folder, model, ledger, tensors, processor, title, is_quiet) -> None:
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


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and reports of transformers, beside which ours would tell nothing."""
    was_on, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if was_on:
            transformers_logging.enable_progress_bar()


def _prove(kind, folder, layout: Layout, tensors: Source, module, settings: ConversionSettings, title: str) -> dict:
    """Load what was written, and compare it."""
    if settings.skip_verification:
        return {"is_verified": False, "why": "it was asked to skip the proof"}
    with quietly():
        model = kind.from_pretrained(folder)
    if settings.code is not None:
        reference: Reference | str = repository_reference(layout.name, settings.code, tensors, model.config)
    else:
        with quietly():
            reference = find_reference(layout.name, tensors, model.config, module)
    proof = prove(model, reference, tolerance=settings.tolerance, title=title, is_quiet=settings.is_quiet)
    if settings.head is not None and proof["is_verified"]:
        proof["notes"].append("the tokens were compared, not what the head makes of them")
    return proof


def prove(model, reference: Reference | str, *, tolerance: float, title: str, is_quiet: bool = False) -> dict:
    """Compare with a reference, if there is one.

    Args:
        model: ours.
        reference: to compare with, or in words why there is none.
        tolerance: largest relative error.
        title: of the conversion, for messages.
        is_quiet: show no progress.

    Returns:
        As `ConversionReport.proof`.

    Raises:
        ConversionError: an error is above the tolerance.
    """
    if isinstance(reference, str):
        return {"is_verified": False, "why": reference}
    found = verify(model, reference, is_quiet=is_quiet)
    check_errors(found, tolerance=tolerance, title=title)
    notes = []
    if reference.positions:
        words = ", ".join(f"{name}={value}" for name, value in reference.positions.items())
        notes.append(
            f"positions were resized by the rule of the reference ({words}) on both sides, not by the family's"
        )
    if len(found["sizes"]) == 1:
        notes.append("the reference takes images of one size")
    return {"is_verified": True, **found, "tolerance": tolerance, "notes": notes}


__all__ = [
    "REPORT_FILE",
    "ConversionSettings",
    "check_output",
    "convert",
    "describe_ledger",
    "make_empty",
    "prove",
    "quietly",
    "short",
]

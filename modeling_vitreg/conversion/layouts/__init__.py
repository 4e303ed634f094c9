"""All layouts, and the recognition of the layout of a checkpoint."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from ..rules import ConversionError
from ..sources import Source
from . import capi, clip, deit, dino, dinov2, dinov3, hat_net, mae, mamba_reg, timm
from .layout import CheckpointInfo, Layout
from .transformers_files import LAYOUTS as BY_MODEL_TYPE


BY_NAMES = (
    dinov2.LAYOUT,
    dinov3.LAYOUT,
    capi.LAYOUT,
    clip.LAYOUT,
    mae.LAYOUT,
    deit.LAYOUT,
    timm.LAYOUT,
    dino.LAYOUT,
    mamba_reg.LAYOUT,
    hat_net.LAYOUT,
)
# Backbones that are no Vision Transformers, which only their own project can load.
OF_BACKBONES = {layout.config_class.model_type: layout for layout in (mamba_reg.LAYOUT, hat_net.LAYOUT)}
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*BY_NAMES, *BY_MODEL_TYPE.values())}
# Settings of models of transformers, and the parts that they stand for, which no plain Vision Transformer has.
_IN_THE_WAY = {
    "vocab_size": "tokens of text",
    "depths": "several grids",
    "window_size": "attention on windows",
    "tubelet_size": "patches of several frames",
    "num_detection_tokens": "tokens for detection",
    "num_patches": "patches without a fixed image size",
}
_ENOUGH = 0.75  # share of names that a layout has to know


def recognise(source: Source, *, family: str | None = None, module=None) -> Layout:
    """The layout of a checkpoint, from what the caller says, its `config.json`, or the names of its tensors.

    A choice between layouts that know the same names is a guess, and becomes one of the notes of the source.

    Args:
        source: the checkpoint.
        family: name of the layout, if the caller knows it.
        module: the model itself, if it was given as one.

    Raises:
        ConversionError: there is no such family, or none fits; the message has the nearest.
    """
    for step in (_by_family, _by_config, _by_names):
        if (layout := step(source, family, module)) is not None:
            return layout
    raise ConversionError(_unknown(source))


def inner_model(source: Source, *, family: str | None = None) -> Source:
    """The tensors of a Vision Transformer inside a larger module, such as `model.` in a checkpoint of Lightning.

    Raises:
        ConversionError: there are several of them.
    """
    layouts = [LAYOUTS[family]] if family in LAYOUTS else BY_NAMES
    if source.settings is not None or _best_share(layouts, source.shapes) >= _ENOUGH:
        return source
    members = collections.defaultdict(list)
    for name in source.shapes:
        parts = name.split(".")
        for count in range(1, min(len(parts), 4)):
            members[".".join(parts[:count]) + "."].append(name)
    shares = {
        prefix: _best_share(layouts, [name.removeprefix(prefix) for name in names])
        for prefix, names in members.items()
        if len(names) >= 8
    }
    found: list[str] = []
    for prefix in sorted(shares, key=lambda prefix: (shares[prefix], len(prefix)), reverse=True):
        if shares[prefix] >= _ENOUGH and not any(prefix.startswith(one) or one.startswith(prefix) for one in found):
            found.append(prefix)
    if len(found) > 1:
        names = ", ".join(prefix.removesuffix(".") for prefix in found)
        raise ConversionError(f"{source.path}: holds several models ({names}): choose one with --checkpoint-key")
    if not found:
        return source
    inside = {name: name.removeprefix(found[0]) for name in members[found[0]]}
    outside = {name: f"outside of {found[0]!r}" for name in source.shapes if name not in inside}
    note = f"took the model under {found[0]!r}" + (
        f", and ignored {len(outside)} tensors outside it" if outside else ""
    )
    return dataclasses.replace(source.renamed(inside), left=source.left | outside, notes=[*source.notes, note])


def describe_checkpoint(
    source: Source, layout: Layout, *, module=None, config_overrides: dict | None = None
) -> CheckpointInfo:
    """Facts about a source, with its tensors under the names of a layout."""
    renamed = source.renamed(layout.canonical(list(source.shapes)))
    return CheckpointInfo(
        shapes=renamed.shapes,
        read=renamed.read,
        file_name=source.path.name,
        checkpoint_key=source.checkpoint_key,
        settings=source.settings,
        processor=source.processor,
        module=module,
        config_overrides=dict(config_overrides or {}),
    )


def _by_family(source: Source, family: str | None, module) -> Layout | None:
    if family is not None and family not in LAYOUTS:
        raise ConversionError(f"expected a family out of {', '.join(LAYOUTS)}, got {family!r}")
    return LAYOUTS.get(family)


def _by_config(source: Source, family: str | None, module) -> Layout | None:
    settings = source.settings or {}
    model_type = settings.get("model_type")
    if str(model_type).startswith("vitreg"):
        raise ConversionError(
            f"{source.path}: is a model of this family already, which from_pretrained loads, also with other settings "
            "such as token_reduction={'kind': 'merge', 'per_layer': 13}. To export it, add --to dinov2, timm or "
            "transformers, or the project that the backbone comes from, such as mamba-reg"
        )
    if model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model_type]
    if model_type is not None and "architecture" not in settings:
        known = ", ".join(BY_MODEL_TYPE)
        raise ConversionError(
            f"{source.path}: model type {model_type!r:.60} cannot be represented{_say_why(settings)}: expected one of "
            f"{known}"
        )
    return timm.LAYOUT if module is not None or "architecture" in settings else None


def _say_why(settings: dict) -> str:
    """The part that is in the way, if a setting of a model of transformers shows it."""
    vision = settings.get("vision_config")
    settings = vision if isinstance(vision, dict) else settings
    found = next((name for name in _IN_THE_WAY if settings.get(name) not in (None, 0, False)), None)
    return f", because it has {_IN_THE_WAY[found]} ({found}={settings[found]!r:.60})" if found else ""


def _by_names(source: Source, family: str | None, module) -> Layout | None:
    shares = {layout.name: layout.share(list(source.shapes)) for layout in BY_NAMES}
    best = max(shares.values())
    if best < _ENOUGH:
        return None
    candidates = [layout for layout in BY_NAMES if shares[layout.name] > best - 0.02]
    choice = _choose(source, candidates, shares)
    equal = [layout.name for layout in candidates if shares[layout.name] == best and layout is not choice]
    if equal and shares[choice.name] == best:
        source.notes.append(
            f"the family {choice.name} is a guess: the names of the tensors fit {', '.join(equal)} as well "
            "(--family chooses another)"
        )
    return choice


def _choose(source: Source, candidates: list[Layout], shares: dict[str, float]) -> Layout:
    """One of the layouts that know the names; the first rule that applies decides."""
    hinted = [layout for layout in candidates if layout.is_hinted(describe_checkpoint(source, layout))]
    has_head = any("head" in name for name in source.shapes)
    is_plain = source.checkpoint_key is None and source.files[0].suffix == ".safetensors"
    preferences = (
        (is_plain, timm.LAYOUT),  # no official repository writes this format
        (True, hinted[0] if hinted else None),
        (not has_head, dino.LAYOUT),
        (True, timm.LAYOUT),  # most of those who train classifiers
    )
    for applies, layout in preferences:
        if applies and layout in candidates:
            return layout
    return max(candidates, key=lambda layout: shares[layout.name])


def _best_share(layouts: Iterable[Layout], names: Iterable[str]) -> float:
    return max(layout.share(list(names)) for layout in layouts)


def _unknown(source: Source) -> str:
    shares = {layout.name: layout.share(list(source.shapes)) for layout in BY_NAMES}
    nearest = max(shares, key=shares.get)
    known = f"the nearest is {nearest}, which has {shares[nearest]:.0%} of its names"
    shown = ", ".join(list(source.shapes)[:6])
    return (
        f"{source.path}: no family fits; {known if shares[nearest] else 'none is near'}. Its tensors are {shown}, ... "
        f"Families: {', '.join(LAYOUTS)}; name one with --family if it is one of them"
    )


__all__ = ["BY_NAMES", "LAYOUTS", "OF_BACKBONES", "describe_checkpoint", "inner_model", "recognise"]

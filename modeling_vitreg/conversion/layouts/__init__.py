"""All layouts, and which of them a checkpoint is."""

from __future__ import annotations

from ..rules import ConversionError
from ..sources import Source
from . import capi, clip, deit, dino, dinov2, dinov3, mae, timm, transformers
from .layout import CheckpointInfo, Layout


# Of layouts that share names, the first that is hinted at, else the first.
BY_NAMES = (
    dinov2.LAYOUT,
    dinov3.LAYOUT,
    capi.LAYOUT,
    clip.LAYOUT,
    mae.LAYOUT,
    deit.LAYOUT,
    timm.LAYOUT,
    dino.LAYOUT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*BY_NAMES, *transformers.LAYOUTS.values())}


def recognise(source: Source, *, family: str | None = None, module=None) -> Layout:
    """The layout of a checkpoint, from its `config.json` or from its names.

    Args:
        source: the checkpoint.
        family: its name, where the caller knows.
        module: the model itself, where it was given as one.

    Raises:
        ConversionError: there is no such family, or none fits; the message has the nearest.
    """
    if family is not None:
        if family not in LAYOUTS:
            raise ConversionError(f"expected a family out of {', '.join(LAYOUTS)}, got {family!r}")
        return LAYOUTS[family]
    model_type = (source.settings or {}).get("model_type")
    if model_type == "vitreg":
        raise ConversionError(
            f"{source.path}: is a model of this family already: from_pretrained loads it; to write it in another "
            "layout add --to dinov2, timm or transformers"
        )
    if model_type in transformers.LAYOUTS:
        return transformers.LAYOUTS[model_type]
    if model_type is not None and "architecture" not in source.settings:
        known = ", ".join(transformers.LAYOUTS)
        raise ConversionError(
            f"{source.path}: model type {model_type!r} cannot be represented: expected one of {known}"
        )
    if module is not None or "architecture" in (source.settings or {}):
        return timm.LAYOUT
    shares = {layout.name: layout.share(list(source.shapes)) for layout in BY_NAMES}
    best = max(shares.values())
    if best < 0.75:
        raise ConversionError(_unknown(source, shares))
    candidates = [layout for layout in BY_NAMES if shares[layout.name] > best - 0.02]
    hinted = [layout for layout in candidates if layout.is_hinted(describe_checkpoint(source, layout))]
    is_plain = source.checkpoint_key is None and source.files[0].suffix == ".safetensors"
    if timm.LAYOUT in candidates and is_plain:  # no official repository writes this format
        return timm.LAYOUT
    if not hinted and dino.LAYOUT in candidates and not any("head" in name for name in source.shapes):
        return dino.LAYOUT
    return (hinted or [layout for layout in candidates if shares[layout.name] == best])[0]


def describe_checkpoint(
    source: Source, layout: Layout, *, module=None, config_overrides: dict | None = None
) -> CheckpointInfo:
    """What a source shows, under the names of a layout."""
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


def _unknown(source: Source, shares: dict[str, float]) -> str:
    nearest = max(shares, key=shares.get)
    known = (
        f"the nearest is {nearest}, which knows {shares[nearest]:.0%} of its names"
        if shares[nearest]
        else "none is near"
    )
    shown = ", ".join(list(source.shapes)[:6])
    return (
        f"{source.path}: no family fits; {known}. Its tensors are {shown}, ... "
        f"Families: {', '.join(LAYOUTS)}; name one with --family if it is one of them"
    )


__all__ = ["BY_NAMES", "LAYOUTS", "describe_checkpoint", "recognise"]

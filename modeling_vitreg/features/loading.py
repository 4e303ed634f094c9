"""From a folder, a name or a module to an `Encoder`, with the statistics that its images are normalised by."""

from __future__ import annotations

import json
import os

import torch
from torch import nn
from transformers import AutoModel
from transformers.utils import cached_file

from .encoder import Encoder
from .families import find_tower, follow


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_encoder(
    source: str | os.PathLike | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Encoder:
    """Open a model for looking at it.

    Args:
        source: a module of a supported family; a folder or a name on the Hub that `AutoModel` opens; or "timm/NAME" or
            "timm:NAME", which timm creates with its pretrained weights. A folder that exists goes first.
        device: where to put it; None: where it is, or the CPU. A module that was given is itself moved.
        dtype: of its weights; None: as they are, or as they were saved.
        trust_remote_code: run code that lies beside the weights. Folders of this package do not need it.
        name: for reports; None: the source, or the class of a module.

    Raises:
        ValueError: a model that is not supported; the message lists those that are.
        RuntimeError: the source could not be opened.
    """
    statistics = None
    if isinstance(source, nn.Module):
        model = source
        name = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    else:
        source = os.fspath(source)
        is_timm = source.startswith(("timm/", "timm:")) and not os.path.isdir(source)
        model = _open_timm(source[len("timm/") :]) if is_timm else _open(source, trust_remote_code)
        statistics = None if is_timm else _saved_statistics(source)
        name = name or source
    if device is not None or dtype is not None:
        model = model.to(device=device, dtype=dtype)
    return Encoder(model, name=name, statistics=statistics or _own_statistics(model))


def _open(source: str, trust_remote_code: bool) -> nn.Module:
    try:
        return AutoModel.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # a path that is no folder is an impossible name to some versions
        raise RuntimeError(
            f"expected a folder of a model, a name on the Hub or timm/NAME, and could not open {source!r}: {error}"
        ) from error


def _open_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError("models of timm need the package timm: pip install timm") from error
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # from unknown names to the network, timm raises a class of its own for each
        raise RuntimeError(f"timm could not create {name!r}: {error}") from error


def _saved_statistics(source: str, **options: object) -> tuple | None:
    """Mean and standard deviation that were saved beside a model, None where they were not."""
    try:
        with open(cached_file(source, "preprocessor_config.json", **options)) as file:
            settings = json.load(file)
        return settings["image_mean"], settings["image_std"]
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _own_statistics(model: nn.Module) -> tuple:
    """Mean and standard deviation that belong to a module."""
    _, tower = find_tower(model)
    if hasattr(tower, "image_processor_settings"):
        settings = tower.image_processor_settings()
        return settings["image_mean"], settings["image_std"]
    timm_settings = getattr(tower, "pretrained_cfg", None)
    if timm_settings and timm_settings.get("mean"):
        return timm_settings["mean"], timm_settings["std"]
    source = follow(model, "config._name_or_path")
    saved = _saved_statistics(source, local_files_only=True) if source else None
    return saved or (IMAGENET_MEAN, IMAGENET_STD)


__all__ = ["load_encoder"]

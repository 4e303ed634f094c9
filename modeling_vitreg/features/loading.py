"""Load a folder, a name or a module as an `Encoder`, with the mean and standard deviation of its images."""

from __future__ import annotations

import os
import pathlib
import re

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from modeling_vitreg.modeling_vitreg import IMAGENET_MEAN, IMAGENET_STD, PROCESSOR_FILE, read_image_processor
from modeling_vitreg.names import list_first, split_reduction
from modeling_vitreg.network import is_hub_known

from .encoder import Encoder
from .families import follow
from .folders import check_weights, conversion_command, is_hub_name, read_json
from .parts import count_channels, find_patches, open_tower, read_parts


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NO_MERGING = (
    "{name}: merging needs a ViT of this package, got a model {kind}: leave out @merge, or convert a ViT of another "
    "library with vitreg convert"
)
# Parts of a tower that no feature depends on.
_UNUSED = re.compile(r"pooler|mask_token|decoder|classifier|(^|\.)head\.|projection")


def load_encoder(
    source: str | os.PathLike | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    parts: dict[str, str] | str | None = None,
) -> Encoder:
    """Open a model to extract its features.

    Args:
        source: a module of a supported family; a folder or a name on the Hub that `AutoModel` opens; or "timm/NAME" or
            "timm:NAME", which timm creates with its pretrained weights. An existing folder takes precedence.
            "@merge=13" behind the name of a model of this package sets its `token_reduction`.
        device: device of the weights; None leaves a module where it is, and loads onto the CPU.
        dtype: type of the weights; None keeps it.
        trust_remote_code: run the code in the folder of the weights. Folders of this package do not need it.
        name: name in reports; None takes the source, or the class of a module.
        parts: where the parts of an unknown model lie, as a text such as "blocks=encoder.blocks,cls=cls_token" or the
            same as a dictionary; see `parts.NAMES`.

    Raises:
        ValueError: the model cannot be measured (the message proposes its parts), its files lack tensors or hold
            integers, or the settings beside it are wrong.
        RuntimeError: the source could not be opened.
    """
    statistics = None
    parts = parts if isinstance(parts, dict) else read_parts(parts)
    if isinstance(source, nn.Module):
        model = source
        name = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    else:
        name, (source, reduction) = name or os.fspath(source), split_reduction(os.fspath(source))
        is_timm = source.startswith(("timm/", "timm:")) and not os.path.isdir(source)
        if is_timm and reduction:
            raise ValueError(_NO_MERGING.format(name=name, kind="of timm"))
        model = _open_timm(source[len("timm/") :]) if is_timm else _open(source, trust_remote_code, parts, reduction)
        statistics = None if is_timm else _saved_statistics(source, model, parts)
    if device is not None or dtype is not None:
        model = model.to(device=device, dtype=dtype)
    return Encoder(model, name=name, statistics=statistics or _own_statistics(model, parts), parts=parts)


def _open(source: str, trust_remote_code: bool, parts: dict, reduction: dict | None = None) -> nn.Module:
    if os.path.isfile(source):
        raise RuntimeError(f"could not open {source!r} as a model: {conversion_command(source)}")
    if not os.path.isdir(source) and not is_hub_name(source):
        raise RuntimeError(f"could not open {source!r}: no such folder, and not OWNER/NAME on the Hub or timm/NAME")
    if not (os.path.isdir(source) or is_hub_known() or try_to_load_from_cache(source, "config.json")):
        raise RuntimeError(f"could not open {source!r}: no such folder, and the Hub cannot be reached from here")
    if os.path.isdir(source):
        folder = pathlib.Path(source)
        check_weights(folder, read_json(folder / "config.json"))
    fields = {}
    if reduction:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if config.model_type != "vitreg":
            raise ValueError(_NO_MERGING.format(name=source, kind=f"of type {config.model_type}"))
        if (config.token_reduction or reduction)["kind"] != "merge":
            raise ValueError(f"{source}: patches cannot be merged in a model with learned tokens: leave out @merge")
        fields = {"token_reduction": reduction}
    model, missing = _load(AutoModel, source, trust_remote_code=trust_remote_code, **fields)
    _, tower, _ = open_tower(model, parts)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is tower)
    lacking = [name for name in missing if name.startswith(prefix) and not _UNUSED.search(name)]
    _check_whole(tower, lacking, source, unused=_UNUSED)
    return model


def load_whole(kind: type, folder: str | os.PathLike, **options: object) -> nn.Module:
    """A folder as a model of a class of transformers, with its head; options are those of `from_pretrained`.

    Raises:
        ValueError, RuntimeError: see `load_encoder`.
    """
    model, missing = _load(kind, os.fspath(folder), **options)
    _check_whole(model, missing, os.fspath(folder))
    return model


def _load(kind: type, source: str, **options: object) -> tuple[nn.Module, list[str]]:
    """A model, and the names of tensors that its files lack."""
    try:
        model, report = kind.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # on files of others, transformers raises errors of a dozen classes
        text = " ".join(str(error).split())[:600]
        if "trust_remote_code=True" in text and not options.get("trust_remote_code"):
            raise RuntimeError(
                f"{source!r} contains its own code: read it, then run it with --trust-remote-code (in Python: "
                "trust_remote_code=True)"
            ) from error
        raise RuntimeError(f"could not open {source!r} as a model: {type(error).__name__}: {text}") from error
    return model, sorted(report["missing_keys"])


def _check_whole(model: nn.Module, lacking: list[str], source: str, *, unused: re.Pattern | None = None) -> None:
    """Refuse a model whose weights were partly filled at random, or are not finite.

    Raises:
        ValueError: the message lists the tensors.
    """
    if lacking:
        raise ValueError(
            f"{source}: {len(lacking)} tensors are missing and would be random: {list_first(lacking, 8)}: download "
            "the model again, or convert its checkpoint with vitreg convert"
        )
    weights = {name: weight for name, weight in model.named_parameters() if weight.dtype in _DTYPES}
    used = {name: weight for name, weight in weights.items() if not (unused and unused.search(name))}
    broken = [name for name, weight in used.items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"{source}: values that are not finite in {len(broken)} tensors: {', '.join(broken[:8])}: the file is "
            "damaged, or its training diverged; take an earlier state"
        )


def _open_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError("models of timm need the package timm: pip install timm") from error
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # from unknown names to the network, timm raises a class of its own for each
        raise RuntimeError(f"timm could not create {name!r}: {error}") from error


def _saved_statistics(source: str, model: nn.Module, parts: dict, **options: object) -> tuple | None:
    """Mean and standard deviation that were saved beside a model; None if they were not.

    Raises:
        ValueError: they are not finite numbers, one or one for each channel.
    """
    try:
        path = cached_file(source, PROCESSOR_FILE, **options)
    except (OSError, ValueError):
        return None
    read_json(path)
    _, tower, _ = open_tower(model, parts)
    num_channels = count_channels(tower, find_patches(tower, parts))
    settings = read_image_processor(path, num_channels=num_channels)
    found = [settings.get(name) for name in ("image_mean", "image_std")]
    if None in found:
        return None
    return tuple(value if isinstance(value, list) else [value] * num_channels for value in found)


def _own_statistics(model: nn.Module, parts: dict) -> tuple:
    """Mean and standard deviation that belong to a module."""
    _, tower, _ = open_tower(model, parts)
    if hasattr(tower, "image_processor_settings"):
        settings = tower.image_processor_settings()
        return settings["image_mean"], settings["image_std"]
    if hasattr(tower, "input_conditioner"):  # C-RADIO norms the images itself
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    timm_settings = getattr(tower, "pretrained_cfg", None)
    if timm_settings and timm_settings.get("mean"):
        return timm_settings["mean"], timm_settings["std"]
    source = follow(model, "config._name_or_path")
    saved = _saved_statistics(source, model, parts, local_files_only=True) if source else None
    return saved or (IMAGENET_MEAN, IMAGENET_STD)

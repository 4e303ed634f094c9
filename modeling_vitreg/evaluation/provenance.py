"""What a number was measured with: fingerprints of facts and of a model, sizes, versions, and the commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess

import torch

import modeling_vitreg
from modeling_vitreg.features import Encoder


# Fields of a configuration that do not change what the model computes.
_IRRELEVANT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
    )
)


def shorten(facts: object) -> str:
    """Sixteen letters that stand for facts of JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_model(encoder: Encoder) -> str:
    """Sixteen letters that change with modules, configuration, weights, and the statistics of images.

    All weights are read once, which takes about a second for each gigabyte.
    """
    config = getattr(encoder.model, "config", None)
    fields = _relevant(config.to_dict()) if hasattr(config, "to_dict") else {}
    digest = hashlib.sha256()
    for name, value in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return shorten([repr(encoder.model), fields, digest.hexdigest(), encoder.image_mean, encoder.image_std])


def _relevant(fields: dict) -> dict:
    kept = {name: value for name, value in fields.items() if name not in _IRRELEVANT}
    return {name: _relevant(value) if isinstance(value, dict) else str(value) for name, value in kept.items()}


def describe_model(encoder: Encoder) -> dict:
    """Family and sizes of a model, and its revision on the Hub where known."""
    return {
        **encoder.describe(),
        "revision": getattr(getattr(encoder.model, "config", None), "_commit_hash", None),
    }


def describe_makers(encoder: Encoder) -> dict:
    """Versions, device and precision, and the commit of the checkout that this package runs from, if it does."""
    versions = {}
    for name in ("modeling-vitreg", "scikit-learn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**encoder.made_with(), **versions, "commit": _find_commit()}


def _find_commit() -> str | None:
    folder = pathlib.Path(modeling_vitreg.__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = run.stdout.split("\n")[:2]
    return commit if pathlib.Path(top) == folder.parent else None  # else it lies in the checkout of another project


__all__ = ["describe_makers", "describe_model", "fingerprint_model", "shorten"]

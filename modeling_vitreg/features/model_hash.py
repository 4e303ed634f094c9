"""Identity of a model: a hash of everything that changes its outputs."""

from __future__ import annotations

import hashlib

import torch

from modeling_vitreg.reports import short_hash

from .encoder import Encoder


# Fields of a configuration that do not change the outputs.
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


def hash_weights(encoder: Encoder) -> str:
    """16-character hash of modules, configuration, weights, mean and standard deviation of images, and named parts.

    It reads all weights once, about one second per gigabyte.
    """
    config = getattr(encoder.model, "config", None)
    fields = _relevant(config.to_dict()) if hasattr(config, "to_dict") else {}
    digest = hashlib.sha256()
    for name, value in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    facts = [repr(encoder.model), fields, digest.hexdigest(), encoder.image_mean, encoder.image_std]
    # Appended only where there are some, so that features stored by older versions are still found.
    return short_hash([*facts, encoder.parts] if encoder.parts else facts)


def _relevant(fields: dict) -> dict:
    kept = {name: value for name, value in fields.items() if name not in _IRRELEVANT}
    return {name: _relevant(value) if isinstance(value, dict) else str(value) for name, value in kept.items()}


def describe_model(encoder: Encoder) -> dict:
    """Family and sizes of a model, and its revision on the Hub if known."""
    revision = getattr(getattr(encoder.model, "config", None), "_commit_hash", None)
    return {**encoder.describe(), "revision": revision}

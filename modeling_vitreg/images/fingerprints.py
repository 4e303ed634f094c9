"""Few letters that change with images."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np


def sum_up_content(raw: dict) -> str | int | None:
    """Of a raw image its bytes, of a file its size."""
    if raw["bytes"] is not None:
        return hashlib.sha256(raw["bytes"]).hexdigest()
    return os.path.getsize(raw["path"]) if raw["path"] and os.path.exists(raw["path"]) else None


def sum_up_map(value: dict | list | np.ndarray) -> str | int | None:
    """Of a map as it was stored, an image or an array."""
    if isinstance(value, dict):
        return sum_up_content(value)
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def shorten(facts: list) -> str:
    """Sixteen letters that change with any of the facts."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


__all__ = ["shorten", "sum_up_content", "sum_up_map"]

"""Inputs of the tasks from features: one vector per image, the inputs of the linear probe, labels.

Letters: I images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import Features


ROWS_AT_ONCE = 16  # images whose maps are in memory together


def one_vector(features: Features) -> Tensor:
    """(I, D): the normed class token of the last layer, else the mean of the normed patches."""
    return features.load("class_tokens")[:, -1] if "class_tokens" in features.names else features.load("mean_patches")


def name_of_vector(features: Features) -> str:
    """Name of the vector that `one_vector` returns."""
    return "class token" if "class_tokens" in features.names else "mean of the patches"


def linear_inputs(
    features: Features, *, num_layers: Sequence[int], device: torch.device | str
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of DINOv2's linear probe: class tokens of the last layers, with and without the mean of the patches.

    Args:
        features: features of the kind "pooled".
        num_layers: whose class tokens are joined; a model with fewer gives all that it has.
        device: for the inputs.

    Returns:
        Name to (I, its width), views of one tensor; a model without class token has the mean of the patches only. And
        labels (I,). Images without a label are left out.

    Raises:
        ValueError: no image has a label.
    """
    mean = features.load("mean_patches")
    tokens = features.load("class_tokens") if "class_tokens" in features.names else mean[:, :0].unsqueeze(1)
    joined, labels = with_labels(features, torch.cat([tokens.flatten(1), mean], dim=1))  # [I, 4 D + D]
    joined = joined.to(device)
    if "class_tokens" not in features.names:
        return {"mean of the patches": joined}, labels
    (_, num_kept, width), inputs = tokens.shape, {}
    for number in dict.fromkeys(min(number, num_kept) for number in num_layers):
        name = "class token" if number == 1 else f"class tokens of {number} layers"
        first, end = (num_kept - number) * width, num_kept * width
        inputs |= {name: joined[:, first:end], f"{name}, mean of the patches": joined[:, first:]}
    return inputs, labels


def with_labels(features: Features, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (I, ...) and labels (I,) of the images that have one; lists of labels are (I, C).

    Raises:
        ValueError: no image has a label.
    """
    labels = features.load("labels")
    is_known = labels.amin(dim=1) >= 0 if labels.ndim == 2 else labels >= 0
    if not is_known.any():
        raise ValueError(
            "expected images with labels, got none: give a folder with one folder for each class, or a dataset with a "
            "column of labels (--columns label=NAME)"
        )
    return values[is_known], labels[is_known]


def count_mask_classes(parts: Sequence[Features], *, ignore_index: int) -> int:
    """One more than the largest class of all masks.

    Raises:
        ValueError: fewer than two.
    """
    highest = -1
    for part in parts:
        for rows in torch.arange(len(part)).split(ROWS_AT_ONCE):
            masks = part.take("masks", rows)
            is_class = masks != ignore_index
            highest = max(highest, int(masks[is_class].max())) if is_class.any() else highest
    if highest < 1:
        raise ValueError(f"expected masks of two classes or more, got {highest} as the largest class")
    return highest + 1

"""Division of images into held-out and training images, the same for every model."""

from __future__ import annotations

import torch
from torch import Tensor


def hold_out(num_images: int, *, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images that are kept and of those that are held out, each at least one, drawn by a seed.

    Raises:
        ValueError: fewer than two images, or a share that is not between 0 and 1.
    """
    if num_images < 2 or not 0 < share < 1:
        raise ValueError(
            f"expected two images or more and a share between 0 and 1 to hold out, got {num_images} images and {share}"
        )
    num_held_out = min(max(round(share * num_images), 1), num_images - 1)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[num_held_out:].sort().values, order[:num_held_out].sort().values


def require_classes(labels: Tensor) -> Tensor:
    """The sorted classes of the training images.

    Raises:
        ValueError: fewer than two.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(
            f"expected training images of two classes or more, got {len(classes)}: a folder needs one folder for each "
            "class, and a part of a sorted data set may hold one class only"
        )
    return classes

"""What a box and an overlap are: components of masks, boxes in pixels, overlaps, CorLoc, padded images.

A box is (xmin, ymin, xmax, ymax) in pixels. The pixel in column x spans x ... x + 1, so a box is as wide as
xmax - xmin. Components join patches that share a side.

Letters for shapes: B images, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


_CROSS = np.zeros((3, 3, 3), dtype=bool)  # neighbours within an image, none in the next one of the batch
_CROSS[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
HIT = 0.5  # overlap from which a box counts as found


def seed_components(mask: Tensor, seeds: Tensor, *, grid: tuple[int, int]) -> np.ndarray:
    """Components (B, rows, columns) of masks (B, P) that hold the seeds (B,).

    Where the seed lies outside the mask, its component is the seed alone.
    """
    masks = _fold(mask, grid)
    images, places = np.arange(len(masks)), np.unravel_index(seeds.cpu().numpy(), grid)
    labels = _label(masks)
    chosen = labels[images, places[0], places[1]]
    components = (labels == chosen[:, None, None]) & (chosen > 0)[:, None, None]
    components[images, places[0], places[1]] = True
    return components


def largest_components(mask: Tensor, *, grid: tuple[int, int]) -> np.ndarray:
    """Largest components (B, rows, columns) of masks (B, P), the first of several; all false for an empty mask."""
    masks = _fold(mask, grid)
    labels = _label(masks)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    own_sizes = sizes[labels].reshape(len(masks), -1)  # [B, rows, columns] -> [B, P]
    chosen = labels.reshape(len(masks), -1)[np.arange(len(masks)), own_sizes.argmax(axis=1)]
    return (labels == chosen[:, None, None]) & masks


def component_boxes(
    components: np.ndarray, *, patch_shape: tuple[int, int], image_sizes: Sequence[tuple[int, int]] | None = None
) -> np.ndarray:
    """Boxes (B, 4) around components.

    Args:
        components: (B, rows, columns), true inside; none of them empty.
        patch_shape: (rows, columns) of a patch in pixels.
        image_sizes: (rows, columns) of each image before it was padded, to which boxes are cut; None: no padding.

    Raises:
        ValueError: a component is empty.
    """
    if not components.any(axis=(1, 2)).all():
        raise ValueError("expected a patch in every component, got an empty one: no box lies around nothing")
    (top, bottom), (left, right) = (_extent(components.any(axis=axis)) for axis in (2, 1))
    boxes = np.stack([left, top, right, bottom], axis=1) * np.array([*patch_shape[::-1]] * 2, dtype=np.float64)
    if image_sizes is not None:
        limits = np.asarray(image_sizes, dtype=np.float64)[:, ::-1]
        boxes = np.minimum(boxes, np.concatenate([limits, limits], axis=1))
    return boxes


def box_overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (M, 4) and others (N, 4): (M, N), 0 where both are empty."""
    boxes, others = (np.asarray(part, dtype=np.float64).reshape(-1, 4) for part in (boxes, others))
    lower = np.maximum(boxes[:, None, :2], others[None, :, :2])  # [M, N, 2]
    upper = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (upper - lower).clip(min=0).prod(axis=-1)
    areas, other_areas = ((part[:, 2:] - part[:, :2]).prod(axis=-1) for part in (boxes, others))
    union = areas[:, None] + other_areas[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def best_overlap(box: np.ndarray, truth: np.ndarray) -> float:
    """Largest overlap of a box (4,) with the true boxes (objects, 4), 0 where there are none."""
    return float(box_overlaps(box, truth).max(initial=0.0))


def corloc(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray], *, hit: float = HIT) -> float:
    """Share of images, from 0 to 1, whose box overlaps one of the true boxes by `hit` or more.

    Args:
        predicted: a box (4,) for each image.
        truth: the boxes (objects, 4) of each image.
        hit: intersection over union.

    Raises:
        ValueError: no images, or not as many boxes as images.
    """
    if len(predicted) != len(truth) or not len(truth):
        raise ValueError(f"expected a box for each of one or more images, got {len(predicted)} for {len(truth)}")
    return sum(best_overlap(box, boxes) >= hit for box, boxes in zip(predicted, truth)) / len(truth)


def pad_to_patches(pixels: Tensor, *, patch_shape: tuple[int, int]) -> Tensor:
    """Pixels (..., rows, columns) with zeros below and to the right, until patches fill them."""
    rows, columns = (-side % patch for side, patch in zip(pixels.shape[-2:], patch_shape))
    return torch.nn.functional.pad(pixels, (0, columns, 0, rows))


def _fold(mask: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return mask.detach().cpu().numpy().astype(bool).reshape(-1, *grid)


def _label(masks: np.ndarray) -> np.ndarray:
    """Numbers of components (B, rows, columns), 0 outside of them."""
    import scipy.ndimage  # not above: settings and boxes are of use without it

    return scipy.ndimage.label(masks, structure=_CROSS)[0]


def _extent(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First true place and the one behind the last, of (B, places)."""
    return lines.argmax(axis=1), lines.shape[1] - lines[:, ::-1].argmax(axis=1)


__all__ = [
    "HIT",
    "best_overlap",
    "box_overlaps",
    "component_boxes",
    "corloc",
    "largest_components",
    "pad_to_patches",
    "seed_components",
]

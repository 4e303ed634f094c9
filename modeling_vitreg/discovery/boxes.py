"""From masks of patches to boxes in pixels: connected components, boxes around them.

A box is (xmin, ymin, xmax, ymax) in pixels. The pixel in column x spans x ... x + 1, so a box is as wide as
xmax - xmin. Components join patches that share a side.

Letters for shapes: B images, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


_CROSS = np.zeros((3, 3, 3), dtype=bool)  # neighbours within an image, none in the next one of the batch
_CROSS[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def seed_components(mask: Tensor, seeds: Tensor, *, grid: tuple[int, int]) -> np.ndarray:
    """Components (B, rows, columns) of masks (B, P) that contain the seeds (B,).

    If the seed lies outside the mask, the component is the seed alone.
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
        components: (B, rows, columns) in bool; none of them is empty.
        patch_shape: (rows, columns) of a patch in pixels.
        image_sizes: (rows, columns) of each image before padding, to which boxes are clipped; None for no padding.

    Raises:
        ValueError: a component is empty.
    """
    if not components.any(axis=(1, 2)).all():
        raise ValueError("expected at least one patch in each component, got an empty component")
    (top, bottom), (left, right) = (_extent(components.any(axis=axis)) for axis in (2, 1))
    boxes = np.stack([left, top, right, bottom], axis=1) * np.array([*patch_shape[::-1]] * 2, dtype=np.float64)
    if image_sizes is not None:
        limits = np.asarray(image_sizes, dtype=np.float64)[:, ::-1]
        boxes = np.minimum(boxes, np.concatenate([limits, limits], axis=1))
    return boxes


def _fold(mask: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return mask.detach().cpu().numpy().astype(bool).reshape(-1, *grid)


def _label(masks: np.ndarray) -> np.ndarray:
    """Numbers of the components (B, rows, columns), 0 outside the mask."""
    import scipy.ndimage  # imported here: settings and boxes are useful without it

    return scipy.ndimage.label(masks, structure=_CROSS)[0]


def _extent(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first true entry and of the one after the last, for rows (B, entries)."""
    return lines.argmax(axis=1), lines.shape[1] - lines[:, ::-1].argmax(axis=1)

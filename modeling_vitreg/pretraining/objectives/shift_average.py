"""Patches of a model without what belongs to positions: averages over copies of an image that are shifted and flipped.

An artifact that stays at a place of the grid, or comes and goes when the image moves, is not in the average; content
is, because it moves with the image.

Letters: B images, C copies of an image, D width. Grids are (rows, columns).

Source: Chen et al. 2025, "Vision Transformers with Self-Distilled Registers" (PH-Reg), arXiv 2505.21501, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


POOL = 10  # random offsets for each copy that is chosen of them


def farthest_points(points: Tensor, number: int, *, first: int) -> Tensor:
    """Indices (number,) of points (N, 2) that lie apart.

    begin with point `first`
    repeat: add the point whose nearest chosen point is the farthest
    """
    distances = torch.full((len(points),), torch.inf)
    chosen = [first]
    for _ in range(number - 1):
        distances = torch.minimum(distances, (points - points[chosen[-1]]).float().square().sum(dim=1))
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen)


def draw_copies(number: int, *, grid: tuple[int, int], share: float) -> tuple[list[tuple[int, int]], list[bool]]:
    """Shifts in patches (rows, columns) and flips of C copies; the first copy is the image itself.

    Args:
        number: C.
        grid: patches of an image.
        share: largest shift, as a share of the grid.
    """
    reach = [round(share * side) for side in grid]
    pool = torch.stack([torch.randint(-most, most + 1, (POOL * number,)) for most in reach], dim=1)
    chosen = pool[farthest_points(pool, number, first=int(torch.randint(len(pool), ())))]
    flips = torch.randint(0, 2, (number,)).bool()
    chosen[0], flips[0] = 0, False
    return [tuple(shift) for shift in chosen.tolist()], flips.tolist()


def shift_images(images: Tensor, shift: tuple[int, int], *, fill: Tensor) -> Tensor:
    """Move the content of images (B, 3, h, w) up and to the left by (rows, columns) of pixels.

    Args:
        images: of any normalisation.
        shift: pixels; negative numbers move down and to the right.
        fill: values, one for each channel, of what comes in from outside.
    """
    moved = fill.to(images).view(1, -1, 1, 1).expand_as(images).clone()
    kept, place = _overlap(images.shape[2], shift[0]), _overlap(images.shape[3], shift[1])
    moved[:, :, kept[1], place[1]] = images[:, :, kept[0], place[0]]
    return moved


def average_patches(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    shifts: list[tuple[int, int]],
    flips: list[bool],
    patch_shape: tuple[int, int],
    fill: Tensor,
) -> Tensor:
    """Average of the patches of all copies, each put back to its place in the image.

    for each copy: move the image, flip it, encode it, flip and move the patches back
    each patch of the image: mean over the copies in which it is visible

    Args:
        encode: images (B, 3, h, w) to patches (B, rows, columns, D).
        images: (B, 3, h, w); all of them get the same shifts.
        shifts: of each copy, in patches. The first is (0, 0), so that every patch is visible once.
        flips: of each copy.
        patch_shape: pixels of a patch (rows, columns).
        fill: values, one for each channel, of what comes in from outside, normalised as the images are.
    """
    total = count = None
    for shift, flip in zip(shifts, flips):
        copy = shift_images(images, tuple(n * side for n, side in zip(shift, patch_shape)), fill=fill)
        patches = encode(copy.flip(-1) if flip else copy).float()
        patches = patches.flip(2) if flip else patches
        if total is None:
            total, count = torch.zeros_like(patches), patches.new_zeros(*patches.shape[1:3], 1)
        rows, columns = (_overlap(side, n) for side, n in zip(patches.shape[1:3], shift))
        total[:, rows[0], columns[0]] += patches[:, rows[1], columns[1]]
        count[rows[0], columns[0]] += 1
    return total / count


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """What stays visible of an axis, and where it lies after the shift."""
    start, stop = max(shift, 0), min(length, length + shift)
    return slice(start, stop), slice(start - shift, stop - shift)

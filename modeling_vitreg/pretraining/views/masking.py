"""Masks of patches: rectangles of many sizes (BEiT, iBOT, DINOv2), or patches at random (MAE, SimMIM).

Letters: V views, B images, P patches, M masks. All masks of a batch are drawn at once, on the CPU, from one generator.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from modeling_vitreg.settings import expect


SMALLEST_BLOCK = 4  # patches
NARROWEST = 0.3  # aspect of a rectangle; the widest is its inverse
NUM_TRIES = 10


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Settings of masks. Defaults are those of DINOv2.

    Args:
        kind: "block" for rectangles; "random" for units of patches at random.
        ratio: smallest and largest share of patches to hide. With "random" both are equal: each image hides the
            same number of patches.
        share: share of views that are masked.
        unit: side of the squares that "random" hides, in patches (32 pixels in SimMIM).
    """

    kind: str = "block"
    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    unit: int = 1

    def __post_init__(self):
        low, high = self.ratio
        expect(self, "masks", kind=("block", "random"), ratio="[0, 1)", share="[0, 1]", unit="[1, inf)")
        if low > high:
            raise ValueError(f"masks: expected low <= high in ratio, got {self.ratio}")
        if self.kind == "random" and (low != high or self.share not in (0, 1)):
            raise ValueError(
                f"masks: kind 'random' hides the same number of patches of every view: give equal ratios and share 1, "
                f"got {self.ratio} and {self.share}"
            )


@dataclasses.dataclass(frozen=True)
class MaskMaker:
    """Draws the masks of a batch, for `ViewLoader`; see `draw_masks`."""

    num_views: int
    grid: tuple[int, int]
    settings: MaskSettings
    patch_shape: tuple[int, int] = (1, 1)

    def of_size(self, size: tuple[int, int]) -> MaskMaker:
        """The same for views of (height, width) pixels."""
        return dataclasses.replace(self, grid=tuple(side // patch for side, patch in zip(size, self.patch_shape)))

    def __call__(self, num_images: int, *, generator: torch.Generator) -> Tensor:
        return draw_masks(
            num_images, num_views=self.num_views, grid=self.grid, settings=self.settings, generator=generator
        )


def draw_masks(
    num_images: int, *, num_views: int, grid: tuple[int, int], settings: MaskSettings, generator: torch.Generator
) -> Tensor:
    """Masks of the views of a batch, bool (V, B, P), true where a patch is hidden.

    The share of views that is masked is exact. For "block", view i of n masked ones hides at most
    `grid patches x u_i`, with u_i uniform in the i-th of n equal parts of `ratio`; the views are then shuffled, so
    that small and large masks are equally many in every batch (DINOv2).
    """
    rows, columns = grid
    num_total = num_views * num_images
    num_masked = int(num_total * settings.share)
    masks = torch.zeros(num_total, rows, columns, dtype=torch.bool)
    if num_masked:
        if settings.kind == "block":
            low, high = settings.ratio
            parts = torch.arange(num_masked) + torch.rand(num_masked, generator=generator)
            targets = (rows * columns * (low + (high - low) * parts / num_masked)).long()
            masks[:num_masked] = draw_block_masks(targets, grid=grid, generator=generator)
            masks = masks[torch.randperm(num_total, generator=generator)]
        else:
            masks = draw_random_masks(num_total, grid=grid, settings=settings, generator=generator)
    return masks.reshape(num_views, num_images, rows * columns)


def draw_block_masks(targets: Tensor, *, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Masks made of rectangles, bool (M, rows, columns), with at most `targets` (M,) patches each.

    for each mask, while fewer patches are hidden than its target, at most half of all:
        up to ten times: draw an area, uniform from 4 patches to what is missing, and an aspect, log-uniform from 0.3
            to 1 / 0.3; round the sides; place the rectangle anywhere if it is smaller than the grid
        hide the first one that adds at least one patch and at most what is missing; stop if none of the ten does

    Source: Bao et al. 2021, arXiv 2106.08254, algorithm 1, with the values of DINOv2. One try of every mask is one
    step here, so that the number of steps hardly grows with the number of masks.
    """
    rows, columns = grid
    masks = torch.zeros(len(targets), rows, columns, dtype=torch.bool)
    limit = 0.5 * rows * columns
    row, column = torch.arange(rows)[None, :, None], torch.arange(columns)[None, None, :]
    log_aspects = math.log(NARROWEST), -math.log(NARROWEST)
    failures = torch.zeros(len(targets), dtype=torch.long)
    active = (targets > 0).nonzero().squeeze(1)
    missing = targets.clamp(max=rows * columns).clone()
    while len(active):
        draws = torch.rand(4, len(active), generator=generator)
        budget = missing[active].clamp(max=limit)
        area = SMALLEST_BLOCK + (budget - SMALLEST_BLOCK) * draws[0]
        aspect = torch.exp(log_aspects[0] + (log_aspects[1] - log_aspects[0]) * draws[1])
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = ((rows - height + 1) * draws[2]).long()[:, None, None]
        left = ((columns - width + 1) * draws[3]).long()[:, None, None]
        is_row = (row >= top) & (row < top + height[:, None, None])
        is_column = (column >= left) & (column < left + width[:, None, None])
        before = masks[active]
        new = (is_row & is_column & ~before).sum(dim=(1, 2))
        is_taken = (height < rows) & (width < columns) & (new > 0) & (new <= budget)
        masks[active[is_taken]] = (before | (is_row & is_column))[is_taken]
        missing[active] -= new.where(is_taken, 0)
        failures[active] = (failures[active] + 1).where(~is_taken, 0)
        active = active[(missing[active] > 0) & (failures[active] < NUM_TRIES)]
    return masks


def draw_random_masks(
    num_masks: int, *, grid: tuple[int, int], settings: MaskSettings, generator: torch.Generator
) -> Tensor:
    """Masks (M, rows, columns) of square units at random, the same number in each, rounded up.

    Raises:
        ValueError: the grid is not a multiple of the unit.
    """
    unit = settings.unit
    if any(side % unit for side in grid):
        raise ValueError(f"masks: a grid of {grid} patches is not a multiple of the unit of {unit} patches")
    units = tuple(side // unit for side in grid)
    noise = torch.rand(num_masks, math.prod(units), generator=generator)
    # A share such as 0.6 is not exact in binary: without the small number 0.6 x 5 would be rounded up to 4.
    num_hidden = math.ceil(settings.ratio[0] * math.prod(units) - 1e-6)
    masks = (noise.argsort(dim=1).argsort(dim=1) < num_hidden).unflatten(1, units)
    return masks.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2)

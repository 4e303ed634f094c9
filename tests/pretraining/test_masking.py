"""Masks: how many patches they hide, where, and that drawing them all at once changes no distribution."""

import math
import random

import pytest
import torch
from torch import Tensor

from modeling_vitreg.pretraining.views.masking import (
    MaskMaker,
    MaskSettings,
    draw_block_masks,
    draw_masks,
    draw_random_masks,
)


GRIDS = [(3, 3), (4, 4), (6, 6), (5, 9), (16, 16), (2, 12)]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Rectangles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_mask_never_hides_more_than_its_target(grid):
    targets = torch.arange(math.prod(grid) + 1).repeat(5)
    masks = draw_block_masks(targets, grid=grid, generator=_generator())
    assert masks.shape == (len(targets), *grid)
    counts = masks.sum(dim=(1, 2))
    assert (counts <= targets).all()
    assert counts[targets == 0].sum() == 0
    if min(grid) > 2:  # in a narrow grid ten tries often fail, and nothing is hidden
        assert (counts[targets > 0] > 0).float().mean() > 0.9


def test_no_rectangle_spans_the_grid():
    assert not draw_block_masks(torch.full((50,), 9), grid=(1, 9), generator=_generator()).any()
    assert draw_block_masks(torch.full((50,), 9), grid=(2, 9), generator=_generator()).any()


def _slow_block_mask(target: int, *, grid: tuple[int, int], draw: random.Random) -> list[list[bool]]:
    """The program of the docstring, one mask and one try after the other."""
    rows, columns = grid
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < target:
        budget = min(target - len(hidden), 0.5 * rows * columns)
        for _ in range(10):
            area = draw.uniform(4, budget)
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
            new = {(top + i, left + j) for i in range(height) for j in range(width)} - hidden
            if 0 < len(new) <= budget:
                hidden |= new
                break
        else:
            break
    return [[(i, j) in hidden for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize(("grid", "target"), [((8, 8), 24), ((6, 4), 11), ((4, 4), 7), ((6, 6), 30)])
def test_block_masks_are_distributed_as_those_of_the_plain_loop(grid, target):
    num_masks, draw = 2000, random.Random(1)
    found = draw_block_masks(torch.full((num_masks,), target), grid=grid, generator=_generator(1)).double()
    slow = [_slow_block_mask(target, grid=grid, draw=draw) for _ in range(num_masks)]
    expected = torch.tensor(slow, dtype=torch.float64)

    def compare(ours: Tensor, theirs: Tensor, deviations: float) -> None:
        """Means over masks, within so many standard deviations of their difference."""
        deviation = ((ours.var(dim=0) + theirs.var(dim=0)) / num_masks).sqrt().clamp(min=1e-4)
        assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() / deviation).max() < deviations

    compare(found, expected, 4)  # how often each patch is hidden
    counts = torch.arange(target + 1)
    compare(_are(found.sum(dim=(1, 2)), counts), _are(expected.sum(dim=(1, 2)), counts), 4)
    for axis in (1, 2):  # how long and how wide what is hidden is
        sides = torch.arange(max(grid) + 1)
        ours, theirs = (masks.amax(dim=axis).sum(dim=1) for masks in (found, expected))
        compare(_are(ours, sides), _are(theirs, sides), 4)
    compare(_num_borders(found), _num_borders(expected), 3)  # how ragged it is


def _are(values: Tensor, numbers: Tensor) -> Tensor:
    return (values[:, None] == numbers).double()


def _num_borders(masks: Tensor) -> Tensor:
    return masks.diff(dim=1).abs().sum(dim=(1, 2)) + masks.diff(dim=2).abs().sum(dim=(1, 2))


# A batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(16, 16), (6, 10)])
def test_half_of_the_views_are_masked_and_their_ratios_fill_the_range_evenly(grid):
    settings = MaskSettings(ratio=(0.1, 0.5), share=0.5)
    masks = draw_masks(32, num_views=2, grid=grid, settings=settings, generator=_generator())
    assert masks.shape == (2, 32, math.prod(grid))
    assert masks.dtype == torch.bool
    ratios = masks.flatten(0, 1).float().mean(dim=1).sort(descending=True).values
    assert (ratios > 0).sum() == 32
    # View i of 32 hides at most the upper end of its part of the range, and mostly nearly as much.
    upper = torch.linspace(0.5, 0.1, 33)[:32]
    assert (ratios[:32] <= upper + 1e-6).all()
    assert (upper - ratios[:32]).mean() < 0.06


def test_masked_views_are_shuffled_over_views_and_images():
    settings = MaskSettings()
    share = torch.zeros(2, 6)
    for seed in range(300):
        masks = draw_masks(6, num_views=2, grid=(8, 8), settings=settings, generator=_generator(seed))
        assert masks.any(dim=2).sum() == 6
        share += masks.any(dim=2).float() / 300
    assert (share - 0.5).abs().max() < 4 * math.sqrt(0.25 / 300)


def test_every_view_is_masked_with_share_1_and_none_with_share_0():
    for share, number in ((1.0, 10), (0.0, 0), (0.25, 2)):
        settings = MaskSettings(share=share)
        masks = draw_masks(5, num_views=2, grid=(8, 8), settings=settings, generator=_generator())
        assert masks.any(dim=2).sum() == number


@pytest.mark.parametrize("kind", ["block", "random"])
def test_the_generator_decides_the_masks(kind):
    settings = MaskSettings() if kind == "block" else MaskSettings(kind="random", ratio=(0.75, 0.75), share=1)
    make = MaskMaker(num_views=2, grid=(7, 7), settings=settings)
    torch.manual_seed(1)
    first = make(8, generator=_generator(3))
    torch.manual_seed(2)
    assert torch.equal(make(8, generator=_generator(3)), first)
    assert not torch.equal(make(8, generator=_generator(4)), first)


# Patches at random -------------------------------------------------------------------------------------------------


def test_mae_hides_the_same_number_of_patches_of_every_image_each_equally_often():
    settings = MaskSettings(kind="random", ratio=(0.75, 0.75), share=1)
    masks = draw_random_masks(2000, grid=(4, 6), settings=settings, generator=_generator())
    assert (masks.sum(dim=(1, 2)) == 18).all()
    assert (masks.float().mean(dim=0) - 0.75).abs().max() < 4 * math.sqrt(0.75 * 0.25 / 2000)


def test_simmim_hides_whole_units():
    # 0.6 of 3 x 6 units are 10.8, and so 11.
    settings = MaskSettings(kind="random", ratio=(0.6, 0.6), share=1, unit=2)
    masks = draw_masks(9, num_views=1, grid=(6, 12), settings=settings, generator=_generator())
    units = masks[0].reshape(9, 3, 2, 6, 2).float().mean(dim=(2, 4))
    assert set(units.unique().tolist()) == {0.0, 1.0}
    assert (units.sum(dim=(1, 2)) == 11).all()
    with pytest.raises(ValueError, match="not a multiple of the unit"):
        draw_masks(1, num_views=1, grid=(5, 6), settings=settings, generator=_generator())


def test_a_share_that_is_not_exact_in_binary_is_not_rounded_up():
    settings = MaskSettings(kind="random", ratio=(0.6, 0.6), share=1)
    assert draw_random_masks(1, grid=(5, 5), settings=settings, generator=_generator()).sum() == 15
    # 0.07 x 100 is 7.000000000000001 in binary.
    settings = MaskSettings(kind="random", ratio=(0.07, 0.07), share=1)
    assert draw_random_masks(1, grid=(10, 10), settings=settings, generator=_generator()).sum() == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "blocks"}, "one of block, random"),
        ({"ratio": (0.5, 0.1)}, "low <= high"),
        ({"ratio": (0.5, 1.0)}, r"expected ratio in \[0, 1\)"),
        ({"share": 1.5}, "share in"),
        ({"kind": "random"}, "equal ratios"),
        ({"kind": "random", "ratio": (0.5, 0.5), "share": 0.5}, "share 1"),
        ({"unit": 0}, "unit"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MaskSettings(**values)

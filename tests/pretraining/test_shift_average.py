"""Targets from shifted and flipped copies: content stays, what belongs to a place of the grid averages out."""

import pytest
import torch

from modeling_vitreg.pretraining.objectives.shift_average import (
    average_patches,
    draw_copies,
    farthest_points,
    shift_images,
)


PATCH, GRID, WHITE = (4, 8), (5, 6), torch.tensor([2.0, 3.0, 4.0])
IMAGES = torch.randn(2, 3, 20, 48, generator=torch.Generator().manual_seed(0))


def _content(images):
    """Patches that are a function of their pixels alone, which no flip changes."""
    blocks = images.unfold(2, 4, 4).unfold(3, 8, 8)  # [B, 3, rows, columns, 4, 8]
    return blocks.amax(dim=(4, 5)).permute(0, 2, 3, 1)


def _average(encode, number=10, share=0.4):
    shifts, flips = draw_copies(number, grid=GRID, share=share)
    return average_patches(encode, IMAGES, shifts=shifts, flips=flips, patch_shape=PATCH, fill=WHITE)


def test_the_average_equals_a_loop_over_images_copies_and_patches():
    place = torch.randn(1, *GRID, 3)

    def encode(images):
        return _content(images) * 2 + place

    shifts, flips = draw_copies(6, grid=GRID, share=0.4)
    found = average_patches(encode, IMAGES, shifts=shifts, flips=flips, patch_shape=PATCH, fill=WHITE)
    for number, image in enumerate(IMAGES):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                seen = []
                for (down, right), flip in zip(shifts, flips):
                    y, x = row - down, column - right
                    if 0 <= y < GRID[0] and 0 <= x < GRID[1]:
                        x = GRID[1] - 1 - x if flip else x
                        pixels = image[:, row * 4 : row * 4 + 4, column * 8 : column * 8 + 8]
                        seen.append(pixels.amax(dim=(1, 2)) * 2 + place[0, y, x])
                torch.testing.assert_close(found[number, row, column], torch.stack(seen).mean(dim=0))


def test_content_is_untouched_and_what_belongs_to_a_place_shrinks():
    torch.manual_seed(1)
    torch.testing.assert_close(_average(_content), _content(IMAGES), rtol=1e-5, atol=1e-5)
    artifact = torch.zeros(1, *GRID, 3)
    artifact[:, 2, 3] = 10.0
    left = _average(lambda images: _content(images) + artifact) - _content(IMAGES)
    assert left.square().sum() < 0.4 * artifact.square().sum() * len(IMAGES)


def test_the_first_copy_is_the_image_and_shifts_stay_within_reach():
    shifts, flips = draw_copies(8, grid=GRID, share=0.4)
    assert shifts[0] == (0, 0) and flips[0] is False and len(set(shifts)) > 4
    assert all(abs(down) <= 2 and abs(right) <= 2 for down, right in shifts)
    assert draw_copies(1, grid=GRID, share=0.4) == ([(0, 0)], [False])


def test_a_positive_shift_moves_content_up_and_to_the_left():
    moved = shift_images(IMAGES, (4, -8), fill=WHITE)
    torch.testing.assert_close(moved[:, :, :-4, 8:], IMAGES[:, :, 4:, :-8])
    assert (moved[:, :, -4:] == WHITE.view(1, 3, 1, 1)).all() and (moved[:, :, :, :8] == WHITE.view(1, 3, 1, 1)).all()


@pytest.mark.parametrize("first", [0, 3])
def test_points_lie_apart(first):
    points = torch.tensor([[0, 0], [0, 1], [9, 9], [1, 0], [9, 0]])
    chosen = farthest_points(points, 3, first=first).tolist()
    assert chosen[0] == first and {chosen[1], chosen[2]} <= {0, 1, 2, 3, 4} and 2 in chosen

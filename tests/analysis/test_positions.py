"""Places of outliers and likeness of neighbours, against plain loops."""

import numpy as np
import pytest
import torch

from modeling_vitreg.analysis.histograms import bin_numbers, next_edge
from modeling_vitreg.analysis.positions import SIMILARITY_EDGES, PositionCounts, neighbour_similarity


def _slow_similarity(patches: np.ndarray, grid: tuple) -> np.ndarray:
    rows, columns = grid
    result = np.zeros((len(patches), rows * columns))
    for image, tokens in enumerate(patches.reshape(len(patches), rows, columns, -1)):
        for row in range(rows):
            for column in range(columns):
                values = []
                for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                    if 0 <= row + down < rows and 0 <= column + right < columns:
                        one, two = tokens[row, column], tokens[row + down, column + right]
                        values.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
                result[image, row * columns + column] = np.mean(values)
    return result


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (2, 1)])
def test_similarity_equals_the_plain_loop_over_neighbours(grid):
    patches = torch.randn(2, grid[0] * grid[1], 6)
    found = neighbour_similarity(patches, grid=grid)
    np.testing.assert_allclose(found, _slow_similarity(patches.numpy(), grid), atol=1e-6)


def test_a_flat_image_is_like_its_neighbours_and_a_checkerboard_is_not():
    flat = torch.ones(1, 16, 3)
    checkerboard = torch.tensor([(row + column) % 2 * 2.0 - 1 for row in range(4) for column in range(4)])
    assert neighbour_similarity(flat, grid=(4, 4)).tolist()[0] == pytest.approx([1] * 16)
    assert neighbour_similarity(checkerboard[None, :, None], grid=(4, 4)).tolist()[0] == pytest.approx([-1] * 16)
    assert neighbour_similarity(torch.ones(1, 1, 3), grid=(1, 1)).isnan().all()


def test_counts_equal_what_all_images_together_say():
    grid, threshold = (3, 4), next_edge(12.0)
    norms, similarity = torch.rand(2, 20, 12) * 20, torch.rand(20, 12) * 2 - 1
    counts = PositionCounts(2, grid=grid)
    for part in (slice(0, 7), slice(7, 20)):
        counts.add(bin_numbers(norms[:, part]), similarity[part])
    is_outlier = (norms[1] >= np.float32(threshold)).numpy()
    report = counts.summarise(1, threshold=threshold)
    np.testing.assert_allclose(report["heat_map"], is_outlier.mean(axis=0).reshape(grid))
    ring = np.ones(grid, bool)
    ring[1, 1:3] = False
    assert report["border_share"] == pytest.approx(is_outlier[:, ring.ravel()].sum() / is_outlier.sum())
    assert report["border_share_by_chance"] == 10 / 12
    hottest = report["most_frequent"][0]
    assert hottest[2] == is_outlier.mean(axis=0).max()
    assert is_outlier.mean(axis=0)[hottest[0] * 4 + hottest[1]] == hottest[2]
    for kind, members in (("outlier", is_outlier), ("normal", ~is_outlier)):
        values = similarity.numpy()[members]
        numbers = report["similarity"][kind]
        assert numbers["num_patches"] == members.sum()
        assert numbers["mean"] == pytest.approx(values.mean(), abs=1e-5)
        np.testing.assert_array_equal(numbers["histogram"], np.histogram(values, SIMILARITY_EDGES)[0])


def test_a_grid_of_one_patch_has_a_place_and_no_neighbours():
    counts = PositionCounts(1, grid=(1, 1))
    counts.add(bin_numbers(torch.full((1, 3, 1), 20.0)), torch.full((3, 1), torch.nan))
    report = counts.summarise(0, threshold=next_edge(10.0))
    assert report["heat_map"] == [[1.0]] and report["similarity"]["outlier"]["mean"] is None

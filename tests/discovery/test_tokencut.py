"""TokenCut against the generalised problem solved by scipy, and DINO-seg against a loop over patches."""

import numpy as np
import pytest
import scipy.linalg
import torch

from modeling_vitreg.discovery.boxes import component_boxes, seed_components
from modeling_vitreg.discovery.dino_seg import dino_seg
from modeling_vitreg.discovery.tokencut import second_eigenvector, tokencut


def smooth(num_images, rows, columns, width=16):
    maps = torch.randn(num_images, width, rows, columns)
    return torch.nn.functional.avg_pool2d(maps, 3, 1, 1).flatten(2).transpose(1, 2)


def slow_tokencut(features, tau, epsilon):
    """One image (P, D): seed and mask, by the generalised eigenproblem."""
    units = features / features.norm(dim=-1, keepdim=True)
    weights = np.where((units @ units.T).numpy() > tau, 1.0, epsilon)
    degrees = np.diag(weights.sum(axis=1))
    vector = scipy.linalg.eigh(degrees - weights, degrees)[1][:, 1]
    seed = np.abs(vector).argmax()
    mask = vector > vector.mean()
    return seed, mask if mask[seed] else ~mask


@pytest.mark.parametrize("tau", [0.0, 0.2])
@pytest.mark.parametrize("sides", [(5, 6), (10, 9)])
def test_a_batch_equals_the_generalised_problem_image_by_image(sides, tau):
    features = smooth(6, *sides)
    found = tokencut(features, tau=tau)
    assert not found.is_degenerate.any()
    for image in range(6):
        seed, mask = slow_tokencut(features[image], tau, 1e-5)
        assert found.seeds[image] == seed
        assert found.mask[image].tolist() == mask.tolist()


def test_the_eigenvector_solves_the_problem_and_is_scaled_by_the_degrees():
    weights = torch.rand(3, 12, 12, dtype=torch.float64) + 0.1
    weights = weights + weights.transpose(1, 2)
    vectors, is_shared = second_eigenvector(weights)
    for matrix, vector in zip(weights.numpy(), vectors.numpy()):
        degrees = np.diag(matrix.sum(axis=1))
        values = scipy.linalg.eigh(degrees - matrix, degrees, eigvals_only=True)
        assert np.allclose((degrees - matrix) @ vector, values[1] * degrees @ vector)
        assert np.isclose(vector @ degrees @ vector, 1)
    assert not is_shared.any()


def test_the_object_that_is_unlike_the_background_is_cut_out_exactly():
    grid = torch.zeros(8, 8, 3)
    grid[...] = torch.tensor([1.0, 0.1, 0.0])
    grid[2:5, 3:6] = torch.tensor([0.0, 1.0, 0.2])
    found = tokencut(grid.reshape(1, 64, 3))
    components = seed_components(found.mask, found.seeds, grid=(8, 8))
    assert component_boxes(components, patch_shape=(16, 16)).tolist() == [[48, 32, 96, 80]]
    assert (found.eigenvector[0][found.mask[0]].min() > found.eigenvector[0][~found.mask[0]].max()).item()


def test_graphs_without_a_best_cut_give_a_defined_result_and_say_so():
    assert tokencut(torch.ones(1, 9, 4)).is_degenerate.all()
    assert tokencut(torch.eye(6)[None]).is_degenerate.all()  # none similar to another
    one = tokencut(torch.ones(2, 1, 4))
    assert one.is_degenerate.all() and one.mask.all() and one.seeds.tolist() == [0, 0]
    two = tokencut(torch.eye(2)[None])
    assert two.mask.sum() == 1
    for found in (one, two, tokencut(torch.zeros(1, 5, 3))):
        assert found.mask.gather(1, found.seeds[:, None]).all()


def test_errors_of_tokencut_say_what_was_expected():
    with pytest.raises(ValueError, match=r"NaN or infinity in images \[0\]"):
        tokencut(torch.full((1, 4, 2), torch.nan))
    with pytest.raises(ValueError, match="epsilon between 0 and 1, got 0"):
        tokencut(torch.rand(1, 4, 2), epsilon=0)


def slow_dino_seg(attention, mass):
    """One map (P,): add patches from the smallest on; keep those after which the sum is above 1 - mass."""
    total, reached, kept = sum(attention), 0.0, set()
    for place in sorted(range(len(attention)), key=lambda place: (attention[place], place)):
        reached += attention[place] / total
        if reached > 1 - mass:
            kept.add(place)
    return [place in kept for place in range(len(attention))]


@pytest.mark.parametrize("mass", [0.3, 0.6, 1.0])
def test_dino_seg_keeps_the_patches_that_hold_most_of_the_attention(mass):
    attention = torch.rand(2, 3, 20, dtype=torch.float64) ** 3
    kept = dino_seg(attention, attention_share=mass)
    for image in range(2):
        for head in range(3):
            assert kept[image, head].tolist() == slow_dino_seg(attention[image, head].tolist(), mass)
            share = attention[image, head][kept[image, head]].sum() / attention[image, head].sum()
            assert share >= mass - 1e-9


def test_errors_of_dino_seg_say_what_was_expected():
    with pytest.raises(ValueError, match="attention_share above 0 and at most 1, got 0"):
        dino_seg(torch.rand(2, 4), attention_share=0)
    for attention in (torch.zeros(2, 4), torch.tensor([[1.0, torch.nan]]), -torch.rand(1, 3), torch.rand(2, 0)):
        with pytest.raises(ValueError, match="expected attention"):
            dino_seg(attention)

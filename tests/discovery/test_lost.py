"""LOST against a slow program written from its formula, and on maps whose object is known."""

import pytest
import torch
from scipy import ndimage

from modeling_vitreg.discovery.boxes import component_boxes, seed_components
from modeling_vitreg.discovery.lost import count_similar, lost, lost_with_biases
from modeling_vitreg.features import TokenFeatures


def slow_lost(features, bias=0.0, num_candidates=100):
    """One image (P, D), patch by patch: seed, degrees, expansion, mask."""
    num_patches = len(features)
    similarity = [[float(a @ b) + bias for b in features] for a in features]
    degrees = [sum(similarity[i][j] > 0 for j in range(num_patches) if j != i) for i in range(num_patches)]
    order = sorted(range(num_patches), key=lambda i: (degrees[i], i))
    seed = order[0]
    expansion = [i for i in order[:num_candidates] if similarity[seed][i] > 0]
    correlation = [sum(similarity[i][j] for i in expansion) for j in range(num_patches)]
    return seed, degrees, sorted(expansion), [value > 0 for value in correlation]


def smooth(num_images, rows, columns, width=8):
    maps = torch.randn(num_images, width, rows, columns)
    return torch.nn.functional.avg_pool2d(maps, 3, 1, 1).flatten(2).transpose(1, 2)


def planted(rows=8, columns=8, places=((2, 5), (3, 6))):
    """Background of one direction, an object of the opposite one at rows x columns of `places`."""
    grid = torch.zeros(rows, columns, 2)
    grid[...] = torch.tensor([1.0, 0.2])
    (top, bottom), (left, right) = places
    grid[top:bottom, left:right] = torch.tensor([-1.0, 0.3])
    return grid.reshape(1, -1, 2)


@pytest.mark.parametrize("bias", [0.0, -0.05, 0.1])
@pytest.mark.parametrize("num_candidates", [1, 7, 100])
def test_batched_lost_equals_the_plain_loop_over_patches(num_candidates, bias):
    features = torch.cat([smooth(3, 6, 5), torch.randn(3, 30, 8), torch.randn(3, 30, 8) + 0.3]).double()
    found = lost(features, bias=bias, num_candidates=num_candidates)
    for image in range(len(features)):
        seed, degrees, expansion, mask = slow_lost(features[image], bias, num_candidates)
        assert found.seeds[image] == seed
        assert found.degrees[image].tolist() == degrees
        assert found.expansion[image].nonzero().flatten().tolist() == expansion
        assert found.mask[image].tolist() == mask


@pytest.mark.parametrize("num_patches", [1, 2, 127, 128, 129, 300])
def test_every_pair_is_counted_once_however_the_product_is_split(num_patches):
    features = torch.randn(3, num_patches, 5)
    similarity = features @ features.transpose(1, 2)
    is_other = ~torch.eye(num_patches, dtype=torch.bool)
    for bias, degrees in zip([0.0, -0.7, 0.4], count_similar(features, biases=[0.0, -0.7, 0.4])):
        assert torch.equal(degrees, ((similarity > -bias) & is_other).sum(dim=2))


def test_centring_and_scaling_come_before_the_products():
    features = smooth(3, 5, 6) + 2
    centred = features - features.mean(dim=1, keepdim=True)
    units = centred / centred.norm(dim=-1, keepdim=True)
    found = lost(features, is_centered=True, is_normalized=True, bias=-0.1)
    expected = lost(units, bias=-0.1)
    assert torch.equal(found.degrees, expected.degrees) and torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.correlation, expected.correlation)


def test_the_object_that_is_unlike_the_background_is_found_exactly():
    found = lost(planted())
    components = seed_components(found.mask, found.seeds, grid=(8, 8))
    assert component_boxes(components, patch_shape=(16, 16)).tolist() == [[48, 32, 96, 80]]
    assert not found.is_degenerate.any()


def test_of_two_objects_of_one_kind_only_that_of_the_seed_is_taken():
    features, other = planted(places=((1, 3), (1, 3))), planted(places=((5, 8), (5, 8)))
    features[other[..., 0] < 0] = torch.tensor([-1.0, 0.3])
    found = lost(features)
    assert found.mask.sum() == 4 + 9 and found.seeds == 9
    component = seed_components(found.mask, found.seeds, grid=(8, 8))
    assert component.sum() == 4
    assert component_boxes(component, patch_shape=(4, 2)).tolist() == [[2, 4, 6, 12]]


def test_a_bias_brings_back_what_a_common_direction_hides():
    hidden = planted() + 5  # all similarities positive: every degree is the same
    assert lost(hidden).is_degenerate.all()
    assert torch.equal(lost(hidden, is_centered=True).mask, lost(planted()).mask)
    units = hidden / hidden.norm(dim=-1, keepdim=True)
    similarity = units @ units.transpose(1, 2)
    middle = (similarity.min() + similarity.max()).item() / 2
    assert torch.equal(lost(hidden, is_normalized=True, bias=-middle).mask, lost(planted()).mask)


def test_a_sweep_of_biases_equals_single_runs_and_batches_equal_single_images():
    features = smooth(5, 40, 40)  # more than one chunk
    biases = [0.0, -0.2, 0.3]
    for bias, swept in zip(biases, lost_with_biases(features, biases=biases, is_centered=True)):
        single = lost(features, bias=bias, is_centered=True)
        for image in range(5):
            alone = lost(features[image : image + 1], bias=bias, is_centered=True)
            assert torch.equal(swept.seeds[image], alone.seeds[0]) and torch.equal(swept.seeds, single.seeds)
            assert torch.equal(swept.mask[image], alone.mask[0]) and torch.equal(swept.mask, single.mask)


def test_the_mask_of_the_seed_is_the_component_that_scipy_labels():
    features = smooth(6, 9, 11)
    found = lost(features, is_centered=True)
    components = seed_components(found.mask, found.seeds, grid=(9, 11))
    for mask, seed, component in zip(found.mask.reshape(-1, 9, 11), found.seeds.tolist(), components):
        labels, _ = ndimage.label(mask.numpy())
        assert ((labels == labels[divmod(seed, 11)]) == component).all()


def test_features_without_information_give_a_defined_result_and_say_so():
    equal = lost(torch.ones(1, 9, 4))
    assert equal.is_degenerate.all() and equal.seeds == 0 and equal.mask.all()
    centred = lost(torch.ones(1, 9, 4), is_centered=True)
    assert centred.is_degenerate.all() and not centred.mask.any()
    assert seed_components(centred.mask, centred.seeds, grid=(3, 3)).sum() == 1
    one = lost(torch.ones(2, 1, 4))
    assert one.is_degenerate.all() and one.mask.all()
    zero = lost(torch.zeros(1, 4, 4), is_normalized=True)
    assert zero.is_degenerate.all()


def test_tokens_by_name_half_precision_and_autocast_give_the_same_as_their_patches():
    patches = smooth(2, 4, 4)
    tokens = TokenFeatures(
        patch_tokens=patches.bfloat16(),
        grid=(4, 4),
        cls_token=torch.full((2, 8), torch.nan),
        distillation_token=None,
        register_tokens=torch.full((2, 3, 8), torch.nan),
        layer=1,
        feature="key",
        is_normed=False,
    )
    expected = lost(patches.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lost(tokens)
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.degrees, expected.degrees)


def test_errors_say_what_was_expected():
    broken = torch.randn(3, 4, 2)
    broken[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in images \[1\]"):
        lost(broken)
    wide = torch.randn(2000, 40, 2)
    wide[1999, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"images \[1999\]"):
        lost(wide)
    with pytest.raises(ValueError, match=r"\(images, patches, width\) with at least one patch, got shape \(4, 2\)"):
        lost(torch.rand(4, 2))
    with pytest.raises(ValueError, match="one candidate or more, got 0"):
        lost(torch.rand(1, 4, 2), num_candidates=0)

"""Streaming histograms equal NumPy's on the whole data; valleys, thresholds and intervals are what they say."""

import numpy as np
import pytest
import torch

from modeling_vitreg.analysis.histograms import (
    EDGES,
    FIXED_THRESHOLD,
    NormHistograms,
    bin_numbers,
    find_valley,
    next_edge,
)
from modeling_vitreg.analysis.verdict import QUANTILES, format_share, judge, summarise_layer


def _norms(num_layers=2, num_images=30, num_patches=50, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(num_layers, num_images, num_patches, generator=generator) * 0.3 + 2)


def _fill(norms: torch.Tensor, *, batch_size: int = 7) -> NormHistograms:
    histograms = NormHistograms(len(norms))
    for batch in norms.split(batch_size, dim=1):
        histograms.add(batch)
    return histograms


def test_the_counts_equal_those_of_numpy_on_the_whole_data():
    norms = _norms()
    norms[0, 0, :4] = torch.tensor([0.0, 1e-9, 1e8, EDGES[100]])  # outside, and on an edge
    histograms = _fill(norms)
    for layer, values in zip(histograms.counts, norms):
        edges = np.concatenate([[0], EDGES, [np.inf]]).astype(np.float32)
        expected, _ = np.histogram(values.numpy().ravel(), bins=edges)
        np.testing.assert_array_equal(layer, expected)
    assert histograms.num_images == 30 and histograms.num_tokens == 1500


def test_moments_are_exact_and_quantiles_within_one_bin():
    norms = _norms()
    histograms = _fill(norms)
    values = norms[1].numpy().ravel()
    moments = histograms.moments(1)
    assert moments["mean"] == pytest.approx(values.mean()) and moments["std"] == pytest.approx(values.std(), rel=1e-5)
    assert (moments["min"], moments["max"]) == (values.min(), values.max())
    for share in (0.0, *QUANTILES.values(), 1.0):
        assert histograms.quantile(1, share) == pytest.approx(np.quantile(values, share), rel=0.037)


def test_equal_norms_have_equal_quantiles():
    histograms = _fill(torch.full((1, 3, 4), 5.0))
    assert [histograms.quantile(0, share) for share in (0.01, 0.5, 1)] == pytest.approx([5.0] * 3)
    assert find_valley(histograms.counts[0], images_above=histograms.images_above[0]) is None


def test_shares_are_exact_at_any_edge_and_their_error_is_that_of_a_mean_over_images():
    norms = _norms()
    histograms = _fill(norms)
    threshold = next_edge(float(norms[0].quantile(0.9)))
    result = histograms.share_above(0, threshold)
    is_above = (norms[0] >= np.float32(threshold)).double()
    per_image = is_above.mean(dim=1)
    assert result["share"] == pytest.approx(is_above.mean().item())
    assert result["num_above"] == is_above.sum() and result["num_images_above"] == (per_image > 0).sum()
    reach = 1.96 * per_image.std().item() / 30**0.5
    assert result["high"] - result["share"] == pytest.approx(reach)
    with pytest.raises(ValueError, match="an edge of the histogram"):
        histograms.share_above(0, threshold * 1.01)


def test_the_interval_covers_the_true_share_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        rates = random.beta(1, 9, 40)  # images differ much more than patches of one image do
        norms = torch.tensor(np.where(random.random((40, 25)) < rates[:, None], 50.0, 5.0))[None].float()
        result = _fill(norms, batch_size=40).share_above(0, next_edge(20.0))
        covered += result["low"] <= 0.1 <= result["high"]
    assert 0.85 < covered / 200 < 0.99


def test_no_outlier_has_an_interval_that_shrinks_with_the_images():
    highs = [_fill(torch.ones(1, number, 4)).share_above(0, next_edge(20.0))["high"] for number in (10, 1000)]
    assert highs == pytest.approx([1 - 0.05**0.1, 1 - 0.05**0.001])
    assert _fill(torch.ones(1, 1, 4)).share_above(0, next_edge(20.0))["high"] is None


def test_an_edge_is_above_by_one_bin_at_most_and_the_fixed_threshold_is_one():
    assert next_edge(FIXED_THRESHOLD) == 150.0
    for value in (0.3, 7.7, 149.9, 151.0, 4000.0):
        assert value <= next_edge(value) <= value * 10 ** (1 / 64) * 1.0001
    assert bin_numbers(torch.tensor([150.0])) == bin_numbers(torch.tensor([150.1]))


@pytest.mark.parametrize("ratio, share", [(2.2, 0.05), (5, 0.02), (10, 0.005), (10, 0.2)])
def test_a_second_mode_is_found_and_told_from_the_first(ratio, share):
    random = np.random.default_rng(0)
    is_outlier = random.random((1, 200, 100)) < share
    values = np.where(is_outlier, 40 * ratio, 40) * np.exp(0.08 * random.standard_normal((1, 200, 100)))
    histograms = _fill(torch.tensor(values, dtype=torch.float32), batch_size=50)
    valley = find_valley(histograms.counts[0], images_above=histograms.images_above[0])
    assert valley.depth > 0.9 and 40 < valley.threshold < 40 * ratio
    assert valley.low_mode == pytest.approx(40, rel=0.15) and valley.high_mode == pytest.approx(40 * ratio, rel=0.15)
    assert histograms.share_above(0, valley.threshold)["share"] == pytest.approx(is_outlier.mean(), abs=0.002)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("heavy", [False, True])
def test_one_mode_has_no_valley(spread, heavy):
    for seed in range(5):
        random = np.random.default_rng(seed)
        noise = random.standard_t(4, (1, 100, 200)) if heavy else random.standard_normal((1, 100, 200))
        histograms = _fill(torch.tensor(40 * np.exp(spread * noise), dtype=torch.float32), batch_size=100)
        assert find_valley(histograms.counts[0], images_above=histograms.images_above[0]) is None


def test_two_halves_are_no_artifacts():
    values = torch.cat([torch.full((1, 50, 40), 10.0), torch.full((1, 50, 40), 60.0)], dim=2)
    histograms = _fill(values)
    assert find_valley(histograms.counts[0], images_above=histograms.images_above[0]) is None


def test_all_rules_stand_beside_each_other():
    norms = _norms(1)
    norms[0, :, 0] = 400.0
    layer = summarise_layer(_fill(norms), 0)
    values = norms.numpy().ravel()
    thresholds = {rule: entry["threshold"] for rule, entry in layer["rules"].items()}
    assert layer["automatic_rule"] == "valley" and 30 < thresholds["automatic"] < 400
    assert thresholds["fixed"] == 150 and thresholds["median"] == pytest.approx(3 * np.median(values), rel=0.08)
    assert thresholds["moments"] == pytest.approx(values.mean() + 3 * values.std(), rel=0.04)
    for rule in ("automatic", "fixed"):
        assert layer["rules"][rule]["share"] == 0.02


def test_the_last_layer_decides_if_it_has_any():
    def layer(number, share, rule):
        numbers = {"threshold": 30.0, "share": share, "low": None, "high": None, "num_images_above": 1}
        return {"layer": number, "automatic_rule": rule, "rules": {"automatic": numbers}}

    for shares, rule, word, number, start, end in (
        ([0, 0.02, 0.006], "3 x median", "many", 3, 2, 3),
        ([0, 0.02, 0.0002], "valley", "few", 3, 2, 3),
        ([0.01, 0, 0.0002], "valley", "few", 3, 3, 3),
        ([0, 0.02, 0.00002], "valley", "many", 2, 2, 2),
        ([0, 0.02, 0.00002], "3 x median", "none", 3, None, None),  # a tail that does not last
        ([0, 0.00002, 0], "valley", "none", 3, None, None),
    ):
        layers = [layer(place, share, rule) for place, share in enumerate(shares, start=1)]
        verdict = judge(layers, input_share=0.02)
        assert not verdict["is_in_input"]  # they do not last from the input on
        found = (verdict["level"], verdict["layer"], verdict["from_layer"], verdict["to_layer"])
        assert found == (word, number, start, end)


def test_norms_that_cannot_be_counted_are_refused():
    for norms in (torch.full((1, 2, 3), torch.nan), torch.ones(2, 2, 3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="expected finite norms"):
            NormHistograms(1).add(norms)


@pytest.mark.parametrize("share, words", [(0, "0 %"), (0.00012, "0.012 %"), (0.0237, "2.4 %"), (0.5, "50 %")])
def test_a_share_is_written_with_two_figures(share, words):
    assert format_share(share) == words

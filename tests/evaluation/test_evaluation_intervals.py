"""Intervals: the formula of Wilson by another library, and what a bootstrap must cover."""

import math

import pytest
import torch
from scipy.stats import binomtest

from modeling_vitreg.evaluation.intervals import (
    BOOTSTRAP,
    bootstrap_interval,
    share_of_counts,
    statistic_of_images,
    wilson_interval,
)


@pytest.mark.parametrize("num_right, n", [(0, 5), (1, 1), (7, 20), (199, 200), (200, 200), (1234, 50_000)])
def test_wilson_interval_equals_that_of_scipy(num_right, n):
    expected = binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(num_right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_share_holds_value_interval_and_count():
    measured = share_of_counts("top1", 3, 4)
    assert (measured.metric, measured.value, measured.n) == ("top1", 0.75, 4)
    assert measured.interval[0] < 0.75 < measured.interval[1]


def test_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    values = torch.randn(400, dtype=torch.float64)
    measured = statistic_of_images("mean", lambda weights: weights @ values / 400, num_images=400)
    assert measured.value == pytest.approx(values.mean().item()) and measured.interval_method == BOOTSTRAP
    low, high = measured.interval
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(400), rel=0.1)


def test_bootstrap_depends_on_the_seed_only():
    values = torch.rand(30, dtype=torch.float64)
    intervals = [bootstrap_interval(lambda w: w @ values, num_images=30, seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_draws_in_which_a_statistic_is_not_defined_do_not_count():
    def share_of_first(weights):  # 0 / 0 in a draw without the first two images
        return weights[:, 0] / weights[:, :2].sum(dim=1)

    low, high = bootstrap_interval(share_of_first, num_images=4)
    assert 0 <= low < high <= 1
    with pytest.raises(ValueError, match="NaN in all"):
        bootstrap_interval(lambda weights: weights[:, 0] * torch.nan, num_images=4)


def test_intervals_of_nothing_are_refused():
    with pytest.raises(ValueError, match="n > 0, got 0 of 0"):
        share_of_counts("top1", 0, 0)
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(lambda weights: weights.sum(dim=1), num_images=0)

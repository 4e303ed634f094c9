"""Values of metrics with their 95 % intervals.

An interval covers the choice of the test images only, not that of the training images or the seed of a head. Shares of
images have Wilson's interval; all other statistics are bootstrapped over the images.

Letters: I images, S draws.

Source: Wilson 1927; Efron 1979 (percentile bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


WILSON = "Wilson, 95 %"
BOOTSTRAP = "percentile bootstrap over images, 95 %, 1000 draws"
CENTRED = "percentile bootstrap over images, less its bias, 95 %, 1000 draws"
_NUM_DRAWS, _DRAWS_AT_ONCE = 1000, 50
_Z = 1.959963984540054  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class MetricValue:
    """Value of a metric on `n` test images, with its interval (low, high)."""

    metric: str
    value: float
    interval: tuple[float, float]
    interval_method: str
    n: int


def share_of_counts(metric: str, num_right: int, n: int) -> MetricValue:
    """Share of correct images, from their number and the number `n` of all images, with Wilson's interval."""
    return MetricValue(metric, num_right / max(n, 1), wilson_interval(num_right, n), WILSON, n)


def statistic_of_images(
    metric: str, statistic: Callable[[Tensor], Tensor], *, num_images: int, seed: int = 0, is_centred: bool = False
) -> MetricValue:
    """A statistic of weighted images with a bootstrap interval.

    Args:
        metric: name of the metric.
        statistic: function of the weights of the images, (S, I) in float64, that returns values (S,).
        num_images: I.
        seed: random seed.
        is_centred: shift the interval by the difference of the value and the mean of the draws. For ranks: images that
            are drawn twice have equal scores, which raises an average precision.

    Raises:
        ValueError: no image.
    """
    value = float(statistic(torch.ones(1, num_images, dtype=torch.float64))[0])
    interval = bootstrap_interval(statistic, num_images=num_images, seed=seed, center=value if is_centred else None)
    return MetricValue(metric, value, interval, CENTRED if is_centred else BOOTSTRAP, num_images)


def wilson_interval(num_right: int, n: int) -> tuple[float, float]:
    """Interval of a share of `n` independent trials.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), p = num_right / n, z of 95 %

    Raises:
        ValueError: not 0 <= num_right <= n, or n is 0.
    """
    if not 0 <= num_right <= n or not n:
        raise ValueError(f"expected 0 ... n correct images out of n > 0, got {num_right} of {n}")
    share, extra = num_right / n, _Z**2 / n
    middle, half = share + extra / 2, _Z * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    low, high = (middle - half) / (1 + extra), (middle + half) / (1 + extra)
    return 0.0 if num_right == 0 else low, 1.0 if num_right == n else high  # exact at the ends


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], *, num_images: int, seed: int = 0, center: float | None = None
) -> tuple[float, float]:
    """Quantiles 2.5 % and 97.5 % of a statistic over draws of I images out of I, with replacement.

    Draws in which the statistic is NaN are ignored. With `center`, the draws are first shifted to this mean.

    Raises:
        ValueError: no image, or the statistic is NaN in all draws.
    """
    if num_images < 1:
        raise ValueError("expected at least one image to draw from, got none")
    generator, values = torch.Generator().manual_seed(seed), []
    for _ in range(_NUM_DRAWS // _DRAWS_AT_ONCE):
        drawn = torch.randint(num_images, (_DRAWS_AT_ONCE, num_images), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add(1, drawn, torch.ones(drawn.shape).double())
        values.append(statistic(counts))
    values = torch.cat(values)
    values = values[~values.isnan()]
    if not len(values):
        raise ValueError("expected a statistic that is defined in at least one draw of images, got NaN in all")
    values = values if center is None else values - values.mean() + center
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high

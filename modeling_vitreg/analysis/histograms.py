"""Histograms of norms, updated batch by batch in constant memory.

The bin edges are fixed in advance, 64 per decade, and include 150, the threshold of the paper. Counts therefore do not
depend on the batches, and a threshold that is an edge divides the patches exactly although it is chosen after the last
image. Other thresholds are rounded up to the next edge, by at most 3.7 %. A norm at the threshold counts as above it.

Letters for shapes: L layers, B images, P tokens of an image, K edges; K + 1 bins, the outer two open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


BINS_A_DECADE = 64
FIXED_THRESHOLD = 150.0  # of the paper, for DINOv2-g
# From 0.0075 to 3 million. As float32, in which norms are compared with them, so that no rounding differs.
EDGES = (FIXED_THRESHOLD * 10.0 ** (np.arange(-275, 276) / BINS_A_DECADE)).astype(np.float32)

_SMOOTHING = 2.0  # bins, standard deviation
_SEPARATION = 1.5  # least ratio of the two modes
_LARGEST_SHARE = 0.3  # above a valley: two modes of like size are two kinds of content, not artifacts
_LEAST_COUNT = 10  # tokens above a valley


class NormHistograms:
    """Histograms of token norms, one per layer, and the sums that an interval over images needs.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int):
        self.counts = np.zeros((num_layers, len(EDGES) + 1), np.int64)
        self.images_above = np.zeros((num_layers, len(EDGES)), np.int64)
        self.num_images = self.num_tokens = 0
        self._squares_above = np.zeros((num_layers, len(EDGES)))
        self._sums, self._squares = np.zeros(num_layers), np.zeros(num_layers)
        self._smallest, self._largest = np.full(num_layers, np.inf), np.zeros(num_layers)

    def add(self, norms: Tensor, *, bins: Tensor | None = None) -> None:
        """Add the norms (L, B, P) of a batch; `bins` are their `bin_numbers`, if the caller has computed them.

        Raises:
            ValueError: norms of another number of layers, or that are not finite.
        """
        if norms.ndim != 3 or len(norms) != len(self.counts) or not norms.isfinite().all():
            raise ValueError(
                f"expected finite norms (layers, images, tokens) of {len(self.counts)} layers, got shape "
                f"{tuple(norms.shape)} with {(~norms.isfinite()).sum().item()} that are not finite"
            )
        counts = count_bins(bin_numbers(norms) if bins is None else bins).cpu()  # [L, B, P] -> [L, B, K + 1]
        # The tokens of an image above edge k are those in the bins after it.
        above = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # [L, B, K + 1] -> [L, B, K]
        self.counts += counts.sum(1).numpy()
        self.images_above += (above > 0).sum(1).numpy()
        self._squares_above += above.double().square().sum(1).numpy()
        exact = norms.double() if norms.device.type != "mps" else norms.cpu().double()
        self._sums += exact.sum((1, 2)).cpu().numpy()
        self._squares += exact.square().sum((1, 2)).cpu().numpy()
        if norms[0].numel():
            self._smallest = np.minimum(self._smallest, exact.amin((1, 2)).cpu().numpy())
            self._largest = np.maximum(self._largest, exact.amax((1, 2)).cpu().numpy())
        self.num_images += norms.shape[1]
        self.num_tokens += norms[0].numel()

    def merge(self, other: NormHistograms) -> None:
        """Add the norms of other images."""
        for name in ("counts", "images_above", "num_images", "num_tokens", "_squares_above", "_sums", "_squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._smallest = np.minimum(self._smallest, other._smallest)
        self._largest = np.maximum(self._largest, other._largest)

    def moments(self, layer: int) -> dict:
        """Exact mean, standard deviation, minimum and maximum of a layer, by its index."""
        mean = self._sums[layer] / self.num_tokens
        variance = max(self._squares[layer] / self.num_tokens - mean**2, 0.0)
        return {
            "mean": float(mean),
            "std": math.sqrt(variance),
            "min": float(self._smallest[layer]),
            "max": float(self._largest[layer]),
        }

    def quantile(self, layer: int, share: float) -> float:
        """Norm below which a `share` of the tokens lie, within one bin (3.7 %) of the exact value.

        Tokens are assumed to be uniformly distributed over the logarithm within a bin.
        """
        below = np.cumsum(self.counts[layer])
        number = int(np.searchsorted(below, share * self.num_tokens))
        number = min(number, len(EDGES))
        before = below[number - 1] if number else 0
        inside = (share * self.num_tokens - before) / max(self.counts[layer][number], 1)
        low = EDGES[number - 1] if number else self._smallest[layer]
        high = EDGES[number] if number < len(EDGES) else self._largest[layer]
        # Bins end at the smallest and largest norm, which are known exactly.
        low, high = max(low, self._smallest[layer]), min(high, self._largest[layer])
        if low <= 0:
            return float(high * inside)
        return float(low * (high / low) ** min(inside, 1.0))

    def share_above(self, layer: int, threshold: float) -> dict:
        """Share of tokens above a threshold, with an interval over images.

        The interval is the mean over images +- 1.96 standard errors, clipped to 0 and 1, because images are
        independent and the patches of one image are not. One image has no interval. If no token is above, the upper
        end is 1 - 0.05 ^ (1 / images), the share of images with outliers that a sample of this size misses once in
        twenty.

        Args:
            layer: index of the layer.
            threshold: one of `EDGES`; see `next_edge`.

        Returns:
            `share`, `low`, `high` (None for one image), `num_above` tokens, `num_images_above` with at least one.
        """
        number = _edge_number(threshold)
        total, num_images = int(self.counts[layer][number + 1 :].sum()), self.num_images
        share, size = total / self.num_tokens, self.num_tokens / num_images
        low = high = None
        if num_images > 1:
            variance = max(self._squares_above[layer][number] / size**2 - num_images * share**2, 0) / (num_images - 1)
            reach = 1.96 * math.sqrt(variance / num_images)
            low, high = max(share - reach, 0.0), min(share + reach, 1.0)
            if not total:
                high = 1 - 0.05 ** (1 / num_images)
        counts = {"num_above": total, "num_images_above": int(self.images_above[layer][number])}
        return {"share": share, "low": low, "high": high, **counts}


def bin_numbers(norms: Tensor) -> Tensor:
    """Bin of each norm, 0 below the first edge, K from the last edge on; int64, of the shape of `norms`."""
    edges = torch.from_numpy(EDGES).to(norms.device)
    return torch.bucketize(norms.float().contiguous(), edges, right=True)


def count_bins(bins: Tensor, *, num_bins: int = len(EDGES) + 1) -> Tensor:
    """Counts (..., bins) of bin numbers (..., P)."""
    leading, size = bins.shape[:-1], bins.shape[-1]
    rows = bins.reshape(-1, size)
    offsets = torch.arange(len(rows), device=bins.device)[:, None] * num_bins
    counts = torch.bincount((rows + offsets).flatten(), minlength=len(rows) * num_bins)
    return counts.reshape(*leading, num_bins)


def next_edge(value: float) -> float:
    """First edge at or above a value; the last edge for larger values."""
    number = int(np.searchsorted(EDGES, np.float32(value)))
    return float(EDGES[min(number, len(EDGES) - 1)])


@dataclass(frozen=True)
class Valley:
    """The gap between the normal norms of a layer and a second mode of larger ones.

    Args:
        depth: from 0 to 1, empty: one minus the lowest count between the modes over the lower of both.
        threshold: the edge in the middle of the lowest stretch.
        low_mode, high_mode: norms at the two peaks.
    """

    depth: float
    threshold: float
    low_mode: float
    high_mode: float


def find_valley(counts: np.ndarray, *, images_above: np.ndarray) -> Valley | None:
    """Find the valley after the highest mode of a histogram over the logarithm of the norm, if there is one.

    for each bin above the highest peak of the smoothed histogram:
        the other mode is the highest peak above that bin
        depth = 1 - count of the bin / count of the other mode
    the deepest bin wins, provided that the modes are a factor 1.5 apart, that the other holds ten tokens or more of
    two images or more, but at most 30 % of all, and rises from the valley by four standard deviations of its count.

    Args:
        counts: (K + 1,) of one layer.
        images_above: (K,) images with a token above each edge.
    """
    reach = int(4 * _SMOOTHING)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SMOOTHING) ** 2)
    smooth = np.convolve(counts, kernel / kernel.sum(), mode="same")
    peak = int(np.argmax(smooth))
    behind = np.maximum.accumulate(smooth[::-1])[::-1]  # highest count from each bin on
    window = 2 * _SMOOTHING * math.sqrt(math.pi)  # bins over which the smoothing counts
    rise = (behind - smooth) * window
    place = np.array([bin + int(np.argmax(smooth[bin:])) for bin in range(len(smooth))])  # of the other mode
    total = counts.sum()
    above = total - np.cumsum(counts)  # behind each bin
    images = np.append(images_above, 0)
    is_valley = (
        (np.arange(len(smooth)) > peak)
        & (place - peak >= BINS_A_DECADE * math.log10(_SEPARATION))
        & (above >= _LEAST_COUNT)
        & (above <= _LARGEST_SHARE * total)
        & (images >= min(2, images_above.max(initial=0)))
        & (rise > 4 * np.sqrt((behind + smooth) * window))
    )
    if not is_valley.any():
        return None
    depths = np.where(is_valley, 1 - smooth / np.maximum(behind, 1e-12), -1.0)
    is_lowest = depths >= depths.max() - 1e-9
    first = int(np.argmax(is_lowest))
    length = int(np.argmin(np.append(is_lowest[first:], False)))  # of the first stretch, for there may be several
    middle = first + length // 2
    return Valley(
        depth=float(depths.max()),
        threshold=float(EDGES[min(middle, len(EDGES) - 1)]),
        low_mode=_centre(peak),
        high_mode=_centre(int(place[middle])),
    )


def _edge_number(threshold: float) -> int:
    number = int(np.searchsorted(EDGES, np.float32(threshold)))
    if number == len(EDGES) or EDGES[number] != np.float32(threshold):
        raise ValueError(f"expected a threshold that is an edge of the histogram, got {threshold}: use `next_edge`")
    return number


def _centre(number: int) -> float:
    low, high = EDGES[max(number - 1, 0)], EDGES[min(number, len(EDGES) - 1)]
    return float(np.sqrt(float(low) * float(high)))

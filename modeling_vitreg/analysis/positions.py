"""Positions of outliers in the image, and similarity of their patches to the neighbours.

Both are counted for each bin of the norm, because the threshold is known only after the last image. This takes
constant memory and no second pass.

Letters for shapes: L layers, B images, P patches, D width, K + 1 bins of norms, S bins of similarity.

Source: Darcet et al. 2024, arXiv 2309.16588, figure 5a (similarity right after the patch embedding) and appendix A
(places). The similarity is that of the embedding without positions, the mean over the up to four neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .histograms import EDGES, count_bins


SIMILARITY_EDGES = np.linspace(-1, 1, 81)
_NUM_NORMS = len(EDGES) + 1


def neighbour_similarity(patches: Tensor, *, grid: tuple) -> Tensor:
    """Mean cosine similarity of each patch to its neighbours above, below, left and right, as far as they exist.

    Args:
        patches: (B, P, D), row by row.
        grid: (rows, columns).

    Returns:
        (B, P), from -1 to 1; NaN on a grid of one patch, which has no neighbour.
    """
    units = F.normalize(patches.float(), dim=-1).unflatten(1, tuple(grid))  # [B, P, D] -> [B, rows, columns, D]
    down = (units[:, 1:] * units[:, :-1]).sum(-1)  # [B, rows - 1, columns]
    right = (units[:, :, 1:] * units[:, :, :-1]).sum(-1)  # [B, rows, columns - 1]
    total = F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0)) + F.pad(right, (0, 1)) + F.pad(right, (1, 0))
    has_down, has_right = torch.ones_like(down), torch.ones_like(right)
    count = F.pad(has_down, (0, 0, 0, 1)) + F.pad(has_down, (0, 0, 1, 0))
    count = count + F.pad(has_right, (0, 1)) + F.pad(has_right, (1, 0))
    return (total / count).flatten(1)


class PositionCounts:
    """Counts of patches by layer, norm and position, and by layer, norm and similarity to their neighbours.

    The memory is 2,200 bytes per layer and patch, for example 5 MB for 12 layers of 14 x 14 patches.

    Args:
        num_layers: L.
        grid: (rows, columns), the same for all images.
    """

    def __init__(self, num_layers: int, *, grid: tuple):
        self.grid = tuple(grid)
        num_patches = self.grid[0] * self.grid[1]
        self.by_place = torch.zeros(num_layers, num_patches, _NUM_NORMS, dtype=torch.int32)
        self.by_similarity = np.zeros((num_layers, _NUM_NORMS, len(SIMILARITY_EDGES) - 1), np.int64)
        self._similarities = np.zeros((num_layers, _NUM_NORMS))  # sums
        self.num_images = 0

    def add(self, bins: Tensor, similarity: Tensor) -> None:
        """Add a batch: bins of norms (L, B, P) of `bin_numbers`, and similarity (B, P) of `neighbour_similarity`."""
        num_layers, num_images, num_patches = bins.shape
        rows = torch.arange(num_layers * num_patches).view(num_layers, 1, num_patches) * _NUM_NORMS
        cells = (rows + bins.cpu()).flatten()  # [L, B, P] -> [L B P]
        self.by_place.view(-1).scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))
        self.num_images += num_images
        if num_patches == 1:
            return  # no neighbours
        num_cells = len(SIMILARITY_EDGES) - 1
        cells = ((similarity + 1) / 2 * num_cells).long().clamp(0, num_cells - 1)  # [B, P]
        joint = (bins * num_cells + cells).flatten(1)  # [L, B, P] -> [L, B P]
        counts = count_bins(joint, num_bins=_NUM_NORMS * num_cells)
        self.by_similarity += counts.view(num_layers, _NUM_NORMS, num_cells).cpu().numpy()
        sums = torch.zeros(num_layers, _NUM_NORMS, device=bins.device)
        sums.scatter_add_(1, bins.flatten(1), similarity.flatten().expand(num_layers, -1))
        self._similarities += sums.double().cpu().numpy() if sums.device.type != "mps" else sums.cpu().numpy()

    def merge(self, other: PositionCounts) -> None:
        """Add the patches of other images."""
        for name in ("by_place", "by_similarity", "_similarities", "num_images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def heat_map(self, layer: int, *, threshold: float) -> np.ndarray:
        """Share of images (rows, columns) whose patch is an outlier, for an index of a layer and an edge."""
        counts = self.by_place[layer][:, _first_bin(threshold) :].sum(-1).numpy()
        return (counts / self.num_images).reshape(self.grid)

    def summarise(self, layer: int, *, threshold: float) -> dict:
        """Positions and neighbours of the outliers of one layer.

        Args:
            layer: index of the layer, its number minus 1.
            threshold: an edge of the histogram.

        Returns:
            `layer`, `threshold`, `num_images`, `heat_map` (rows of shares of images), `border_share` (share of
            outliers on the border) with `border_share_by_chance` (share of patches on the border), the `most_frequent`
            positions as [row, column, share], and `similarity`: for `outlier` and `normal` patches their number, mean
            (None without patches) and histogram over `edges`.
        """
        heat = self.heat_map(layer, threshold=threshold)
        ring = np.ones(self.grid, bool)
        ring[1:-1, 1:-1] = False
        hottest = np.argsort(-heat, axis=None, kind="stable")[:5]
        places = [[*map(int, np.unravel_index(place, self.grid)), float(heat.flat[place])] for place in hottest]
        first = _first_bin(threshold)
        return {
            "layer": layer + 1,
            "threshold": threshold,
            "num_images": self.num_images,
            "heat_map": heat.tolist(),
            "border_share": float(heat[ring].sum() / heat.sum()) if heat.any() else None,
            "border_share_by_chance": float(ring.mean()),
            "most_frequent": [place for place in places if place[2] > 0],
            "similarity": {
                "edges": SIMILARITY_EDGES.tolist(),
                "outlier": self._summarise_similarity(layer, slice(first, None)),
                "normal": self._summarise_similarity(layer, slice(0, first)),
            },
        }

    def _summarise_similarity(self, layer: int, norms: slice) -> dict:
        counts = self.by_similarity[layer, norms].sum(0)
        number = int(counts.sum())
        mean = float(self._similarities[layer, norms].sum() / number) if number else None
        return {"num_patches": number, "mean": mean, "histogram": counts.tolist()}


def _first_bin(threshold: float) -> int:
    return int(np.searchsorted(EDGES, np.float32(threshold))) + 1

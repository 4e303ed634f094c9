"""Attention of the class token and the registers, its distribution over tokens, and similarity of the registers.

Maps are probabilities over all tokens: a map over the patches sums to one minus the attention on the prefix.

Letters for shapes: B images, H heads, Q prefix tokens as queries, N tokens, P patches, R registers, D width.

Source: Darcet et al. 2024, arXiv 2309.16588, section 3.4. Registers that start equal stay equal, because they
have no position; R equal registers act as one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


DUPLICATE_COSINE = 0.999  # from this similarity on, two registers count as equal


def attention_entropy(maps: Tensor) -> Tensor:
    """Entropy of maps (..., P), each scaled to sum to one, divided by that of a uniform map: from 0 to 1.

    NaN for a map of zeros and for a single patch.
    """
    shares = maps.float() / maps.float().sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / np.log(maps.shape[-1])


def map_overlap(maps: Tensor) -> Tensor:
    """Overlap (..., Q, Q) of the maps (..., Q, P) of several queries: 1 for equal maps, 0 for disjoint ones.

    overlap of a and b = sum over patches of the smaller of both, each scaled to sum to one
    """
    shares = maps.float() / maps.float().sum(-1, keepdim=True)
    return torch.minimum(shares.unsqueeze(-2), shares.unsqueeze(-3)).sum(-1)


def register_similarity(registers: Tensor) -> Tensor:
    """Cosine similarity (R, R) between registers (B, R, D), mean over images."""
    units = F.normalize(registers.float(), dim=-1)
    return (units @ units.transpose(1, 2)).mean(0)


def find_duplicates(similarity: Tensor, *, least: float = DUPLICATE_COSINE) -> list[list[int]]:
    """Groups of two or more registers, counted from 1, whose similarity to the first of the group is at least
    `least`."""
    groups, is_taken = [], [False] * len(similarity)
    for first in range(len(similarity)):
        if is_taken[first]:
            continue
        group = [other for other in range(first, len(similarity)) if similarity[first, other] >= least]
        group = [other for other in group if not is_taken[other]]
        for other in group:
            is_taken[other] = True
        if len(group) > 1:
            groups.append([other + 1 for other in group])
    return groups


class AttentionMeans:
    """Attention of the prefix tokens in each layer, mean over images, in constant memory.

    Args:
        num_layers: number of layers that are measured.
        kinds: number of tokens of each kind, in order: cls, distillation, registers, patches.
    """

    def __init__(self, num_layers: int, *, kinds: dict):
        self.kinds = dict(kinds)
        self.queries = [
            f"register {number + 1}" if kind == "registers" else f"{kind} {number + 1}" if number else kind
            for kind, count in self.kinds.items()
            if kind != "patches"
            for number in range(count)
        ]
        self.num_images = 0
        self._sums = [{} for _ in range(num_layers)]

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, probabilities: list[Tensor], top_places: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: (B, H, Q, N) of each layer.
            top_places: (B,), the patch with the largest norm in the last layer.
        """
        num_prefix = len(self.queries)
        for sums, values in zip(self._sums, probabilities):
            values = values.float()
            maps = values[..., num_prefix:]  # [B, H, Q, N] -> [B, H, Q, P]
            mean_maps = maps.mean(1)  # [B, H, Q, P] -> [B, Q, P]
            places = top_places.view(-1, 1, 1, 1).expand(*maps.shape[:3], 1)
            kinds = values.split(list(self.kinds.values()), dim=-1)
            found = {
                "entropy": attention_entropy(maps).mean(1),  # [B, H, Q] -> [B, Q]
                "attention_share": torch.stack([part.sum(-1).mean(1) for part in kinds], dim=-1),  # [B, Q, kinds]
                "top": maps.gather(-1, places)[..., 0].mean(1),
                "overlap": map_overlap(mean_maps),
                "head_attention_share": maps.sum(-1),  # [B, H, Q]
                "map": mean_maps,
            }
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.double().sum(0).cpu().numpy()
        self.num_images += len(top_places)

    def merge(self, other: AttentionMeans) -> None:
        """Add the maps of other images."""
        if not self.num_images:
            self._sums = other._sums
        elif other.num_images:
            pairs = zip(self._sums, other._sums)
            self._sums = [{name: value + more[name] for name, value in sums.items()} for sums, more in pairs]
        self.num_images += other.num_images

    def summarise(self, layers: list[int]) -> dict:
        """Numbers of the measured layers, whose numbers are `layers`.

        Returns:
            `num_images`, `queries`, and `layers`, each with `layer` and for each query `entropy` (1: uniform),
            `attention_share` on each kind of token, `top_patch_share` on the patch with the largest norm,
            `top_patch_ratio` of that share to a uniform one, `head_attention_share` on the patches by head, and
            `overlap` with each query.
        """
        numbers = [self._summarise_layer(sums, layer) for sums, layer in zip(self._sums, layers)]
        return {"num_images": self.num_images, "queries": self.queries, "layers": numbers}

    def mean_maps(self, place: int) -> np.ndarray:
        """Maps (Q, P) of a measured layer, by its index, mean over images and heads."""
        return self._sums[place]["map"] / self.num_images

    def _summarise_layer(self, sums: dict, layer: int) -> dict:
        mean = {name: value / self.num_images for name, value in sums.items()}
        patches = list(self.kinds).index("patches")
        even = mean["attention_share"][:, patches] / mean["map"].shape[-1]
        return {
            "layer": layer,
            "entropy": _finite(mean["entropy"]),
            "attention_share": [dict(zip(self.kinds, row)) for row in mean["attention_share"].tolist()],
            "top_patch_share": mean["top"].tolist(),
            "top_patch_ratio": (mean["top"] / np.maximum(even, 1e-30)).tolist(),
            "head_attention_share": mean["head_attention_share"].T.tolist(),  # [H, Q] -> [Q, H]
            "overlap": [_finite(row) for row in mean["overlap"]],
        }


def _finite(values: np.ndarray) -> list:
    return [value if np.isfinite(value) else None for value in values.tolist()]

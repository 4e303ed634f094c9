"""Outliers among the tokens that are left at the end of a model that works on fewer tokens.

Letters for shapes: B images, P patches, M tokens that the patches went into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling_vitreg.analysis.histograms import NormHistograms
from modeling_vitreg.encoding import Consumer, Crop, EncodedBatch, Needs
from modeling_vitreg.features import find_reduction


class FirstImages(Consumer):
    """Pixels of the first images that could be read.

    Args:
        number: of images.
        transform: as of all consumers of the pass.
    """

    def __init__(self, number: int, transform: Crop):
        self.needs, self.number, self._kept = Needs(transform=transform), number, []

    @property
    def pixels(self) -> Tensor:
        """(B, C, height, width), on the CPU."""
        return torch.cat(self._kept)[: self.number]

    def update(self, batch: EncodedBatch) -> None:
        """Add a batch."""
        if sum(map(len, self._kept)) < self.number:
            self._kept.append(batch.pixels.cpu())

    def merge(self, others: Sequence[FirstImages]) -> None:
        """Add the images of other processes."""
        self._kept += [pixels for other in others for pixels in other._kept]


class Survivors(Consumer):
    """Norms of the tokens that patches went into, in the last layer.

    A token of several patches counts once, while `analysis` counts each patch. Outliers that never merge are a larger
    share of the tokens than of the patches.

    Args:
        transform: as of all consumers of the pass.
    """

    name = "outliers among surviving tokens"

    def __init__(self, transform: Crop):
        self.needs, self._norms = Needs(features=((-1, "token"),), transform=transform), NormHistograms(1)

    def update(self, batch: EncodedBatch) -> None:
        """Add a batch."""
        norms = batch.tokens(-1).patch_tokens.float().norm(dim=-1)  # [B, P, D] -> [B, P]
        with batch.autocast():
            reduction = find_reduction(batch.encoder, batch.pixels)
        if "learned_tokens" in (reduction or {}):
            norms = reduction.learned_tokens.float().norm(dim=-1)  # [B, S, D] -> [B, S]
        elif hasattr(reduction, "merge"):
            norms = reduction.merge(norms.unsqueeze(-1)).squeeze(-1)  # equal in all patches of a token
        self._norms.add(norms[None])

    def merge(self, others: Sequence[Survivors]) -> None:
        """Add the norms of other processes."""
        for other in others:
            self._norms.merge(other._norms)

    def compute(self, threshold: float) -> dict:
        """`share` of tokens whose norm is above an edge of a histogram, with `low` and `high`, and `num_tokens`."""
        found = self._norms.share_above(0, threshold)
        return {**found, "threshold": threshold, "num_tokens": self._norms.num_tokens / self._norms.num_images}

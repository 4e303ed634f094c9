"""TokenCut: a normalised cut of the graph of patches into two parts, object and background.

Letters for shapes: B images, P patches, D width.

Source: Wang et al. 2022, arXiv 2202.11539 (YangtaoWANG95/TokenCut, `object_discovery.py`); normalised cuts: Shi and
Malik 2000.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.features import TokenFeatures

from .lost import check_finite, check_patches


TAU, EPSILON = 0.2, 1e-5
_SAME = 1e-9  # relative difference in float64 that counts as equal


@dataclass(frozen=True)
class TokenCutResult:
    """Result of TokenCut for each image of a batch.

    Args:
        seeds: (B,), the patch of largest absolute value in the eigenvector, the first of several.
        eigenvector: (B, P) in float64, of the second smallest eigenvalue; larger on the object.
        mask: (B, P), true on the part that contains the seed; the object is the component that contains it.
        is_degenerate: (B,), true if the second eigenvalue is not simple, so the cut is arbitrary: all patches are
            equal, none is similar to another, or there is one patch.
    """

    seeds: Tensor
    eigenvector: Tensor
    mask: Tensor
    is_degenerate: Tensor


@torch.no_grad()
def tokencut(features: TokenFeatures | Tensor, *, tau: float = TAU, epsilon: float = EPSILON) -> TokenCutResult:
    """Divide each image into two parts.

    for each image:
        W[i, j] = 1 where the cosine of patches i and j is above `tau`, else `epsilon`; D = its sums, on a diagonal
        y = eigenvector of (D - W) y = lambda D y for the second smallest lambda
        seed = where |y| is largest; sign of y such that y is above its mean there
        mask = y > mean of y

    Args:
        features: features of the patches (B, P, D), or `TokenFeatures`.
        tau: cosine above which two patches are joined.
        epsilon: weight of all other pairs, above 0.

    Raises:
        ValueError: the features have another shape or are not finite, or epsilon is out of range.

    Source: see the module. As published: keys of the last layer, tau 0.2, epsilon 1e-5.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"expected an epsilon between 0 and 1, got {epsilon}: the graph must stay connected")
    patches = check_patches(features)
    check_finite(patches)
    patches = F.normalize(patches, dim=-1)
    with torch.autocast(patches.device.type, enabled=False):
        is_joined = patches @ patches.transpose(1, 2) > tau  # [B, P, D] -> [B, P, P]
    vector, is_degenerate = second_eigenvector(torch.where(is_joined, 1.0, torch.tensor(epsilon).double()))
    sizes = vector.abs()
    seeds = (sizes >= (1 - _SAME) * sizes.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    mean = vector.mean(dim=1, keepdim=True)
    mask = vector > mean
    is_flipped = ~mask.gather(1, seeds[:, None])
    return TokenCutResult(
        seeds=seeds,
        eigenvector=torch.where(is_flipped, -vector, vector),
        mask=mask ^ is_flipped,
        is_degenerate=is_degenerate,
    )


def second_eigenvector(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Second eigenvector y of (D - W) y = lambda D y, and whether its eigenvalue is not simple.

    With u = D^(1/2) y this is the vector of the second largest eigenvalue of D^(-1/2) W D^(-1/2), a symmetric matrix.

    Args:
        weights: W, (B, P, P), symmetric and above zero, in float64.

    Returns:
        Vectors (B, P) with y' D y = 1 and any sign, and Booleans (B,). A graph of one patch has the vector 0.
    """
    roots = weights.sum(dim=-1).sqrt()
    if weights.shape[-1] == 1:
        return torch.zeros_like(roots), torch.ones_like(roots[:, 0], dtype=torch.bool)
    values, vectors = torch.linalg.eigh(weights / (roots[:, :, None] * roots[:, None]))
    is_shared = torch.zeros_like(values[:, 0], dtype=torch.bool)
    if weights.shape[-1] > 2:
        is_shared = values[:, -2] - values[:, -3] < _SAME
    return vectors[:, :, -2] / roots, is_shared

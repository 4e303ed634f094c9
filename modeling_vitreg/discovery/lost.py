"""LOST: find an object without labels from the similarities between the patches of an image.

Patches of an object are similar to few other patches, patches of the background to many. The patch with the fewest
positive similarities is the seed. Patches with few similarities that are similar to the seed expand it. The object
consists of the patches that are similar to their sum. Features may be queries, keys, values or tokens of any layer.

Letters for shapes: B images, P patches, D width, k candidates of the expansion.

Source: Simeoni et al. 2021, arXiv 2109.14279 (valeoai/LOST, `object_discovery.py`); the bias of the Gram matrix that
models with registers need: Darcet et al. 2024, arXiv 2309.16588, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.features import TokenFeatures


NUM_CANDIDATES = 100
_BLOCK = 128  # rows per matrix product
_CHUNK = {"cpu": 2**20, "cuda": 2**28}  # similarities that are computed together


@dataclass(frozen=True)
class LostResult:
    """Result of LOST for each image of a batch.

    Args:
        seeds: (B,), the patch with the lowest degree, the first of several.
        degrees: (B, P), number of other patches with a similarity above zero.
        expansion: (B, P), true for the patches whose similarities are summed.
        correlation: (B, P), similarity to the sum of these patches.
        mask: (B, P), true where the correlation is above zero; the object is the component that holds the seed.
        is_degenerate: (B,), true if all degrees are equal, so the seed is arbitrary, or if the seed is not in the
            mask; another bias or centred features may help.
    """

    seeds: Tensor
    degrees: Tensor
    expansion: Tensor
    correlation: Tensor
    mask: Tensor
    is_degenerate: Tensor


def lost(
    features: TokenFeatures | Tensor,
    *,
    bias: float = 0.0,
    num_candidates: int = NUM_CANDIDATES,
    is_centered: bool = False,
    is_normalized: bool = False,
) -> LostResult:
    """Find one object in each image.

    for each image:
        A = features @ features.T + bias
        degree of i = number of j != i with A[i, j] > 0
        candidates = the `num_candidates` patches of lowest degree, seed = the first of them
        expansion = candidates i with A[seed, i] > 0
        mask = sum over the expansion of A[i] > 0

    Args:
        features: features of the patches (B, P, D), or `TokenFeatures`.
        bias: added to each similarity, in units of squared features, or of the cosine if they are normalised.
        num_candidates: k; all patches if an image has fewer.
        is_centered: subtract the mean over the patches of the image.
        is_normalized: scale each patch to norm 1, after centring.

    Raises:
        ValueError: the features have another shape or are not finite, or there are no candidates.

    Source: see the module. As published: bias 0, 100 candidates, keys of the last layer as they are.
    """
    options = {"num_candidates": num_candidates, "is_centered": is_centered, "is_normalized": is_normalized}
    (result,) = lost_with_biases(features, biases=[bias], **options)
    return result


@torch.no_grad()
def lost_with_biases(
    features: TokenFeatures | Tensor,
    *,
    biases: Sequence[float],
    num_candidates: int = NUM_CANDIDATES,
    is_centered: bool = False,
    is_normalized: bool = False,
) -> list[LostResult]:
    """LOST with several biases, one result for each; they share the similarities, which are most of the work.

    The whole matrix of similarities is never in memory. Degrees are counted block by block, and similarities to the
    seed and to the sum of the expansion are products with a vector. Arguments and errors are those of `lost`.
    """
    if num_candidates < 1:
        raise ValueError(f"expected one candidate or more, got {num_candidates}; the published number is 100")
    patches = check_patches(features)
    check_finite(patches.square().sum(dim=-1))  # squares may overflow where features do not
    size = max(_CHUNK.get(patches.device.type, _CHUNK["cpu"]) // patches.shape[1] ** 2, 1)
    parts = []
    for chunk in patches.split(size):
        if is_centered:
            chunk = chunk - chunk.mean(dim=1, keepdim=True)
        if is_normalized:
            chunk = F.normalize(chunk, dim=-1)
        with torch.autocast(chunk.device.type, enabled=False):
            degrees = count_similar(chunk, biases=biases)
            parts.append([_expand(chunk, *pair, num_candidates) for pair in zip(degrees, biases)])
    return [_join(chunks) for chunks in zip(*parts)]


def count_similar(patches: Tensor, *, biases: Sequence[float]) -> list[Tensor]:
    """Degrees (B, P) for each bias: the number of other patches whose product with a patch, plus the bias, is above 0.

    Args:
        patches: (B, P, D) in float32.
        biases: one or more.
    """
    num_patches = patches.shape[1]
    is_cpu = patches.device.type == "cpu"
    block = _BLOCK if is_cpu else num_patches  # a block fits the cache of a CPU; a GPU is faster with all rows at once
    degrees = [patches.new_zeros(patches.shape[:2], dtype=torch.int64) for _ in biases]
    for start in range(0, num_patches, block):
        stop = min(start + block, num_patches)
        # The matrix is symmetric: only the part right of the diagonal is computed, and counted for rows and columns.
        similarity = patches[:, start:stop] @ patches[:, start:].transpose(1, 2)  # [B, block, P - start]
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        for counts, bias in zip(degrees, biases):
            is_similar = similarity > -bias
            counts[:, start:stop] += is_similar.sum(dim=2)
            counts[:, stop:] += is_similar[:, :, stop - start :].sum(dim=1)
    return degrees


def _expand(patches: Tensor, degrees: Tensor, bias: float, num_candidates: int) -> LostResult:
    order = degrees.argsort(dim=1, stable=True)
    images = torch.arange(len(patches), device=patches.device)
    seeds, candidates = order[:, 0], order[:, :num_candidates]  # [B, P] -> [B], [B, k]
    to_seed = patches @ patches[images, seeds, :, None]  # [B, P, D] -> [B, P, 1]
    is_similar = to_seed[..., 0].gather(1, candidates) > -bias  # [B, P] -> [B, k]
    expansion = torch.zeros_like(degrees, dtype=torch.bool).scatter(1, candidates, is_similar)
    total = expansion[:, None].to(patches.dtype) @ patches  # [B, 1, P] and [B, P, D] -> [B, 1, D]
    correlation = (patches @ total.transpose(1, 2))[..., 0] + bias * expansion.sum(dim=1, keepdim=True)  # [B, P]
    mask = correlation > 0
    is_flat = degrees.amin(dim=1) == degrees.amax(dim=1)
    return LostResult(
        seeds=seeds,
        degrees=degrees,
        expansion=expansion,
        correlation=correlation,
        mask=mask,
        is_degenerate=is_flat | ~mask[images, seeds],
    )


def _join(parts: Sequence[LostResult]) -> LostResult:
    return LostResult(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(LostResult)))


def check_patches(features: TokenFeatures | Tensor) -> Tensor:
    """Patches (B, P, D) in float32.

    Raises:
        ValueError: another shape, or no patch.
    """
    patches = features.patch_tokens if isinstance(features, TokenFeatures) else features
    if patches.ndim != 3 or not patches.numel():
        raise ValueError(
            f"expected features (images, patches, width) with at least one patch, got shape {tuple(patches.shape)}"
        )
    return patches.detach().float()


def check_finite(values: Tensor) -> None:
    """Check that values (B, ...) are finite.

    Raises:
        ValueError: the message names the images.
    """
    is_finite = values.isfinite().flatten(1).all(dim=1)
    if not is_finite.all():
        images = (~is_finite).nonzero().flatten().tolist()
        raise ValueError(
            f"expected finite features, got NaN or infinity in images {images}: the encoder may have diverged"
        )

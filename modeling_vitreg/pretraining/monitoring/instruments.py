"""Measures of a self-supervised run: entropies of the targets, rank of the features, similarity of the registers.

A joint-embedding loss can collapse in two ways. Uniform collapse: every target is the uniform distribution, and the
loss stays at ln K. Constant collapse: all images have the same target, and the loss falls to the entropy of that
target. In both, the mean target has no more entropy than a single one, because targets do not depend on the image.

Letters for shapes: B images, K prototypes, R registers, D width. Entropies are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows: -sum_k p[k] ln p[k], from 0 (one prototype) to ln K (no preference).

    Args:
        probabilities: (B, K), rows sum to one, as the teacher's targets do; any floating dtype.

    Returns:
        float32 scalar in nats, on the same device; nothing waits for the device.

    Raises:
        ValueError: not a matrix, or no rows.
    """
    _check_matrix("probabilities", probabilities)
    # float32: in bfloat16 a sum over thousands of prototypes loses the tail.
    return torch.special.entr(probabilities.float()).sum(dim=1).mean()


@torch.no_grad()
def entropy_of_mean(probabilities: Tensor, *, processes: DistributedContext = SINGLE_PROCESS) -> Tensor:
    """Entropy of the mean row, at least `entropy` of the same rows and at most that plus ln B.

    Near ln K the images spread over all prototypes; near `entropy` all rows are the same. Few images cannot use many
    prototypes: compare with both bounds, not with ln K alone.

    Args:
        probabilities: (B, K), rows sum to one; of this process, B may differ between processes.
        processes: the mean is over the rows of all of them, so all of them have to call.

    Returns:
        float32 scalar in nats.

    Raises:
        ValueError: not a matrix, or no rows.
    """
    _check_matrix("probabilities", probabilities)
    rows = probabilities.float()
    count = processes.all_reduce_sum(rows.new_full((), len(rows)))
    mean = processes.all_reduce_sum(rows.sum(dim=0)) / count  # [B, K] -> [K]
    return torch.special.entr(mean).sum()


def collapse_line(num_prototypes: int) -> float:
    """ln K, in nats: loss and entropy of a run whose targets are uniform.

    Raises:
        ValueError: fewer than 2 prototypes.
    """
    if num_prototypes < 2:
        raise ValueError(f"expected 2 or more prototypes, got {num_prototypes}: with one, every loss is 0")
    return math.log(num_prototypes)


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Number of directions that features use (RankMe): exp of the entropy of the normalised singular values.

    s = singular values of `features`, not centred;  p = s / sum(s);  exp(-sum_i p[i] ln p[i])

    Not centred, so that a large mean that all images share counts as the one direction that it is. Computed in float64
    on the CPU. The paper adds 1e-7 to p; here 0 ln 0 is 0, so that k equal directions give k exactly.

    Args:
        features: (B, D), of any scale; B well above D, because the rank is at most min(B, D).

    Returns:
        From 1 to min(B, D); 0 for features that are all zero.

    Raises:
        ValueError: not a matrix, no rows, or features that are not finite.

    Source: Garrido et al. 2023, arXiv 2210.02885, equation 1.
    """
    _check_matrix("features", features)
    if not features.isfinite().all():
        raise ValueError(
            "expected finite features, got NaN or infinity: the encoder may have diverged; check its training loss"
        )
    # On the CPU, for not every accelerator has float64.
    singular = torch.linalg.svdvals(features.cpu().double())
    if not singular[0] > 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


@torch.no_grad()
def register_similarity(model: nn.Module) -> float | None:
    """Largest cosine between two learned registers: near 1 means that two of them are one.

    Args:
        model: one of the package, with or without a head.

    Returns:
        From -1 to 1, or None for a model with fewer than two registers.
    """
    registers = model.base_model.embeddings.register_tokens
    if registers is None or len(registers.weight) < 2:
        return None
    # float64, for cosines of near copies differ from 1 by less than float32 shows.
    directions = nn.functional.normalize(registers.weight.cpu().double(), dim=1)
    first, second = torch.triu_indices(len(directions), len(directions), offset=1)
    return (directions @ directions.T)[first, second].max().item()  # [R, R] -> [R (R - 1) / 2]


def _check_matrix(name: str, values: Tensor) -> None:
    if values.ndim != 2 or not values.numel():
        raise ValueError(
            f"expected {name} (rows, columns) with at least one row, got shape {tuple(values.shape)}: join views and "
            "images by `.flatten(0, -2)`"
        )

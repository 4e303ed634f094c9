"""Spurious tokens of a teacher, and losses that move them into registers.

A token is spurious if it resembles an unrelated image, or resembles what the registers hold, or only takes in what
other tokens send. All features are unit vectors, and all masks are true for clean tokens.

Letters: B crops, P tokens of a crop, N tokens of a full image, R registers, M sampled spurious tokens, D width.

Source: Qiu et al. 2026, UniRefiner, arXiv 2605.19622, and its trainer (Apache-2.0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


TEMPERATURE = 0.2
SAMPLED_SHARE = 0.4  # of the tokens, the most similar to an unrelated image: spurious ones are drawn from these
REGISTER_SIMILARITY = 0.55  # of a token with a register: below it the two are not pushed apart
LIFT = 0.1  # above the threshold, of similarities without a gradient
WEAK_PART, WEAK_WEIGHT = 10, 0.2  # one register in ten may resemble the image


def most_similar(tokens: Tensor, others: Tensor) -> Tensor:
    """Largest cosine (B, P) of each token (B, P, D) with other tokens (B, N, D)."""
    return (tokens @ others.mT).amax(dim=-1)


def match(tokens: Tensor, pool: Tensor) -> Tensor:
    """For each token (B, P, D) the most similar one of a pool (B, N, D), as (B, P, D)."""
    nearest = (tokens @ pool.mT).argmax(dim=-1, keepdim=True)
    return pool.gather(1, nearest.expand(-1, -1, pool.shape[-1]))


def sample_spurious(tokens: Tensor, similarity: Tensor, number: int) -> Tensor:
    """Draw M tokens (B, M, D), with replacement, from the most similar share of tokens (B, P, D)."""
    count = max(int(tokens.shape[1] * SAMPLED_SHARE), 1)
    least = similarity.topk(count, dim=1).values[:, -1:]
    drawn = torch.multinomial((similarity >= least).float(), number, replacement=True)
    return tokens.gather(1, drawn[..., None].expand(-1, -1, tokens.shape[-1]))


def hijackee_scores(queries: list[Tensor], keys: list[Tensor], is_clean: Tensor) -> Tensor:
    """How much less than one a token gives to the others, (B, P).

    a = mean over layers of softmax over j of cos(query i, key j)
    score[j] = 1 - sum over i of a[i, j]; a key that is not clean is zero

    Args:
        queries, keys: of some layers, all heads in one, (B, P, D).
        is_clean: (B, P).
    """
    flows = []
    for query, key in zip(queries, keys):
        key = F.normalize(key, dim=-1) * is_clean[..., None]
        flows.append((F.normalize(query, dim=-1) @ key.mT).softmax(dim=-1))
    return 1 - torch.stack(flows).mean(dim=0).sum(dim=1)


def is_no_hijackee(scores: Tensor, is_clean: Tensor, *, sigma: float) -> Tensor:
    """Whether a score (B, P) is at most `sigma` standard deviations above the mean of all clean tokens."""
    known = scores[is_clean]
    return scores <= known.mean() + sigma * known.std()


def clean_threshold(targets: Tensor, is_clean: Tensor) -> Tensor:
    """Cosine of two random clean targets: the mean of each with the one at its place from the end."""
    clean = targets[is_clean]
    return (clean * clean.flip(0)).sum(dim=-1).mean()


def alignment_loss(
    student: Tensor, targets: Tensor, is_clean: Tensor, pool: Tensor, *, threshold: Tensor, uniformity: float
) -> Tensor:
    """Contrast of clean crop tokens with their targets.

    for each clean token i of a crop:
        add  - s_i . t_i / 0.2  +  uniformity * logsumexp over j of (s_i . F_j / 0.2)
    divide by their number; no gradient flows where s_i . F_j is below the threshold

    Args:
        student: tokens of the student (B, P, D).
        targets: of the teacher (B, P, D).
        is_clean: (B, P).
        pool: all tokens of the teacher in the full image (B, N, D).
        threshold: of `clean_threshold`.
        uniformity: weight of the second term.
    """
    spread = _stop_below(student @ pool.mT, threshold)
    terms = -(student * targets).sum(dim=-1) / TEMPERATURE + uniformity * _logsumexp(spread)
    return terms[is_clean].mean()


def separation_loss(full: Tensor, registers: Tensor) -> Tensor:
    """Mean over the tokens (B, N, D) of an image of logsumexp over registers (B, R, D) of their cosine / 0.2."""
    return _logsumexp(_stop_below(full @ registers.mT, REGISTER_SIMILARITY)).mean()


def absorption_loss(registers: Tensor, student: Tensor, spurious: Tensor, *, threshold: Tensor) -> Tensor:
    """Registers take over spurious tokens, each one another.

    h(r) = the spurious token that register r resembles most
    - mean over r of r . h(r) / 0.2
    - 0.2 * mean of the cosine / 0.2 with the crop, over the tenth of the registers that resemble it most, of those
      above the threshold
    + mean over r of logsumexp over r' of (r . h(r') / 0.2), where cosines below the threshold are threshold + 0.1

    Args:
        registers: of the student (B, R, D).
        student: crop tokens of the student (B, P, D).
        spurious: sampled tokens of the teacher (B, M, D).
        threshold: of `clean_threshold`.
    """
    cosines, nearest = (registers @ spurious.mT).max(dim=-1)
    strongest = most_similar(registers, student.detach()).topk(-(-registers.shape[1] // WEAK_PART), dim=-1).values
    is_near = strongest > threshold
    weak = strongest[is_near].mean() if is_near.any() else strongest.new_zeros(())
    matched = spurious.gather(1, nearest[..., None].expand(-1, -1, spurious.shape[-1]))
    crowd = registers @ matched.mT
    crowd = torch.where(crowd < threshold, (threshold + LIFT).to(crowd.dtype), crowd)
    return -cosines.mean() / TEMPERATURE - WEAK_WEIGHT * weak / TEMPERATURE + _logsumexp(crowd).mean()


def consistency_loss(student: Tensor, cleaner: Tensor) -> Tensor:
    """Cross-entropy of the similarities among the tokens of a crop (B, P, D) with those of cleaner tokens.

    p_i = softmax over j of minmax(s_i . s_j) / 0.2, and q_i the same of the cleaner ones, without gradient
    mean over i of  - sum over j of q_ij log(p_ij + 1e-10)
    """
    with torch.no_grad():
        wanted = (_minmax(cleaner @ cleaner.mT) / TEMPERATURE).softmax(dim=-1)
    found = (_minmax(student @ student.detach().mT) / TEMPERATURE).softmax(dim=-1)
    return -(wanted * (found + 1e-10).log()).sum(dim=-1).mean()


def _stop_below(similarity: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(similarity < threshold, similarity.detach(), similarity)


def _logsumexp(similarity: Tensor) -> Tensor:
    return (similarity / TEMPERATURE).logsumexp(dim=-1)


def _minmax(similarity: Tensor) -> Tensor:
    low, high = similarity.amin(dim=-1, keepdim=True), similarity.amax(dim=-1, keepdim=True)
    return (similarity - low) / (high - low + 1e-10)

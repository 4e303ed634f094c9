"""Anatomy of attention sinks: which heads send most of their attention to one token, and what that does.

A sink is one of two computations. In a *no-operation* the token that is attended to has a tiny value, so the head
writes nothing. In a *broadcast* the token has a value of ordinary or large size, and all tokens receive this vector.
Registers move sinks, they do not remove them.

For each image and head, with attention A (N, N) over all tokens and u_j = LayerScale * W_O v_j:

    s            argmax_j mean_i A_ij, the dominant column
    event        A_is >= 0.5 for at least 0.9 of the queries i; without it the head has no sink
    ratio        |u_s| / mean_{j != s} |u_j|
    stable rank  |U|_F^2 / sigma_1(U)^2 of the update U = A u (without a gate); 1: all tokens receive one vector
    no-operation if ratio <= 0.2; broadcast if ratio >= 0.5 and stable rank <= 1.5; other if neither

Letters for shapes: L layers, B images, H heads, N tokens, P patches, D width, d = D / H.

Source: arXiv 2606.08105 and its code, KempnerInstitute/attention_sink, whose bounds these are. The cosines are those
of arXiv 2602.08626, the effective rank is that of arXiv 2604.14433.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.encoding import EncodedBatch
from modeling_vitreg.features import Encoder, extract_features
from modeling_vitreg.features.encoder import NO_ATTENTION
from modeling_vitreg.features.heads import MAX_ENTRIES, LayerHeads, read_heads
from modeling_vitreg.features.updates import share_of_registers, split_update
from modeling_vitreg.omissions import Failures


LEAST_ATTENTION, LEAST_QUERIES = 0.5, (9, 10)  # of a query, and the share of queries as numerator and denominator
MAX_IDLE_RATIO, MIN_BROADCAST_RATIO, MAX_BROADCAST_RANK = 0.2, 0.5, 1.5
CLASSES = ("no_operation", "broadcast", "other")  # of sinks; numbered from 1, 0 is no sink
RULES = {
    "sink": "at least 90 % of all tokens put at least half of their attention on one token",
    "no_operation": f"a sink whose value is at most {MAX_IDLE_RATIO:g} of the mean of the other tokens",
    "broadcast": f"a sink whose value is at least {MIN_BROADCAST_RATIO:g} of the mean of the other tokens, and an "
    f"update of stable rank {MAX_BROADCAST_RANK:g} or less",
    "other": "a sink that is neither",
}


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """One number for each image and head, (B, H).

    Args:
        sinks: dominant column.
        attention: mean attention on it.
        num_routed: queries with half of their attention or more on it.
        least: smallest attention of a query on it; the strict definition of a sink is least >= 1 - eps.
        ratio, stable_rank: see above, in float64.
        classes: 0 for no sink, else 1 + index in `CLASSES`.
    """

    sinks: Tensor
    attention: Tensor
    num_routed: Tensor
    least: Tensor
    ratio: Tensor
    stable_rank: Tensor
    classes: Tensor


def measure_heads(attention: Tensor, values: Tensor, weights: Tensor) -> HeadStatistics:
    """Statistics of the heads of a layer; arguments as in `features.heads.LayerHeads`.

    No u (N, D) is built: with W = Q R, R (d, d), vectors W x and R x have the same lengths and singular values.
    """
    mass, sinks = attention.mean(dim=2).max(dim=-1)
    column = attention.gather(3, sinks[..., None, None].expand(-1, -1, attention.shape[2], 1))[..., 0]  # [B, H, N]
    (_, roots) = torch.linalg.qr(weights.double(), mode="r")  # [H, d, d]
    lengths = torch.einsum("bhnd,hed->bhne", values.double(), roots).norm(dim=-1)  # [B, H, N]
    own = lengths.gather(2, sinks[..., None])[..., 0]
    others = (lengths.sum(dim=2) - own) / max(lengths.shape[2] - 1, 1)
    update = torch.einsum("bhnd,hed->bhne", (attention @ values).double(), roots)
    energies = torch.linalg.eigvalsh(update.transpose(-1, -2) @ update).clamp(min=0)  # [B, H, d]
    ratio, num_routed = own / others.clamp(min=1e-12), (column >= LEAST_ATTENTION).sum(dim=2)
    stable_rank = energies.sum(dim=-1).clamp(min=1e-30) / energies[..., -1].clamp(min=1e-30)
    classes = classify(num_routed, ratio, stable_rank, num_tokens=attention.shape[2])
    return HeadStatistics(sinks, mass, num_routed, column.amin(dim=2), ratio, stable_rank, classes)


def classify(num_routed: Tensor, ratio: Tensor, stable_rank: Tensor, *, num_tokens: int) -> Tensor:
    """Classes of heads, 0 for no sink, else 1 + index in `CLASSES`; the bounds belong to their classes."""
    is_sink = LEAST_QUERIES[1] * num_routed >= LEAST_QUERIES[0] * num_tokens  # in integers, so that 9 of 10 are enough
    classes = torch.full_like(num_routed, 3)
    classes[(ratio >= MIN_BROADCAST_RATIO) & (stable_rank <= MAX_BROADCAST_RANK)] = 2
    classes[ratio <= MAX_IDLE_RATIO] = 1
    return torch.where(is_sink, classes, 0)


def effective_rank(tokens: Tensor) -> Tensor:
    """(B,): exp(entropy) of the singular values, scaled to sum to one, of centred tokens (B, P, D); 1 if all equal.

    1 to min(P - 1, D), in float64.
    """
    centred = tokens.double() - tokens.double().mean(dim=1, keepdim=True)
    is_wide = centred.shape[1] <= centred.shape[2]
    gram = centred @ centred.transpose(1, 2) if is_wide else centred.transpose(1, 2) @ centred
    energies = torch.linalg.eigvalsh(gram)
    energies = energies.where(energies > 1e-13 * energies[:, -1:], 0)  # rounding, whose root would count
    sizes = energies.sqrt()
    return torch.special.entr(sizes / sizes.sum(dim=1, keepdim=True).clamp(min=1e-300)).sum(dim=1).exp()


def class_patch_cosine(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B,): cosine of the class token and a patch of tokens (B, N, D), mean over patches."""
    return F.cosine_similarity(tokens[:, :1].float(), tokens[:, num_prefix_tokens:].float(), dim=-1).mean(dim=1)


def shift_consistency(encoder: Encoder, pixels: Tensor) -> dict:
    """How well patches follow the content when an image moves by one patch, to the right and down.

    Args:
        encoder: the model.
        pixels: (B, C, height, width); the free row or column is filled with the mean colour, 0.

    Returns:
        `num_images`; `same_content`, mean cosine of normed patches of the last layer with those of the same content,
        and `same_place`, with those at the same place. Artifacts that are bound to places lower the former.

    Raises:
        ValueError: an image of one patch.
    """
    rows, columns = encoder.patch_shape
    (tokens,) = extract_features(encoder, pixels, is_normed=True)
    grids, found = tokens.patch_grid.float(), {"same_content": [], "same_place": []}  # [B, rows, columns, D]
    for axis, step in ((1, rows), (2, columns)):
        if grids.shape[axis] < 2:
            continue
        size = pixels.shape[axis + 1]
        moved = torch.cat([torch.zeros_like(pixels.narrow(axis + 1, 0, step)),
                           pixels.narrow(axis + 1, 0, size - step)], dim=axis + 1)  # fmt: skip
        (shifted,) = extract_features(encoder, moved, is_normed=True)
        ends, others = shifted.patch_grid.float(), grids.shape[axis] - 1
        for name, start in (("same_content", 0), ("same_place", 1)):
            cosines = F.cosine_similarity(grids.narrow(axis, start, others), ends.narrow(axis, 1, others), dim=-1)
            found[name].append(cosines.mean().item())
    if not found["same_content"]:
        raise ValueError("an image of one patch cannot be shifted")
    return {"num_images": len(pixels), **{name: float(np.mean(values)) for name, values in found.items()}}


class SinkSection:
    """Sinks of all heads on the first images, and what goes with them, in constant memory.

    Args:
        num_layers, num_heads: of the model; None where it has no known heads.
        kinds: number of tokens of each kind, in order: class token, distillation token, registers, patches.
        failures: keeps the traceback if the heads of a model cannot be read.
    """

    def __init__(self, num_layers: int, num_heads: int | None, *, kinds: dict, failures: Failures):
        self.kinds, self._failures, self.num_images = dict(kinds), failures, 0
        self.problem = NO_ATTENTION if num_heads == 0 else None
        self._counts = np.zeros((num_layers, num_heads or 0, len(CLASSES), len(kinds)), np.int64)
        self._moments = np.zeros((2, len(CLASSES)))  # sums over images of sinks behind layer 1, and of their squares
        self._sums: dict[str, np.ndarray] = {}  # of numbers for each layer

    def read(self, batch: EncodedBatch, first: int) -> list[Tensor] | None:
        """Read the heads for the first images of a batch, in one pass of their own.

        Returns:
            Attention (B, H, Q, N) of the prefix tokens in each layer, which comes out on the way; None where the heads
            cannot be read.
        """
        if self.problem:
            return None
        encoder, num_tokens = batch.encoder, sum(self.kinds.values())
        size = max(MAX_ENTRIES // ((encoder.num_heads or 1) * num_tokens**2), 1)
        try:
            with batch.autocast():
                use = functools.partial(self._measure, encoder)
                found = [read_heads(encoder, part, use) for part in batch.pixels[:first].split(size)]
        except Exception as error:  # the other sections can be measured
            self.problem = f"the heads of this model cannot be read: {self._failures.note('attention sinks', error)}"
            return None
        tokens = [batch.tokens(number) for number in range(1, encoder.num_layers + 1)]
        ranks = torch.stack([effective_rank(layer.patch_tokens[:first]) for layer in tokens])  # [L, B]
        self._add({"effective_rank": ranks.sum(dim=1).cpu().numpy()})
        classes = torch.cat([torch.stack([part[number][1] for number in part], dim=1) for part in found])  # [B, L, H]
        counts = F.one_hot(classes[:, 1:], len(CLASSES) + 1)[..., 1:].sum(dim=(1, 2)).double().cpu().numpy()
        self._moments += np.stack([counts.sum(axis=0), (counts**2).sum(axis=0)])
        self.num_images += first
        return [torch.cat([part[number][0] for part in found]) for number in found[0]]

    def merge(self, other: SinkSection) -> None:
        """Add what another process measured."""
        self._counts += other._counts
        self._moments += other._moments
        self._add(other._sums)
        self.num_images += other.num_images
        self.problem = self.problem or other.problem

    def compute(self) -> dict:
        """`sinks` of the report.

        Raises:
            ValueError: not requested, or the heads cannot be read.
        """
        if not self.num_images or self.problem:
            raise ValueError(self.problem or "not requested")
        per_image = self._counts / self.num_images  # [L, H, classes, kinds]
        totals = {name: self._interval(number) for number, name in enumerate(CLASSES)}
        layers = []
        for number, counts in enumerate(per_image):
            numbers = {name: float(sums[number] / self.num_images) for name, sums in self._sums.items()}
            layers.append(
                {
                    "layer": number + 1,
                    "per_image": {
                        name: dict(zip(self.kinds, counts[:, place].sum(axis=0).tolist()))
                        for place, name in enumerate(CLASSES)
                    },
                    "heads": {name: counts[:, place].sum(axis=1).tolist() for place, name in enumerate(CLASSES)},
                    **numbers,
                }
            )
        report = {"num_images": self.num_images, "rules": RULES, "totals": totals, "layers": layers}
        return {**report, "sentence": say(report)}

    def _measure(self, encoder: Encoder, heads: LayerHeads) -> tuple[Tensor, Tensor]:
        """Count the heads of a layer; their prefix rows (B, H, Q, N) and classes (B, H)."""
        found, place = measure_heads(heads.attention, heads.values, heads.weights), heads.number - 1
        ends = torch.tensor(list(self.kinds.values())).cumsum(0).to(found.sinks.device)
        kinds = torch.bucketize(found.sinks, ends, right=True)
        marks = F.one_hot(found.classes, len(CLASSES) + 1)[..., 1:, None] * F.one_hot(kinds, len(ends))[..., None, :]
        self._counts[place] += marks.sum(dim=0).cpu().numpy()  # [B, H, classes, kinds]
        numbers, first = {"attention_on_dominant": found.attention.mean(dim=1)}, encoder.num_prefix_tokens
        numbers["strict_sinks"] = (found.least >= LEAST_ATTENTION).double().sum(dim=1)
        if self.kinds["cls"]:
            numbers["cosine_before_norm"] = class_patch_cosine(heads.inputs, first)
            numbers["cosine_behind_norm"] = class_patch_cosine(heads.normed, first)
            if self.kinds["registers"]:
                updates = split_update(heads.attention[:, :, 0], heads.values, heads.weights, encoder=encoder)
                numbers["register_share"] = share_of_registers(updates)
        for name, value in numbers.items():
            self._sums.setdefault(name, np.zeros(len(self._counts)))[place] += value.double().sum().item()
        return heads.attention[:, :, :first].clone(), found.classes

    def _add(self, sums: dict[str, np.ndarray]) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def _interval(self, number: int) -> dict:
        """Sinks per image of a class behind layer 1, with 95 % of the mean over images."""
        total, squares = self._moments[:, number]
        mean, low, high = total / self.num_images, None, None
        if self.num_images > 1:
            variance = max(squares - self.num_images * mean**2, 0) / (self.num_images - 1)
            reach = 1.96 * math.sqrt(variance / self.num_images)
            low, high = max(mean - reach, 0.0), mean + reach
        return {"mean": float(mean), "low": low, "high": high}


def say(report: dict) -> str:
    """The result in one sentence."""
    heads = sum(len(layer["heads"][CLASSES[0]]) for layer in report["layers"][1:])
    means = {name: report["totals"][name]["mean"] for name in CLASSES}
    if not sum(means.values()):
        return f"No sinks: none of the {heads} heads behind layer 1 sends most attention of most tokens to one token."
    where: dict[str, float] = {}
    for layer in report["layers"][1:]:
        for name in CLASSES:
            for kind, count in layer["per_image"][name].items():
                where[kind] = where.get(kind, 0) + count
    words = {"cls": "the class token", "distillation": "the distillation token"}
    most = max(where, key=where.get)
    return (
        f"An image has {sum(means.values()):.3g} sinks in the {heads} heads behind layer 1: "
        f"{means['no_operation']:.3g} no-operations, {means['broadcast']:.3g} broadcasts and {means['other']:.3g} "
        f"others, {where[most] / sum(where.values()):.0%} of them on {words.get(most, most)}."
    )

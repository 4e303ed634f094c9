"""Causal edits of sinks: one head is changed while its attention stays fixed, and the rest of the network runs on.

In a no-operation the patches should not change if the value of the sink becomes zero, and should if it becomes an
ordinary one. In a broadcast, with the value of another image's sink, they should move towards those of that image.

Letters for shapes: B images, N tokens, P patches, D width, d = D / H.

Source: arXiv 2606.08105 and its code, KempnerInstitute/attention_sink, `vit_causal/interventions.py`. The price in
k-NN is ours: there are too few images for a probe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_vitreg.features import Encoder
from modeling_vitreg.features.heads import LayerHeads, entry_of, read_heads
from modeling_vitreg.features.hooks import record_feature
from modeling_vitreg.features.knn import knn_accuracy

from .sinks import CLASSES, measure_heads


EDITS = {
    "zero": "value of the sink: 0",
    "mean": "value of the sink: mean of the head's sinks over other images",
    "donor": "value of the sink: that of the sink of another image",
    "ordinary": "value of the sink: that of a random patch of another image",
    "removed": "attention to the sink removed, the rest scaled up to one",
    "control": "value of a random patch: 0",
}
_LEAST_EVENTS = 2  # images in which a head is a sink of its class
_NUM_NEIGHBORS = 10  # of the k-NN vote; there are few images
_CHUNK = 16  # images whose attention is held


@torch.no_grad()
def edit_sinks(
    encoder: Encoder, pixels: Tensor, labels: Sequence[int | None], *, num_heads: int = 4, seed: int = 0
) -> dict:
    """Edit the heads that are most often sinks of each class, behind layer 1.

    The first half of the images is edited; the second half gives the mean values of sinks. The donor of an image is
    the next one.

    Args:
        encoder: the model.
        pixels: (B, C, height, width), four images or more.
        labels: class of each image, or None; for k-NN.
        num_heads: most heads of a class.
        seed: random seed of the random patches.

    Returns:
        `num_images` edited, `meaning` of the edits, and `classes`: for each class `heads` with `layer`, `head` (from
        1), `num_events` (images in which it is such a sink; others do not count) and `edits`. These hold for each edit
        `change` (RMS change of the normed final patches without the sink, relative to their RMS), `shared` (share of
        the squared change that all patches have in common), `donor_cosine` (of the mean change with the difference of
        the mean patches of donor and image), and `knn` with `knn_before`, accuracy of k-NN of edited and unedited
        images among the others (None without labels).

    Raises:
        ValueError: fewer than four images, or attention that cannot be edited.
    """
    if len(pixels) < 4:
        raise ValueError(f"expected four images or more to edit, got {len(pixels)}")
    random, num_edited = torch.Generator().manual_seed(seed), len(pixels) // 2
    parts = pixels.split(_CHUNK)
    statistics = [read_heads(encoder, part, _measure) for part in parts]
    found = {n: tuple(torch.cat([part[n][i] for part in statistics]) for i in range(3)) for n in statistics[0]}
    if not all(is_average.all() for _, _, is_average in found.values()):
        raise ValueError("the gate of this attention multiplies outside of a module, so its heads cannot be edited")
    base, report = torch.cat([final_tokens(encoder, part) for part in parts]), {}
    for number, name in enumerate(CLASSES[:2], start=1):
        events = {n: (classes[:num_edited] == number).sum(dim=0) for n, (classes, _, _) in found.items() if n > 1}
        ranked = sorted(((c, n, h) for n, row in events.items() for h, c in enumerate(row.tolist())), reverse=True)
        chosen = [(n, h) for c, n, h in ranked[:num_heads] if c >= _LEAST_EVENTS]
        report[name] = {"heads": []}
        for layer, head in chosen:
            is_event = (found[layer][0][:num_edited, head] == number).cpu()
            edited = _edit_head(encoder, pixels, base, layer=layer, head=head, random=random)
            values = _summarise(encoder, edited, base, is_event, labels=labels)
            numbers = {"layer": layer, "head": head + 1, "num_events": int(is_event.sum())}
            report[name]["heads"].append({**numbers, "edits": values})
    return {"num_images": num_edited, "num_held_out": len(pixels) - num_edited, "meaning": EDITS, "classes": report}


def edited_values(
    attention: Tensor, values: Tensor, sinks: Tensor, *, mean: Tensor | None, num_prefix: int, random: torch.Generator
) -> dict[str, Tensor]:
    """What each of `EDITS` adds to the averaged values (B, N, d) of a head: A_:s (v'_s - v_s), exactly.

    Args:
        attention: (B, N, N) of the head.
        values: (B, N, d) of the head.
        sinks: (B,), the dominant column.
        mean: (d,), mean value of sinks over other images; None leaves this edit out.
        num_prefix: tokens in front of the patches.
        random: draws the random patches.
    """
    rows, donors = torch.arange(len(sinks), device=sinks.device), torch.arange(len(sinks)).roll(-1).to(sinks.device)
    own, column = values[rows, sinks], attention[rows, :, sinks]  # [B, d], [B, N]
    patch, donor_patch = (_draw_patch(s, num_prefix, values.shape[1], random) for s in (sinks, sinks[donors]))
    new = {"zero": torch.zeros_like(own)}
    if mean is not None:
        new["mean"] = mean.expand_as(own)
    new |= {"donor": own[donors], "ordinary": values[donors, donor_patch]}
    added = {name: column[..., None] * (value - own)[:, None] for name, value in new.items()}
    cut = attention.scatter(2, sinks[:, None, None].expand(-1, attention.shape[1], 1), 0)
    added["removed"] = cut / cut.sum(dim=-1, keepdim=True).clamp(min=1e-12) @ values - attention @ values
    added["control"] = -attention[rows, :, patch][..., None] * values[rows, patch][:, None]
    return added


def _draw_patch(sinks: Tensor, num_prefix: int, num_tokens: int, random: torch.Generator) -> Tensor:
    """A patch of each image (B,) that is not its sink."""
    num_patches = num_tokens - num_prefix
    drawn = torch.randint(0, num_patches, sinks.shape, generator=random).to(sinks.device)
    return num_prefix + torch.where(drawn + num_prefix == sinks, (drawn + 1) % num_patches, drawn)


def _measure(heads: LayerHeads) -> tuple[Tensor, Tensor, Tensor]:
    found = measure_heads(heads.attention, heads.values, heads.weights)
    return found.classes, found.sinks, torch.full((len(heads.values),), heads.is_average)


def _edit_head(
    encoder: Encoder, pixels: Tensor, base: Tensor, *, layer: int, head: int, random: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Final tokens (B, N, D) of the edited images after each edit, and the sinks (B,)."""
    num_edited, parts = len(pixels) // 2, []

    def take(heads: LayerHeads) -> tuple | None:
        if heads.number != layer:
            return None
        found = measure_heads(heads.attention, heads.values, heads.weights)
        one = heads.attention[:, head].clone(), heads.values[:, head].clone()
        return (*one, found.sinks[:, head], found.classes[:, head] > 0)

    for part in pixels.split(_CHUNK):
        parts.append(read_heads(encoder, part, take)[layer])
    attention, values, sinks, is_sink = (torch.cat(tensors) for tensors in zip(*parts))
    held_out = torch.arange(num_edited, len(pixels), device=sinks.device)[is_sink[num_edited:]]
    mean = values[held_out, sinks[held_out]].mean(dim=0) if len(held_out) else None
    added = edited_values(
        attention[:num_edited], values[:num_edited], sinks[:num_edited],
        mean=mean, num_prefix=encoder.num_prefix_tokens, random=random,
    )  # fmt: skip
    place = slice(head * values.shape[-1], (head + 1) * values.shape[-1])
    edited = {}
    for name, change in added.items():
        chunks = zip(pixels[:num_edited].split(_CHUNK), change.split(_CHUNK))
        tokens = [final_tokens(encoder, part, layer=layer, place=place, change=own) for part, own in chunks]
        edited[name] = torch.cat(tokens), sinks[:num_edited]
    return edited


def final_tokens(
    encoder: Encoder, pixels: Tensor, *, layer: int = 0, place: slice | None = None, change: Tensor | None = None
) -> Tensor:
    """Normed tokens (B, N, D) of the last layer, with a change (B, N, d) of one head."""

    def edit(_, inputs: tuple) -> tuple:
        heads = inputs[0].clone()
        heads[..., place] += change.to(heads.dtype)
        return (heads, *inputs[1:])

    def hooks(keep: Callable) -> Iterator:
        if change is not None:
            yield entry_of(encoder.layers[layer - 1]).register_forward_pre_hook(edit)
        yield from record_feature(encoder.layers, encoder.num_layers, "token", functools.partial(keep, "token"))

    return encoder.norm_tokens(encoder.run(pixels, hooks, num_expected=1)["token"]).float()


def _summarise(
    encoder: Encoder, edited: dict, base: Tensor, is_event: Tensor, *, labels: Sequence[int | None]
) -> dict:
    first, report = encoder.num_prefix_tokens, {}
    is_event = is_event.to(base.device)
    for name, (tokens, sinks) in edited.items():
        own = base[: len(tokens)]
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool, device=base.device)
        kept[torch.arange(len(sinks)), sinks] = False
        measured = measure_change(tokens[:, first:], own[:, first:], kept[:, first:])
        row = {key: float(value[is_event].mean()) for key, value in measured.items()}
        before, after = (_knn(encoder, part, base, labels, is_event) for part in (own, tokens))
        report[name] = {**row, "knn_before": before, "knn": after}
    return report


def measure_change(patches: Tensor, before: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """`change`, `shared` and `donor_cosine` (B,) of `edit_sinks`, over the `kept` (B, P) patches (B, P, D)."""
    kept, change = kept[..., None].double(), (patches - before).double()
    counts = kept.sum(dim=(1, 2)).clamp(min=1)
    energy, mean = (change**2 * kept).sum(dim=(1, 2)), (change * kept).sum(dim=1) / counts[:, None]
    towards = (before.roll(-1, dims=0).mean(dim=1) - before.mean(dim=1)).double()
    return {
        "change": (energy / (before.double() ** 2 * kept).sum(dim=(1, 2)).clamp(min=1e-24)).sqrt(),
        "shared": (mean**2).sum(dim=1) * counts / energy.clamp(min=1e-20),
        "donor_cosine": F.cosine_similarity(mean, towards, dim=-1, eps=1e-8),
    }


def _knn(
    encoder: Encoder, tokens: Tensor, bank: Tensor, labels: Sequence[int | None], is_event: Tensor
) -> float | None:
    """Accuracy of k-NN of images (B, N, D) among all others; class token, or mean patch where there is none."""
    if any(label is None for label in labels):
        return None
    first = encoder.num_prefix_tokens
    own, others = (part[:, 0] if encoder.has_cls_token else part[:, first:].mean(dim=1) for part in (tokens, bank))
    classes, hits = torch.from_numpy(np.unique(labels, return_inverse=True)[1]).to(bank.device), []
    for number in is_event.nonzero()[:, 0].tolist():  # each against all images but itself
        is_other, one = torch.arange(len(others), device=bank.device) != number, slice(number, number + 1)
        query = own[one], classes[one]
        hits.append(knn_accuracy(others[is_other], classes[is_other], *query, num_neighbors=_NUM_NEIGHBORS))
    return sum(hits) / len(hits)

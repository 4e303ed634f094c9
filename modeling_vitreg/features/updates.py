"""What a layer adds to the class token, by the kind of token that it comes from.

An attention map shows where the class token looks, not where its update comes from: in models with registers most of
the update may come through them.

Letters for shapes: B images, H heads, N tokens, D width, d = D / H.

Source: the question is that of Lappe and Giese 2025, arXiv 2505.05892; the share is defined below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .encoder import Encoder, layer_numbers
from .families import find_part
from .heads import output_weights
from .hooks import TOLERANCE, record_attention, record_projected, record_projection, split_values


@torch.no_grad()
def class_token_updates(encoder: Encoder, pixel_values: Tensor, *, layer: int = -1) -> dict[str, Tensor] | None:
    """Vectors that the attention of a layer adds to the class token, one for each kind of token.

    update of a kind = scale * sum over its tokens j and heads h of A[h, class, j] W_O[h] v[h, j]

    The bias of the output projection belongs to no token and is left out.

    Args:
        encoder: from `load_encoder`.
        pixel_values: (B, C, height, width), normalised by `Encoder.prepare`.
        layer: from 1, or from -1 backwards.

    Returns:
        (B, D) for each of "prefix" (class and distillation token), "registers" and "patches"; None for a model without
        class token, or whose attention does more than average its values, as with a gate.

    Raises:
        ValueError: images that do not fit, or no such layer.
    """
    (number,) = layer_numbers(layer, encoder.num_layers, first=1)
    block = encoder.layers[number - 1]
    projection = find_part(block, "projection")
    if not encoder.has_cls_token or projection is None or encoder.num_heads is None:
        return None

    def hooks(keep: Callable) -> Iterator:
        sizes = {"num_heads": encoder.num_heads, "num_queries": 1}
        yield from record_attention(block, functools.partial(keep, "attention"), **sizes)
        yield from record_projection(find_part(block, "attention"), "value", functools.partial(keep, "value"))
        yield from record_projected(find_part(block, "attention"), projection, functools.partial(keep, "sum"))

    found = encoder.run(pixel_values, hooks, num_expected=3)
    attention, expected = found["attention"][:, :, 0], found["sum"][:, 0].float()  # [B, H, N], [B, D]
    try:
        values = split_values(found["value"], num_heads=encoder.num_heads, width=expected.shape[-1])
    except ValueError:
        return None
    averaged = torch.einsum("bhn,bhnd->bhd", attention, values).flatten(1)
    if (averaged - expected).norm() > TOLERANCE * expected.norm():
        return None
    return split_update(attention, values, output_weights(block, num_heads=encoder.num_heads), encoder=encoder)


def split_update(attention: Tensor, values: Tensor, weights: Tensor, *, encoder: Encoder) -> dict[str, Tensor]:
    """What the heads of a layer add to a token, by the kind of token that it comes from; see `class_token_updates`.

    Args:
        attention: (B, H, N) of the token.
        values, weights: see `heads.LayerHeads`.
        encoder: says where the prefix ends.
    """
    num_registers, first = encoder.num_register_tokens, encoder.num_prefix_tokens
    counts = {"prefix": first - num_registers, "registers": num_registers, "patches": attention.shape[-1] - first}
    sizes = list(counts.values())
    return {
        kind: torch.einsum("bhd,hcd->bc", torch.einsum("bhn,bhnd->bhd", shares, part), weights)
        for kind, shares, part in zip(counts, attention.split(sizes, dim=-1), values.split(sizes, dim=2))
    }


def register_share(encoder: Encoder, pixel_values: Tensor, *, layer: int = -1) -> Tensor | None:
    """Share of the update of the class token that comes through registers, (B,) from 0 to 1.

    |update of registers| / (|update of prefix| + |update of registers| + |update of patches|)

    Arguments and errors are those of `class_token_updates`; None where that is None, and without registers.
    """
    updates = class_token_updates(encoder, pixel_values, layer=layer) if encoder.num_register_tokens else None
    if updates is None:
        return None
    return share_of_registers(updates).cpu()


def share_of_registers(updates: dict[str, Tensor]) -> Tensor:
    """(B,): `register_share` of updates (B, D) by kind of token."""
    lengths = {kind: part.norm(dim=-1) for kind, part in updates.items()}
    return lengths["registers"] / sum(lengths.values()).clamp(min=1e-30)

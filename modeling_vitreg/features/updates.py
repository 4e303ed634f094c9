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
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder, layer_numbers
from .families import find_part
from .hooks import record_attention, record_projection


TOLERANCE = 1e-3  # relative difference between the parts' sum and what the model itself adds up


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
        class token, or whose attention does more than average its values (gates, shared heads).

    Raises:
        ValueError: images that do not fit, or no such layer.
    """
    (number,) = layer_numbers(layer, encoder.num_layers, first=1)
    block = encoder.layers[number - 1]
    projection, scale = find_part(block, "projection"), find_part(block, "scale")
    if not encoder.has_cls_token or projection is None:
        return None

    def hooks(keep: Callable) -> Iterator:
        sizes = {"num_heads": encoder.num_heads, "num_queries": 1}
        yield from record_attention(block, functools.partial(keep, "attention"), **sizes)
        yield from record_projection(find_part(block, "attention"), "value", functools.partial(keep, "value"))
        yield projection.register_forward_pre_hook(lambda _, inputs: keep("sum", inputs[0][:, 0]))

    found = encoder.run(pixel_values, hooks, num_expected=3)
    attention, value = found["attention"][:, :, 0], found["value"].float()  # [B, H, N], [B, N, D]
    if value.shape[-1] % encoder.num_heads or value.shape[-1] != projection.weight.shape[1]:
        return None
    value = value.unflatten(-1, (encoder.num_heads, -1))  # [B, N, D] -> [B, N, H, d]
    num_registers, first = encoder.num_register_tokens, encoder.num_prefix_tokens
    counts = {"prefix": first - num_registers, "registers": num_registers, "patches": attention.shape[-1] - first}
    parts = {}
    for kind, weights, values in zip(
        counts, attention.split(list(counts.values()), dim=-1), value.split(list(counts.values()), dim=1)
    ):
        parts[kind] = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)  # [B, D]
    expected = found["sum"].float()
    if (sum(parts.values()) - expected).norm() > TOLERANCE * expected.norm():
        return None
    updates = {kind: F.linear(part, projection.weight.float()) for kind, part in parts.items()}
    return (
        updates if scale is None else {kind: scale(part.to(encoder.dtype)).float() for kind, part in updates.items()}
    )


def register_share(encoder: Encoder, pixel_values: Tensor, *, layer: int = -1) -> Tensor | None:
    """Share of the update of the class token that comes through registers, (B,) from 0 to 1.

    |update of registers| / (|update of prefix| + |update of registers| + |update of patches|)

    Arguments and errors are those of `class_token_updates`; None where that is None, and without registers.
    """
    updates = class_token_updates(encoder, pixel_values, layer=layer) if encoder.num_register_tokens else None
    if updates is None:
        return None
    lengths = {kind: part.norm(dim=-1) for kind, part in updates.items()}
    return (lengths["registers"] / sum(lengths.values()).clamp(min=1e-30)).cpu()


__all__ = ["class_token_updates", "register_share"]

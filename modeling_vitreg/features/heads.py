"""What every head of a layer reads and writes: attention among all tokens, values, and output weights.

    the update of head h at token i = sum_j A[h, i, j] u[h, j],  u[h, j] = scale * W_O[h] v[h, j]

Letters for shapes: B images, H heads, N tokens, P patches, D width, d = D / H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .encoder import NO_ATTENTION, Encoder
from .families import find_part
from .hooks import HALF_TOLERANCE, TOLERANCE, record_attention, record_projection, split_values


MAX_ENTRIES = 2**26  # of the attention of one layer, a quarter of a gigabyte; more images are read in parts


@dataclass(frozen=True, eq=False)
class LayerHeads:
    """Heads of one layer for a batch, in float32.

    Args:
        number: of the layer, from 1.
        attention: (B, H, N, N), probabilities of each query over all keys.
        values: (B, H, N, d).
        weights: (H, D, d), columns of the output projection with the LayerScale of the layer.
        inputs: (B, N, D), the residual stream in front of the layer.
        normed: (B, N, D), what the attention reads: the input behind the first norm.
        is_average: whether averaged values are what enters `entry_of` the layer; not so with a gate of timm.
    """

    number: int
    attention: Tensor
    values: Tensor
    weights: Tensor
    inputs: Tensor
    normed: Tensor
    is_average: bool


def output_weights(block: nn.Module, *, num_heads: int) -> Tensor:
    """(H, D, d): columns of the output projection of a layer, with its LayerScale.

    Raises:
        ValueError: no linear layer behind the attention.
    """
    projection, scale = find_part(block, "projection"), find_part(block, "scale")
    weight = getattr(projection, "weight", None)
    if weight is None or weight.ndim != 2:
        raise ValueError("expected a linear layer behind the attention, got none: the heads cannot be told apart")
    factors = weight.new_ones(weight.shape[0])
    factors = factors if scale is None else scale(factors[None, None]).flatten()
    return (weight * factors[:, None]).float().unflatten(1, (num_heads, -1)).transpose(0, 1)  # [D, D] -> [H, D, d]


def entry_of(block: nn.Module) -> nn.Module:
    """The first module that the concatenated heads (B, N, D) enter: a norm, a gate of ours, or the projection."""
    attention = find_part(block, "attention")
    if not isinstance(norm := getattr(attention, "norm", nn.Identity()), nn.Identity):  # EVA-CLIP
        return norm
    is_ours = hasattr(attention, "prefix_probabilities")  # gates of timm multiply without a module
    return attention.gate if is_ours and attention.gate is not None else find_part(block, "projection")


@torch.no_grad()
def read_heads(encoder: Encoder, pixel_values: Tensor, use: Callable[[LayerHeads], object]) -> dict[int, object]:
    """Run the model once and hand over the heads of each layer while it runs, so that one layer is held at a time.

    Args:
        encoder: from `load_encoder`.
        pixel_values: (B, C, height, width), normalised by `Encoder.prepare`; (B, H, N, N) is held: pass few images.
        use: called for each layer in order.

    Returns:
        What `use` returned, by the number of the layer.

    Raises:
        ValueError: images that do not fit; no attention, or attention that does more than average values, unless
            by a gate or a norm.
    """
    if encoder.num_heads == 0:
        raise ValueError(NO_ATTENTION)
    if getattr(getattr(encoder.tower, "config", None), "token_reduction", None) is not None:
        raise ValueError(
            "expected attention among all tokens, got a model with token_reduction: load it with token_reduction=None"
        )
    projection = find_part(encoder.layers[0], "projection")
    if encoder.num_heads is None or projection is None or isinstance(projection, nn.Conv2d):
        what = "no known heads" if projection is None else "heads of maps, which are not read"
        raise ValueError(f"{encoder.name}: blocks of class {type(encoder.layers[0]).__name__} have {what}")

    def hooks(keep: Callable) -> Iterator:
        for number, block in enumerate(encoder.layers, start=1):
            yield from _record_layer(encoder, number, block, lambda heads: keep(heads.number, use(heads)))

    return encoder.run(pixel_values, hooks, num_expected=encoder.num_layers)


def _record_layer(encoder: Encoder, number: int, block: nn.Module, finish: Callable) -> Iterator:
    parts, attention, entry = {}, find_part(block, "attention"), entry_of(block)

    def note_input(name: str) -> Callable:
        def note(_, arguments: tuple, keywords: dict) -> None:
            parts[name] = arguments[0] if arguments else keywords["hidden_states"]

        return note

    def assemble(_, __, ___) -> None:
        with torch.autocast(encoder.device.type, enabled=False):
            finish(_assemble(encoder, number, block, parts))
        parts.clear()

    yield block.register_forward_pre_hook(note_input("inputs"), with_kwargs=True)
    yield attention.register_forward_pre_hook(note_input("normed"), with_kwargs=True)
    sizes = {"num_heads": encoder.num_heads, "num_queries": None}
    yield from record_attention(block, functools.partial(parts.__setitem__, "attention"), **sizes)
    yield from record_projection(attention, "value", functools.partial(parts.__setitem__, "values"))
    yield entry.register_forward_pre_hook(lambda _, inputs: parts.update(sum=inputs[0]))
    yield block.register_forward_hook(assemble)


def _assemble(encoder: Encoder, number: int, block: nn.Module, parts: dict) -> LayerHeads:
    expected, attention = parts["sum"].float(), parts["attention"].float()
    if parts["inputs"].shape[:-1] != expected.shape[:-1]:
        raise ValueError(f"expected attention among all tokens, got one of layer {number} on windows or fewer tokens")
    values = split_values(parts["values"], num_heads=encoder.num_heads, width=expected.shape[-1])
    error = ((attention @ values).transpose(1, 2).flatten(2) - expected).norm()
    tolerance = TOLERANCE if parts["sum"].dtype == torch.float32 else HALF_TOLERANCE
    module, is_average = find_part(block, "attention"), bool(error <= tolerance * expected.norm())
    is_gated = getattr(module, "gate", None) is not None
    if not is_average and not is_gated:
        raise ValueError(
            f"expected attention that averages its values, got one of layer {number} that does more: its heads cannot "
            "be told apart"
        )
    return LayerHeads(
        number=number,
        attention=attention,
        values=values,
        weights=output_weights(block, num_heads=encoder.num_heads),
        inputs=parts["inputs"].float(),
        normed=parts["normed"].float(),
        is_average=is_average,
    )

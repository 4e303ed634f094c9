"""Hooks that take features out of a running model, and attention from its queries and keys.

Letters for shapes: B images, N tokens, Q prefix tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import find_part


_PROJECTIONS = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value")}


def record_feature(layers: list[nn.Module], number: int, feature: str, keep: Callable) -> Iterator:
    """Hooks that keep a feature (B, N, D) of layer `number`; 0 is the input of the first layer.

    Args:
        layers: layers of the model, in order.
        number, feature: as in `tokens.extract_features`.
        keep: called with the feature.
    """
    if feature == "token" and number == 0:
        yield layers[0].register_forward_pre_hook(
            lambda _, arguments, keywords: keep(arguments[0] if arguments else keywords["hidden_states"]),
            with_kwargs=True,
        )
        return
    layer = layers[number - 1]
    if feature == "token":
        yield layer.register_forward_hook(lambda _, __, value: keep(value[0] if isinstance(value, tuple) else value))
    elif feature == "mlp":
        yield find_part(layer, "mlp").register_forward_pre_hook(lambda _, arguments: keep(arguments[0]))
    else:
        yield from record_projection(find_part(layer, "attention"), feature, keep)


def record_attention(layer: nn.Module, keep: Callable, *, num_heads: int, num_queries: int | None) -> Iterator:
    """Hooks that keep the attention probabilities (B, H, Q, N) of the first Q tokens of a layer, in float32; None: of
    all tokens."""
    attention = find_part(layer, "attention")
    if hasattr(attention, "prefix_probabilities"):  # ours, which knows its norms, gates and biases
        yield from _record_own(attention, lambda *found: keep(attention.prefix_probabilities(*found, num_queries)))
        return
    parts = {}
    yield from record_projection(attention, "query", lambda value: parts.update(query=value))
    yield from record_projection(attention, "key", lambda value: parts.update(key=value))

    def finish(_, arguments: tuple, keywords: dict, __) -> None:
        rotary = _find_rotary(attention, arguments, keywords)
        query, key = parts.pop("query"), parts.pop("key")
        keep(_probabilities(attention, query, key, rotary=rotary, num_heads=num_heads, num_queries=num_queries))

    yield attention.register_forward_hook(finish, with_kwargs=True)


def _record_own(attention: nn.Module, keep: Callable) -> Iterator:
    """Hooks that keep queries, keys and values in one tensor, and what the layer knows of positions."""
    packed: list[Tensor] = []

    def finish(_, arguments: tuple, keywords: dict, __) -> None:
        keep(packed.pop(), arguments[1] if len(arguments) > 1 else keywords.get("rotary"))

    yield attention.qkv.register_forward_hook(lambda _, __, value: packed.append(value))
    yield attention.register_forward_hook(finish, with_kwargs=True)


def record_projection(attention: nn.Module, name: str, keep: Callable) -> Iterator:
    """Hooks that keep "query", "key" or "value" (B, N, D) of an attention, as its linear layers make them."""
    for path in _PROJECTIONS[name]:
        if isinstance(getattr(attention, path, None), nn.Module):
            yield getattr(attention, path).register_forward_hook(lambda _, __, value: keep(value))
            return
    place = list(_PROJECTIONS).index(name)
    if getattr(attention, "q_bias", None) is not None:  # timm's Eva adds the biases itself, beside the module
        bias = (attention.q_bias, attention.k_bias, attention.v_bias)[place]
        weight = attention.qkv.weight.chunk(3)[place]
        yield attention.register_forward_pre_hook(lambda _, arguments: keep(F.linear(arguments[0], weight, bias)))
        return
    # A copy, because a view would keep all three.
    sizes = getattr(attention, "sizes", None) or attention.qkv.out_features // 3
    if hasattr(attention, "expand"):  # of a model with fewer tokens inside a layer
        yield from _record_own(
            attention, lambda packed, merges: keep(attention.expand(packed.split(sizes, dim=-1)[place], merges))
        )
        return
    yield attention.qkv.register_forward_hook(lambda _, __, value: keep(value.split(sizes, dim=-1)[place].clone()))


def _find_rotary(attention: nn.Module, arguments: tuple, keywords: dict) -> tuple | None:
    """Cosines and sines with which this call turns queries and keys, and whether halves or neighbours are paired."""
    if keywords.get("position_embeddings") is not None:  # DINOv3 of transformers
        return (*keywords["position_embeddings"], True)
    if keywords.get("rope") is not None:  # timm
        sin, cos = keywords["rope"].chunk(2, dim=-1)
        return cos, sin, bool(getattr(attention, "rotate_half", False))
    return None


def _probabilities(
    attention: nn.Module, query: Tensor, key: Tensor, *, rotary: tuple | None, num_heads: int, num_queries: int | None
) -> Tensor:
    """Softmax (B, H, Q, N) of what the prefix tokens ask, from queries and keys (B, N, D)."""
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key)]
    norms = [getattr(attention, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    query, key = (norm(part).float() for norm, part in zip(norms, heads))
    if rotary is not None:
        query, key = _turn(query, *rotary), _turn(key, *rotary)
    query = query[:, :, :num_queries]
    return (query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5).softmax(dim=-1)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, has_halves: bool) -> Tensor:
    """Turn the last tokens of (B, H, N, d), as many as the tables have, by their angles."""
    num_turned = cos.shape[-2]
    kept, turned = heads[:, :, : heads.shape[2] - num_turned], heads[:, :, heads.shape[2] - num_turned :]
    if has_halves:
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
    else:
        swapped = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([kept, turned * cos.float() + swapped * sin.float()], dim=2)

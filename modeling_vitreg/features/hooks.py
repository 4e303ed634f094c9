"""Hooks that take features out of a running model, and attention from its queries and keys.

Letters for shapes: B images, N tokens, Q prefix tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import find_part
from .parts import tensor_of


TOLERANCE = 1e-3  # relative difference between what we add up and what a model itself adds up
HALF_TOLERANCE = 0.03  # the same in half precision
_REMEDY = "read the tokens instead, feature 'token' (vitreg discover: --set discovery.feature=token)"
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
            lambda _, arguments, keywords: keep(tensor_of((*arguments, *keywords.values()))),
            with_kwargs=True,
        )
        return
    layer = layers[number - 1]
    if feature == "token":
        yield layer.register_forward_hook(lambda _, __, value: keep(tensor_of(value)))
    elif feature == "mlp":
        mlp = find_part(layer, "mlp")
        if mlp is None:
            raise ValueError(f"blocks of class {type(layer).__name__} have no known second linear layer: {_REMEDY}")
        yield mlp.register_forward_pre_hook(lambda _, arguments: keep(arguments[0]))
    else:
        yield from record_projection(find_part(layer, "attention"), feature, keep)


def record_attention(layer: nn.Module, keep: Callable, *, num_heads: int, num_queries: int | None) -> Iterator:
    """Hooks that keep the attention probabilities (B, H, Q, N) of the first Q tokens of a layer, in float32; None: of
    all tokens."""
    attention = find_part(layer, "attention")
    if attention is None:
        raise ValueError(f"blocks of class {type(layer).__name__} have no known attention")
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


def record_checked_attention(layer: nn.Module, keep: Callable, *, num_heads: int, num_queries: int) -> Iterator:
    """`record_attention`, after a check that these probabilities and the values make what the layer projects.

    Raises:
        ValueError: from the hooks, if they do not: the attention has gates, biases or other parts.
    """
    attention, projection = find_part(layer, "attention"), find_part(layer, "projection")
    if attention is None:
        raise ValueError(f"blocks of class {type(layer).__name__} have no known attention")
    what = f"attention of class {type(attention).__name__} in {type(layer).__name__}"
    remedy = "if vitreg convert takes this model, convert it and measure the converted one"
    if projection is None or num_heads is None:
        raise ValueError(f"{what} has no known parts, so it is not read: {remedy}")
    found = {}

    def put(name: str, value: Tensor) -> None:
        found[name] = value
        if len(found) == 3:  # the projection lies inside the attention, or behind it
            check(*(found.pop(name) for name in ("probabilities", "value", "sum")))

    def check(probabilities: Tensor, value: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE if value.dtype == expected.dtype == torch.float32 else HALF_TOLERANCE
        value, expected = split_values(value, num_heads=num_heads, width=expected.shape[-1]), expected.float()
        made = (probabilities @ value).transpose(1, 2).flatten(2)  # [B, H, Q, d] -> [B, Q, D]
        if made.shape != expected.shape or (made - expected).norm() > tolerance * expected.norm():
            raise ValueError(f"{what} does more than a softmax of queries and keys, so it is not read: {remedy}")
        keep(probabilities)

    yield projection.register_forward_pre_hook(lambda _, inputs: put("sum", inputs[0][:, :num_queries]))
    yield from record_projection(attention, "value", lambda value: put("value", value))
    yield from record_attention(
        layer, lambda value: put("probabilities", value), num_heads=num_heads, num_queries=num_queries
    )


def record_projected(attention: nn.Module | None, projection: nn.Module, keep: Callable) -> Iterator:
    """Hooks that keep what the projection of an attention reads, (B, N, D)."""
    if hasattr(attention, "expand"):  # of a model with fewer tokens inside a layer
        yield from _record_own(attention, lambda *found: keep(attention.expand(*found)), reads=projection)
    else:
        yield projection.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))


def _record_own(attention: nn.Module, keep: Callable, *, reads: nn.Module | None = None) -> Iterator:
    """Hooks that keep queries, keys and values in one tensor, or what a part reads; and what the layer knows of
    positions."""
    packed: list[Tensor] = []

    def finish(_, arguments: tuple, keywords: dict, __) -> None:
        keep(packed.pop(), arguments[1] if len(arguments) > 1 else keywords.get("rotary"))

    if reads is None:
        yield attention.qkv.register_forward_hook(lambda _, __, value: packed.append(value))
    else:
        yield reads.register_forward_pre_hook(lambda _, inputs: packed.append(inputs[0]))
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
    if not isinstance(getattr(attention, "qkv", None), nn.Module):
        what = "blocks without known attention have" if attention is None else f"{type(attention).__name__} has"
        raise ValueError(f"{what} no known layer of {name}s: {_REMEDY}")
    # A copy, because a view would keep all three.
    sizes = getattr(attention, "sizes", None) or len(attention.qkv.weight) // 3
    if hasattr(attention, "expand"):  # of a model with fewer tokens inside a layer
        yield from _record_own(
            attention, lambda packed, merges: keep(attention.expand(packed.split(sizes, dim=-1)[place], merges))
        )
        return
    axis = 1 if isinstance(attention.qkv, nn.Conv2d) else -1
    yield attention.qkv.register_forward_hook(lambda _, __, value: keep(value.split(sizes, dim=axis)[place].clone()))


def split_values(values: Tensor, *, num_heads: int, width: int) -> Tensor:
    """Values (B, H, N, d) from those (B, N, K d) of K heads that H / K heads of queries share; `width` is H d."""
    size = width // num_heads
    if width % num_heads or values.shape[-1] % size or num_heads % (values.shape[-1] // size):
        raise ValueError(f"expected values of {num_heads} heads, {width} wide, got values {values.shape[-1]} wide")
    values = values.float().unflatten(-1, (-1, size)).transpose(1, 2)
    return values.repeat_interleave(num_heads // values.shape[1], dim=1)


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
    size = query.shape[-1] // num_heads
    heads = [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (query, key)]  # [B, N, K d] -> [B, K, N, d]
    norms = [getattr(attention, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    query, key = (norm(part).float() for norm, part in zip(norms, heads))
    if rotary is not None:
        query, key = _turn(query, *rotary), _turn(key, *rotary)
    query, key = query[:, :, :num_queries], key.repeat_interleave(num_heads // key.shape[1], dim=1)
    with torch.autocast(query.device.type, enabled=False):  # which would make the product of floats a half again
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

"""Tokens by name, of any layer of an encoder and inside it.

Letters for shapes: B images, N tokens, P patches, R registers, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .encoder import NO_ATTENTION, Encoder, layer_numbers
from .hooks import record_feature
from .parts import as_sequence


FEATURES = ("token", "query", "key", "value", "mlp")


@dataclass(frozen=True)
class TokenFeatures:
    """Tokens of one layer by name.

    Args:
        patch_tokens: (B, P, D), row by row.
        grid: rows and columns of the patches.
        cls_token: (B, D), or None for a model without one.
        distillation_token: (B, D), or None.
        register_tokens: (B, R, D); R may be 0.
        layer: 0 is the input of the first layer, i the output of layer i, or features inside layer i.
        feature: "token" is the residual stream; "query", "key" and "value" are outputs of the projections, heads side
            by side; "mlp" is what enters the second linear layer of the MLP, of its inner width.
        is_normed: whether the model's final norm was applied.
        cls_tokens: (B, C, D), for a model with several class tokens.
    """

    patch_tokens: Tensor
    grid: tuple[int, int]
    cls_token: Tensor | None
    distillation_token: Tensor | None
    register_tokens: Tensor
    layer: int
    feature: str
    is_normed: bool
    cls_tokens: Tensor | None = None

    @property
    def patch_grid(self) -> Tensor:
        """(B, rows, columns, D): the patches where they lie in the image."""
        return self.patch_tokens.unflatten(1, self.grid)


def extract_features(
    encoder: Encoder,
    pixel_values: Tensor,
    *,
    layers: int | Sequence[int] = -1,
    feature: str = "token",
    is_normed: bool = False,
) -> list[TokenFeatures]:
    """Tokens of some layers, in evaluation mode and without gradient; `extract_many` says the rest.

    Args:
        encoder: from `load_encoder`.
        pixel_values: (B, C, height, width), normalised by `Encoder.prepare`.
        layers: 0 is the input of the first layer, i the output of layer i or features inside layer i; negative ones
            count from the end, so that -1 is the output of the last layer.
        feature: "token", "query", "key", "value" or "mlp".
        is_normed: apply the final norm of the model, to the tokens of any layer; of features "token" only.

    Returns:
        One entry for each layer, in the order asked for.

    Raises:
        ValueError: images that do not fit, no such layer or feature.
    """
    layers = [layers] if isinstance(layers, int) else list(layers)
    return extract_many(encoder, pixel_values, wanted=[(layer, feature) for layer in layers], is_normed=is_normed)


@torch.no_grad()
def extract_many(
    encoder: Encoder, pixel_values: Tensor, *, wanted: Sequence[tuple[int, str]], is_normed: bool = False
) -> list[TokenFeatures]:
    """Several features of several layers in one forward pass, which ends where the last of them was found.

    Modes of modules and hooks are restored, also after an error. Queries and keys are outputs of their projections:
    before a norm of queries and keys and before rotary positions. The final norm is applied to all tokens; a model
    that norms the pooled vector instead leaves them unchanged.

    Args:
        encoder: from `load_encoder`.
        pixel_values: (B, C, height, width), normalised by `Encoder.prepare`.
        wanted: pairs (layer, feature), as in `extract_features`.
        is_normed: apply the final norm of the model; all features must then be "token".

    Returns:
        One entry for each pair, in their order, in the precision of the model and on its device.

    Raises:
        ValueError: images that do not fit, nothing wanted, no such layer or feature.
    """
    pairs = [_check_pair(encoder, layer, feature) for layer, feature in wanted]
    if not pairs:
        raise ValueError("expected one pair (layer, feature) or more, got none")
    if is_normed and any(feature != "token" for _, feature in pairs):
        raise ValueError("is_normed=True needs feature 'token': the final norm applies to tokens only")

    def hooks(keep: Callable) -> Iterator:
        for pair in set(pairs):
            yield from record_feature(encoder.layers, *pair, functools.partial(keep, pair))

    is_inside = any(feature != "token" for _, feature in pairs)
    found = encoder.run(pixel_values, hooks, num_expected=len(set(pairs)), is_inside_layers=is_inside)
    grid = tuple(side // patch for side, patch in zip(pixel_values.shape[2:], encoder.patch_shape))
    found = {pair: as_sequence(value, grid=grid) for pair, value in found.items()}
    if is_normed:
        found = {pair: encoder.norm_tokens(tokens) for pair, tokens in found.items()}
    return [_name_tokens(encoder, found[pair], grid, pair, is_normed) for pair in pairs]


def _check_pair(encoder: Encoder, layer: int, feature: str) -> tuple[int, str]:
    if feature not in FEATURES:
        raise ValueError(f"expected a feature out of {', '.join(FEATURES)}, got {feature!r}")
    if feature != "token" and encoder.num_heads == 0:
        raise ValueError(f"expected feature 'token', got {feature!r}: {NO_ATTENTION}, and no MLP")
    (number,) = layer_numbers(layer, encoder.num_layers, first=0 if feature == "token" else 1)
    return number, feature


def _name_tokens(encoder: Encoder, tokens: Tensor, grid: tuple, pair: tuple, is_normed: bool) -> TokenFeatures:
    num_cls, num_distillation = encoder.num_cls_tokens, int(encoder.has_distillation_token)
    counts = [num_cls, num_distillation, encoder.num_register_tokens, math.prod(grid)]
    if tokens.shape[1] != sum(counts):
        if pair[1] != "token":
            raise RuntimeError(
                f"{encoder.name}: expected {sum(counts)} rows of feature {pair[1]!r}, got {tokens.shape[1]}: its "
                "attention works on windows or other tokens; read feature 'token'"
            )
        raise RuntimeError(
            f"{encoder.name}: expected {sum(counts)} tokens (class, distillation, registers, patches: {counts}), got "
            f"{tokens.shape[1]}; this model has another order or number of tokens"
        )
    cls, distillation, registers, patches = tokens.split(counts, dim=1)
    return TokenFeatures(
        patch_tokens=patches,
        grid=grid,
        cls_token=cls[:, 0] if num_cls else None,
        distillation_token=distillation[:, 0] if num_distillation else None,
        register_tokens=registers,
        layer=pair[0],
        feature=pair[1],
        is_normed=is_normed,
        cls_tokens=cls if num_cls > 1 else None,
    )


@torch.no_grad()
def find_reduction(encoder: Encoder, pixel_values: Tensor) -> ModelOutput | None:
    """What became of the patches in a model with `config.token_reduction`; None where a model keeps all of them."""
    if getattr(getattr(encoder.tower, "config", None), "token_reduction", None) is None:
        return None

    def hooks(keep: Callable) -> Iterator:
        yield encoder.tower.register_forward_hook(lambda _, __, output: keep("reduction", output.reduction))

    return encoder.run(pixel_values, hooks, num_expected=1, is_inside_layers=False)["reduction"]

"""Tokens of views of different sizes from one network: its last layer computes only tokens that a loss reads.

After the attention of the last layer a token meets no other, so what no loss reads is left out there: most patches of
global views, all of local ones, and the registers. Results are those of the whole network, up to the rounding of the
products, and the step is the faster the fewer layers there are.

Groups of views go through the network one after the other, or packed in one sequence of tokens. Packed, every norm and
linear layer sees the tokens of all groups at once, and attention stays within an image: the number of kernels halves.
DINOv2 does this with a block-diagonal mask; here attention is simply called once for each group, so that every back
end works.

Letters: B images of a group, N tokens and P patches of an image, M tokens read, D width.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel


def encode_views(
    model: ViTWithRegistersModel,
    groups: list[tuple[Tensor, Tensor | None]],
    *,
    patches: list[Tensor | None],
    is_packed: bool | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Normed class tokens (B, D) and some patches (M, D) of groups of images.

    Args:
        model: the network; it has a class token.
        groups: images (B, 3, h, w) and their mask (B, P) or None; sizes differ between groups.
        patches: indices of each group, indices (M,) into (B P) of those to read; None reads none.
        is_packed: None packs where the many small kernels of a group leave the device waiting, on a GPU.
    """
    if model.config.register_neurons:  # they move activations between all tokens of an image
        return [_encode_whole(model, *group, wanted) for group, wanted in zip(groups, patches)]
    if is_packed is None:
        is_packed = groups[0][0].device.type != "cpu"
    if not is_packed:
        return [_encode(model, [group], [wanted])[0] for group, wanted in zip(groups, patches)]
    return _encode(model, groups, patches)


def _encode(model: ViTWithRegistersModel, groups: list, patches: list) -> list[tuple[Tensor, Tensor]]:
    states, rotaries, _ = zip(*(model.embed(images, masks) for images, masks in groups))
    sizes = tuple(tuple(state.shape[:2]) for state in states)
    starts = itertools.accumulate((num_images * num_tokens for num_images, num_tokens in sizes), initial=0)
    reads = [start + _indices(model, state, wanted) for start, state, wanted in zip(starts, states, patches)]
    tokens = torch.cat([state.flatten(0, 1) for state in states])  # never a view: a compiler would guard on its base
    *layers, last = model.layers
    for layer in layers:
        tokens = layer(tokens, rotaries, sizes)
    tokens = model.norm_tokens(last(tokens, rotaries, sizes, torch.cat(reads))).split([len(read) for read in reads])
    return [(part[: len(images)], part[len(images) :]) for part, (images, _) in zip(tokens, groups)]


def _encode_whole(
    model: ViTWithRegistersModel, images: Tensor, mask: Tensor | None, patches: Tensor | None
) -> tuple[Tensor, Tensor]:
    state, rotary, _ = model.embed(images, mask)
    indices = _indices(model, state, patches)
    for layer in model.layers:
        state = layer(state, rotary)
    tokens = model.norm_tokens(state.flatten(0, 1)[indices])
    return tokens[: len(images)], tokens[len(images) :]


def _indices(model: ViTWithRegistersModel, state: Tensor, patches: Tensor | None) -> Tensor:
    """Of class tokens, then of patches, in the (B N) tokens of a group."""
    num_images, num_tokens = state.shape[:2]
    kinds = model.config.token_slices
    images = torch.arange(num_images, device=state.device)
    indices = images * num_tokens + kinds["cls"].start
    if patches is None:
        return indices
    first = kinds["patches"].start
    num_patches = num_tokens - first
    return torch.cat([indices, patches // num_patches * num_tokens + first + patches % num_patches])

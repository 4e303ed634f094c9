"""Views of different sizes through one network, one group after the other or packed in one sequence of tokens.

Packed, every norm and linear layer sees the tokens of all groups at once, and attention stays within an image: the
result is the same, up to the rounding of the products, and the number of kernels halves. DINOv2 does this with a
block-diagonal mask; here attention is simply called once for each group, so that every back end works.

Letters: B images of a group, P patches.
"""

from __future__ import annotations

from torch import Tensor

from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel, ViTWithRegistersTokens


def encode_views(
    model: ViTWithRegistersModel, groups: list[tuple[Tensor, Tensor | None]], *, is_packed: bool | None = None
) -> list[ViTWithRegistersTokens]:
    """Normed tokens of groups of images.

    Args:
        model: the network.
        groups: images (B, 3, h, w) and their mask (B, P) or None; sizes differ between groups.
        is_packed: None packs where the many small kernels of a group leave the device waiting, on a GPU.
    """
    if is_packed is None:
        is_packed = groups[0][0].device.type != "cpu"
    if not is_packed or len(groups) == 1:
        return [model(images, bool_masked_pos=masks) for images, masks in groups]
    states, tables, grids = zip(*(model.embed(images, masks) for images, masks in groups))
    for layer in model.layers:
        states = layer(states, tables)
    return [model.split_tokens(model.norm_tokens(state), grid) for state, grid in zip(states, grids)]


__all__ = ["encode_views"]

"""DINO-seg: the patches with most of the attention of the class token, a baseline of object discovery.

Letters for shapes: B images, H heads, P patches.

Source: Caron et al. 2021, arXiv 2104.14294, section 4.2.2; as a method to find boxes in Simeoni et al. 2021,
arXiv 2109.14279 (valeoai/LOST, `object_discovery.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


ATTENTION_SHARE = 0.6


@torch.no_grad()
def dino_seg(attention: Tensor, *, attention_share: float = ATTENTION_SHARE) -> Tensor:
    """Keep the patches with most of the attention.

    for each map:
        sort its patches, smallest first, and scale them to sum to one
        keep a patch if the sum up to it, itself included, is above 1 - `attention_share`

    The object is the largest component. The published code leaves out the component of the last label, and takes the
    background where there is one component only; `boxes.largest_components` does neither.

    Args:
        attention: attention of the class token on the patches (..., P), not negative.
        attention_share: share of the attention to keep, in (0, 1].

    Returns:
        Mask (..., P), true where a patch is kept.

    Raises:
        ValueError: no patches, attention that is negative, not finite or zero everywhere, or a share out of range.
    """
    if not 0 < attention_share <= 1:
        raise ValueError(
            f"expected an attention_share above 0 and at most 1, got {attention_share}; the published one is 0.6"
        )
    attention = attention.float()
    is_valid = attention.numel() and (attention >= 0).all() and attention.isfinite().all()
    if not is_valid or not (attention.sum(dim=-1) > 0).all():
        raise ValueError(
            "expected attention (..., patches), not negative, finite and above zero somewhere in each map"
        )
    values, order = attention.sort(dim=-1, stable=True)
    is_kept = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - attention_share
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)

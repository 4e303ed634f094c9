"""How a model runs: in evaluation mode, with other attributes for a while, with the fastest attention of a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


# The first that takes the arguments runs; only "math" takes all.
ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextlib.contextmanager
def eval_mode(model: nn.Module, *, is_eager: bool = True) -> Iterator[None]:
    """Evaluate inside the block; every module then returns to the mode that it was in.

    Compiled modules run eagerly inside the block, unless `is_eager` is false, because other sizes without gradients
    would be compiled again.
    """
    # Module by module, because a part may be frozen in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager" if is_eager else "default"):
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def changed_attributes(changes: Sequence[tuple[object, str, object]]) -> Iterator[None]:
    """Other values of attributes, given as (owner, name, value), inside the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def fast_attention(device_type: str) -> contextlib.AbstractContextManager:
    """Attention by cuDNN where it takes the arguments, then flash, then efficient; on a CPU torch chooses."""
    if device_type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(ATTENTION_BACKENDS, set_priority=True)

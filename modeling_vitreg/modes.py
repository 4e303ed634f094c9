"""Evaluation of a model during training, without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate inside the block; every module then returns to the mode that it was in.

    Compiled modules run eagerly inside the block, because other sizes without gradients would be compiled anew.
    """
    # Module by module, for a part may be frozen in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


__all__ = ["eval_mode"]

"""Exponential moving average (EMA) of the weights of a model: a teacher, or the model that is saved."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_ema_model(model: nn.Module) -> nn.Module:
    """A copy without gradient in evaluation mode: no dropout, no stochastic depth."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, *, decay: float) -> None:
    """Update the average in place: decay x average + (1 - decay) x weights, for every parameter.

    Sharded parameters are averaged shard by shard; both models are sharded alike.
    """
    average = [parameter.detach() for parameter in ema_model.parameters()]
    weights = [parameter.detach() for parameter in model.parameters()]
    torch._foreach_lerp_(average, weights, 1 - decay)

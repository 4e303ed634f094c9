"""The teacher that follows its student: an exponential moving average without gradient."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student without gradient, in evaluation mode: no dropout, no stochastic depth."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Move the teacher: momentum x teacher + (1 - momentum) x student, for every parameter, in place.

    Sharded parameters move shard by shard: teacher and student are sharded alike.
    """
    own = [parameter.detach() for parameter in teacher.parameters()]
    other = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(own, other, 1 - momentum)


__all__ = ["follow", "make_teacher"]

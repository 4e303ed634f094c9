"""What a loss needs of the other processes, as an argument: the same loss runs on one CPU and on many GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


def _same(values: Tensor) -> Tensor:
    return values


@dataclasses.dataclass(frozen=True)
class Processes:
    """Sums and neighbours over the processes that share a batch; the default is a process that is alone.

    Args:
        rank: number of this process.
        size: number of processes.
        total: sum of a tensor over the processes, without gradient.
        largest: maximum of a tensor over the processes, without gradient.
        gather: rows (B, ...) of all processes, in order of rank, (size x B, ...); gradients flow back to their owner.
    """

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same
    gather: Callable[[Tensor], Tensor] = _same


ALONE = Processes()


def all_processes() -> Processes:
    """The processes of torch.distributed, or `ALONE` where it is not in use."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return ALONE
    return Processes(
        rank=distributed.get_rank(),
        size=distributed.get_world_size(),
        total=lambda values: _reduce(values, distributed.ReduceOp.SUM),
        largest=lambda values: _reduce(values, distributed.ReduceOp.MAX),
        gather=_gather,
    )


def _reduce(values: Tensor, operation) -> Tensor:
    values = values.detach().clone()
    torch.distributed.all_reduce(values, op=operation)
    return values


def _gather(rows: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


__all__ = ["ALONE", "Processes", "all_processes"]

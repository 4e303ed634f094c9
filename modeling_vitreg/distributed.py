"""Communication between processes as an argument, so that the same loss runs on one CPU and on many GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def _same(values: Tensor) -> Tensor:
    return values


@dataclasses.dataclass(frozen=True)
class DistributedContext:
    """Reductions over the processes that share a batch; the default is a single process.

    Args:
        rank: number of this process.
        size: number of processes.
        all_reduce_sum: sum of a tensor over the processes, without gradient.
        all_reduce_max: maximum of a tensor over the processes, without gradient.
        all_gather: rows (B, ...) of all processes in order of rank, (size x B, ...); gradients flow back to their
            process.
    """

    rank: int = 0
    size: int = 1
    all_reduce_sum: Callable[[Tensor], Tensor] = _same
    all_reduce_max: Callable[[Tensor], Tensor] = _same
    all_gather: Callable[[Tensor], Tensor] = _same


_PATIENCE = datetime.timedelta(days=1)  # that a process waits for the slowest; a dead one is noticed at once

SINGLE_PROCESS = DistributedContext()


def distributed_context() -> DistributedContext:
    """The context of torch.distributed, or `SINGLE_PROCESS` if it is not initialised."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return SINGLE_PROCESS
    return DistributedContext(
        rank=distributed.get_rank(),
        size=distributed.get_world_size(),
        all_reduce_sum=lambda values: _reduce(values, distributed.ReduceOp.SUM),
        all_reduce_max=lambda values: _reduce(values, distributed.ReduceOp.MAX),
        all_gather=_all_gather,
    )


@contextlib.contextmanager
def joined_processes() -> Iterator[DistributedContext]:
    """The processes that `torchrun` or `accelerate launch` started together with this one, joined inside the block.

    They exchange results in the memory of the machine, whatever their devices are.

    Raises:
        RuntimeError: this process was asked to stop, because another one died.
    """
    from torch import distributed

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield distributed_context()
        return
    before = signal.signal(signal.SIGTERM, _stop)
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield distributed_context()
    finally:
        signal.signal(signal.SIGTERM, before)
        distributed.destroy_process_group()


def _stop(*_) -> None:
    raise RuntimeError(
        "this process was asked to stop (SIGTERM), most often because another process of the command died: run the "
        "same command again to continue"
    )


@contextlib.contextmanager
def first_process_first(context: DistributedContext) -> Iterator[None]:
    """The block runs in the first process, then in the others: files that it prepares are then there."""
    if context.rank and context.size > 1:
        torch.distributed.barrier()
    yield
    if not context.rank and context.size > 1:
        torch.distributed.barrier()


def gather_to_first(value: Any, context: DistributedContext, *, local: dict[str, Any] | None = None) -> list | None:
    """The values of all processes in order of rank, in the first process; None in the others.

    Args:
        value: anything that pickles.
        context: the processes.
        local: objects by name that stay where they are: one inside of a value becomes that of the receiver.

    Raises:
        RuntimeError: a process died.
    """
    if context.size == 1:
        return [value]
    parts = [None] * context.size if context.rank == 0 else None
    try:
        torch.distributed.gather_object(_pack(value, local or {}), parts)
    except RuntimeError as error:
        raise RuntimeError(
            f"another of the {context.size} processes died before it was done: run the same command again. {error}"
        ) from error
    return parts and [value, *(_Unpickler(io.BytesIO(part), local or {}).load() for part in parts[1:])]


def tell_others(value: Any, context: DistributedContext) -> Any:
    """The value of the first process, in all of them; it pickles."""
    values = [value]
    if context.size > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, local: dict[str, Any]):
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = {id(kept): name for name, kept in local.items()}

    def persistent_id(self, part: Any) -> str | None:
        return self._names.get(id(part))


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, local: dict[str, Any]):
        super().__init__(buffer)
        self._local = local

    def persistent_load(self, name: str) -> Any:
        return self._local[name]


def _pack(value: Any, local: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, local).dump(value)
    return buffer.getvalue()


def new_control_group() -> torch.distributed.ProcessGroup | None:
    """A group of all processes for messages between CPUs beside those of training; None for a single process."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.new_group(backend="gloo")


def _reduce(values: Tensor, operation) -> Tensor:
    values = values.detach().clone()
    torch.distributed.all_reduce(values, op=operation)
    return values


def _all_gather(rows: Tensor) -> Tensor:
    return _AllGather.apply(rows)


class _AllGather(torch.autograd.Function):
    # Not torch.distributed.nn.functional.all_gather: under torchrun its gradient fails on CPUs with torch 2.8.

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = _reduce(gradient.contiguous(), torch.distributed.ReduceOp.SUM)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]

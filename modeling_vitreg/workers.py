"""Worker processes of a `DataLoader`: when one dies or runs out of memory, words instead of an endless wait."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info


# What torch says when a process died, and when shared memory, whose files it calls torch_..., could not be had.
_LOST = ("exited unexpectedly", "is killed by signal", "</torch_")


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(batch: Any) -> Any:
    """The same batch, with its tensors in shared memory if a worker made it; for `collate_fn`.

    Without it the thread of the queue moves them there. Its error is only printed, and the main process waits forever.

    Raises:
        RuntimeError: there is no room.
    """
    if get_worker_info() is not None:
        for tensor in _find_tensors(batch):
            tensor.share_memory_()
    return batch


def take(batches: Iterator[Any], *, reader: str) -> Any:
    """The next batch.

    Args:
        batches: of a `DataLoader`.
        reader: name of the reader, for messages.

    Raises:
        RuntimeError: a worker died, or shared memory is full.
    """
    try:
        return next(batches)
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST):
            raise
        raise RuntimeError(
            f"{reader}: a worker process died: {str(error).strip().splitlines()[-1]}. Most often memory or shared "
            "memory ran out: use fewer workers or a smaller micro-batch. 0 workers show errors of the decoding itself."
        ) from error


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides, and may want another batch before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _find_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _find_tensors(vars(value))
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _find_tensors(part)

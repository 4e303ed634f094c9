"""Start the processes of a training program, and end all of them when one is lost."""

import functools
import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from modeling_vitreg.cli.processes import start_the_others
from modeling_vitreg.files import DISK_ERRORS


# What torch says, by back end and version, when another process is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_KEPT: list[torch.distributed.ProcessGroup] = []  # the group of all processes, until nothing else of the run is left


def make_accelerator(**settings) -> Accelerator:
    """The accelerator of this process, for any launcher, on GPUs and on CPUs.

    Without `cpu`, accelerate takes processes that torch's launcher started on a machine without GPU for single ones.
    """
    start_the_others()
    _leave_old_addresses()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        cpu=world_size > 1 and (device is None or device.type == "mps"),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        **settings,
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # In torch 2.8 a process hangs at its end if DistributedDataParallel is the last that holds the group: it waits
        # for the threads of the group, and they for the lock of the interpreter.
        _KEPT.append(torch.distributed.group.WORLD)
    if accelerator.num_processes != world_size:
        raise SystemExit(
            f"the launcher started {world_size} processes, but accelerate sees {accelerator.num_processes}: "
            "start them with `accelerate launch` or `python -m torch.distributed.run`"
        )
    return accelerator


def _leave_old_addresses() -> None:
    """After a restart, meet the other processes under names that the attempt before did not use.

    The launcher of torch keeps its store of addresses when it starts processes again (pytorch/pytorch#135712), so some
    call a process that is gone. Only the processes of one machine agree on the number of restarts; docs/train/scale.md
    says what helps on several.
    """
    restarts, world_size = (int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
    if restarts and world_size > 1 and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        store, rank, _ = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"restart {restarts}", store)
        torch.distributed.init_process_group(store=store, rank=rank, world_size=world_size)


def ends_in_words(main: Callable) -> Callable:
    """Report a full disk, exhausted memory or a lost process in one sentence that says what to do."""

    @functools.wraps(main)
    def run(**options) -> None:
        try:
            main(**options)
        except OSError as error:
            if error.errno not in DISK_ERRORS and (error.errno is None or error.filename is None):
                raise
            raise SystemExit(
                f"{error}: free some space, or check the path and its permissions, and run the same command again: it "
                "continues from the last state"
            ) from None
        except (RuntimeError, MemoryError) as error:
            text, rank = str(error), os.environ.get("RANK", "0")
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
                raise SystemExit(
                    f"process {rank}: out of memory: {text.splitlines()[0] if text else 'the host has none left'}\n"
                    "Use a smaller --micro-batch (the batch stays the same), --checkpoint-activations, --precision "
                    "bf16 or --shard; the same command with one of them continues from the last state"
                ) from None
            if isinstance(error, torch.distributed.DistError) or any(word in text for word in _LOST):
                raise SystemExit(
                    f"process {rank}: another process of this run ended, so this one ends too. Look for the message "
                    "or the exit code of that process (-9: killed, often for lack of memory). The same command "
                    "continues from the last state"
                ) from None
            raise
        finally:
            _KEPT.clear()

    return run

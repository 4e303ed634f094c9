"""Verbs under a launcher of several processes."""

from __future__ import annotations

import os
import sys


def start_the_others() -> None:
    """Replace this process by torch's launcher where `accelerate launch --num_processes N` started only one.

    That is what it does on CPUs, without a word.
    """
    if "WORLD_SIZE" in os.environ or "ACCELERATE_USE_CPU" not in os.environ:
        return
    import psutil
    import torch
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    command = parent.cmdline() if parent else []
    if torch.accelerator.is_available() or "launch" not in command[:3]:
        return
    told, _ = launch_command_parser().parse_known_args(command[command.index("launch") + 1 :])
    if (told.num_processes or 1) > 1 and (told.num_machines or 1) == 1:
        program = ["-m", "modeling_vitreg"] if sys.argv[0].endswith("__main__.py") else sys.argv[:1]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(told.num_processes)]
        os.execv(sys.executable, [sys.executable, *launcher, *program, *sys.argv[1:]])


def refuse_several_processes(verb: str) -> None:
    """Check that a verb that cannot share its work was started once.

    Raises:
        ValueError: a launcher started several processes, which would write the same files.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ValueError(
            f"vitreg {verb} runs in one process, got {count}: start it without torchrun and accelerate launch. "
            "analyze, discover, embed and evaluate share their images among processes"
        )

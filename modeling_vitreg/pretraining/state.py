"""The state of a run on disk, whole or not at all, and the same however it was sharded.

    state/
      LAST                     name of the newest folder
      step-00000500/
        objective.safetensors  everything that learns, follows or is averaged, by name
        optimizer.safetensors  moments, as `<name of the parameter>/<name of the moment>`
        state.json             step, recipe, data, processes, positions of streams, scale of gradients

A folder is written under another name, flushed to the disk and renamed; LAST changes after that, and old folders go
last. Random numbers need no state: every draw of a step is seeded by the step.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


POINTER = "LAST"
OBJECTIVE, OPTIMIZER, FACTS = "objective.safetensors", "optimizer.safetensors", "state.json"


def save_state(
    folder: pathlib.Path,
    *,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    is_writer: bool = True,
    num_kept: int = 2,
) -> None:
    """Write the state of a run; all processes call it together, one writes.

    Args:
        folder: that holds the states of the run.
        objective: as it came from `accelerator.prepare`, sharded or not.
        optimizer: without accelerate's wrapper.
        facts: JSON-able; `step` names the folder.
        is_writer: whether this process writes.
        num_kept: newest states to keep.

    Raises:
        RuntimeError: the state could not be written; the one before it is untouched.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(objective, options=options)
    optimizer_state = get_optimizer_state_dict(objective, optimizer, options=options)
    if not is_writer:
        return
    moments = {
        f"{name}/{moment}": value.contiguous() if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, state in optimizer_state["state"].items()
        for moment, value in state.items()
    }
    facts = facts | {"parameter_groups": optimizer_state["param_groups"]}
    name = f"step-{facts['step']:08d}"
    partial = folder / f"{name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / OBJECTIVE)
        save_file(moments, partial / OPTIMIZER)
        (partial / FACTS).write_text(json.dumps(facts, indent=1))
        for path in partial.iterdir():
            _flush(path)
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        write_text(folder / POINTER, name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = (folder / POINTER).read_text() if (folder / POINTER).exists() else None
        raise RuntimeError(
            f"the state of step {facts['step']} could not be written to {folder}: {error}. "
            + (f"The last good state is {folder / kept}. " if kept else "There is no earlier state. ")
            + "Free some space, or see to the permissions of the folder, and give the same command again to go on."
        ) from error
    for old in sorted(path for path in folder.glob("step-*") if path.is_dir())[:-num_kept]:
        shutil.rmtree(old, ignore_errors=True)


def last_state(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest whole state in a folder of states, or None.

    Raises:
        RuntimeError: the pointer names a state that is not whole.
    """
    if not (folder / POINTER).exists():
        return None
    state = folder / (folder / POINTER).read_text().strip()
    missing = [name for name in (OBJECTIVE, OPTIMIZER, FACTS) if not (state / name).exists()]
    if missing:
        raise RuntimeError(
            f"{folder / POINTER} names {state}, which lacks {', '.join(missing)}. Write the name of another "
            f"step-... folder into {folder / POINTER}, or begin anew in another output folder."
        )
    return state


def read_facts(state: pathlib.Path) -> dict[str, Any]:
    """What was saved beside the tensors."""
    return json.loads((state / FACTS).read_text())


def load_state(state: pathlib.Path, *, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state into objective and optimiser, sharded or not; returns the facts.

    Raises:
        RuntimeError: names or shapes that do not fit.
    """
    facts = read_facts(state)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(objective, load_file(state / OBJECTIVE), options=options)
    moments: dict[str, dict] = {}
    for name, value in load_file(state / OPTIMIZER).items():
        parameter, moment = name.rsplit("/", 1)
        moments.setdefault(parameter, {})[moment] = value
    optimizer_state = {"state": moments, "param_groups": facts.pop("parameter_groups")}
    set_optimizer_state_dict(objective, optimizer, optimizer_state, options=options)
    return facts


def load_objective(state: pathlib.Path) -> dict[str, torch.Tensor]:
    """Everything that learned, by name, on the CPU."""
    return load_file(state / OBJECTIVE)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


__all__ = ["last_state", "load_objective", "load_state", "read_facts", "save_state", "write_text"]

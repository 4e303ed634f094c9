"""The state of a run on disk, whole or not at all, and the same however it was sharded.

    state/
      LAST                     name of the newest folder
      step-00000500/
        objective.safetensors  parameters and buffers of student, teacher and heads, by name
        optimizer.safetensors  moments, as `<name of the parameter>/<name of the moment>`
        state.json             step, recipe, data, processes, positions of streams, scale of gradients
        checksums.json         CRC-32 of the three files; states of older versions have none

Beside `state/` and `model/`, `model.json` says which step the model is from: a run that was killed between writing its
state and its model writes the model when it continues.

A folder is written under another name, flushed to the disk and renamed; LAST changes after that, and old folders are
removed last. Random numbers need no state: every draw of a step is seeded by the step.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from modeling_vitreg.files import atomic_folder, checksum, write_text


POINTER = "LAST"
OBJECTIVE, OPTIMIZER, METADATA = "objective.safetensors", "optimizer.safetensors", "state.json"
CHECKSUMS, MODEL_RECORD = "checksums.json", "model.json"
_NAME = re.compile(r"step-\d{8,}")
_RENAMED = {"average.": "ema_model.", "_centre.centre": "_center.center"}  # parts of names in older states
FORMAT = 1  # raised when an older version of this module could not read what this one writes


class DamagedState(RuntimeError):
    """A file of a state is missing, cut off or changed; the message names it."""


def save_state(
    folder: pathlib.Path,
    *,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any] | None = None,
    is_writer: bool = True,
    num_kept: int = 2,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write the state of a run; all processes call it together, one writes.

    Args:
        folder: folder that holds the states of the run.
        objective: as it came from `accelerator.prepare`, sharded or not.
        optimizer: without accelerate's wrapper.
        metadata: JSON-able; `step` names the folder.
        is_writer: whether this process writes.
        num_kept: newest states to keep.
        facts: older name of `metadata`.

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
    metadata = (metadata or facts) | {"format": FORMAT, "parameter_groups": optimizer_state["param_groups"]}
    name = f"step-{metadata['step']:08d}"
    try:
        with atomic_folder(folder / name) as part:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / OBJECTIVE)
            save_file(moments, part / OPTIMIZER)
            (part / METADATA).write_text(json.dumps(metadata, indent=1))
            checksums = {path.name: checksum(path) for path in sorted(part.iterdir())}
            (part / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        write_text(folder / POINTER, name)
    except OSError as error:
        kept, _ = _named(folder)
        raise RuntimeError(
            f"the state of step {metadata['step']} could not be written to {folder}: {error}. "
            + (f"The last good state is {kept}. " if kept else "There is no earlier state. ")
            + "Free some space, or check the permissions of the folder, and run the same command again to continue."
        ) from error
    # Newer folders belong to a run that was taken back to an earlier state; they are overwritten when it gets there.
    for old in [path for path in _states(folder) if path.name <= name][num_kept:]:
        shutil.rmtree(old, ignore_errors=True)


def last_state(folder: pathlib.Path, *, warn: Callable[[str], None] | None = None) -> pathlib.Path | None:
    """The newest state in a folder of states that is whole; None if there is no state.

    Args:
        folder: folder that holds the states of a run.
        warn: called with a sentence for each newer state that is damaged; None warns as Python does.

    Raises:
        RuntimeError: there are states and all of them are damaged.
    """
    named, problems = _named(folder)
    for state in [path for path in _states(folder) if named is None or path.name <= named.name]:
        try:
            check_state(state)
        except DamagedState as error:
            problems.append(str(error))
            continue
        for problem in problems:
            (warn or warnings.warn)(f"{problem}; the run continues from {state}")
        return state
    if problems:
        raise RuntimeError(
            f"no state in {folder} can be read: {'; '.join(problems)}. Restore one of them from a backup, or start "
            "again with another output folder"
        )
    return None


def check_state(state: pathlib.Path) -> None:
    """Compare the files of a state with their checksums; of a state without checksums, read headers and metadata.

    Raises:
        DamagedState: a file is missing, cut off or changed.
        RuntimeError: a newer version of this package wrote the state.
    """
    expected = _read_json(state / CHECKSUMS) if (state / CHECKSUMS).exists() else {}
    for name in (OBJECTIVE, OPTIMIZER, METADATA):
        path = state / name
        try:
            if not path.exists():
                raise DamagedState(f"{path} is missing")
            if expected and checksum(path) != expected.get(name):
                raise DamagedState(f"{path} is damaged: its checksum differs from {CHECKSUMS}")
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, SafetensorError) as error:
            raise DamagedState(f"{path} cannot be read: {error}") from error
    read_metadata(state)


def read_metadata(state: pathlib.Path) -> dict[str, Any]:
    """The metadata of a state.

    Raises:
        DamagedState: the file is no JSON, or not of a state.
        RuntimeError: a newer version of this package wrote the state.
    """
    path = state / METADATA
    metadata = _read_json(path)
    if not isinstance(metadata.get("step"), int) or not isinstance(metadata.get("parameter_groups"), list):
        raise DamagedState(f"{path} is damaged: it has no step or no parameter groups")
    if metadata.get("format", FORMAT) != FORMAT:
        raise RuntimeError(
            f"{path} has format {metadata['format']}, this version of modeling_vitreg reads format {FORMAT}: install "
            "the version that wrote it, or start again with another output folder"
        )
    return metadata


def load_state(state: pathlib.Path, *, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a saved state into objective and optimiser, sharded or not; returns the metadata.

    Raises:
        DamagedState: a file of the state cannot be read.
        RuntimeError: names or shapes do not fit.
    """
    metadata = read_metadata(state)
    options = StateDictOptions(full_state_dict=True)
    moments: dict[str, dict] = {}
    for name, value in _load(state / OPTIMIZER).items():
        parameter, moment = name.rsplit("/", 1)
        moments.setdefault(parameter, {})[moment] = value
    optimizer_state = {"state": moments, "param_groups": metadata.pop("parameter_groups")}
    for file, put in {
        OBJECTIVE: lambda: set_model_state_dict(objective, load_objective(state), options=options),
        OPTIMIZER: lambda: set_optimizer_state_dict(objective, optimizer, optimizer_state, options=options),
    }.items():
        try:
            put()
        except (KeyError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"{state / file} does not fit the model of this recipe: {error}") from error
    return metadata


def load_objective(state: pathlib.Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of all trained modules, by name, on the CPU.

    Raises:
        DamagedState: the file cannot be read.
    """
    weights = _load(state / OBJECTIVE)
    return {
        next((name.replace(old, new) for old, new in _RENAMED.items() if old in name), name): weights[name]
        for name in weights
    }


def record_model(folder: pathlib.Path, step: int) -> None:
    """Write down beside `model/` which step it is from, with the checksums of its weights."""
    record = {"step": step, "checksums": _checksums_of_weights(folder)}
    write_text(folder / MODEL_RECORD, json.dumps(record, indent=1) + "\n")


def is_model_of(folder: pathlib.Path, step: int) -> bool:
    """Whether `model/` in the output folder of a run is whole and from this step."""
    try:
        record = _read_json(folder / MODEL_RECORD)
        return record == {"step": step, "checksums": _checksums_of_weights(folder)}
    except (DamagedState, OSError):
        return False


def _checksums_of_weights(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: checksum(path) for path in sorted((folder / "model").glob("*.safetensors"))}


def _load(path: pathlib.Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedState(f"{path} cannot be read: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedState(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedState(f"{path} is damaged: it holds a {type(content).__name__}, not a JSON object")
    return content


def _states(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders of states, the newest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def _named(folder: pathlib.Path) -> tuple[pathlib.Path | None, list[str]]:
    """The state that LAST names, None if it names none; and what is wrong with LAST."""
    pointer = folder / POINTER
    if not pointer.exists():
        return None, []
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _NAME.fullmatch(name):
        return None, [f"{pointer} is damaged: it holds {name[:40]!r}, not the name of a state"]
    return folder / name, [] if (folder / name).exists() else [f"{folder / name} is missing"]


__all__ = [
    "DamagedState",
    "check_state",
    "is_model_of",
    "last_state",
    "load_objective",
    "load_state",
    "read_metadata",
    "record_model",
    "save_state",
]

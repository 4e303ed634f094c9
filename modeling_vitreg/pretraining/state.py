"""The state of a run on disk, whole or not at all, and the same however it was sharded.

    state/
      LAST                     name of the newest folder
      step-00000500/
        objective.safetensors  parameters and buffers of student, teacher and heads, by name
        optimizer.safetensors  moments, as `<name of the parameter>/<name of the moment>`
        state.json             step, recipe, data, processes, positions of streams, scale of gradients
        checksums.json         CRC-32 of the other files; states of older versions have none

Several processes write a part each, for example `objective-00001-of-00002.safetensors`, see `shards`. Any number of
processes, sharded in any way, reads what it needs of them.

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
from concurrent.futures import Future
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from modeling_vitreg.distributed import new_control_group
from modeling_vitreg.files import checksum, write_text
from modeling_vitreg.names import list_first

from .shards import DamagedState, ShardReader, ShardWriter


POINTER = "LAST"
OBJECTIVE, OPTIMIZER, METADATA = "objective.safetensors", "optimizer.safetensors", "state.json"
CHECKSUMS, MODEL_RECORD = "checksums.json", "model.json"
_NAME = re.compile(r"step-\d{8,}")
_RENAMED = {"average.": "ema_model.", "_centre.centre": "_center.center"}  # parts of names in older states
FORMATS = (1, 2)  # 2 has several files of each kind; version 0.1 reads 1


class StateSaver:
    """Writes states in the background during training; all processes make and call it together.

    Args:
        folder: folder that holds the states of the run.
        num_kept: newest states to keep.
    """

    def __init__(self, folder: pathlib.Path, *, num_kept: int = 2):
        self._folder, self._num_kept = folder, num_kept
        self._group: distributed.ProcessGroup | None = None
        self._saving: tuple[Future, ShardWriter, int] | None = None

    def save(
        self, *, objective: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any], wait: bool = False
    ) -> None:
        """Copy this process's part of the state to the host, and begin to write it once the state before is written.

        Args:
            objective: as it came from `accelerator.prepare`, sharded or not.
            optimizer: without accelerate's wrapper.
            metadata: JSON-able; `step` names the folder.
            wait: return when the state is written.

        Raises:
            RuntimeError: this state, with `wait`, or the state before could not be written; the one before that is
                untouched.
        """
        self.wait()
        tensors, _, groups = _tensors_of(objective, optimizer)
        metadata = metadata | {"format": 1 if _num_processes() == 1 else 2, "parameter_groups": groups}
        step = metadata["step"]
        name = f"step-{step:08d}"

        def finish(part: pathlib.Path, checksums: dict[str, str]) -> None:
            (part / METADATA).write_text(json.dumps(metadata, indent=1))
            checksums = checksums | {METADATA: checksum(part / METADATA)}
            (part / CHECKSUMS).write_text(json.dumps(checksums, indent=1))

        def commit() -> None:
            write_text(self._folder / POINTER, name)
            # Newer folders are of a run that was taken back to an earlier state, which overwrites them later.
            for old in [path for path in _states(self._folder) if path.name <= name][self._num_kept :]:
                shutil.rmtree(old, ignore_errors=True)

        writer = ShardWriter(self._folder / name, finish=finish, commit=commit)
        _ignore_single_process()
        if self._group is None:
            self._group = new_control_group()  # so that messages of the background do not meet those of training
        keywords = {
            "process_group": self._group,
            "storage_writer": writer,
            "planner": checkpoint.DefaultSavePlanner(flatten_state_dict=False),
        }
        if wait:
            future: Future = Future()
            try:
                future.set_result(checkpoint.save(tensors, **keywords))
            except BaseException as error:
                future.set_exception(error)
        else:
            future = checkpoint.async_save(tensors, **keywords)
        self._saving = (future, writer, step)
        if wait:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether the state that was being written could not be; `wait` says why."""
        return self._saving is not None and self._saving[0].done() and self._saving[0].exception() is not None

    def wait(self) -> None:
        """Wait until the last state is written.

        Raises:
            RuntimeError: it could not be written; the one before it is untouched.
        """
        if self._saving is None:
            return
        (future, writer, step), self._saving = self._saving, None
        try:
            future.result()
        except BaseException as error:
            writer.abandon(error)
            if isinstance(error, checkpoint.CheckpointException):  # of each process that failed
                error = next(iter(error.failures.values()))[0]
            if not isinstance(error, OSError):
                raise error from None
            kept, _ = _named(self._folder)
            raise RuntimeError(
                f"the state of step {step} could not be written to {self._folder}: {error}. "
                + (f"The last good state is {kept}. " if kept else "There is no earlier state. ")
                + "Free some space, or check the permissions of the folder, and run the same command again"
            ) from error


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
    """Write the state of a run, and wait for it; all processes call it together. See `StateSaver`.

    Args:
        folder: folder that holds the states of the run.
        objective, optimizer, metadata: see `StateSaver.save`.
        is_writer: not used any more; every process writes its part.
        num_kept: newest states to keep.
        facts: older name of `metadata`.

    Raises:
        RuntimeError: the state could not be written; the one before it is untouched.
    """
    saver = StateSaver(folder, num_kept=num_kept)
    saver.save(objective=objective, optimizer=optimizer, metadata=metadata or facts, wait=True)


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
    metadata = read_metadata(state)
    expected = _read_json(state / CHECKSUMS) if (state / CHECKSUMS).exists() or metadata["format"] > 1 else {}
    for name in sorted({OBJECTIVE, OPTIMIZER, METADATA} if metadata["format"] == 1 else expected):
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
    if metadata.setdefault("format", 1) not in FORMATS:
        raise RuntimeError(
            f"{path} has format {metadata['format']}, this version of modeling_vitreg reads formats "
            f"{' and '.join(map(str, FORMATS))}: install the version that wrote it, or start again with another "
            "output folder"
        )
    return metadata


def load_state(state: pathlib.Path, *, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read into objective and optimiser, sharded or not, their parts of a saved state; returns the metadata.

    All processes call it together; the state may be of another number of processes, or sharded in another way.

    Raises:
        DamagedState: a file of the state cannot be read.
        RuntimeError: names or shapes do not fit.
    """
    metadata = read_metadata(state)
    reader = ShardReader(_files_of(state, "objective", "optimizer"), rename=_new_name)
    tensors, moments, _ = _tensors_of(objective, optimizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for kind, file in (("objective", OBJECTIVE), ("optimizer", OPTIMIZER)):
        ours, theirs = (
            {name: found[name] for name in found if name.startswith(f"{kind}/")} for found in (shapes, reader.shapes)
        )
        if ours != theirs:
            wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise RuntimeError(
                f"{state / file} does not fit the model of this recipe: {len(wrong)} tensors are missing, new or of "
                f"another shape, for example {list_first((name.removeprefix(f'{kind}/') for name in wrong), 3)}"
            )
    _ignore_single_process()
    try:
        checkpoint.load(
            tensors, storage_reader=reader, planner=checkpoint.DefaultLoadPlanner(flatten_state_dict=False)
        )
    except checkpoint.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    found = {"state": moments, "param_groups": metadata.pop("parameter_groups")}
    set_optimizer_state_dict(objective, optimizer, found)
    return metadata


def load_objective(state: pathlib.Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of all trained modules, by name, whole and on the CPU.

    Raises:
        DamagedState: a file cannot be read.
    """
    reader = ShardReader(_files_of(state, "objective"), rename=_new_name)
    weights = {name: torch.empty(shape, dtype=reader.dtypes[name]) for name, shape in reader.shapes.items()}
    _ignore_single_process()
    try:
        checkpoint.load(
            weights,
            storage_reader=reader,
            planner=checkpoint.DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    except checkpoint.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return {name.removeprefix("objective/"): tensor for name, tensor in weights.items()}


def _files_of(state: pathlib.Path, *kinds: str) -> dict[str, list[pathlib.Path]]:
    return {kind: sorted(state.glob(f"{kind}*.safetensors")) or [state / f"{kind}.safetensors"] for kind in kinds}


def _new_name(name: str) -> str:
    return next((name.replace(old, new) for old, new in _RENAMED.items() if old in name), name)


def _tensors_of(objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict, list]:
    """Tensors of a state by their names in `shards`, moments as the optimiser names them, groups of parameters."""
    found = get_optimizer_state_dict(objective, optimizer)
    moments = {
        name: {moment: torch.as_tensor(value) for moment, value in state.items()}
        for name, state in found["state"].items()
    }
    tensors = {f"objective/{name}": value for name, value in get_model_state_dict(objective).items()}
    for name, state in moments.items():
        tensors |= {f"optimizer/{name}/{moment}": value for moment, value in state.items()}
    return tensors, moments, found["param_groups"]


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _ignore_single_process() -> None:
    """torch warns of a single process, which is what most runs have."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


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

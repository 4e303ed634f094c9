"""Storage of torch.distributed.checkpoint (DCP) in safetensors: every process writes and reads its parts of tensors.

A process writes a file for each part of a state, `objective` and `optimizer`: `objective.safetensors` of one process,
`objective-00001-of-00002.safetensors` of several. A tensor that is whole has its name; a part of a tensor is
`<name>@<offsets>`, and the header of its file holds the shape of the whole tensor.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from modeling_vitreg.files import atomic_folder, atomic_write, checksum


class DamagedState(RuntimeError):
    """A file of a state is missing, cut off or changed; the message names it."""


class ShardWriter(StorageWriter):
    """Writes tensors `<file>/<name>`, sharded or not, into a folder that is whole or not there.

    Args:
        folder: to make; the main process of the group makes it.
        finish: called in the main process before the folder is renamed, with it and the checksums of its files.
        commit: called in the main process after it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        finish: Callable[[pathlib.Path, dict[str, str]], None],
        commit: Callable[[], None],
    ):
        self._folder, self._finish, self._commit = folder, finish, commit
        self._stack, self._part = contextlib.ExitStack(), None

    def reset(self, checkpoint_id=None) -> None:
        """Of the interface; a writer is used once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        if is_coordinator:
            self._part = self._stack.enter_context(atomic_folder(self._folder))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for number, plan in enumerate(plans, start=1):
            suffix = f"-{number:05d}-of-{len(plans):05d}" if len(plans) > 1 else ""
            object.__setattr__(plan, "storage_data", (self._part, suffix))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, suffix = plan.storage_data
        files: dict[str, dict] = collections.defaultdict(dict)
        shapes: dict[str, dict[str, str]] = collections.defaultdict(dict)
        indices: dict[str, list] = collections.defaultdict(list)
        for item in plan.items:
            chunk, shape = item.tensor_data.chunk, item.tensor_data.size
            file, name = item.index.fqn.split("/", 1)
            if chunk.sizes != shape:
                if not math.prod(chunk.sizes):
                    continue  # more processes than rows
                shapes[file][name] = json.dumps(list(shape))
                name += "@" + ",".join(map(str, chunk.offsets))
            files[file][name] = planner.resolve_data(item).detach().contiguous()
            indices[file].append(item.index)
        results = []
        for file, tensors in files.items():
            path = folder / f"{file}{suffix}.safetensors"
            with atomic_write(path) as part:
                save_file(tensors, part, metadata=shapes[file] or None)
            written = (path.name, checksum(path))
            results += [WriteResult(index, size_in_bytes=0, storage_data=written) for index in indices[file]]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish(
            self._part, dict(sorted({result.storage_data for of_process in results for result in of_process}))
        )
        self._stack.close()
        self._commit()

    def abandon(self, error: BaseException) -> None:
        """Remove what was written, after an error in any process."""
        with contextlib.suppress(type(error)):
            self._stack.__exit__(type(error), error, error.__traceback__)


class ShardReader(StorageReader):
    """Reads tensors `<file>/<name>` from files of `ShardWriter`, written by any number of processes.

    Args:
        files: by the first part of the names of their tensors.
        rename: name of a tensor in the files to its name today.

    Attributes:
        shapes, dtypes: of the whole tensors.

    Raises:
        DamagedState: a file cannot be read.
    """

    def __init__(self, files: Mapping[str, list[pathlib.Path]], *, rename: Callable[[str], str] = str):
        self._places: dict[MetadataIndex, tuple[pathlib.Path, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        chunks: dict[str, list] = collections.defaultdict(list)
        for prefix, paths in files.items():
            for path in paths:
                with _open(path) as file:
                    shapes = file.metadata() or {}
                    for key in file.keys():  # noqa: SIM118 - it is no mapping
                        stored, _, offsets = key.partition("@")
                        name = f"{prefix}/{rename(stored)}"
                        part = file.get_slice(key)
                        sizes = torch.Size(part.get_shape())
                        self.dtypes[name] = (part[:0] if sizes else file.get_tensor(key)).dtype
                        start = torch.Size(map(int, offsets.split(","))) if offsets else torch.Size([0] * len(sizes))
                        self.shapes[name] = torch.Size(json.loads(shapes[stored])) if offsets else sizes
                        chunks[name].append(ChunkStorageMetadata(start, sizes))
                        self._places[MetadataIndex(name, start)] = (path, key)
        self._metadata = Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(dtype=self.dtypes[name]), shape, chunks[name])
                for name, shape in self.shapes.items()
            }
        )

    def reset(self, checkpoint_id=None) -> None:
        """Of the interface; a reader is used once."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True

    def read_metadata(self) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Of the interface; headers have been read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = collections.defaultdict(list)
        for item in plan.items:
            path, key = self._places[item.storage_index]
            items[path].append((key, item))
        for path, wanted in items.items():
            with _open(path) as file:
                for key, item in wanted:
                    target = planner.resolve_tensor(item).detach()
                    part = tuple(slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths))
                    target.copy_(file.get_slice(key)[part] if part else file.get_tensor(key))
                    planner.commit_tensor(item, target)
        return _done(None)


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DamagedState(f"{path} cannot be read: {error}") from error


def _done(result) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future

"""Pickled checkpoints (`.pth`, `.pt`, `.bin`, `.ckpt`), read without running code.

PyTorch's formats are read with `weights_only=True`. An archive of TorchScript, the format of OpenAI's CLIP, is read by
an unpickler that knows tensors and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .rules import ConversionError, stage


_DEPTH = 32  # of modules inside modules
_STORAGES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_pickle(file: pathlib.Path) -> dict:
    """The dictionary that a file holds; tensors are views of the file where the format allows it.

    Raises:
        ConversionError: the file is damaged, needs code to be read, or holds something else.
    """
    size = f"{file.stat().st_size:,} bytes"
    with stage(f"{file}: {size}, damaged, truncated or not a checkpoint of PyTorch", remedy="download it again"):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                _check_archive(file, archive)
                if any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist()):
                    return _ScriptReader(file, archive).state_dict()
        try:
            state = _load(file)
        except pickle.UnpicklingError as error:
            if needed := re.search(r"GLOBAL ([\w.]+)|[Cc]lass(?:es)? ([\w.]+)", str(error)):
                name = needed[1] or needed[2]
                raise ConversionError(
                    f"{file}: refused, because reading it would run code ({name}): ask its author for a file of "
                    "tensors, or, if you trust it, load it yourself and torch.save its state_dict()"
                ) from error
            raise ConversionError(
                f"{file}: {size}, damaged or not a checkpoint of PyTorch: download it again"
            ) from error
    if not isinstance(state, dict):
        raise ConversionError(
            f"{file}: expected a dictionary of tensors, got {type(state).__name__}: torch.save the state_dict()"
        )
    return state


def _load(file: pathlib.Path) -> object:
    with torch.serialization.safe_globals(_plain_classes()):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format before 1.6


def _plain_classes() -> list:
    """Classes that old checkpoints hold beside tensors: numbers and options, which run nothing."""
    core = np._core if hasattr(np, "_core") else np.core
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, np.ndarray, core.multiarray.scalar, *kinds]


def _check_archive(file: pathlib.Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that would fill the memory, or whose checksums differ from its content."""
    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > file.stat().st_size + 2**20:
        raise ConversionError(
            f"{file}: claims {claimed:,} bytes in a file of {file.stat().st_size:,}: PyTorch does not compress "
            "checkpoints, so this is not one"
        )
    if not any(entry.CRC for entry in archive.infolist()):  # saved with set_crc32_options(False)
        return
    try:
        damaged = archive.testzip()
    except Exception as error:  # a broken header raises one of a dozen classes
        raise ConversionError(f"{file}: the archive is damaged ({error}): download it again") from error
    if damaged is not None:
        raise ConversionError(f"{file}: the checksum of {damaged} is wrong, so the file is damaged: download it again")


class _ScriptModule:
    """Stands for any class of an archive: it takes its state and does nothing with it."""

    def __init__(self, *arguments):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class _ScriptReader(pickle.Unpickler):
    """Reads the tensors of an archive of TorchScript and ignores its code."""

    def __init__(self, file: pathlib.Path, archive: zipfile.ZipFile):
        self._file, self._archive = file, archive
        self._root = archive.namelist()[0].split("/", 1)[0]
        self._storages: dict[str, Tensor] = {}
        super().__init__(archive.open(f"{self._root}/data.pkl"))

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names."""
        return dict(self._walk(self.load(), "", _DEPTH))

    def _walk(self, module: _ScriptModule, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if not depth:
            raise ConversionError(f"{self._file}: modules are nested deeper than {_DEPTH}: this is no checkpoint")
        for name, value in module.state.items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _ScriptModule):
                yield from self._walk(value, f"{prefix}{name}.", depth - 1)

    def find_class(self, module: str, name: str):
        """The few names that an archive of tensors needs."""
        if module.startswith("__torch__"):
            return _ScriptModule
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "device"): torch.device,
        }
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch.jit._pickle":
            return lambda values, *_: values
        if (module, name) not in allowed:
            raise ConversionError(f"{self._file}: refused, because reading it would run code ({module}.{name})")
        return allowed[module, name]

    def persistent_load(self, reference):
        """One storage of the archive, read once."""
        _, kind, key, _, _ = reference
        if key not in self._storages:
            if kind not in _STORAGES:
                raise ConversionError(f"{self._file}: expected tensors of numbers, got a {kind}")
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=_STORAGES[kind]) if data else torch.empty(0)
        tensor = self._storages[key]
        return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)

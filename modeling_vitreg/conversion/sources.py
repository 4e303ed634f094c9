"""Checkpoints as they lie on a disk, opened without running code of theirs and without reading them into memory.

A source is a file (`.pth`, `.pt`, `.bin`, `.ckpt`, `.safetensors`), or a folder with one, in one piece or sharded, and
perhaps with a `config.json`. Pickles are read with `weights_only=True`; an archive of TorchScript, the layout of
OpenAI's CLIP, by a reader that knows tensors and nothing else.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import safetensors
import torch
from torch import Tensor

from .rules import ConversionError


# What training programs wrap a state in, the one to take first.
CHECKPOINT_KEYS = ("teacher", "model_ema", "state_dict", "model", "student")
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


@dataclasses.dataclass
class Source:
    """An open checkpoint.

    Args:
        path: file or folder.
        shapes: of its tensors, by name.
        read: returns a tensor by name, as a view of the file where the format allows.
        num_bytes: of its tensors.
        files: that hold the tensors.
        checkpoint_key: word under which the tensors stood in the file, or None.
        left: what else stood in the file, with the reason why it is left.
        settings: of its `config.json`, or None.
        processor: settings of its image processor, or None.
    """

    path: pathlib.Path
    shapes: dict[str, tuple]
    read: Callable[[str], Tensor]
    num_bytes: int
    files: list[pathlib.Path]
    checkpoint_key: str | None = None
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict | None = None
    processor: dict | None = None

    def renamed(self, names: dict[str, str]) -> Source:
        """The same tensors, those in `names` only, under the names that stand there."""
        back = {new: old for old, new in names.items()}
        if len(back) < len(names):
            twice = [name for name, count in collections.Counter(names.values()).items() if count > 1]
            raise ConversionError(f"{self.path}: several tensors are {', '.join(twice[:5])}: keep one of them")
        return dataclasses.replace(
            self, shapes={names[old]: self.shapes[old] for old in names}, read=lambda name: self.read(back[name])
        )


def open_source(path: str | pathlib.Path, *, checkpoint_key: str | None = None) -> Source:
    """Open a checkpoint.

    Args:
        path: file or folder.
        checkpoint_key: key of the state dict in a file that holds several, such as "student"; default:
            the first of `CHECKPOINT_KEYS`.

    Raises:
        ConversionError: it is missing, truncated, no checkpoint, or needs code to be read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path))
        fetch = f"; to fetch it from the Hub: hf download {path} --local-dir {path.name}" if is_hub_name else ""
        raise ConversionError(
            f"{path}: no such file or folder: expected a checkpoint ({', '.join(_SUFFIXES)}) or a folder of one{fetch}"
        )
    folder, file = (path, _find_weights(path)) if path.is_dir() else (path.parent, path)
    settings = _read_json(folder / "config.json") if path.is_dir() else None
    processor = _read_json(folder / "preprocessor_config.json") if path.is_dir() else None
    files = _shards(file)
    for one in files:
        _check_size(one)
    states = [_open_file(one) for one in files]
    tensors, read, used, left = {}, {}, None, {}
    for one, state in zip(files, states):
        found, used, rest = _unwrap(state, checkpoint_key, one)
        tensors |= found
        read |= dict.fromkeys(found, found)
        left |= rest
    return Source(
        path=path,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        read=lambda name: read[name][name].read(),
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        files=files,
        checkpoint_key=used,
        left=left,
        settings=settings,
        processor=processor,
    )


def hash_files(files: list[pathlib.Path], *, known: dict[str, str] | None = None) -> str:
    """SHA-256 of files, one after the other.

    Args:
        files: to be read.
        known: hashes of official files by name.

    Raises:
        ConversionError: a file's name carries the beginning of a hash, as official names do, and it is another.
    """
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    found, in_name = digest.hexdigest(), _HASH_IN_NAME.search(files[0].name)
    claimed = (known or {}).get(files[0].name, in_name[1] if in_name else "")
    if len(files) == 1 and not found.startswith(claimed):
        raise ConversionError(
            f"{files[0]}: the name claims SHA-256 {claimed[:12]}..., the content has {found[:12]}...: "
            "the download is damaged or the file was changed. Download it again, or rename it if the change is yours"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A tensor that is read when asked for."""

    shape: tuple
    num_bytes: int
    read: Callable[[], Tensor]


def _find_weights(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    if (folder / "model" / "config.json").exists():
        raise ConversionError(f"{folder}: is a training run; its model is the folder {folder / 'model'}")
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    if len(found) == 1:
        return found[0]
    raise ConversionError(
        f"{folder}: expected one of {', '.join(_WEIGHT_FILES)} in the folder, got {len(found)} other checkpoints: "
        "name the file"
    )


def _shards(file: pathlib.Path) -> list[pathlib.Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    names = sorted(set(_read_json(file)["weight_map"].values()))
    missing = [name for name in names if not (file.parent / name).exists()]
    if missing:
        raise ConversionError(f"{file.parent}: {len(missing)} shards are missing: {', '.join(missing[:5])}")
    return [file.parent / name for name in names]


def _read_json(path: pathlib.Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: is not JSON ({error})") from error


def _check_size(file: pathlib.Path) -> None:
    """A zip archive that unpacks to more than it is would fill the memory."""
    if file.stat().st_size == 0:
        raise ConversionError(f"{file}: is empty: download it again")
    if zipfile.is_zipfile(file):
        claimed = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        if claimed > file.stat().st_size + 2**20:
            raise ConversionError(
                f"{file}: claims {claimed:,} bytes in a file of {file.stat().st_size:,}: PyTorch does not compress "
                "checkpoints, so this is none"
            )


def _open_file(file: pathlib.Path) -> dict:
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if _is_torchscript(file):
        return _wrap(_ScriptReader(file).state_dict())
    size = f"{file.stat().st_size:,} bytes"
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used with files saved with" not in str(error):
                    raise
                state = torch.load(file, map_location="cpu", weights_only=True)  # the format before 1.6
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and ("GLOBAL" in str(error) or "class" in str(error).lower()):
            needed = re.search(r"GLOBAL ([\w.]+)|class(?:es)? ([\w.]+)", str(error))
            needed = next((name for name in needed.groups() if name), "more than tensors") if needed else "more"
            raise ConversionError(
                f"{file}: refused, for reading it would run code ({needed}): ask its author for a file of tensors, "
                "or, if you trust it, load it yourself and torch.save its state_dict()"
            ) from error
        raise ConversionError(f"{file}: {size}, damaged or no checkpoint of PyTorch: download it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConversionError(
            f"{file}: {size}, truncated or no checkpoint of PyTorch ({type(error).__name__}): download it again"
        ) from error
    if not isinstance(state, dict):
        raise ConversionError(f"{file}: expected a dictionary of tensors, got {type(state).__name__}")
    return _wrap(state)


def _plain_classes() -> list:
    """Classes that old checkpoints hold beside tensors: numbers and options, which run nothing."""
    core = np._core if hasattr(np, "_core") else np.core
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, np.ndarray, core.multiarray.scalar, *kinds]


def _wrap(state: dict) -> dict:
    """Tensors as they will be read, in any depth of dictionaries."""
    wrapped = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            wrapped[str(name)] = _Lazy(tuple(value.shape), size, lambda value=value: value.detach())
        elif isinstance(value, dict):
            wrapped[str(name)] = _wrap(value)
        else:
            wrapped[str(name)] = None
    return wrapped


def _open_safetensors(file: pathlib.Path) -> dict:
    try:
        handle = safetensors.safe_open(file, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no dictionary)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file}: {file.stat().st_size:,} bytes, truncated or not safetensors ({error}): download it again"
        ) from error
    return {
        name: _Lazy(tuple(part.get_shape()), _num_bytes(part), lambda name=name: handle.get_tensor(name))
        for name, part in slices.items()
    }


def _num_bytes(part) -> int:
    bits = int(re.search(r"\d+", part.get_dtype())[0]) if part.get_dtype() != "BOOL" else 8
    return int(np.prod(part.get_shape(), dtype=np.int64)) * bits // 8


def _unwrap(state: dict, checkpoint_key: str | None, file: pathlib.Path) -> tuple[dict, str | None, dict]:
    """Tensors of a file, the word that they stood under, and what else there was."""
    used, left, wanted = [], {}, [checkpoint_key] if checkpoint_key else list(CHECKPOINT_KEYS)
    while True:
        nested = {name: value for name, value in state.items() if isinstance(value, dict)}
        tensors = {name: value for name, value in state.items() if isinstance(value, _Lazy)}
        word = next((word for word in wanted if word in nested and _has_tensors(nested[word])), None)
        if word is None:
            break
        left |= {name: f"beside the weights under {word!r}" for name in state if name != word}
        used.append(word)
        state, wanted = nested[word], list(CHECKPOINT_KEYS)
    if checkpoint_key and checkpoint_key not in used:
        raise ConversionError(
            f"{file}: has no state under {checkpoint_key!r}: expected one of {', '.join(nested) or 'none, it is flat'}"
        )
    if not tensors:
        raise ConversionError(f"{file}: holds no tensors: expected a state dict, got {', '.join(list(state)[:8])}")
    left |= {name: "not a tensor" for name in state if name not in tensors}
    return tensors, "/".join(used) or None, left


def _has_tensors(value: dict) -> bool:
    return any(isinstance(part, _Lazy) or (isinstance(part, dict) and _has_tensors(part)) for part in value.values())


# Archives of TorchScript ------------------------------------------------------------------------------------------


def _is_torchscript(file: pathlib.Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())


class _ScriptModule:
    """Stands for any class of an archive: it takes its state and does nothing with it."""

    def __init__(self, *arguments):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class _ScriptReader:
    """Reads the tensors of an archive of TorchScript; its code is not looked at."""

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._archive = zipfile.ZipFile(file)
        self._root = self._archive.namelist()[0].split("/", 1)[0]
        self._storages: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names."""
        with self._archive.open(f"{self._root}/data.pkl") as stream:
            module = _ClosedUnpickler(stream, self).load()
        return dict(self._walk(module, ""))

    def _walk(self, module: _ScriptModule, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in module.state.items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _ScriptModule):
                yield from self._walk(value, f"{prefix}{name}.")

    def find(self, module: str, name: str):
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
            raise ConversionError(f"{self._file}: refused, for reading it would run {module}.{name}")
        return allowed[module, name]

    def storage(self, reference: tuple):
        """One storage of the archive, read once."""
        _, kind, key, _, _ = reference
        if key not in self._storages:
            kinds = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64}
            kinds |= {"LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}
            kinds |= {"BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8}
            if kind not in kinds:
                raise ConversionError(f"{self._file}: expected tensors of numbers, got a {kind}")
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=kinds[kind]) if data else torch.empty(0)
        tensor = self._storages[key]
        return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)


class _ClosedUnpickler(pickle.Unpickler):
    """Unpickles what a `_ScriptReader` allows."""

    def __init__(self, stream, reader: _ScriptReader):
        super().__init__(stream)
        self._reader = reader

    def find_class(self, module: str, name: str):
        return self._reader.find(module, name)

    def persistent_load(self, reference):
        return self._reader.storage(reference)


__all__ = ["CHECKPOINT_KEYS", "Source", "hash_files", "open_source"]

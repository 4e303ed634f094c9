"""Checkpoints on a disk, opened without running their code and without reading all of them into memory.

A source is a file (`.pth`, `.pt`, `.bin`, `.ckpt`, `.safetensors`), or a folder with one, in one piece or in shards,
and perhaps with a `config.json`. Any problem is raised as a `ConversionError` that names file and part.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Callable

import safetensors
import torch
from torch import Tensor

from modeling_vitreg.features.folders import check_settings, is_hub_name, list_shards, read_json
from modeling_vitreg.names import list_first

from .pickles import read_pickle
from .rules import ConversionError, stage
from .writer import DTYPES


# Keys under which training programs keep a state dict; the first that exists is taken.
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
_NOT_WEIGHTS = re.compile(r"optim|sched|scaler|callback|loop|hyper|config|args|rng", re.IGNORECASE)
# Parts of names that DDP, FSDP, torch.compile, DeepSpeed and activation checkpointing put in.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_MOST_TENSORS, _MOST_LEVELS, _LONGEST_NAME = 10_000, 8, 500
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclasses.dataclass
class Source:
    """An open checkpoint.

    Args:
        path: file or folder.
        shapes: shape of each tensor, by name.
        read: returns a tensor by name, as a view of the file where the format allows it.
        num_bytes: size of all tensors.
        files: files that hold the tensors.
        checkpoint_key: key under which the tensors stood in the file, or None.
        left: other content of the file, with the reason why it is left out.
        settings: content of `config.json`, or None.
        processor: settings of the image processor, or None.
        dtypes: type of each tensor, or its name where torch has none like it.
        notes: sentences for the user about choices that were made.
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
    dtypes: dict[str, torch.dtype | str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def renamed(self, names: dict[str, str]) -> Source:
        """The tensors that `names` lists, under their new names."""
        back = {new: old for old, new in names.items()}
        if len(back) < len(names):
            twice = [name for name, count in collections.Counter(names.values()).items() if count > 1]
            raise ConversionError(f"{self.path}: several tensors are {list_first(twice)}: keep one of them")
        return dataclasses.replace(
            self,
            shapes={names[old]: self.shapes[old] for old in names},
            dtypes={names[old]: self.dtypes[old] for old in names if old in self.dtypes},
            read=lambda name: self.read(back[name]),
        )

    def beside(self, other: Source) -> Source:
        """The tensors of two sources."""
        return dataclasses.replace(
            self,
            shapes=self.shapes | other.shapes,
            dtypes=self.dtypes | other.dtypes,
            read=lambda name: other.read(name) if name in other.shapes else self.read(name),
            num_bytes=self.num_bytes + other.num_bytes,
        )

    @classmethod
    def of_module(cls, module: torch.nn.Module, title: str) -> Source:
        """The tensors of a model in memory."""
        state = module.state_dict()
        return cls(
            path=pathlib.Path(title),
            shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
            dtypes={name: tensor.dtype for name, tensor in state.items()},
            read=lambda name: state[name].detach().cpu(),
            num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
            files=[],
        )


def open_source(path: str | pathlib.Path, *, checkpoint_key: str | None = None) -> Source:
    """Open a checkpoint.

    Args:
        path: file or folder.
        checkpoint_key: key of the state dict in a file that holds several, such as "student", or the beginning of the
            names of its tensors; default: the first of `CHECKPOINT_KEYS`.

    Raises:
        ConversionError: it is missing, damaged, no checkpoint, needs code to be read, or leads out of its folder.
    """
    path = pathlib.Path(path)
    if not (path.is_file() or path.is_dir()):
        fetch = f"; to fetch it from the Hub: hf download {path} --local-dir {path.name}"
        raise ConversionError(
            f"{path}: no such file or folder: expected a checkpoint ({', '.join(_SUFFIXES)}) or a folder of one"
            + (fetch if is_hub_name(str(path)) else "")
        )
    try:
        settings = read_json(path / "config.json") if path.is_dir() else None
        processor = read_json(path / "preprocessor_config.json") if path.is_dir() else None
        file = _find_weights(path) if path.is_dir() else path
        files = list_shards(file) if file.name.endswith(".index.json") else [file]
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from error
    parts, key, left, notes = {}, None, {}, []
    for one in files:
        state, key, rest, said = _select(_open_file(one), checkpoint_key, one)
        if twice := next((name for name in state if name in parts), None):
            raise ConversionError(f"{one}: {twice} is in another shard too: keep one of them")
        parts |= _check_parts(state, one, rest)
        left |= rest
        notes += said
    _check_settings(settings, path, len(parts))
    if not parts:
        raise ConversionError(f"{path}: holds no tensors: expected a state dict, got {', '.join(list(left)[:8])}")

    def read(name: str) -> Tensor:
        with stage(f"{path}: {name[:_LONGEST_NAME]} cannot be read", remedy="download the file again"):
            return parts[name].read()

    source = Source(
        path=path,
        shapes={name: part.shape for name, part in parts.items()},
        dtypes={name: part.dtype for name, part in parts.items()},
        read=read,
        num_bytes=sum(part.num_bytes for part in parts.values()),
        files=files,
        checkpoint_key=key,
        left=left,
        settings=settings,
        processor=processor,
        notes=notes,
    )
    return source.renamed({name: _WRAPPERS.sub("", name) for name in source.shapes})


def hash_files(files: list[pathlib.Path], *, known: dict[str, str] | None = None) -> str:
    """SHA-256 of files, one after the other.

    Args:
        files: files to be read.
        known: hashes of official files by name.

    Raises:
        ConversionError: the name of a file carries the beginning of a hash, as official names do, and the content has
            another.
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
class _Part:
    """A tensor that is read when it is needed."""

    shape: tuple
    dtype: torch.dtype | str
    num_bytes: int
    read: Callable[[], Tensor]


def _find_weights(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "model" / "config.json").is_file():
        raise ConversionError(
            f"{folder}: is the output folder of a training run: give the folder of its model, {folder / 'model'}"
        )
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(found) == 1:
        return found[0]
    raise ConversionError(
        f"{folder}: expected one of {', '.join(_WEIGHT_FILES)} in the folder, got {len(found)} other checkpoints: "
        "name the file"
    )


def _check_settings(settings: dict | None, path: pathlib.Path, num_tensors: int) -> None:
    try:
        check_settings(settings or {}, path / "config.json", num_layers=max(num_tensors, 1))
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _open_file(file: pathlib.Path) -> dict:
    with open(file, "rb") as stream:
        start = stream.read(64)
    if not start:
        raise ConversionError(f"{file}: is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{file}: is a Git LFS pointer, not the file itself: run git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise ConversionError(f"{file}: is a web page, not a checkpoint: download the file itself")
    return _open_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)


def _open_safetensors(file: pathlib.Path) -> dict[str, _Part]:
    size = f"{file.stat().st_size:,} bytes"
    with stage(f"{file}: {size}, truncated or not safetensors", remedy="download it again"):
        handle, parts = safetensors.safe_open(file, framework="pt"), {}
        for name in handle.keys():  # noqa: SIM118 (it is no dictionary)
            part = handle.get_slice(name)
            shape, kind = tuple(part.get_shape()), part.get_dtype()
            bits = 8 if kind == "BOOL" else int(re.search(r"\d+", kind)[0])
            read = lambda name=name: handle.get_tensor(name)  # noqa: E731
            parts[name] = _Part(shape, _BY_NAME.get(kind, kind), math.prod(shape) * bits // 8, read)
    return parts


def _select(state: dict, key: str | None, file: pathlib.Path) -> tuple[dict, str | None, dict, list[str]]:
    """The state dict of a file, the keys that lead to it, what is left out with the reason, and notes."""
    used, left, notes, is_found = [], {}, [], key is None
    for _ in range(_MOST_LEVELS):
        nested = {name: value for name, value in state.items() if isinstance(value, dict) and _holds_tensors(value)}
        tensors = {name: value for name, value in state.items() if isinstance(value, (Tensor, _Part))}
        if not is_found and key not in nested and any(str(name).startswith(f"{key}.") for name in tensors):
            inside = {name: value for name, value in tensors.items() if str(name).startswith(f"{key}.")}
            left |= {str(name): f"not under {key!r}" for name in state if name not in inside}
            state, is_found = {name.removeprefix(f"{key}."): value for name, value in inside.items()}, True
            used.append(key)
            continue
        word = _choose_key(nested, tensors, None if is_found else key, file)
        if word is None:
            break
        is_found = is_found or word == key
        left |= {str(name): f"beside the weights under {word!r}" for name in state if name != word}
        notes += _notes_about(nested, word, file) if key is None else []
        used.append(str(word))
        state = nested[word]
    else:
        raise ConversionError(f"{file}: dictionaries are nested deeper than {_MOST_LEVELS}: expected a state dict")
    if not is_found:
        names = ", ".join(map(repr, nested)) or "no key, because it holds tensors directly"
        raise ConversionError(f"{file}: has no state under {key!r}: expected one of {names}")
    left |= {str(name): "not a tensor" for name in state if name not in tensors}
    return tensors, "/".join(used) or None, left, notes


def _choose_key(nested: dict, tensors: dict, key: str | None, file: pathlib.Path) -> str | None:
    """Key of the dictionary to go into next; None: the tensors lie here."""
    if key is not None:
        return key if key in nested else None
    if word := next((word for word in CHECKPOINT_KEYS if word in nested), None):
        return word
    likely = [name for name in nested if not _NOT_WEIGHTS.search(str(name))]
    if tensors or not likely:
        return None
    if len(likely) > 1:
        names = ", ".join(map(str, likely[:8]))
        raise ConversionError(f"{file}: holds several state dicts ({names}): choose one with --checkpoint-key")
    return likely[0]


def _notes_about(nested: dict, word: str, file: pathlib.Path) -> list[str]:
    """Other weights that lie beside those that were taken, such as a moving average."""
    count = sum(isinstance(value, Tensor) for value in nested[word].values())
    others = [
        name
        for name, value in nested.items()
        if name != word
        and not _NOT_WEIGHTS.search(str(name))
        and 2 * sum(isinstance(part, Tensor) for part in value.values()) >= count > 0
    ]
    if not others:
        return []
    return [
        f"{file.name} holds several sets of weights: took {word!r}, not {', '.join(map(repr, others))} "
        f"(--checkpoint-key {others[0]} takes {'that' if len(others) == 1 else 'the first of those'})"
    ]


def _holds_tensors(value: dict) -> bool:
    """Whether there is a tensor in a dictionary or in those below it, which may contain one another."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for part in one.values():
            if isinstance(part, (Tensor, _Part)):
                return True
            if isinstance(part, dict):
                waiting.append(part)
    return False


def _check_parts(state: dict, file: pathlib.Path, left: dict) -> dict[str, _Part]:
    """Tensors that can be converted, none larger than the file; those without values are left out."""
    if len(state) > _MOST_TENSORS:
        raise ConversionError(f"{file}: holds {len(state):,} tensors: expected a Vision Transformer, at most 10,000")
    parts = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ConversionError(f"{file}: expected names of tensors, got {name!r:.60} as a key: rename it")
        with stage(f"{file}: {name} cannot be read", remedy="save it as a dense tensor on the CPU"):
            part = value if isinstance(value, _Part) else _wrap(value)
            if len(part.shape) > 8:
                raise ValueError(f"{len(part.shape)} axes")
        if math.prod(part.shape):
            parts[name] = part
        else:
            left[name] = f"shape {part.shape} has no values"
    claimed, size = sum(part.num_bytes for part in parts.values()), file.stat().st_size
    if claimed > 4 * size + 2**20:
        raise ConversionError(
            f"{file}: its tensors claim {claimed:,} bytes in a file of {size:,}: they repeat the same values, or the "
            "file is damaged; save each tensor as a copy (tensor.clone())"
        )
    return parts


def _wrap(value: Tensor) -> _Part:
    kinds = {
        "sparse": value.layout != torch.strided,
        "nested": value.is_nested,
        "quantized": value.is_quantized,
        f"on the device {value.device.type}": value.device.type != "cpu",
    }
    if found := [kind for kind, is_so in kinds.items() if is_so]:
        raise ValueError(f"it is {' and '.join(found)}")
    return _Part(tuple(value.shape), value.dtype, value.numel() * value.element_size(), lambda: value.detach())

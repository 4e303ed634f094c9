"""Write safetensors files one tensor at a time, so that memory holds one tensor."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from .ledger import Entry
from .rules import ConversionError


# Names of types in the format. Source: the specification of safetensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: pathlib.Path,
    entries: list[Entry],
    *,
    read: Callable[[str], Tensor],
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Make tensors and write them.

    Args:
        path: new file.
        entries: tensors to write.
        read: returns a source tensor by name.
        on_tensor: called with the name of each tensor written.

    Raises:
        ConversionError: a value is not finite, or of a type that the format lacks; the message names the tensor.
        OSError: the disk is full.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        dtype, shape = _result(entry, read)
        size = torch.Size(shape).numel() * dtype.itemsize
        header[entry.name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = make(entry, read)
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
            on_tensor(entry.name)


def make(entry: Entry, read: Callable[[str], Tensor]) -> Tensor:
    """The values of an entry.

    Raises:
        ConversionError: one of its sources is not finite.
    """
    sources = [read(name) for name in entry.sources]
    for name, tensor in zip(entry.sources, sources):
        check_finite(name, tensor)
    return entry.make(*sources)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with values that are not finite.

    Raises:
        ConversionError: there are some.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ConversionError(
            f"{name} has {count:,} of {tensor.numel():,} values that are not finite: the file is damaged or its "
            "training diverged; nothing was saved"
        )


def _result(entry: Entry, read: Callable[[str], Tensor]) -> tuple[torch.dtype, list[int]]:
    sources = [read(name) for name in entry.sources]
    dtype = sources[0].dtype if sources else torch.float32
    if dtype not in DTYPES:
        raise ConversionError(f"{entry.sources[0]} has type {dtype}: expected one of {', '.join(map(str, DTYPES))}")
    made = entry.make(*(torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources))
    return (dtype if sources else made.dtype), list(made.shape)

"""In which precision the matrix products of a model run. The residual stream of weights in float32 stays float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from modeling_vitreg.features import Encoder
from modeling_vitreg.modes import fast_attention


def choose_precision(encoder: Encoder, wanted: str | None) -> str:
    """The precision of a pass.

    Args:
        encoder: the model, on its device.
        wanted: "float32", "bfloat16" or "float16"; None: bfloat16 for weights in float32 on a GPU that has it, else
            the precision of the weights.

    Raises:
        ValueError: the weights are in another half precision than the one that is wanted.
    """
    own = str(encoder.dtype).removeprefix("torch.")
    if own != "float32":
        if wanted not in (None, own):
            raise ValueError(
                f"{encoder.name}: expected weights in float32 for the precision {wanted}, got weights in {own}: load "
                "them in float32, or leave out the precision"
            )
        return own
    if wanted is None and encoder.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return wanted or "float32"


def to_float16(values: Tensor, *, name: str, remedy: str) -> Tensor:
    """Values in half precision, to store them.

    Raises:
        RuntimeError: a value that float16 cannot hold.
    """
    halves = values.half()
    if halves.isinf().any():
        raise RuntimeError(f"{name}: a value is above 65504, the largest of float16: store float32 ({remedy})")
    return halves


@contextlib.contextmanager
def run_in(precision: str, encoder: Encoder) -> Iterator[None]:
    """A context in which the encoder runs in a precision. An outer one keeps the converted weights for inner ones."""
    device, is_mixed = encoder.device.type, precision != "float32" and encoder.dtype == torch.float32
    with (
        fast_attention(device),
        torch.autocast(device, getattr(torch, precision)) if is_mixed else contextlib.nullcontext(),
    ):
        yield

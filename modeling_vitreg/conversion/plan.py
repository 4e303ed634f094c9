"""Shared by both directions of a conversion: the settings, and a plan that `pipeline.run` carries out."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersPreTrainedModel

from .ledger import Entry, Ledger
from .rules import ConversionError
from .sources import Source
from .verify import TOLERANCE, Reference
from .writer import DTYPES


@dataclasses.dataclass(frozen=True)
class ConversionSettings:
    """Choices of the caller.

    Args:
        family: name of the layout; None infers it.
        checkpoint_key: key of the state dict in a file that holds several; None takes the usual ones.
        head: file with a linear head of DINOv2 for this backbone.
        config_overrides: fields of the configuration that no tensor shows. A `token_reduction` is written after the
            comparison, which needs all tokens.
        code: clone of the original repository to compare with; None uses installed libraries.
        tolerance: largest relative error.
        skip_verification: do not compare with the original, for models that do not fit into memory twice.
        is_quiet: show no progress.
    """

    family: str | None = None
    checkpoint_key: str | None = None
    head: pathlib.Path | None = None
    config_overrides: dict = dataclasses.field(default_factory=dict)
    code: pathlib.Path | None = None
    tolerance: float = TOLERANCE
    skip_verification: bool = False
    is_quiet: bool = False


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """A conversion whose ledger balances, before anything is written.

    Args:
        title: "A to B", for messages.
        source, target: facts for the report.
        ledger: what becomes of each tensor.
        tensors: the tensors that are read.
        files: files of the source, to be hashed.
        hashes: SHA-256 of official files by name.
        left: other content of the source, with the reason.
        write: writes the result into a folder, and returns what `compare` needs.
        compare: returns our model and the reference, or in words why there is none.
        notes: what the comparison does not show.
        finish: changes the folder after the comparison.
    """

    title: str
    source: dict
    target: dict
    ledger: Ledger
    tensors: Source
    files: list[pathlib.Path]
    hashes: dict[str, str]
    left: dict[str, str]
    write: Callable[[pathlib.Path], object]
    compare: Callable[[object], tuple[ViTWithRegistersPreTrainedModel, Reference | str]]
    notes: list[str] = dataclasses.field(default_factory=list)
    finish: Callable[[pathlib.Path], None] = lambda folder: None


def make_empty(kind: type[PreTrainedModel], config: ViTWithRegistersConfig) -> ViTWithRegistersPreTrainedModel:
    """A model on the meta device, with shapes but no values."""
    with torch.device("meta"):
        return kind(config)


def short(name: str) -> str:
    """The name of a tensor in the base model, without the prefix of classes with a head."""
    return name.removeprefix("vitreg.")


def check_types(entries: tuple[Entry, ...], sources: Source, targets: dict[str, torch.dtype]) -> None:
    """Refuse weights of integers and other types that a model cannot have.

    Args:
        entries: tensors to be written.
        sources: what they are made from.
        targets: type of each tensor of the model; the names are those of the entries.

    Raises:
        ConversionError: the message has the name and the type of a tensor.
    """
    for entry in entries:
        for name in entry.sources:
            found = sources.dtypes.get(name, torch.float32)
            is_number = isinstance(found, torch.dtype) and found in DTYPES
            wants_float = targets.get(entry.name, torch.float32).is_floating_point
            if not is_number or found.is_floating_point != wants_float:
                raise ConversionError(
                    f"{sources.path}: {name} has type {str(found).removeprefix('torch.')}, expected "
                    f"{'floating-point numbers' if wants_float else 'integers'}: if the weights are quantised, "
                    "convert the original ones"
                )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide the progress bars and load reports of transformers, which would hide ours."""
    was_on, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if was_on:
            transformers_logging.enable_progress_bar()

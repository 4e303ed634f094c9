"""Checkpoints to folders of this family, and back: open, infer, balance, write, verify, and only then rename.

Both directions make a `ConversionPlan` (`incoming.py`, `outgoing.py`), and `run` carries it out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from modeling_vitreg.files import atomic_folder
from modeling_vitreg.reports import ConversionReport, command_line, made_with, write_report

from .incoming import plan_import
from .outgoing import IN_ONE_FILE, TARGETS, plan_export
from .plan import ConversionPlan, ConversionSettings, quietly
from .rules import ConversionError, stage
from .sources import hash_files
from .verify import check_errors, verify


REPORT_FILE = "conversion.json"


def convert(
    source: str | pathlib.Path | nn.Module,
    output: str | pathlib.Path,
    *,
    settings: ConversionSettings | None = None,
    command: str | None = None,
) -> ConversionReport:
    """Convert a checkpoint to a folder that `from_pretrained` loads, and verify it.

    Args:
        source: file, folder, "timm:NAME", or a model of timm or transformers in memory.
        output: folder to make; it must not exist, or be empty.
        settings: choices of the caller.
        command: for the record; default that of the process.

    Returns:
        The content of `conversion.json`.

    Raises:
        ConversionError: the source is damaged or of no known family, the ledger does not balance, or the outputs
            differ; then nothing is saved.
    """
    settings, output = settings or ConversionSettings(), _check_output(output)
    if isinstance(source, PreTrainedModel):
        with _saved(source) as folder:
            return _convert(folder, output, settings, command, title=type(source).__name__)
    return _convert(source, output, settings, command)


def _convert(source, output: pathlib.Path, settings, command: str | None, *, title: str | None = None):
    try:
        plan = plan_import(source, settings)
        if title is not None:
            plan = dataclasses.replace(plan, source=plan.source | {"path": title})
        return run(plan, output, settings=settings, command=command)
    except ConversionError as error:
        if title is not None:
            raise ConversionError(str(error).replace(str(source), title)) from error
        if isinstance(source, nn.Module) or str(source) in str(error):
            raise
        raise ConversionError(f"{source}: {error}") from error


@contextlib.contextmanager
def _saved(module: PreTrainedModel) -> Iterator[pathlib.Path]:
    """A folder with a model of transformers, because its names in files are not always those in memory."""
    with tempfile.TemporaryDirectory(prefix="vitreg-convert-") as place:
        folder = pathlib.Path(place) / type(module).__name__
        with quietly():
            module.save_pretrained(folder)
        yield folder


def export(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    to: str,
    settings: ConversionSettings | None = None,
    command: str | None = None,
) -> ConversionReport:
    """Write a model of this family in another layout, and verify it.

    Args:
        source: folder of a model of this family.
        output: a file ending in `.pth` for "dinov2", "mamba-reg" and "hat-net", else a folder to make.
        to: one of `TARGETS`.
        settings: `code`, `tolerance`, `skip_verification` and `is_quiet` count.
        command: for the record; default that of the process.

    Returns:
        The content of `conversion.json`; beside a file, it begins with the name of the file.

    Raises:
        ConversionError: the layout cannot represent the architecture, and the message names the field; or the outputs
            differ, and then nothing is saved.
    """
    settings, output = settings or ConversionSettings(), _check_output(output)
    if to not in TARGETS:
        raise ConversionError(f"expected a layout out of {', '.join(TARGETS)}, got {to!r}")
    is_file = to in IN_ONE_FILE
    if is_file and output.suffix != ".pth":
        raise ConversionError(f"{output}: the layout of {to} is a file: choose a name that ends in .pth")
    plan = plan_export(source, to, output.name, settings)
    return run(plan, output, settings=settings, command=command, is_file=is_file)


def run(
    plan: ConversionPlan,
    output: pathlib.Path,
    *,
    settings: ConversionSettings,
    command: str | None = None,
    is_file: bool = False,
) -> ConversionReport:
    """Carry a plan out: write, compare, and move the result to its place if both went well.

    Args:
        plan: what to write, and what to compare with.
        output: folder to make, or with `is_file` the file beside which the report lies.
        settings: choices of the caller.
        command: for the record.
        is_file: whether the result is one file.

    Raises:
        ConversionError: the disk is too small, the source differs from its hash, or the outputs differ.
    """
    _check_room(output, plan.tensors.num_bytes)
    digest = hash_files(plan.files, known=plan.hashes) if plan.files else None
    report_name = f"{output.stem}.{REPORT_FILE}" if is_file else REPORT_FILE
    with atomic_folder(output, files=[output.name, report_name] if is_file else None) as folder:
        written = plan.write(folder)
        report = ConversionReport(
            source={**plan.source, "sha256": digest, "num_bytes": plan.tensors.num_bytes},
            target=plan.target,
            ledger={
                "coverage": plan.ledger.coverage(plan.title),
                "num_used": plan.ledger.num_used,
                "num_written": len(plan.ledger.entries),
                "dropped": plan.ledger.dropped,
                "filled": plan.ledger.filled,
                "left": plan.left,
            },
            verification=_verify(plan, written, settings),
            command=command or command_line(),
            made_with=made_with(),
        )
        plan.finish(folder)
        write_report(report, folder / report_name)
    return report


def _verify(plan: ConversionPlan, written: object, settings: ConversionSettings) -> dict:
    if settings.skip_verification:
        return {"is_verified": False, "why": "the verification was skipped on request"}
    remedy = "name a clone of its repository with --code, or skip the comparison with --no-verify"
    with stage(f"{plan.title}: the original model could not be run", remedy=remedy):
        model, reference = plan.compare(written)
        if isinstance(reference, str):
            return {"is_verified": False, "why": reference}
        found = verify(model, reference, is_quiet=settings.is_quiet)
    check_errors(found, tolerance=settings.tolerance, title=plan.title)
    notes = list(plan.notes)
    if reference.positions:
        words = ", ".join(f"{name}={value}" for name, value in reference.positions.items())
        notes.append(
            f"positions were resized by the rule of the reference ({words}) on both sides, not by the family's"
        )
    if len(found["sizes"]) == 1:
        notes.append("the reference takes images of one size only")
    return {"is_verified": True, **found, "tolerance": settings.tolerance, "notes": notes}


def _check_output(output: str | pathlib.Path) -> pathlib.Path:
    output = pathlib.Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConversionError(f"{output}: exists and is not empty: choose another output, or remove it")
    return output


def _check_room(output: pathlib.Path, num_bytes: int) -> None:
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.05 * num_bytes:
        raise ConversionError(
            f"{output}: needs {num_bytes:,} bytes, the disk has {free:,} left: free some space, "
            f"or choose another output"
        )

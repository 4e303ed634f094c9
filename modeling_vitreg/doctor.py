"""What may be wrong with this installation or with a checkpoint, and what to type about it.

Nothing is changed, and nothing is asked of the network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open


DISTRIBUTION = "modeling-vitreg"
_LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "huggingface_hub", "peft")
_OPTIONAL = ("torchvision", "accelerate", "datasets", "peft")
_SIMILAR = 1 - 1e-6  # cosine from which two registers are one
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: ok; warning, something will not work or not well; problem, it does not work.
        what: was found.
        remedy: command to type, or empty.
    """

    level: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


def diagnose(checkpoint: str | os.PathLike | None = None) -> list[Finding]:
    """Look at the installation, and at a checkpoint if one is named.

    Args:
        checkpoint: folder of a model, or name of one on the Hub that is in the cache.
    """
    findings = [*check_versions(), *check_torchvision(), *check_hardware(), *check_cache()]
    return findings if checkpoint is None else [*findings, *check_checkpoint(checkpoint)]


def render_findings(findings: list[Finding]) -> str:
    """A table in plain text; what was found is broken to the width of a terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = []
    for finding in findings:
        lines += textwrap.wrap(finding.what, width, initial_indent=f"{finding.level:<9}", subsequent_indent=" " * 9)
        lines += [f"{'':9}-> {finding.remedy}"] if finding.remedy else []
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    words = [_plural(count, level) for level, count in counts.items() if count]
    return "\n".join([*lines, " and ".join(words) if words else "nothing is wrong"])


def check_versions() -> Iterator[Finding]:
    """Versions against the ranges that this package declares."""
    yield Finding("ok", f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    ranges = _declared()
    for name in _LIBRARIES:
        wanted = ranges.get(name.lower().replace("_", "-"))
        specifier = str(wanted.specifier) if wanted is not None else ""
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            level = "warning" if name in _OPTIONAL else "problem"
            yield Finding(level, f"{name} is not installed", f'pip install "{name}{specifier}"')
            continue
        if wanted is None or wanted.specifier.contains(version, prereleases=True):
            yield Finding("ok", f"{name} {version}")
        else:
            yield Finding(
                "problem", f"{name} {version}: expected {specifier}", f'pip install --upgrade "{name}{specifier}"'
            )


def check_torchvision() -> Iterator[Finding]:
    """Whether torchvision was built for this torch."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            yield Finding("problem", f"torchvision cannot be imported: {error}", f'pip install "{error.name}"')
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        torch_version = torch.__version__.split("+")[0]
        yield Finding(
            "problem",
            f"torchvision was built for another torch than {torch_version}, and cannot be imported: {error}",
            f'pip install --force-reinstall "torch=={torch_version}" torchvision',
        )
    else:
        yield Finding("ok", "torchvision fits torch")


def check_hardware() -> Iterator[Finding]:
    """Accelerators with their memory, and threads."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding("ok", f"{name}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "Apple GPU (mps)")
    elif torch.version.cuda and pathlib.Path("/proc/driver/nvidia/version").exists():
        yield Finding(
            "warning", f"there is a GPU, but torch, built for CUDA {torch.version.cuda}, cannot use it", "nvidia-smi"
        )
    else:
        yield Finding("ok", "no accelerator: everything runs on the processor")
    threads, cores = torch.get_num_threads(), _num_cores()
    yield Finding("ok", f"{_plural(threads, 'thread')} on {_plural(cores, 'core')}")
    if threads > cores:
        yield Finding(
            "warning", "more threads than cores stand in each other's way", f"export OMP_NUM_THREADS={cores}"
        )


def check_cache() -> Iterator[Finding]:
    """The cache of the Hub, offline mode, and whether there is a token, which is never shown."""
    cache = pathlib.Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file() and not file.is_symlink())
    yield Finding("ok", f"cache of the Hub: {cache}, {size / _GIB:.1f} GiB, {free / _GIB:.1f} GiB of the disk free")
    if not os.access(place, os.W_OK):
        yield Finding("problem", f"{place} cannot be written to", "export HF_HOME=SOME/FOLDER")
    if free < 2 * _GIB:
        yield Finding("warning", "the disk is nearly full", "hf cache prune")
    if constants.HF_HUB_OFFLINE:
        yield Finding("warning", "offline mode: only what lies in the cache can be loaded", "unset HF_HUB_OFFLINE")
    else:
        yield Finding("ok", f"online, with {constants.ENDPOINT}")
    if huggingface_hub.get_token() is None:
        yield Finding("ok", "no token: loading public models and everything local works, publishing does not")
    else:
        yield Finding("ok", "there is a token for the Hub")


def check_checkpoint(checkpoint: str | os.PathLike) -> Iterator[Finding]:
    """Files, tensors and registers of a model of this family."""
    folder = _find_folder(checkpoint)
    if folder is None:
        yield Finding(
            "problem",
            f"{checkpoint}: is no folder with a config.json, and no model in the cache",
            f"hf download {checkpoint}",
        )
        return
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        yield Finding("problem", f"{folder / 'config.json'} does not parse: {error}")
        return
    yield from _check_files(folder, settings)
    yield from _check_tensors(folder, settings)


def _check_files(folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    references = settings.get("auto_map") or {}
    if settings.get("model_type") != "vitreg" and not references:
        yield Finding("ok", f"a model of type {settings.get('model_type')}, whose code is in transformers")
        return
    code = {f"{value.split('.')[0]}.py" for value in references.values() if "--" not in value}
    missing = sorted(name for name in code if not (folder / name).is_file())
    again = _write_command(folder, settings, "", target=folder)
    if missing or not references:
        found = ", ".join(missing) or "the auto_map of config.json"
        yield Finding("problem", f"{found} missing: it loads only where this package is installed", again)
    else:
        yield Finding("ok", "its code lies beside it")
    if (folder / "preprocessor_config.json").is_file():
        yield Finding("ok", "its image processor lies beside it")
    else:
        yield Finding("problem", "preprocessor_config.json missing: nobody can prepare images for it", again)


def _check_tensors(folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        yield Finding("problem", f"{folder}: no model.safetensors: the weights are missing")
        return
    broken, num_tensors, registers = [], 0, None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    num_tensors += 1
                    broken += [name] if not bool(tensor.isfinite().all()) else []
                    registers = tensor.float() if "register_tokens" in name else registers
        except SafetensorError as error:
            yield Finding("problem", f"{path.name} is damaged or not whole, so get or save it again: {error}")
            return
    if broken:
        shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        yield Finding("problem", f"values that are not finite in {shown}: training diverged; take an earlier state")
    else:
        yield Finding("ok", f"{num_tensors} tensors, all values finite")
    yield from _check_registers(registers, folder, settings)


def _check_registers(registers: torch.Tensor | None, folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    """Equal registers get equal gradients, so they stay one register for ever."""
    expected = settings.get("num_register_tokens", 4 if settings.get("model_type") == "vitreg" else 0)
    if registers is None:
        found = 0
    else:
        registers = registers.reshape(-1, registers.shape[-1])
        found = len(registers)
    if found != expected:
        yield Finding("problem", f"the weights hold {found} registers, config.json says {expected}")
    if registers is None or found < 2:
        yield Finding("ok", f"{_plural(found, 'register')}")
        return
    unit = torch.nn.functional.normalize(registers, dim=-1, eps=1e-30)
    similarity = unit @ unit.T
    twins = [
        (row, column)
        for row in range(found)
        for column in range(row)
        if similarity[row, column] > _SIMILAR or torch.equal(registers[row], registers[column])
    ]
    if not twins:
        yield Finding("ok", f"{found} registers, all different")
        return
    are_all = len(twins) == found * (found - 1) // 2
    change = f"m.resize_register_tokens(1); m.resize_register_tokens({found})"
    yield Finding(
        "problem",
        f"{'all' if are_all else 'some'} of its {found} registers are equal: equal ones get equal gradients, so they "
        "work as one for ever. To train on, give all but the first new values",
        _write_command(folder, settings, change, target=f"{folder}-distinct"),
    )


def _write_command(folder: pathlib.Path, settings: dict, change: str, *, target: str | os.PathLike) -> str:
    """The command that loads a model of this family, changes it and saves it; empty for others."""
    if settings.get("model_type") != "vitreg":
        return ""
    kind = (settings.get("architectures") or ["ViTWithRegistersModel"])[0]
    load, save = f"m = {kind}.from_pretrained('{folder}')", f"m.save_pretrained('{target}')"
    steps = [f"from modeling_vitreg import {kind}", load, *([change] if change else []), save]
    return f'python -c "{"; ".join(steps)}"'


def _find_folder(checkpoint: str | os.PathLike) -> pathlib.Path | None:
    path = pathlib.Path(checkpoint)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    try:
        found = huggingface_hub.try_to_load_from_cache(os.fspath(checkpoint), "config.json")
    except HFValidationError:
        return None
    return pathlib.Path(found).parent if isinstance(found, str) else None


def _declared() -> dict[str, Requirement]:
    """Requirements of this package by name, those of its extras too."""
    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a copy that is not installed
        return {}
    requirements = [Requirement(text) for text in texts]
    named = {req.name.lower().replace("_", "-"): req for req in requirements if req.specifier}
    return named


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = [
    "DISTRIBUTION",
    "Finding",
    "check_cache",
    "check_checkpoint",
    "check_hardware",
    "check_torchvision",
    "check_versions",
    "diagnose",
    "render_findings",
]

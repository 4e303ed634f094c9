"""Problems of this installation or of a model, each with the command that fixes it.

Nothing is changed, and the network is not used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import textwrap
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open

from modeling_vitreg.names import count_of, list_first
from modeling_vitreg.workers import count_cores


DISTRIBUTION = "modeling-vitreg"
_LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "huggingface_hub", "peft")
_OPTIONAL = ("torchvision", "accelerate", "datasets", "peft")
_SIMILAR = 1 - 1e-6  # cosine from which two registers are one
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        level: ok; warning: something may not work; problem: it does not work.
        what: the finding.
        remedy: command to type, or empty.
    """

    level: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


def diagnose(checkpoint: str | os.PathLike | None = None) -> list[Finding]:
    """Check the installation, and a model if one is named.

    Args:
        checkpoint: folder of a model, or name of one on the Hub that is in the cache.
    """
    findings = [*check_versions(), *check_torchvision(), *check_hardware(), *check_cache()]
    return findings if checkpoint is None else [*findings, *check_checkpoint(checkpoint)]


def render_findings(findings: list[Finding]) -> str:
    """A table in plain text, wrapped to the width of the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = []
    for finding in findings:
        lines += textwrap.wrap(finding.what, width, initial_indent=f"{finding.level:<9}", subsequent_indent=" " * 9)
        lines += [f"{'':9}-> {finding.remedy}"] if finding.remedy else []
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    words = [count_of(count, level) for level, count in counts.items() if count]
    return "\n".join([*lines, " and ".join(words) if words else "no problem was found"])


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
            f"torchvision cannot be imported, because it was built for another torch than {torch_version}: {error}",
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
        yield Finding("ok", "no accelerator: everything runs on the CPU")
    threads, cores = torch.get_num_threads(), count_cores()
    yield Finding("ok", f"{count_of(threads, 'thread')} on {count_of(cores, 'core')}")
    if threads > cores:
        yield Finding("warning", "more threads than cores slow each other down", f"export OMP_NUM_THREADS={cores}")


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
        yield Finding("warning", "offline mode: only models in the cache can be loaded", "unset HF_HUB_OFFLINE")
    else:
        yield Finding("ok", f"online, with {constants.ENDPOINT}")
    if huggingface_hub.get_token() is None:
        yield Finding("ok", "no token: public and local models can be loaded, but not published")
    else:
        yield Finding("ok", "there is a token for the Hub")


def check_checkpoint(checkpoint: str | os.PathLike) -> Iterator[Finding]:
    """Files, settings, code, tensors and registers of a model."""
    from modeling_vitreg.features import folders

    folder = _find_folder(checkpoint)
    if folder is None:
        if pathlib.Path(checkpoint).exists():
            yield Finding("problem", f"{checkpoint}: no model with a config.json", f"vitreg convert {checkpoint} NEW")
        else:
            yield Finding("problem", f"{checkpoint}: not a folder with a config.json, nor a model in the cache",
                          f"hf download {checkpoint}")  # fmt: skip
        return
    try:
        settings = folders.read_json(folder / "config.json") or {}
        folders.check_settings(settings, folder / "config.json")
    except (ValueError, OSError) as error:
        yield Finding("problem", str(error))
        return
    yield from _check_files(folder, settings)
    is_readable = yield from _check_tensors(folder, settings)
    if is_readable:
        yield from _check_names(folder, settings)


def _check_files(folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    from modeling_vitreg.features import folders
    from modeling_vitreg.modeling_vitreg import read_image_processor

    is_ours = settings.get("model_type") in ("vitreg", "vitreg_mamba", "vitreg_hat", "vitreg_dual_encoder")
    again = _write_command(folder, settings, "", target=folder)
    references = settings.get("auto_map") or {}
    values = references.values() if isinstance(references, dict) else ()
    code = {f"{value.split('.')[0]}.py" for value in values if isinstance(value, str) and "--" not in value}
    missing = sorted(name for name in code if "/" in name or not (folder / name).is_file())
    if missing or (is_ours and not code):
        found = ", ".join(missing) or "the auto_map of config.json"
        yield Finding("problem", f"{found} missing: it loads only where this package is installed", again)
    elif broken := [text for name in sorted(code) if (text := _syntax_error(folder / name))]:
        yield Finding("problem", f"the code in the folder is damaged: {', '.join(broken)}", again)
    elif code:
        yield Finding("ok", f"the code is in the folder: {', '.join(sorted(code))}")
    elif _class_of(settings) is None:
        yield Finding("problem", f"config.json names neither code nor a class of transformers: {_describe(settings)}")
    else:
        yield Finding("ok", f"a model of type {settings.get('model_type')}, whose code is in transformers")
    if not (folder / "preprocessor_config.json").is_file():
        if is_ours:
            yield Finding("problem", "preprocessor_config.json missing: images cannot be prepared for it", again)
        return
    try:
        path = folder / "preprocessor_config.json"
        folders.read_json(path)
        read_image_processor(path, num_channels=settings.get("num_channels") or 3)
        yield Finding("ok", "the image processor is in the folder")
    except (ValueError, OSError) as error:
        yield Finding("problem", str(error), again)


def _syntax_error(path: pathlib.Path) -> str:
    """Why a file is no Python, without running it; empty where it is."""
    try:
        compile(path.read_bytes(), path.name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        return f"{path.name}: {error}"
    return ""


def _check_tensors(folder: pathlib.Path, settings: dict) -> Generator[Finding, None, bool]:
    """Read all tensors; returns whether all could be read."""
    from modeling_vitreg.features import folders

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        remedy = f"vitreg convert {folder / pickles[0]} NEW" if pickles else ""
        yield Finding("problem", f"{folder}: the weights are missing, model.safetensors", remedy)
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").exists():
        try:
            files = folders.list_shards(index)
        except (ValueError, OSError) as error:
            yield Finding("problem", str(error))
            return False
    broken, whole, num_tensors, registers = [], [], 0, None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    num_tensors += 1
                    is_small = (
                        tensor.is_floating_point() and tensor.element_size() == 1
                    )  # torch has few functions for it
                    broken += [name] if not bool((tensor.float() if is_small else tensor).isfinite().all()) else []
                    is_count = name.endswith(("position_ids", "num_batches_tracked"))
                    whole += [name] if not tensor.is_floating_point() and not is_count else []
                    registers = tensor.float() if "register_tokens" in name else registers
        except (SafetensorError, OSError) as error:
            yield Finding("problem", f"{path.name} is damaged or incomplete: download or save it again: {error}")
            return False
    if broken:
        found = f"values that are not finite in {list_first(broken, 3)}: training diverged; take an earlier state"
        yield Finding("problem", found)
    if whole:
        yield Finding(
            "problem", f"integers or booleans instead of weights in {list_first(whole, 3)}: download the model again"
        )
    if not broken and not whole:
        yield Finding("ok", f"{num_tensors} tensors, all values finite")
    yield from _check_registers(registers, folder, settings)
    return True


def _check_names(folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    """Tensors of the file against those of the class that the configuration names, which loads them."""
    import transformers

    kind = _class_of(settings)
    if kind is None:
        yield Finding("warning", f"tensors were not compared with a class: {_describe(settings)} is not installed")
        return
    if kind.config_class.model_type != settings.get("model_type"):
        yield Finding("problem", f"config.json contradicts itself: {_describe(settings)}")
        return
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        _, facts = kind.from_pretrained(folder, **options)
    except Exception as error:  # a class may raise any error on unexpected values
        yield Finding("problem", f"{kind.__name__} cannot be loaded: {type(error).__name__}: {error}")
        return
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(facts["missing_keys"])
    wrong = sorted(entry if isinstance(entry, str) else entry[0] for entry in facts["mismatched_keys"])
    others = sorted(facts["unexpected_keys"])
    if missing:
        found = f"{len(missing)} tensors are missing, and would be random: {list_first(missing, 3)}"
        yield Finding("problem", f"{found}. Download or save the model again")
    if wrong:
        yield Finding("problem", f"tensors of another shape than config.json says: {list_first(wrong, 3)}")
    if others:
        yield Finding("warning", f"tensors that {kind.__name__} does not read: {list_first(others, 3)}")
    if not missing and not wrong:
        yield Finding("ok", f"{kind.__name__} finds all of its tensors")


def _class_of(settings: dict) -> type | None:
    """The class that a configuration names, of this package or of transformers; None if there is no such class."""
    import transformers

    import modeling_vitreg

    architectures = settings.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or not name.isidentifier():
        return None
    if name in modeling_vitreg.__all__:
        return getattr(modeling_vitreg, name)
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def _describe(settings: dict) -> str:
    return f"model_type {settings.get('model_type')!r}, architectures {settings.get('architectures')!r}"


def _check_registers(registers: torch.Tensor | None, folder: pathlib.Path, settings: dict) -> Iterator[Finding]:
    """Equal registers get equal gradients, so they stay equal."""
    expected = settings.get("num_register_tokens", 4 if settings.get("model_type") == "vitreg" else 0)
    if registers is None:
        found = 0
    else:
        registers = registers.reshape(-1, registers.shape[-1])
        found = len(registers)
    if found != expected:
        yield Finding("problem", f"the weights hold {found} registers, config.json says {expected}")
    if registers is None or found < 2:
        yield Finding("ok", f"{count_of(found, 'register')}")
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
        f"{'all' if are_all else 'some'} of its {found} registers are equal: they get equal gradients and stay equal, "
        "so they work as one register. Before further training, give all but the first new values",
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

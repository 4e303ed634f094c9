"""Outputs of a model for a fixed input: recorded when it is made, compared in a bare process before it is uploaded.

    expected_outputs.json   beside the weights: the input, and of each output its shape, means and first values

The process runs the code of the folder. It cannot import this package, has no network, a home of its own and none of
the environment's secrets.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import site
import subprocess
import sys
import tempfile

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging as transformers_logging

import modeling_vitreg
from modeling_vitreg.files import to_json, write_text
from modeling_vitreg.reports import versions

from . import probe
from .errors import CardError
from .model_folder import EXPECTED_OUTPUTS, ModelFolder, read_json


TOLERANCE = 1e-5  # relative to the largest value of an output
VERSION = 1
_KINDS = ("expected_outputs", "fingerprint")  # the second until 2026
_TIMEOUT = 3600  # seconds, for a folder whose code never ends
_START = f"import sys; sys.modules[{modeling_vitreg.__name__!r}] = None  # importing it fails from now on\n"
# Variables that a process needs to start and to compute. Tokens, keys and passwords have other names.
_PASSED_ON = ("PATH", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "WINDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
              "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # fmt: skip
_BASE_FILES = ("*.json", "*.safetensors", "*.py", "*.txt", "*.model")  # of the model of an adapter


def record_expected_outputs(folder: str | os.PathLike, model: torch.nn.Module | None = None) -> pathlib.Path:
    """Write `expected_outputs.json` into the folder of a model.

    Args:
        folder: as `save_pretrained` leaves it.
        model: the saved model, on the CPU, in float32 and evaluation mode; None loads it.

    Returns:
        The file.

    Raises:
        ValueError: an output is not finite, or the model would be loaded in another state than it is in.
    """
    if model is not None:
        parameter = next(model.parameters())
        found = (parameter.device.type, parameter.dtype, model.training)
        if found != ("cpu", torch.float32, False):
            raise ValueError(f"expected a model on the CPU, in float32, in evaluation mode, got {found}: leave it out")
    path = pathlib.Path(folder) / EXPECTED_OUTPUTS
    write_text(path, describe_outputs(run_here(folder) if model is None else probe.take_outputs(model)))
    return path


def run_here(folder: str | os.PathLike) -> dict:
    """The outputs of a folder under the classes of this package, without the code in the folder."""
    classes = {name: getattr(modeling_vitreg, name) for name in modeling_vitreg.__all__}
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return probe.take_outputs(probe.load(os.fspath(folder), classes=classes))
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def describe_outputs(taken: dict) -> str:
    """The text of `expected_outputs.json`."""
    content = {"kind": _KINDS[0], "version": VERSION, **taken, "made_with": versions("torch", "transformers")}
    return to_json(content) + "\n"


def read_outputs(path: str | os.PathLike) -> dict:
    """The content of a file that `record_expected_outputs` wrote.

    Raises:
        CardError: the file has other content.
    """
    content = read_json(pathlib.Path(path))
    if content.get("kind") not in _KINDS or content.get("version") != VERSION:
        raise CardError(f"{path}: expected recorded outputs of version {VERSION}: record them again")
    return content


def run_apart(folder: str | os.PathLike, model: ModelFolder, *, token: str | None = None) -> dict:
    """Load a folder in a new process as described above, and return its outputs.

    Args:
        folder: with the files of the model that are uploaded.
        model: the folder that they come from, for messages and for the model of an adapter.
        token: to download the model of an adapter, if that is private. The process does not get it.

    Raises:
        CardError: the model cannot be loaded or gives values that are not finite, with the last line of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {
            "HOME": scratch,
            "HF_HOME": scratch,
            "HF_MODULES_CACHE": scratch,
            "PYTHONUSERBASE": site.getuserbase(),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if model.is_adapter:
            base = model.settings["base_model_name_or_path"]
            _download(base, token)
            environment["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
        program = f"{_START}exec({inspect.getsource(probe)!r})\nmain()\n"
        command = [sys.executable, "-c", program, str(pathlib.Path(folder).resolve())]
        try:
            run = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise CardError(f"{model.path}: did not load and run within {_TIMEOUT} seconds") from None
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        raise CardError(f"{model.path}: cannot be loaded without this package: {_last_words(run.stderr)}")
    try:
        return json.loads(lines[-1])
    except ValueError:
        raise CardError(f"{model.path}: its code printed {lines[-1][:80]!r} instead of the outputs") from None


def _download(base: str, token: str | None) -> None:
    try:
        huggingface_hub.snapshot_download(base, allow_patterns=_BASE_FILES, token=token)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CardError(f"{base}, the model of the adapter, cannot be downloaded: {error}") from None


def compare_outputs(taken: dict, recorded: dict, *, title: str) -> float:
    """The largest difference, relative to the largest value of its output.

    Args:
        taken, recorded: of `probe.take_outputs`.
        title: name of the model, for the message.

    Raises:
        CardError: an output is missing, has another shape, or differs by more than `TOLERANCE`.
    """
    largest = 0.0
    for name, before in recorded["outputs"].items():
        after = taken["outputs"].get(name)
        if after is None or after["shape"] != before["shape"]:
            found = "is missing" if after is None else f"has the shape {after['shape']}"
            raise CardError(f"{title}: its output {name}, recorded with the shape {before['shape']}, {found}")
        pairs = zip(_numbers(after), _numbers(before))
        difference = max(abs(new - old) for new, old in pairs) / (before["largest"] or 1.0)
        if not difference <= TOLERANCE:  # so that nan is too large
            raise CardError(
                f"{title}: its output {name} differs by {difference:.1e} of its largest value from {EXPECTED_OUTPUTS} "
                f"(limit {TOLERANCE:g}), because weights, configuration or code were changed later. If the change is "
                "intended, delete that file"
            )
        largest = max(largest, difference)
    return largest


def _last_words(text: str) -> str:
    """The message at the end of a traceback, whose own lines are indented."""
    lines = text.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line and not line[0].isspace()]
    return "\n".join(lines[starts[-1] :]) if starts else "the process printed no error"


def _numbers(summary: dict) -> list[float]:
    return [*(summary[name] for name in probe.MEASURES), *summary["first"]]

"""That what is published is what was made: outputs recorded when a model is made, and compared in a bare process.

    fingerprint.json   beside the weights: the input, and of each output its shape, means and first values

`record_fingerprint` writes it; who publishes compares.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers.utils import logging as transformers_logging

import modeling_vitreg
from modeling_vitreg.files import write_text
from modeling_vitreg.reports import versions

from . import probe
from .errors import CardError
from .model_folder import FINGERPRINT_FILE, read_json


TOLERANCE = 1e-5  # in units of the largest value of an output
VERSION = 1
_START = f"import sys; sys.modules[{modeling_vitreg.__name__!r}] = None  # importing it fails from now on\n"


def record_fingerprint(folder: str | os.PathLike, model: torch.nn.Module | None = None) -> pathlib.Path:
    """Write `fingerprint.json` into a folder, when the model in it is made.

    Args:
        folder: as `save_pretrained` leaves it.
        model: that was saved, on the CPU, in float32 and evaluation mode; None loads it.

    Returns:
        The file.

    Raises:
        ValueError: the model gives values that are not finite, or would give others when it is loaded to be compared.
    """
    if model is not None:
        parameter = next(model.parameters())
        found = (parameter.device.type, parameter.dtype, model.training)
        if found != ("cpu", torch.float32, False):
            raise ValueError(f"expected a model on the CPU, in float32, in evaluation mode, got {found}: leave it out")
    path = pathlib.Path(folder) / FINGERPRINT_FILE
    text = write_fingerprint(take_here(folder) if model is None else probe.take_fingerprint(model))
    write_text(path, text)
    return path


def take_here(folder: str | os.PathLike) -> dict:
    """The fingerprint of a folder under the classes of this package, and not the code that lies there."""
    classes = {name: getattr(modeling_vitreg, name) for name in modeling_vitreg.__all__}
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return probe.take_fingerprint(probe.load(os.fspath(folder), classes=classes))
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def write_fingerprint(taken: dict) -> str:
    """The text of `fingerprint.json`."""
    made_with = versions("torch", "transformers")
    content = {"kind": "fingerprint", "version": VERSION, **taken, "made_with": made_with}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_fingerprint(path: str | os.PathLike) -> dict:
    """What `write_fingerprint` wrote.

    Raises:
        CardError: the file is no fingerprint.
    """
    content = read_json(pathlib.Path(path))
    if (content.get("kind"), content.get("version")) != ("fingerprint", VERSION):
        raise CardError(f"{path}: expected a fingerprint of version {VERSION}: record it again")
    return content


def run_apart(folder: str | os.PathLike, *, title: str, needs_network: bool = False, token: str | None = None) -> dict:
    """Load a folder in a new process that cannot import this package, and take its fingerprint there.

    Args:
        folder: of a model or an adapter.
        title: of it, for the message.
        needs_network: the model of an adapter is somewhere else.
        token: for that.

    Raises:
        CardError: it cannot be loaded, or gives values that are not finite; the message has the last words of the
            process.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error"}
    environment |= {} if needs_network else {"HF_HUB_OFFLINE": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    program = f"{_START}exec({inspect.getsource(probe)!r})\nmain()\n"
    with tempfile.TemporaryDirectory() as scratch:
        environment["HF_MODULES_CACHE"] = scratch
        command = [sys.executable, "-c", program, str(pathlib.Path(folder).resolve())]
        run = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise CardError(
            f"{title}: does not load where this package is not installed, so nobody could use it: "
            f"{_last_words(run.stderr)}"
        )
    return json.loads(run.stdout.strip().splitlines()[-1])


def compare_fingerprints(taken: dict, recorded: dict, *, title: str) -> float:
    """The largest difference, in units of the largest value of the output that it is in.

    Args:
        taken, recorded: of `take_fingerprint`.
        title: of what is compared, for the message.

    Raises:
        CardError: an output is missing, has another shape, or differs by more than `TOLERANCE`.
    """
    largest = 0.0
    for name, before in recorded["outputs"].items():
        after = taken["outputs"].get(name)
        if after is None or after["shape"] != before["shape"]:
            found = "is not there" if after is None else f"has the shape {after['shape']}"
            raise CardError(f"{title}: its output {name}, of shape {before['shape']} when it was recorded, {found}")
        pairs = zip(_numbers(after), _numbers(before))
        difference = max(abs(new - old) for new, old in pairs) / (before["largest"] or 1.0)
        if not difference <= TOLERANCE:  # so that nan is too large
            raise CardError(
                f"{title}: its output {name} differs by {difference:.1e} of its largest value from the one in "
                f"{FINGERPRINT_FILE} (limit {TOLERANCE:g}): weights, configuration or code were changed since. If "
                "that was meant, record the fingerprint anew"
            )
        largest = max(largest, difference)
    return largest


def _last_words(text: str) -> str:
    """The message at the end of a traceback, whose own lines are indented."""
    lines = text.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line and not line[0].isspace()]
    return "\n".join(lines[starts[-1] :]) if starts else "the process said nothing"


def _numbers(summary: dict) -> list[float]:
    return [*(summary[name] for name in probe.MEASURES), *summary["first"]]


__all__ = [
    "TOLERANCE",
    "compare_fingerprints",
    "read_fingerprint",
    "record_fingerprint",
    "run_apart",
    "take_here",
    "write_fingerprint",
]

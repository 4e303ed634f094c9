"""Reports: what was measured, on what, by which command. Frozen dataclasses of plain values, written as JSON.

Each program that draws, compares or publishes results reads a report and never the model. `made_with` and
`command_line` describe how a report was made; `short_hash` identifies its inputs. Reports of earlier versions are read
too: `read_report` renames the keys that have changed since (see `_RENAMED`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from modeling_vitreg.files import to_json, write_text


_ARCHITECTURE = {
    "architecture.num_layers": "num_hidden_layers",
    "architecture.num_heads": "num_attention_heads",
    "architecture.num_registers": "num_register_tokens",
}
_DISCOVERY = {
    "hit": "iou_threshold",
    "overlap": "iou",
    "mean_overlap": "mean_iou",
    "settings.mass": "attention_share",
    "settings.is_centred": "is_centered",
    "settings.is_normalised": "is_normalized",
}
# Keys of version 1 and their present names, by kind of report; "parent.key" holds inside that parent only.
_RENAMED = {
    "artifacts": {
        **_ARCHITECTURE,
        "ablation.num_registers": "num_register_tokens",
        "places": "outlier_positions",
        "outlier_positions.hottest": "most_frequent",
        "sinks": "massive_activations",
        "verdict.word": "level",
        "layers.mass": "attention_share",
        "layers.head_mass": "head_attention_share",
        "layers.top_mass": "top_patch_share",
        "layers.top_over_even": "top_patch_ratio",
    },
    "conversion": {"proof": "verification", "source.container": "checkpoint_key"},
    "discovery": {**_ARCHITECTURE, **_DISCOVERY},
    "evaluation": {
        **_ARCHITECTURE,
        **_DISCOVERY,
        "architecture.fingerprint": "weights_hash",
        "model_fingerprint": "weights_hash",
        "data_fingerprint": "dataset_hash",
        "fingerprints": "hashes",
        "settings.num_neighbours": "num_neighbors",
    },
}


@dataclass(frozen=True)
class ArtifactReport:
    """Artifacts of a model on a set of images. All values are plain JSON values, no tensors or arrays.

    A section that was not measured is {"skipped": reason}. Layer 0 is the embedding, layers 1 ... L are the outputs of
    the layers. Tokens are taken before the final norm. Norms cannot be compared between models.

    Args:
        model: name or path of the encoder.
        architecture: family, sizes and prefix tokens of the encoder.
        images: `source`, `num_images` measured, `num_unreadable`, `unreadable` (the first reasons), `num_nonfinite`,
            `nonfinite` (the first names), `size` and `grid` (rows, columns), `is_complete`, and `stopped_by` if the
            pass ended early.
        verdict: `level` (none, few, many or unknown), `sentence`, and the layer, rule, threshold, share and interval
            that decided it.
        bins: `edges` of the histograms of norms; one more bin lies below the first and above the last edge.
        layers: one dictionary per layer: moments, quantiles, histogram, and threshold and share for each rule.
        outlier_positions: where outliers lie, and their similarity to their neighbours; see `analysis.positions`.
        massive_activations: see `analysis.activations`.
        attention: attention of the class token and the registers; see `analysis.attention`.
        ablation: effect of replacing the registers; see `analysis.ablation`.
        probes: linear probes on tokens; see `analysis.probes`.
        sinks: what heads do that attend to one token; see `analysis.sinks`.
        command: command that made the report.
        made_with: see `made_with`.
    """

    kind: ClassVar[str] = "artifacts"
    version: ClassVar[int] = 2

    model: str
    architecture: dict
    images: dict
    verdict: dict
    bins: dict
    layers: list
    outlier_positions: dict
    massive_activations: dict
    attention: dict
    ablation: dict
    probes: dict
    command: str
    made_with: dict = field(default_factory=dict)
    sinks: dict = field(default_factory=lambda: {"skipped": "not measured by the version that made this report"})


@dataclass(frozen=True)
class ConversionReport:
    """A conversion of a checkpoint to a model of this family, or back, with its ledger and its verification.

    Args:
        source: `path`, `layout`, `checkpoint_key`, `sha256`, `num_bytes`, `licence` of official weights, `assumed`
            (fields of the configuration that no tensor shows, with the usual values of the family) and, on the way in,
            `notes` about choices that were made.
        target: `layout`, and on the way in `class` of the model and `num_parameters`.
        ledger: `num_used`, `num_written`, `dropped`, `filled` and `left` with reasons, and the line of coverage.
        verification: `is_verified`; then `reference`, `sizes`, `errors` (for each size and kind of tokens the largest
            difference, `absolute` and `relative` to the largest value), `largest_relative_error`, `tolerance`,
            `notes`; or `why` there is none.
        command: command that made the conversion.
        made_with: versions of Python and packages, and the commit.
    """

    kind: ClassVar[str] = "conversion"
    version: ClassVar[int] = 2

    source: dict
    target: dict
    ledger: dict
    verification: dict
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """Results of a frozen encoder on several tasks. All values are plain JSON values, no tensors or arrays.

    Args:
        model: name or path of the encoder.
        architecture: family and sizes of the encoder, `weights_hash`, and `revision` on the Hub if known.
        data: for each `dataset_hash`: `name`, `hashes` of its parts, `revision` if known, and for the parts `train`
            and `test` `num_images`, `num_unreadable`, `num_nonfinite` and `unreadable` (the first reasons).
        results: one dictionary per number: `task`, `dataset`, `split`, `metric`, `value`, `interval` [low, high] of
            95 %, `interval_method`, `n` test images, `settings` of the task, `facts` (choices of a sweep, sizes),
            `seed`, `dataset_hash`, `revision` of the data, `weights_hash`, `seconds` of the task without the encoding,
            and the `command` and `commit` that made it.
        skipped: task to the reason why it has no result, for the tasks of the last command.
        stopped_by: why the evaluation ended early, None if it did not.
        command: command that wrote the report last; earlier results keep their own.
        made_with: see `made_with`.
    """

    kind: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 2

    model: str
    architecture: dict
    data: dict
    results: list
    skipped: dict
    stopped_by: str | None
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class DiscoveryReport:
    """Objects that were discovered in a set of images. All values are plain JSON values, no tensors or arrays.

    CorLoc is the share of annotated images whose box has an IoU of `iou_threshold` or more with a true box; None if no
    image is annotated.

    Args:
        model: name or path of the encoder.
        architecture: family and sizes of the encoder.
        images: `source`, `num_images` measured, `num_annotated` of them, `num_unreadable`, `num_nonfinite`,
            `unreadable` (the first reasons), `is_complete`, and `stopped_by` if the pass ended early.
        as_published: `settings`, `corloc`, `num_hits`, `mean_iou` (with the best true box), `num_degenerate`, the
            number of images in which the method found no structure, and `point_in_box`, the share of annotated images
            whose patch most similar to the class token lies in a true box (arXiv 2602.22394).
        sweep: `settings` and `entries`, each with `feature`, `layer`, `bias` and the numbers above; empty without one.
        best_of_sweep: the entry with the most hits, the first of several, and a `note`; empty without a sweep.
        predictions: with the published settings, for each image in order: `name`, `box`, `iou` (None if not
            annotated), `is_degenerate` and the true `boxes`.
        command: command that made the report.
        made_with: see `made_with`.
    """

    kind: ClassVar[str] = "discovery"
    version: ClassVar[int] = 2

    model: str
    architecture: dict
    images: dict
    as_published: dict
    sweep: dict
    best_of_sweep: dict
    predictions: list
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class RetrofitReport:
    """The repair of a finished model by test-time registers, and its effect. All values are plain JSON values.

    Args:
        model: the original.
        method: "test-time".
        images: `source`, `num_images` used to find the units, `num_held_out`, `size`, `unreadable`.
        outliers: of the original: detection `layer`, `threshold`, `highest_layer` searched, `share` of patches.
        register_neurons: units of each layer, from 1, that act on the test-time registers.
        tried: for each number of units what `retrofit.register_neurons.measure_repair` returns on held-out images.
        control: the same for a zero token without units; it is not neutral.
        result: the same for the chosen units, with `time_ratio`, the time of a forward in units of the original's.
        verdict: `is_repaired`, and `sentence`.
        comparison: of original and result on held-out images: `layers` and `attention`, each with `before` and
            `after`; `tasks`, each with `task`, `metric`, `n`, `before`, `after` and their intervals; `skipped`, tasks
            without result and the reasons. Empty without a page.
        command: command that made the report.
        made_with: versions of Python and packages, and the commit.
    """

    kind: ClassVar[str] = "retrofit"
    version: ClassVar[int] = 2

    model: str
    method: str
    images: dict
    outliers: dict
    register_neurons: dict
    tried: list
    control: dict
    result: dict
    verdict: dict
    command: str
    comparison: dict = field(default_factory=dict)
    made_with: dict = field(default_factory=dict)


Report = TypeVar("Report")


# Provenance --------------------------------------------------------------------------------------------------------


def made_with(**details: str) -> dict:
    """Versions and commit that a measurement is made with, and further details such as device and dtype."""
    names = ("torch", "transformers", "modeling-vitreg", "scikit-learn")
    return {**versions(*names), **details, "commit": find_commit()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def find_commit() -> str | None:
    """Commit of the git checkout that this package runs from, None if it is installed."""
    folder = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = run.stdout.split("\n")[:2]
    return commit if pathlib.Path(top) == folder.parent else None  # else the package lies in another project


def command_line() -> str:
    """The command of this process, quoted for a shell, with the name of the program instead of its path."""
    name = pathlib.Path(sys.argv[0]).name
    return shlex.join(["vitreg" if name == "__main__.py" else name, *sys.argv[1:]])  # python -m modeling_vitreg


def short_hash(values: object, *, sort_keys: bool = True) -> str:
    """16-character hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=sort_keys).encode()).hexdigest()[:16]


def escape_markdown(text: str) -> str:
    """A name from outside in one line of Markdown or of a cell in its tables, without any markup."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    escaped = re.sub(r"([\\`*#|]|(?<=\])\()", r"\\\1", line)  # a bracket alone is no link
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# Files -------------------------------------------------------------------------------------------------------------


def write_report(report: object, path: str | os.PathLike) -> pathlib.Path:
    """Write a report as JSON; the file appears whole or not at all.

    Args:
        report: a dataclass with class variables `kind` and `version`.
        path: file to write; its folder is created.

    Returns:
        The file written.

    Raises:
        ValueError: the report holds a number that is not finite, or a value that JSON cannot hold.
    """
    path = pathlib.Path(path)
    content = {"kind": report.kind, "version": report.version, **dataclasses.asdict(report)}
    try:
        text = to_json(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a report of finite numbers, words, lists and dictionaries: {error}") from error
    write_text(path, text + "\n")
    return path


def read_report(path: str | os.PathLike, *, kind: type[Report] = ArtifactReport) -> Report:
    """Read a report of this or an earlier version.

    Args:
        path: file to read.
        kind: expected class of the report.

    Raises:
        ValueError: the file is not a report, or is one of another kind or of a later version, or lacks a field.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a report in JSON, got a file that does not parse: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a report, a dictionary in JSON, got a {type(content).__name__}")
    found = (content.get("kind"), content.get("version"))
    if found[0] != kind.kind or found[1] not in range(1, kind.version + 1):
        raise ValueError(
            f"{path}: expected a report of kind {kind.kind!r}, version {kind.version} or earlier, got kind "
            f"{found[0]!r}, version {found[1]!r}: make it again with the command in the report"
        )
    content = rename_old_keys(content)
    del content["kind"], content["version"]
    names = {entry.name for entry in dataclasses.fields(kind)}
    missing = names - set(content)
    missing -= {RetrofitReport: {"comparison"}, ArtifactReport: {"sinks"}}.get(kind, set())  # later than the others
    if missing or set(content) - names:
        raise ValueError(
            f"{path}: expected the fields {', '.join(sorted(names))}; missing {sorted(missing)}, unknown "
            f"{sorted(set(content) - names)}"
        )
    return kind(**content)


def rename_old_keys(content: dict) -> dict:
    """A report as read from JSON, with the keys of the present version; of any version and kind."""
    renamed = _RENAMED.get(content.get("kind"), {}) if content.get("version") == 1 else {}
    return _rename(content, renamed, "")


def _rename(value: object, renamed: dict, parent: str) -> object:
    if isinstance(value, list):
        return [_rename(entry, renamed, parent) for entry in value]
    if not isinstance(value, dict):
        return value
    names = {key: renamed.get(f"{parent}.{key}", renamed.get(key, key)) for key in value}
    return {names[key]: _rename(entry, renamed, names[key]) for key, entry in value.items()}

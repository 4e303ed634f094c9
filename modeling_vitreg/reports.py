"""Facts that travel between stages: frozen dataclasses of plain values, JSON in and out, each with a version.

A report holds what was measured and how: the number of images, the layer, the rule behind each threshold, the command.
Whoever draws, compares or publishes reads the report and never the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from modeling_vitreg.files import write_text


@dataclass(frozen=True)
class ArtifactReport:
    """What artifacts a model has on some images. Values are those of JSON: no tensor, no array.

    A section that was not measured is {"skipped": why}. Layers count from 1, the output of the first layer; tokens are
    those before the final norm; norms are in units of the residual stream and carry over to no other model.

    Args:
        model: name that the encoder was loaded by, with `architecture`: its family, sizes and tokens.
        images: `source`, `num_images` measured, `num_unreadable`, `num_nonfinite`, `size` and `grid` (rows, columns),
            `is_complete` and, where it is false, `stopped_by`.
        verdict: `word` (none, few, many, or unknown), `sentence`, and the layer, rule, threshold, share and interval
            behind it.
        bins: `edges` of the histograms of norms, below and above which lies one more bin.
        layers: one dictionary a layer: moments, quantiles, histogram, and for each rule its threshold and share.
        places: where outliers lie and how like their neighbours they are; see `analysis.positions`.
        sinks: massive activations; see `analysis.activations`.
        attention: of class token and registers; see `analysis.attention`.
        ablation: what registers are worth; see `analysis.ablation`.
        probes: what tokens hold; see `analysis.probes`.
        command: that made the report.
        made_with: versions of what made it.
    """

    kind: ClassVar[str] = "artifacts"
    version: ClassVar[int] = 1

    model: str
    architecture: dict
    images: dict
    verdict: dict
    bins: dict
    layers: list
    places: dict
    sinks: dict
    attention: dict
    ablation: dict
    probes: dict
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ConversionReport:
    """How a checkpoint became a model, or a model another layout's checkpoint, and what proves it.

    Args:
        source: `path`, `layout`, `container`, `sha256`, `num_bytes`, the `licence` of official weights, and `assumed`:
            fields of the configuration that no tensor shows, as is usual in the family.
        target: `layout`, `class` of the model, `num_parameters`.
        ledger: `num_used`, `dropped` and `filled` with their reasons, and the line of coverage.
        proof: `is_verified`; then `reference`, `sizes`, `errors` (for each size and kind of tokens the largest
            difference, `absolute` and `relative` to the largest value), `largest_relative_error`, `tolerance`,
            `notes`; or `why` there is none.
        command: that made the conversion.
        made_with: versions of what made it.
    """

    kind: ClassVar[str] = "conversion"
    version: ClassVar[int] = 1

    source: dict
    target: dict
    ledger: dict
    proof: dict
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """How good a frozen encoder is at some tasks. Values are those of JSON: no tensor, no array.

    Args:
        model: name that the encoder was loaded by.
        architecture: its family and sizes, `fingerprint` of code and weights, and `revision` on the Hub where known.
        data: for the fingerprint of each data set `name`, `fingerprints` of its parts, `revision` where known, and
            for the parts `train` and `test` `num_images`, `num_unreadable`, `num_nonfinite` and `unreadable` (why, the
            first few).
        results: one dictionary a number: `task`, `dataset`, `split`, `metric`, `value`, `interval` [low, high] of
            95 %, `interval_method`, `n` test images behind the value, `settings` (what was asked for), `facts` (what
            came out: choices of a sweep, sizes), `seed`, `data_fingerprint`, `revision` of the data,
            `model_fingerprint`, `seconds` of the task without the encoding, and `command` and `commit` that made it.
        skipped: of the tasks that were asked for last, name to the reason why there is no result.
        stopped_by: why the evaluation ended early, None if it did not.
        command: that wrote the report last; a result of an earlier one has its own.
        made_with: versions of what wrote it last, device and precision, and the commit of a checkout.
    """

    kind: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 1

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
    """What a model discovers on some images. Values are those of JSON: no tensor, no array.

    CorLoc is the share of annotated images whose box overlaps a true box by `hit`; None where no image is annotated.

    Args:
        model: name that the encoder was loaded by, with `architecture`: its family and sizes.
        images: `source`, `num_images` measured, `num_annotated` of them, `num_unreadable`, `num_nonfinite`,
            `unreadable` (why, the first few), `is_complete` and, where it is false, `stopped_by`.
        as_published: `settings`, `corloc`, `num_hits`, `mean_overlap` (of the best true box) and `num_degenerate`, the
            images in which the method had nothing to go by.
        sweep: `settings` and `entries`, each with `feature`, `layer`, `bias` and the numbers above; empty without one.
        best_of_sweep: the entry of most hits, the first of several, and a `note`; empty without a sweep.
        predictions: as published, for each image in order `name`, `box`, `overlap` (None where not annotated),
            `is_degenerate` and the true `boxes`.
        command: that made the report.
        made_with: versions of what made it.
    """

    kind: ClassVar[str] = "discovery"
    version: ClassVar[int] = 1

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
    """How a finished model got registers, and what changed. Values are those of JSON: no tensor, no array.

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
        command: that made the report.
        made_with: versions of what made it.
    """

    kind: ClassVar[str] = "retrofit"
    version: ClassVar[int] = 1

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
    made_with: dict = field(default_factory=dict)


Report = TypeVar("Report")


def write_report(report: object, path: str | os.PathLike) -> pathlib.Path:
    """Write a report as JSON, beside its final place first, so that a reader meets a whole file or none.

    Args:
        report: a dataclass with class variables `kind` and `version`.
        path: file to write; its folder is made.

    Returns:
        The file written.

    Raises:
        ValueError: the report holds a number that JSON lacks (not finite), or a value of another type.
    """
    path = pathlib.Path(path)
    content = {"kind": report.kind, "version": report.version, **dataclasses.asdict(report)}
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a report of finite numbers, words, lists and dictionaries: {error}") from error
    write_text(path, text + "\n")
    return path


def read_report(path: str | os.PathLike, *, kind: type[Report] = ArtifactReport) -> Report:
    """Read a report that `write_report` wrote.

    Args:
        path: of the file.
        kind: class of the report that is expected.

    Raises:
        ValueError: the file is no report, one of another kind or version, or lacks a field.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a report in JSON, got a file that does not parse: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a report, a dictionary in JSON, got a {type(content).__name__}")
    found = (content.pop("kind", None), content.pop("version", None))
    if found != (kind.kind, kind.version):
        raise ValueError(
            f"{path}: expected a report of kind {kind.kind!r}, version {kind.version}, got kind {found[0]!r}, version "
            f"{found[1]!r}: make it again with the command that it names"
        )
    names = {entry.name for entry in dataclasses.fields(kind)}
    if set(content) != names:
        raise ValueError(
            f"{path}: expected the fields {', '.join(sorted(names))}; missing {sorted(names - set(content))}, "
            f"unknown {sorted(set(content) - names)}"
        )
    return kind(**content)


__all__ = [
    "ArtifactReport",
    "ConversionReport",
    "DiscoveryReport",
    "EvaluationReport",
    "read_report",
    "write_report",
]

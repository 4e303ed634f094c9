"""The folder of an artifact report.

    index.html       page with all figures embedded
    artifacts.json   the `ArtifactReport`
    norms.png  shares.png  norm_maps.png  outlier_positions.png  attention.png  heads.png  massive_activations.png
    sinks.png
    errors.log       tracebacks, if a section or a figure failed

A comparison holds `index.html`, `shares.png`, `series.png`, and one folder as above per model, named 1, 2, ...
Each file appears whole or not at all. The report is written first, so a figure that fails loses no number.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.features import Encoder
from modeling_vitreg.files import check_writable, write_text
from modeling_vitreg.omissions import Failures
from modeling_vitreg.reports import ArtifactReport, write_report

from .figures import (
    draw_attention,
    draw_heads,
    draw_massive_activations,
    draw_norm_maps,
    draw_norms,
    draw_positions,
    draw_series,
    draw_shares,
    draw_sinks,
)
from .html import render_comparison, render_page
from .survey import Examples, SurveySettings, survey
from .web import example_rows


def analyze(
    encoder: Encoder,
    images: object,
    *,
    output_folder: str | os.PathLike,
    settings: SurveySettings | None = None,
    source: str = "",
    command: str = "",
    context: DistributedContext = SINGLE_PROCESS,
) -> ArtifactReport | None:
    """Measure the artifacts of a model, and write report, figures and page.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`.
        images: anything that `encoding.ImageReader` reads.
        output_folder: folder to write, see above; it is created, and files of these names are replaced.
        settings: how much is measured.
        source: name of the images, for the report.
        command: command that makes the report, for the report.
        context: processes that share the images; the first one writes.

    Returns:
        The report; None in all processes but the first.

    Raises:
        ValueError: no image can be read, or the images do not fit the model.
        OSError: the folder cannot be written, which is checked before the images are read.
    """
    words = {"settings": settings, "source": source, "command": command, "context": context}
    found = _measure(encoder, images, output_folder, **words)
    return found and found[0]


def _measure(
    encoder: Encoder, images: object, folder: str | os.PathLike, **words: object
) -> tuple[ArtifactReport, Examples] | None:
    """Write the folder of a model; `words` are those of `survey`."""
    check_writable(folder)
    found = survey(encoder, images, **words)
    if found is not None:
        write_folder(*found, folder)
    return found


def compare(
    encoders: Sequence[Encoder],
    open_source: Callable[[], object],
    *,
    output_folder: str | os.PathLike,
    settings: SurveySettings | None = None,
    source: str = "",
    command: str = "",
    context: DistributedContext = SINGLE_PROCESS,
) -> list[ArtifactReport]:
    """Measure several models on the same images, and write one page for all and one folder per model.

    Ctrl-C ends the pass of the model that is being measured; the next model follows.

    Args:
        encoders: two or more.
        open_source: opens the images; it is called once per model.
        output_folder, settings, source, command, context: as in `analyze`.

    Raises:
        ValueError: fewer than two encoders, or as in `analyze`.
        OSError: as in `analyze`.
    """
    if len(encoders) < 2:
        raise ValueError(f"expected two models or more to compare, got {len(encoders)}")
    folder, found = pathlib.Path(output_folder), []
    for number, encoder in enumerate(encoders, start=1):
        texts = {"settings": settings, "source": source, "command": command, "context": context}
        found.append(_measure(encoder, open_source(), folder / str(number), **texts))
    if context.rank:
        return [None] * len(found)
    reports, pages = [report for report, _ in found], [f"{number}/index.html" for number in range(1, len(found) + 1)]
    write_comparison(reports, folder, command=command, examples=[shown for _, shown in found], pages=pages)
    return reports


def write_folder(report: ArtifactReport, examples: Examples, folder: str | os.PathLike) -> pathlib.Path:
    """Write report, figures and page; returns the page."""
    folder = pathlib.Path(folder)
    write_report(report, folder / "artifacts.json")
    tasks = {}
    if report.layers:
        tasks = {
            "norms": lambda path: draw_norms(report, path),
            "shares": lambda path: draw_shares([report], path),
            "outlier_positions": lambda path: draw_positions(report, path),
            "massive_activations": lambda path: draw_massive_activations(report, path),
        }
    if report.layers and "skipped" not in report.sinks:
        tasks["sinks"] = lambda path: draw_sinks(report, path)
    if report.layers and examples.images is not None:
        tasks["norm_maps"] = lambda path: draw_norm_maps(report, examples, path)
        if examples.attention:
            tasks["attention"] = lambda path: draw_attention(report, examples, path)
            tasks["heads"] = lambda path: draw_heads(report, examples, path)
    figures = _draw(tasks, folder, examples.failures)
    rows = _example_rows([(report, examples)], [report.model], examples.failures)
    # Their maps can be read on the page, which does not show them twice.
    shown = {name: path for name, path in figures.items() if name not in ("shares", *(["attention"] if rows else []))}
    return _write_page(folder / "index.html", render_page(report, shown, examples=rows), examples.failures)


def write_comparison(
    reports: Sequence[ArtifactReport],
    folder: str | os.PathLike,
    *,
    labels: Sequence[str] | None = None,
    axis: str = "model",
    command: str = "",
    is_strict: bool = False,
    examples: Sequence[Examples] = (),
    pages: Sequence[str] = (),
) -> pathlib.Path:
    """Write the page of several reports of models, sizes of a model, or checkpoints of a run.

    Args:
        reports: two or more, in order.
        folder: folder to write, see above; it is created.
        labels: one per report, such as the training step; None: the part of the models' names that differs.
        axis: meaning of the labels, such as "training step".
        command: command that makes the page.
        is_strict: raise the error of a figure that fails instead of leaving the figure out.
        examples: first images of each report, to show side by side; empty: none.
        pages: address of the page of each report; empty: there are none.

    Returns:
        The page.

    Raises:
        ValueError: fewer than two reports, or the numbers of labels and reports differ.
    """
    if labels is None:
        labels = _tell_apart([report.model for report in reports])
    if len(labels) != len(reports):
        raise ValueError(f"expected one label for each of {len(reports)} reports, got {len(labels)}")
    pairs = [(report, label) for report, label in zip(reports, labels) if report.layers]
    folder, measured, shown = pathlib.Path(folder), [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    tasks = {
        "shares": lambda path: draw_shares(measured, path),
        "series": lambda path: draw_series(measured, path, labels=shown, axis=axis),
    }
    failures = Failures(is_strict=is_strict)
    figures = _draw(tasks if measured else {}, folder, failures)
    rows = _example_rows(list(zip(reports, examples)), labels, failures)
    words = {"command": command, "labels": labels, "examples": rows, "pages": pages}
    return _write_page(folder / "index.html", render_comparison(reports, figures, **words), failures)


def _example_rows(pairs: list, labels: Sequence[str], failures: Failures) -> list[dict]:
    found = failures.attempt("maps of the first images", lambda: example_rows(pairs, labels))
    return found if isinstance(found, list) else []


def _tell_apart(names: Sequence[str]) -> list[str]:
    """The last folder in which the names of models differ, as in `outputs/a/model` and `outputs/b/model`."""
    parts = [name.rstrip("/").split("/") for name in names]
    while len({part[-1] for part in parts}) == 1 and all(len(part) > 1 for part in parts):
        parts = [part[:-1] for part in parts]
    return [part[-1][-24:] for part in parts]


def _draw(tasks: dict, folder: pathlib.Path, failures: Failures) -> dict[str, pathlib.Path]:
    """Draw all figures; a figure that fails is left out, because the numbers are saved already."""
    figures = {}
    for name, draw in tasks.items():
        found = failures.attempt(f"figure {name}", lambda name=name, draw=draw: draw(folder / f"{name}.png"))
        if isinstance(found, pathlib.Path):
            figures[name] = found
    return figures


def _write_page(path: pathlib.Path, text: str, failures: Failures) -> pathlib.Path:
    write_text(path, text)
    failures.write(path.parent)
    return path

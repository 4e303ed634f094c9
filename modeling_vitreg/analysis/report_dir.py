"""Everything about the artifacts of a model in one folder, by one call.

    index.html       the page, with all figures inside
    artifacts.json   the `ArtifactReport`
    norms.png  shares.png  norm_maps.png  outlier_positions.png  attention.png  heads.png  massive_activations.png

A comparison holds `index.html`, `shares.png`, `series.png`, and a folder as above for each model, 1 to the last.
A file is written beside its final place and renamed, the report first: what was measured survives a figure that fails.
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable, Sequence

from modeling_vitreg.features import Encoder
from modeling_vitreg.files import write_text
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
)
from .html import render_comparison, render_page
from .survey import Examples, SurveySettings, survey


_logger = logging.getLogger(__name__)


def analyze(
    encoder: Encoder,
    images: object,
    *,
    output_folder: str | os.PathLike,
    settings: SurveySettings | None = None,
    source: str = "",
    command: str = "",
) -> ArtifactReport:
    """Measure the artifacts of a model and write report, figures and page.

    Args:
        encoder: of `modeling_vitreg.features.load_encoder`.
        images: anything that `samples.SampleReader` reads.
        output_folder: see above; it is made, and files of these names in it are replaced.
        settings: how much is measured.
        source: of the images, in words.
        command: that the user gave.

    Raises:
        ValueError: there is no image that can be read, or the images do not fit the model.
    """
    report, examples = survey(encoder, images, settings=settings, source=source, command=command)
    write_folder(report, examples, output_folder)
    return report


def compare(
    encoders: Sequence[Encoder],
    open_source: Callable[[], object],
    *,
    output_folder: str | os.PathLike,
    settings: SurveySettings | None = None,
    source: str = "",
    command: str = "",
) -> list[ArtifactReport]:
    """Measure several models on the same images and write a page of all, and a folder for each.

    Ctrl-C ends the pass of the model that is being measured; the next one follows.

    Args:
        encoders: two or more.
        open_source: opens the images anew, for each model once.
        output_folder, settings, source, command: as in `analyze`.

    Raises:
        ValueError: fewer than two encoders, or as in `analyze`.
    """
    if len(encoders) < 2:
        raise ValueError(f"expected two models or more to compare, got {len(encoders)}")
    folder, reports = pathlib.Path(output_folder), []
    for number, encoder in enumerate(encoders, start=1):
        words = {"settings": settings, "source": source, "command": command}
        reports.append(analyze(encoder, open_source(), output_folder=folder / str(number), **words))
    write_comparison(reports, folder, command=command)
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
            "places": lambda path: draw_positions(report, path),
            "massive_activations": lambda path: draw_massive_activations(report, path),
        }
    if report.layers and examples.images is not None:
        tasks["norm_maps"] = lambda path: draw_norm_maps(report, examples, path)
        if examples.attention:
            tasks["attention"] = lambda path: draw_attention(report, examples, path)
            tasks["heads"] = lambda path: draw_heads(report, examples, path)
    return _write_page(folder / "index.html", render_page(report, _draw(tasks, folder)))


def write_comparison(
    reports: Sequence[ArtifactReport],
    folder: str | os.PathLike,
    *,
    labels: Sequence[str] | None = None,
    axis: str = "model",
    command: str = "",
) -> pathlib.Path:
    """Write the page of several reports, read back or fresh: models, sizes of a model, or checkpoints of a run.

    Args:
        reports: in order, two or more.
        folder: see above; it is made.
        labels: of each report, such as its step; None: what tells the names of their models apart.
        axis: what the labels are, such as "training step".
        command: that the user gave.

    Returns:
        The page.

    Raises:
        ValueError: fewer than two reports, or not one label for each.
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
    figures = _draw(tasks if measured else {}, folder)
    return _write_page(folder / "index.html", render_comparison(reports, figures, command=command))


def _tell_apart(names: Sequence[str]) -> list[str]:
    """The ends of the names of models, without the folders that all of them end in, as in `outputs/a/model`."""
    parts = [name.rstrip("/").split("/") for name in names]
    while len({part[-1] for part in parts}) == 1 and all(len(part) > 1 for part in parts):
        parts = [part[:-1] for part in parts]
    return [part[-1][-24:] for part in parts]


def _draw(tasks: dict, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draw all figures; one that cannot be drawn is left out with a warning, for the numbers are safe already."""
    figures = {}
    for name, draw in tasks.items():
        try:
            figures[name] = draw(folder / f"{name}.png")
        except Exception as error:
            _logger.warning("the figure %s was left out: %s: %s", name, type(error).__name__, error)
    return figures


def _write_page(path: pathlib.Path, text: str) -> pathlib.Path:
    write_text(path, text)
    return path


__all__ = ["analyze", "compare", "write_comparison", "write_folder"]

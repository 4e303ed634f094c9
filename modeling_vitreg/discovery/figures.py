"""Figures of a discovery: images with boxes, and the results of a sweep."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modeling_vitreg.images import AnnotatedImage, UnreadableImage
from modeling_vitreg.reports import DiscoveryReport
from modeling_vitreg.style import BLUE, GREEN, ORANGE, make_cells, plain_text


FOUND, MISSED, TRUE = GREEN, ORANGE, BLUE
_COLUMNS = 4


def draw_discoveries(
    images: Sequence[AnnotatedImage], report: DiscoveryReport, *, num_images: int = 12, num_columns: int = _COLUMNS
) -> Figure:
    """Draw images with the predicted box (solid) and the true boxes (dashed) in a grid.

    Args:
        images: images of the report, in any order; they are matched by name.
        report: result of `discover`.
        num_images: maximum number of images, the first ones.
        num_columns: columns of the grid.

    Raises:
        ValueError: no image of the report is among them.
    """
    by_name, shown = {found["name"]: found for found in report.predictions}, []
    for number in range(len(images)):
        with contextlib.suppress(UnreadableImage):  # the report has counted it
            if len(shown) < num_images and (image := images[number]).name in by_name:
                shown.append((image, by_name[image.name]))
    if not shown:
        raise ValueError("expected the images of the report, got none whose name is in it")
    num_columns = min(num_columns, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    figure, axes = make_cells(num_rows, num_columns, side=2.8, top=0.1 * num_rows + 0.6)
    for axis, (image, found) in zip(axes.flat, shown):
        axis.imshow(np.asarray(image.image))
        _draw_prediction(axis, found, iou_threshold=report.as_published["settings"]["iou_threshold"])
    figure.suptitle(_title(report), fontsize=10)
    figure.legend(handles=_legend(report), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_sweep(report: DiscoveryReport) -> Figure:
    """Draw CorLoc in percent for each feature and layer (rows) and bias (columns); the best setting has a frame.

    Raises:
        ValueError: a report without a sweep over annotated images.
    """
    if not report.best_of_sweep:
        raise ValueError("expected the report of a sweep over annotated images, got a report without a sweep")
    entries, best = report.sweep["entries"], report.best_of_sweep
    rows = list(dict.fromkeys((entry["layer"], entry["feature"]) for entry in entries))
    biases = sorted({entry["bias"] for entry in entries})
    values = np.full((len(rows), len(biases)), np.nan)
    for entry in entries:
        place = rows.index((entry["layer"], entry["feature"])), biases.index(entry["bias"])
        values[place] = 100 * entry["corloc"]
    figure = Figure(figsize=(1.8 + 0.62 * len(biases), 1.6 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=max(values.max(), 1), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 * max(values.max(), 1) else "white"
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    corner = biases.index(best["bias"]) - 0.5, rows.index((best["layer"], best["feature"])) - 0.5
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MISSED, linewidth=2))
    axis.set_xticks(range(len(biases)), [f"{bias:g}" for bias in biases], fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{feature}, layer {layer}" for layer, feature in rows], fontsize=8)
    axis.set_xlabel("bias" + (" (cosine)" if report.sweep["settings"]["is_normalized"] else " (squared features)"))
    axis.set_title(f"{plain_text(report.model)}: LOST, {report.images['num_annotated']} images", fontsize=9)
    figure.colorbar(picture, label="CorLoc (%)")
    return figure


def _draw_prediction(axis: Axes, found: dict, *, iou_threshold: float) -> None:
    for box in found["boxes"] or []:
        axis.add_patch(_rectangle(box, TRUE, linestyle="--", linewidth=1.2))
    is_hit = found["iou"] is not None and found["iou"] >= iou_threshold
    axis.add_patch(_rectangle(found["box"], FOUND if is_hit else MISSED, linewidth=2))
    iou = "" if found["iou"] is None else f": IoU {found['iou']:.2f}"
    axis.set_title(plain_text(found["name"], max_length=30) + iou, fontsize=8)


def _rectangle(box: Sequence[float], colour: str, **style: object) -> Rectangle:
    left, top, right, bottom = box
    # matplotlib centres pixels on whole numbers; boxes count from the edge of the first pixel.
    return Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, **style)


def _title(report: DiscoveryReport) -> str:
    settings, corloc = report.as_published["settings"], report.as_published["corloc"]
    is_dino_seg = settings["method"] == "dino_seg"
    feature = f"head {settings['head']}" if is_dino_seg else settings["feature"]
    title = f"{plain_text(report.model)}: {settings['method']}, {feature}, layer {settings['layer']}"
    return (
        title if corloc is None else f"{title}, CorLoc {100 * corloc:.1f} % of {report.images['num_annotated']} images"
    )


def _legend(report: DiscoveryReport) -> list[Rectangle]:
    if not report.images["num_annotated"]:
        return [_rectangle((0, 0, 1, 1), MISSED, linewidth=2, label="predicted")]
    return [
        _rectangle((0, 0, 1, 1), FOUND, linewidth=2, label="predicted, right"),
        _rectangle((0, 0, 1, 1), MISSED, linewidth=2, label="predicted, wrong"),
        _rectangle((0, 0, 1, 1), TRUE, linestyle="--", linewidth=1.2, label="true"),
    ]

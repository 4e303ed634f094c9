"""Figures of a discovery: images with boxes, and the map of a sweep. Drawn without pyplot; the caller saves them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modeling_vitreg.reports import DiscoveryReport

from .annotations import AnnotatedImage


FOUND, MISSED, TRUE = "#009e73", "#d55e00", "#0072b2"
_COLUMNS = 4


def draw_discoveries(
    images: Sequence[AnnotatedImage], report: DiscoveryReport, *, num_images: int = 12, num_columns: int = _COLUMNS
) -> Figure:
    """Images with the predicted box (solid) and the true ones (dashed), in a grid.

    Args:
        images: those that the report was made of, in the same order or not; found by their names.
        report: of `discover`.
        num_images: at most so many, the first ones.
        num_columns: of the grid.

    Raises:
        ValueError: no image of the report is among them.
    """
    by_name = {image.name: image for image in images}
    shown = [found for found in report.predictions if found["name"] in by_name][:num_images]
    if not shown:
        raise ValueError("expected the images that the report was made of, got none with a name that is in it")
    num_columns = min(num_columns, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    figure = Figure(figsize=(2.8 * num_columns, 2.9 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, found in zip(axes, shown):
        axis.imshow(np.asarray(by_name[found["name"]].open()))
        _draw_prediction(axis, found, iou_threshold=report.as_published["settings"]["iou_threshold"])
    figure.suptitle(_title(report), fontsize=10)
    figure.legend(handles=_legend(report), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_sweep(report: DiscoveryReport) -> Figure:
    """CorLoc, in percent, for every feature and layer (rows) and bias (columns) of a sweep; the best one is framed.

    Raises:
        ValueError: a report without a sweep over annotated images.
    """
    if not report.best_of_sweep:
        raise ValueError("expected the report of a sweep over annotated images, got one without")
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
    axis.set_title(f"{report.model}: LOST, {report.images['num_annotated']} images", fontsize=9)
    figure.colorbar(picture, label="CorLoc (%)")
    return figure


def _draw_prediction(axis: Axes, found: dict, *, iou_threshold: float) -> None:
    for box in found["boxes"] or []:
        axis.add_patch(_rectangle(box, TRUE, linestyle="--", linewidth=1.2))
    is_hit = found["iou"] is not None and found["iou"] >= iou_threshold
    axis.add_patch(_rectangle(found["box"], FOUND if is_hit else MISSED, linewidth=2))
    words = found["name"] if found["iou"] is None else f"{found['name']}: IoU {found['iou']:.2f}"
    axis.set_title(words[-40:], fontsize=8)


def _rectangle(box: Sequence[float], colour: str, **style: object) -> Rectangle:
    left, top, right, bottom = box
    # Pixels are drawn around whole numbers, boxes are counted from the edge of the first one.
    return Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, **style)


def _title(report: DiscoveryReport) -> str:
    settings, corloc = report.as_published["settings"], report.as_published["corloc"]
    words = f"{report.model}: {settings['method']}, {settings['feature']}, layer {settings['layer']}"
    if settings["method"] == "dino_seg":
        words = f"{report.model}: {settings['method']}, head {settings['head']}, layer {settings['layer']}"
    return words if corloc is None else f"{words}, CorLoc {100 * corloc:.1f} % of {report.images['num_annotated']}"


def _legend(report: DiscoveryReport) -> list[Rectangle]:
    if not report.images["num_annotated"]:
        return [_rectangle((0, 0, 1, 1), MISSED, linewidth=2, label="predicted")]
    return [
        _rectangle((0, 0, 1, 1), FOUND, linewidth=2, label="predicted, right"),
        _rectangle((0, 0, 1, 1), MISSED, linewidth=2, label="predicted, wrong"),
        _rectangle((0, 0, 1, 1), TRUE, linestyle="--", linewidth=1.2, label="true"),
    ]


__all__ = ["draw_discoveries", "draw_sweep"]

"""Curves of a training run: its log, and the norms of patch tokens, over the steps."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from modeling_vitreg.style import (
    BLUE,
    COLOURS,
    INK,
    ORANGE,
    add_colorbar,
    add_legend,
    label_axes,
    make_panels,
    save_figure,
    set_log_scale,
    show_percent,
)

from ..objectives.objective import Objective, Panel
from .diagnosis import read_series
from .instruments import collapse_line


KNN = Panel("k-NN accuracy", {"knn": "k-NN"}, unit="%")
# Panels of all objectives, after their own panels.
COMMON_PANELS = (
    KNN,
    Panel("Patches", {"segmentation": "mean IoU of a probe", "patch_consistency": "correlation with best"}),
    Panel("Effective rank of the features", {"rank": "rank"}),
    Panel("Learning rate", {"learning_rate": "learning rate"}),
)
WITH_COLLAPSE_LINE = ("dino", "teacher_entropy")
MAX_LAYER_PANELS = 5


def draw_curves(
    records: list[dict],
    path: str | os.PathLike,
    *,
    panels: Sequence[Panel] = Objective.panels,
    num_prototypes: int | None = None,
) -> pathlib.Path:
    """Draw the log of a run, one panel for each kind of value.

    Curves of many points are drawn faint, with their running median on top. The dashed line is ln K, the loss and
    entropy of uniform targets; the dotted line is chance, if records have `chance`.

    Args:
        records: as for `diagnosis.diagnose`; values that no record has are left out.
        path: file to write; the suffix chooses the format, PNG without one.
        panels: panels of the objective; `COMMON_PANELS` are added.
        num_prototypes: K of the class-token head; None leaves the dashed line out.

    Returns:
        The file written.

    Raises:
        ValueError: no record has a value to draw, or a record has no step.
    """
    panels = (*panels, *COMMON_PANELS)
    drawn = []
    for panel in panels:
        series = {key: read_series(records, key=key) for key in panel.curves}
        if series := {key: points for key, points in series.items() if points[0]}:
            drawn.append((panel, series))
    if not drawn:
        known = ", ".join(key for panel in panels for key in panel.curves)
        raise ValueError(f"expected records with any of {known}, got {len(records)} without a finite one of them")
    steps = [step for _, series in drawn for points, _ in series.values() for step in points]
    figure, axes = _panels(len(drawn), width=4.4, height=3.0)
    for ax, (panel, series) in zip(axes, drawn):
        for number, (key, points) in enumerate(series.items()):
            is_whole = key in ("total", "learning_rate")  # in black; parts of it in colours
            colour = INK if is_whole else COLOURS[number - ("total" in series)]
            _draw_series(ax, *points, colour=colour, label=panel.curves[key])
        _dress(ax, panel.title, steps=steps)
        if num_prototypes is not None and any(key in series for key in WITH_COLLAPSE_LINE):
            _draw_level(ax, collapse_line(num_prototypes), f"ln K = {collapse_line(num_prototypes):.2f}", "--")
        if panel.unit == "%":
            show_percent(ax)
        if panel is KNN:
            _draw_chance(ax, records, best=max(series["knn"][1]))
        if "learning_rate" in series:
            ax.yaxis.set_major_formatter("{x:g}")
        if len(series) > 1:
            _explain(ax)
    return save_figure(figure, path, dpi=130)


def _draw_series(ax: Axes, steps: list, values: list, *, colour: str, label: str | None) -> None:
    if len(steps) < 60:
        ax.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    places, medians = _running_medians(np.array(values), reach=len(values) // 40)
    ax.plot(np.array(steps)[places], medians, color=colour, linewidth=1.8, label=label)


def _running_medians(values: np.ndarray, *, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Medians of windows around some hundreds of places, so that a log of a million lines is drawn in no time."""
    places = np.unique(np.linspace(0, len(values) - 1, 400).round().astype(int))
    # Windows shrink alike on both sides towards the ends, so that a slope there is not flattened.
    reaches = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    windows = zip(places - reaches, places + reaches + 1)
    return places, np.array([np.median(values[start:stop]) for start, stop in windows])


def _draw_chance(ax: Axes, records: list[dict], *, best: float) -> None:
    _, chances = read_series(records, key="chance")
    if chances:
        _draw_level(ax, chances[-1], f"chance {chances[-1]:.1%}", ":")
    ax.set_ylim(0, 1.1 * max(best, *chances, 0.01))


def _explain(ax: Axes) -> None:
    """A legend above the curves."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.2 * (top - bottom))
    add_legend(ax, loc="upper right", ncols=2, fontsize=8)


def _draw_level(ax: Axes, value: float, text: str, style: str) -> None:
    ax.axhline(value, color=INK, linewidth=1, linestyle=style, zorder=1)
    ax.margins(y=0.1)  # room for the text, should the line be the highest thing
    ax.annotate(
        text, (1, value), (-3, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=INK,
    )  # fmt: skip


def draw_norms(norm_records: list[dict], path: str | os.PathLike) -> pathlib.Path:
    """Draw how the norms of patches spread over the steps of a run, layer by layer, and how many are outliers.

    Up to five layers get a panel, evenly spaced and with the last: median, quantiles and maximum on a logarithmic
    scale, and dashed the threshold above which a patch is an outlier. The last panel has the share of outliers of
    every layer. Artifacts show as a maximum that leaves the median behind.

    Args:
        norm_records: each a `step` and what `modeling_vitreg.analysis.summarise_norms` returns: `multiple`, and
            `layers` with `layer`, `median`, `q90`, `q99`, `max`, `outlier_share`. All of one model.
        path: file to write; the suffix chooses the format, PNG without one.

    Returns:
        The file written.

    Raises:
        ValueError: no records, or records of models with different numbers of layers.

    Source: Darcet et al. 2024, arXiv 2309.16588, figure 4b, of one step after the other.
    """
    by_step = {record["step"]: record for record in norm_records}
    records = [by_step[step] for step in sorted(by_step)]
    depths = sorted({len(record["layers"]) for record in records})
    if len(depths) != 1 or not depths[0]:
        raise ValueError(f"expected records of one model with one number of layers, got {depths or 'no records'}")
    steps, depth = [record["step"] for record in records], depths[0]
    shown = sorted({round(number) for number in np.linspace(0, depth - 1, min(depth, MAX_LAYER_PANELS))})
    figure, axes = _panels(len(shown) + 1, width=4.0, height=2.9)
    for ax, number in zip(axes, shown):
        _draw_layer_norms(ax, steps, [record["layers"][number] for record in records], records[-1]["multiple"])
    limits = [limit for ax in axes[:-1] for limit in ax.get_ylim()]
    for ax in axes[:-1]:
        ax.set_ylim(min(limits), max(limits) * (max(limits) / min(limits)) ** 0.3)  # room for the legend
    add_legend(axes[0], loc="upper left", ncols=2, fontsize=8)
    _draw_shares(axes[-1], steps, records)
    return save_figure(figure, path, dpi=130)


def _draw_layer_norms(ax: Axes, steps: list, layers: list[dict], multiple: float) -> None:
    median, q90, q99, largest = (np.array([layer[key] for layer in layers]) for key in ("median", "q90", "q99", "max"))
    colour, marker = BLUE, "o" if len(steps) == 1 else None
    ax.fill_between(steps, median, q90, color=colour, alpha=0.35, linewidth=0)
    ax.fill_between(steps, q90, q99, color=colour, alpha=0.18, linewidth=0)
    ax.plot(steps, median, color=colour, linewidth=1.8, marker=marker, label="median")
    ax.plot(steps, q90, color=colour, linewidth=0.8, alpha=0.7, marker=marker, label="90 %")
    ax.plot(steps, q99, color=colour, linewidth=0.6, alpha=0.5, marker=marker, label="99 %")
    ax.plot(steps, largest, color=ORANGE, linewidth=1.2, marker=marker, label="largest")
    ax.plot(
        steps, multiple * median, color=INK, linewidth=1, linestyle="--", marker=marker, label=f"{multiple:g} x median"
    )
    set_log_scale(ax, "y")
    _dress(ax, f"Norm of patches, layer {layers[0]['layer']}", steps=steps)


def _draw_shares(ax: Axes, steps: list, records: list[dict]) -> None:
    depth = len(records[0]["layers"])
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, depth))
    for number, colour in enumerate(colours):
        shares = [record["layers"][number]["outlier_share"] for record in records]
        ax.plot(steps, shares, color=colour, linewidth=1.4, marker="o", markersize=3)
    _dress(ax, f"Share of patches above {records[-1]['multiple']:g} x median", steps=steps)
    show_percent(ax)
    ax.set_ylim(bottom=0, top=max(0.01, ax.get_ylim()[1]))
    scale = ListedColormap(colours)
    bar = add_colorbar(ax, ScalarMappable(Normalize(0.5, depth + 0.5), scale), "layer", size=8, ticks=[1, depth])
    bar.ax.yaxis.labelpad = -6


def _panels(count: int, *, width: float, height: float) -> tuple:
    """Up to four panels in rows of up to two, more in rows of three."""
    return make_panels(count, width=width, height=height, num_columns=2 if count == 4 else min(count, 3))


def _dress(ax: Axes, title: str, *, steps: list) -> None:
    label_axes(ax, title, x="step", size=8)
    margin = 0.03 * (max(steps) - min(steps)) or 1
    ax.set_xlim(min(steps) - margin, max(steps) + margin)  # the same for all panels, however few points one has
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))

"""Figures of an `ArtifactReport`: norms, places, neighbours, attention, and several reports side by side.

Figures are drawn without pyplot, so that no back end is chosen and no window, setting or figure of the caller is
touched. A file is written beside its final place and renamed. Colours are those of Okabe and Ito and of viridis, which
can be told apart without seeing red and green as different.

Norms are L2 norms of tokens before the final norm, in units of the residual stream of their model.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from modeling_vitreg.files import atomic_write
from modeling_vitreg.reports import ArtifactReport

from .survey import Examples
from .verdict import MANY_SHARE


INK, FAINT = "#333333", "#b8b8b8"
BLUE, ORANGE, GREEN, PINK, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, "#e69f00", INK)
RULES = {  # colour, line and words of each rule
    "automatic": (ORANGE, "-", "automatic"),
    "median": (GREEN, "--", "3 x median"),
    "moments": (PINK, "-.", "mean + 3 std"),
    "percentile": (SKY, ":", "98th percentile"),
    "fixed": (INK, (0, (1, 1)), "150, fixed"),
}
MAX_MAPS = 8  # registers, layers or images in a row
_WIDTH = 5.2  # inches of a figure of panels


# Norms -------------------------------------------------------------------------------------------------------------


def draw_norms(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw how the norms of patches are spread, layer by layer, and in the layer of the verdict with all thresholds.

    Source: Darcet et al. 2024, arXiv 2309.16588, figure 4a.
    """
    figure, (left, right) = _panels(2, height=3.6)
    edges = np.array(report.bins["edges"])
    counts = np.array([layer["histogram"] for layer in report.layers])[:, 1:-1].T  # [K - 1, L]
    numbers = [layer["layer"] for layer in report.layers]
    used = np.flatnonzero(counts.any(axis=1))
    # Norms below the first edge or beyond the last have no place on a logarithmic axis.
    first, last = (max(used[0] - 4, 0), used[-1] + 5) if len(used) else (0, len(counts))
    shares = counts[first:last] / max(counts.sum(axis=0).max(), 1)
    borders = np.arange(len(numbers) + 1) + 0.5
    smallest = 1 / max(counts.sum(axis=0).max(), 2)
    drawn = left.pcolormesh(
        borders, edges[first : last + 1][: len(shares) + 1], np.where(shares > 0, shares, np.nan),
        cmap="viridis", norm=LogNorm(smallest, max(shares.max(), 2 * smallest)), rasterized=True,
    )  # fmt: skip
    thresholds = [layer["rules"]["automatic"]["threshold"] for layer in report.layers]
    left.step(borders, [*thresholds, thresholds[-1]], where="post", color=ORANGE, linewidth=1.5)
    left.annotate(
        "threshold", (borders[0], thresholds[0]), (3, 3), textcoords="offset points", fontsize=9, color=ORANGE
    )
    _scale(left, "y")
    low, high = edges[first], edges[min(last, len(edges) - 1)]
    left.set_ylim(low, max(high, 1.3 * max(thresholds)))
    _dress(left, "Norms of patches, all layers", x="layer", y="norm of patch (residual units)")
    left.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    bar = figure.colorbar(drawn, ax=left, pad=0.02)
    bar.set_label("share of patches of the layer", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=9, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    _draw_layer(right, report, report.layers[report.verdict["layer"] - 1], edges)
    return _save(figure, path)


def _draw_layer(ax: Axes, report: ArtifactReport, layer: dict, edges: np.ndarray) -> None:
    counts = np.array(layer["histogram"])[1:-1]
    used = np.flatnonzero(counts)
    ax.stairs(counts, edges, fill=True, color=BLUE, alpha=0.55)
    if layer["register_histogram"] and any(layer["register_histogram"]):
        registers = np.array(layer["register_histogram"])[1:-1]
        ax.stairs(registers, edges, color=INK, linewidth=1, label="registers")
        used = np.union1d(used, np.flatnonzero(registers))
    for rule, numbers in layer["rules"].items():
        colour, line, words = RULES[rule]
        share = f"{100 * numbers['share']:.2g} %"
        ax.axvline(
            numbers["threshold"], color=colour, linestyle=line, linewidth=1.6,
            label=f"{words}: {numbers['threshold']:.3g} ({share})",
        )  # fmt: skip
    thresholds = [numbers["threshold"] for rule, numbers in layer["rules"].items() if rule != "fixed"]
    low, high = edges[used[0]] if len(used) else min(thresholds), edges[used[-1] + 1] if len(used) else 1
    ax.set_xlim(low / 1.3, max(high, *thresholds) * 1.5)  # the fixed 150 may lie outside, the legend has it
    _scale(ax, "x")
    if counts.any():
        _scale(ax, "y")
    ax.set_ylim(0.7, max(counts.max(), 2) * 100)  # room for the legend
    ax.legend(loc="upper right", fontsize=8.5, labelcolor=INK, edgecolor="none", framealpha=0.85)
    title = f"Norms of patches, layer {layer['layer']}"
    _dress(ax, title, x="norm of patch (residual units)", y=f"patches of {report.images['num_images']} images")


def draw_shares(reports: Sequence[ArtifactReport], path: str | os.PathLike) -> pathlib.Path:
    """Draw the share of outliers of every layer, with its interval over images, a line a model."""
    figure, (ax,) = _panels(1, height=3.4)
    for report, colour in zip(reports, _colours(len(reports))):
        rules = [layer["rules"]["automatic"] for layer in report.layers]
        depth = [layer["layer"] for layer in report.layers]
        share = np.array([rule["share"] for rule in rules])
        low, high = (np.array([rule[key] for rule in rules], float) for key in ("low", "high"))
        ax.plot(depth, share, color=colour, linewidth=1.6, marker="o", markersize=3, label=_short(report.model))
        # Where no outlier was seen the interval says how few images there were, and would hide the rest.
        ax.fill_between(depth, low, np.where(share > 0, high, 0), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(MANY_SHARE, color=INK, linewidth=0.8, linestyle=":")
    ax.annotate("many", (0, MANY_SHARE), (2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=9, color=INK)  # fmt: skip
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    ax.set_ylim(0, max(ax.get_ylim()[1], 2 * MANY_SHARE))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    if len(reports) > 1:
        ax.legend(fontsize=9, frameon=False, labelcolor=INK)
    _dress(ax, "Share of outliers (band: 95 % over images)", x="layer", y="share of patches")
    return _save(figure, path)


def draw_series(
    reports: Sequence[ArtifactReport], path: str | os.PathLike, *, labels: Sequence[str], axis: str
) -> pathlib.Path:
    """Draw norms of the last layer and the share of outliers over checkpoints of a run, or over sizes of a model.

    Args:
        reports: in order.
        path: file to write.
        labels: of each report, such as a step or a size.
        axis: what the labels are, such as "training step" or "model".

    Raises:
        ValueError: no reports, or not one label a report.

    Source: Darcet et al. 2024, arXiv 2309.16588, figures 4b and 4c.
    """
    if not reports or len(labels) != len(reports):
        raise ValueError(f"expected reports and one label for each, got {len(reports)} and {len(labels)}")
    figure, (left, right) = _panels(2, height=3.4)
    for place, report in enumerate(reports):
        layer, edges = report.layers[-1], np.array(report.bins["edges"])
        counts = np.array(layer["histogram"])[1:-1]
        # A violin with a logarithmic width, or one patch in a thousand would be thinner than a line.
        width = 0.4 * np.log1p(counts) / max(np.log1p(counts).max(), 1e-9)
        centres = np.sqrt(edges[1:] * edges[:-1])
        left.fill_betweenx(centres, place - width, place + width, color=BLUE, alpha=0.5, linewidth=0, step="mid")
        threshold = layer["rules"]["automatic"]["threshold"]
        left.plot([place - 0.4, place + 0.4], [threshold] * 2, color=ORANGE, linewidth=1.6)
    lows = [layer["min"] for layer in (report.layers[-1] for report in reports)]
    highs = [report.layers[-1]["rules"]["automatic"]["threshold"] for report in reports]
    highs += [report.layers[-1]["max"] for report in reports]
    _scale(left, "y")
    left.set_ylim(max(min(lows), 1e-3) / 1.5, max(highs) * 1.5)
    _dress(left, "Norms, last layer (line: threshold)", x=axis, y="norm of patch (residual units)")
    rules = [report.layers[-1]["rules"]["automatic"] for report in reports]
    places, share = np.arange(len(reports)), np.array([rule["share"] for rule in rules])
    low, high = (np.array([rule[key] for rule in rules], float) for key in ("low", "high"))
    # Where no outlier was seen the interval says how few images there were, and would hide the rest.
    errors = np.nan_to_num(np.clip(np.stack([share - low, high - share]), 0, None)) * (share > 0)
    right.errorbar(places, share, errors, color=BLUE, marker="o", markersize=4, capsize=3, linewidth=1.4)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    right.set_ylim(0, max(right.get_ylim()[1], 2 * MANY_SHARE))
    _dress(right, "Share of outliers, last layer (95 %)", x=axis, y="share of patches")
    for ax in (left, right):
        ax.set_xticks(places, labels, rotation=20 if max(map(len, map(str, labels))) > 8 else 0)
        ax.set_xlim(-0.6, len(reports) - 0.4)
    return _save(figure, path)


# Places ------------------------------------------------------------------------------------------------------------


def draw_positions(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw where outliers lie, and how like their neighbours they are right after the patch embedding.

    Source: Darcet et al. 2024, arXiv 2309.16588, figure 5a.
    """
    figure, (left, right) = _panels(2, height=3.6)
    places = report.outlier_positions
    heat = np.array(places["heat_map"])
    drawn = left.imshow(heat, cmap="viridis", vmin=0, vmax=max(heat.max(), 0.01), interpolation="nearest")
    bar = figure.colorbar(drawn, ax=left, pad=0.02, shrink=0.85, format=PercentFormatter(xmax=1, decimals=None))
    bar.set_label("share of images with an outlier here", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=9, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    _dress(left, f"Places of outliers, layer {places['layer']}", x="column of patch", y="row of patch")
    left.grid(False)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if not heat.any():
        left.text(0.5, 0.5, "no outlier", color="white", ha="center", transform=left.transAxes)
    edges = np.array(places["similarity"]["edges"])
    for kind, colour in (("normal", BLUE), ("outlier", ORANGE)):
        numbers = places["similarity"][kind]
        if numbers["num_patches"]:
            density = np.array(numbers["histogram"]) / numbers["num_patches"] / np.diff(edges)
            label = f"{kind} patches: {numbers['num_patches']:,}, mean {numbers['mean']:.2f}"
            right.stairs(density, edges, color=colour, fill=True, alpha=0.3)
            right.stairs(density, edges, color=colour, linewidth=1.4, label=label)
    right.margins(y=0.2)
    right.set_xlim(-1, 1)
    if right.get_legend_handles_labels()[1]:
        right.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left")
    _dress(right, "Patches and their neighbours", x="cosine similarity with neighbours", y="density")
    return _save(figure, path)


def draw_massive_activations(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the largest activation of every layer beside the median, and the share of the top channels."""
    figure, (left, right) = _panels(2, height=3.2)
    layers = report.massive_activations["layers"]
    depth = [layer["layer"] for layer in layers]
    left.plot(depth, [layer["largest"] for layer in layers], color=ORANGE, marker="o", markersize=3, label="largest")
    left.plot(depth, [layer["median"] for layer in layers], color=BLUE, marker="o", markersize=3, label="median")
    if any(layer["median"] > 0 for layer in layers):
        _scale(left, "y")
    left.margins(y=0.25)
    _dress(left, "Magnitude of activations", x="layer", y="|activation| (residual units)")
    for place, (words, colour) in enumerate((("first channel", ORANGE), ("first three", BLUE))):
        share = [layer["top_shares"][place] for layer in layers]
        right.plot(depth, share, color=colour, marker="o", markersize=3, label=words)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    _dress(right, "Squared norm in the top channels", x="layer", y="share of squared norm")
    for ax in (left, right):
        ax.legend(fontsize=9, frameon=False, labelcolor=INK)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return _save(figure, path)


# Images ------------------------------------------------------------------------------------------------------------


def draw_norm_maps(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw the first images beside the norms of their patches in some layers, on one scale a layer."""
    depth = len(report.layers)
    shown = np.unique(np.linspace(0, depth - 1, min(depth, 5)).round().astype(int)).tolist()
    shown = sorted({*shown, report.verdict["layer"] - 1})
    num_images = min(len(examples.images), MAX_MAPS)
    figure, axes = _cells(num_images, len(shown) + 1, aspect=_aspect(examples))
    for row in range(num_images):
        _show(axes[row, 0], examples.images[row])
        for ax, layer in zip(axes[row, 1:], shown):
            norms, median = examples.norms[layer], report.layers[layer]["median"]
            text = f"max {norms[row].max() / median:.1f} x median" if median > 0 else None
            _show(ax, norms[row], cmap="viridis", vmin=norms.min(), vmax=norms.max(), text=text)
    titles = [f"norms, layer {layer + 1}\n{_range(examples.norms[layer])}" for layer in shown]
    for ax, title in zip(axes[0], ["image", *titles]):
        ax.set_title(title, fontsize=8, color=INK)
    return _save(figure, path)


def draw_attention(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw the first images beside their norms and where class token and registers look in the last layer, the mean of
    its heads; the last row is the mean over images, which shows what does not depend on the image."""
    queries = list(examples.attention)[:MAX_MAPS]
    num_images = min(len(examples.images), len(examples.attention[queries[0]]), MAX_MAPS)
    layer = report.verdict["layer"] - 1
    has_means = all(query in examples.mean_maps for query in queries)
    figure, axes = _cells(num_images + has_means, len(queries) + 2, aspect=_aspect(examples))
    norms = examples.norms[layer]
    for row in range(num_images):
        _show(axes[row, 0], examples.images[row])
        _show(axes[row, 1], norms[row], cmap="viridis", vmin=norms.min(), vmax=norms.max())
        for ax, query in zip(axes[row, 2:], queries):
            _show_map(ax, examples.attention[query][row].mean(axis=0))  # [H, rows, columns] -> [rows, columns]
    if has_means:
        number = report.attention["num_images"]
        axes[-1, 1].text(0.5, 0.5, f"mean of\n{number} images", ha="center", va="center", fontsize=8, color=INK)
        for ax, query in zip(axes[-1, 2:], queries):
            _show_map(ax, examples.mean_maps[query])
    titles = ["image", f"norms, layer {layer + 1}\n{_range(norms)}", *(query.replace("cls", "class token")
              for query in queries)]  # fmt: skip
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=8, color=INK)
    return _save(figure, path)


def draw_heads(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw where every head of the last layer looks for the first image, a row for class token and each register."""
    queries = list(examples.attention)[:MAX_MAPS]
    num_heads = min(examples.attention[queries[0]].shape[1], 2 * MAX_MAPS)
    figure, axes = _cells(len(queries), num_heads, aspect=_aspect(examples), side=1.1, left=0.9)
    for row, query in zip(axes, queries):
        row[0].text(
            -0.08, 0.5, query.replace("cls", "class token"), ha="right", va="center", fontsize=8, color=INK,
            transform=row[0].transAxes,
        )  # fmt: skip
        for ax, values in zip(row, examples.attention[query][0]):
            _show(ax, values, cmap="magma")
    for head, ax in enumerate(axes[0], start=1):
        ax.set_title(f"head {head}", fontsize=8, color=INK)
    return _save(figure, path)


def _show_map(ax: Axes, values: np.ndarray) -> None:
    _show(ax, values, cmap="magma", text=f"{values.sum():.0%}, peak {values.max() / max(values.mean(), 1e-30):.1f}x")


def _show(ax: Axes, values: np.ndarray, *, text: str | None = None, **scale) -> None:
    # One extent for images and maps of any grid, so that a patch lies where it lies in the image.
    ax.imshow(values, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest", **scale)
    if text:
        box = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
        ax.text(0.03, 0.97, text, color="white", fontsize=6.5, va="bottom", ha="left", bbox=box)


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _aspect(examples: Examples) -> float:
    return examples.images.shape[1] / examples.images.shape[2]


# Paper and file ----------------------------------------------------------------------------------------------------


def _colours(number: int) -> list:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]


def _short(name: str) -> str:
    return name if len(name) < 40 else f"…{name[-38:]}"


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Panels below each other, so that they can be read at the width of a phone."""
    figure = Figure(figsize=(_WIDTH, height * count), layout="constrained", facecolor="white")
    return figure, figure.subplots(count, 1, squeeze=False)[:, 0].tolist()


def _cells(num_rows: int, num_columns: int, *, aspect: float, side: float = 1.5, left: float = 0.0) -> tuple:
    size = (side * num_columns + left, side * aspect * num_rows + 0.45)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _dress(ax: Axes, title: str, *, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=9, color=FAINT, labelcolor=INK, which="both")
    ax.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _scale(ax: Axes, direction: str) -> None:
    """A logarithmic axis with plain numbers, 2 and 5 among them."""
    getattr(ax, f"set_{direction}scale")("log", subs=(2, 5))
    axis = getattr(ax, f"{direction}axis")
    axis.set_major_formatter(FuncFormatter(_write_plainly))
    axis.set_minor_formatter(FuncFormatter(_write_plainly))


def _write_plainly(value: float, _: int | None) -> str:
    return f"{value:g}" if value < 1e6 else f"{value:.0e}"


def _save(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png", dpi=120)
    return path


__all__ = [
    "draw_attention",
    "draw_heads",
    "draw_massive_activations",
    "draw_norm_maps",
    "draw_norms",
    "draw_positions",
    "draw_series",
    "draw_shares",
]

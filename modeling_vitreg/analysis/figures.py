"""Figures of an `ArtifactReport`: norms, outlier positions, attention, activations, and comparisons.

Norms are L2 norms of tokens before the final norm, in units of the residual stream of their model.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.ticker import MaxNLocator, PercentFormatter

from modeling_vitreg.reports import ArtifactReport
from modeling_vitreg.style import (
    BLUE,
    COLOURS,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    add_colorbar,
    add_legend,
    label_axes,
    make_cells,
    make_panels,
    plain_text,
    save_figure,
    set_log_scale,
    show_image,
    show_percent,
    show_titles,
)

from .sections import Examples
from .sinks import CLASSES
from .verdict import MANY_SHARE


RULES = {  # colour, line and words of each rule
    "automatic": (ORANGE, "-", "automatic"),
    "median": (GREEN, "--", "3 x median"),
    "moments": (PINK, "-.", "mean + 3 std"),
    "percentile": (SKY, ":", "98th percentile"),
    "fixed": (INK, (0, (1, 1)), "150, fixed"),
}
SINK_COLOURS = (BLUE, ORANGE, FAINT)  # of `CLASSES`
SINK_LINES = {
    "cosine_before_norm": ("cosine of class token and patches", INK, "-"),
    "cosine_behind_norm": ("the same behind the first norm", INK, ":"),
    "register_share": ("class token: share of update through registers", GREEN, "-"),
}
MAX_MAPS = 8  # registers, layers or images in a row


# Norms -------------------------------------------------------------------------------------------------------------


def draw_norms(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the distribution of patch norms in every layer, and in the layer of the verdict with all thresholds.

    Source: Darcet et al. 2024, arXiv 2309.16588, figure 4a.
    """
    figure, (left, right) = make_panels(2, height=3.6)
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
    set_log_scale(left, "y")
    low, high = edges[first], edges[min(last, len(edges) - 1)]
    left.set_ylim(low, max(high, 1.3 * max(thresholds)))
    label_axes(left, "Norms of patches, all layers", x="layer", y="norm of patch (residual units)")
    left.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    add_colorbar(left, drawn, "share of patches of the layer")
    _draw_layer(right, report, report.layers[report.verdict["layer"] - 1], edges)
    return save_figure(figure, path)


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
    set_log_scale(ax, "x")
    if counts.any():
        set_log_scale(ax, "y")
    ax.set_ylim(0.7, max(counts.max(), 2) * 100)  # room for the legend
    ax.legend(loc="upper right", fontsize=8.5, labelcolor=INK, edgecolor="none", framealpha=0.85)
    title = f"Norms of patches, layer {layer['layer']}"
    label_axes(ax, title, x="norm of patch (residual units)", y=f"patches of {report.images['num_images']} images")


def draw_shares(reports: Sequence[ArtifactReport], path: str | os.PathLike) -> pathlib.Path:
    """Draw the share of outliers in every layer with its interval over images, one line per model."""
    figure, (ax,) = make_panels(1, height=3.4)
    for report, colour in zip(reports, itertools.cycle(COLOURS)):
        rules = [layer["rules"]["automatic"] for layer in report.layers]
        depth = [layer["layer"] for layer in report.layers]
        share = np.array([rule["share"] for rule in rules])
        low, high = (np.array([rule[key] for rule in rules], float) for key in ("low", "high"))
        ax.plot(depth, share, color=colour, linewidth=1.6, marker="o", markersize=3, label=plain_text(report.model))
        # Without outliers the interval reflects only the number of images, and would hide the other lines.
        ax.fill_between(depth, low, np.where(share > 0, high, 0), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(MANY_SHARE, color=INK, linewidth=0.8, linestyle=":")
    ax.annotate("many", (0, MANY_SHARE), (2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=9, color=INK)  # fmt: skip
    show_percent(ax)
    ax.set_ylim(0, max(ax.get_ylim()[1], 2 * MANY_SHARE))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    if len(reports) > 1:
        add_legend(ax)
    label_axes(ax, "Share of outliers (band: 95 % interval)", x="layer", y="share of patches")
    return save_figure(figure, path)


def draw_series(
    reports: Sequence[ArtifactReport], path: str | os.PathLike, *, labels: Sequence[str], axis: str
) -> pathlib.Path:
    """Draw norms of the last layer and the share of outliers for checkpoints of a run or sizes of a model.

    Args:
        reports: in order.
        path: file to write.
        labels: one per report, such as a step or a size.
        axis: meaning of the labels, such as "training step" or "model".

    Raises:
        ValueError: no reports, or the numbers of labels and reports differ.

    Source: Darcet et al. 2024, arXiv 2309.16588, figures 4b and 4c.
    """
    if not reports or len(labels) != len(reports):
        raise ValueError(f"expected reports and one label for each, got {len(reports)} and {len(labels)}")
    figure, (left, right) = make_panels(2, height=3.4)
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
    set_log_scale(left, "y")
    left.set_ylim(max(min(lows), 1e-3) / 1.5, max(highs) * 1.5)
    label_axes(left, "Norms, last layer (line: threshold)", x=axis, y="norm of patch (residual units)")
    rules = [report.layers[-1]["rules"]["automatic"] for report in reports]
    places, share = np.arange(len(reports)), np.array([rule["share"] for rule in rules])
    low, high = (np.array([rule[key] for rule in rules], float) for key in ("low", "high"))
    # Without outliers the interval reflects only the number of images, and would hide the other lines.
    errors = np.nan_to_num(np.clip(np.stack([share - low, high - share]), 0, None)) * (share > 0)
    right.errorbar(places, share, errors, color=BLUE, marker="o", markersize=4, capsize=3, linewidth=1.4)
    show_percent(right)
    right.set_ylim(0, max(right.get_ylim()[1], 2 * MANY_SHARE))
    label_axes(right, "Share of outliers, last layer (95 %)", x=axis, y="share of patches")
    for ax in (left, right):
        ax.set_xticks(places, labels, rotation=20 if max(map(len, map(str, labels))) > 8 else 0)
        ax.set_xlim(-0.6, len(reports) - 0.4)
    return save_figure(figure, path)


# Positions and activations -------------------------------------------------------------------------------------------


def draw_positions(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the positions of outliers, and the similarity of patches to their neighbours after the patch embedding.

    Source: Darcet et al. 2024, arXiv 2309.16588, figure 5a.
    """
    figure, (left, right) = make_panels(2, height=3.6)
    places = report.outlier_positions
    heat = np.array(places["heat_map"])
    drawn = left.imshow(heat, cmap="viridis", vmin=0, vmax=max(heat.max(), 0.01), interpolation="nearest")
    percent = PercentFormatter(xmax=1, decimals=None)
    add_colorbar(left, drawn, "share of images with an outlier", shrink=0.85, format=percent)
    label_axes(left, f"Positions of outliers, layer {places['layer']}", x="column of patch", y="row of patch")
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
        add_legend(right, loc="upper left")
    label_axes(right, "Similarity to neighbours", x="mean cosine similarity to neighbours", y="density")
    return save_figure(figure, path)


def draw_massive_activations(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the largest and the median activation of every layer, and the share of the largest channels."""
    figure, (left, right) = make_panels(2, height=3.2)
    layers = report.massive_activations["layers"]
    depth = [layer["layer"] for layer in layers]
    left.plot(depth, [layer["largest"] for layer in layers], color=ORANGE, marker="o", markersize=3, label="largest")
    left.plot(depth, [layer["median"] for layer in layers], color=BLUE, marker="o", markersize=3, label="median")
    if any(layer["median"] > 0 for layer in layers):
        set_log_scale(left, "y")
    left.margins(y=0.25)
    label_axes(left, "Magnitude of activations", x="layer", y="|activation| (residual units)")
    for place, (words, colour) in enumerate((("first channel", ORANGE), ("first three", BLUE))):
        share = [layer["top_shares"][place] for layer in layers]
        right.plot(depth, share, color=colour, marker="o", markersize=3, label=words)
    right.set_ylim(0, 1)
    show_percent(right)
    label_axes(right, "Squared norm in the top channels", x="layer", y="share of squared norm")
    for ax in (left, right):
        add_legend(ax)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return save_figure(figure, path)


def draw_sinks(report: ArtifactReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the sinks of an image by layer, the class of each head, and cosines and effective rank by layer."""
    figure, (bars, heads, lines, ranks) = make_panels(4, height=3.0)
    layers = report.sinks["layers"]
    depth, below = [layer["layer"] for layer in layers], np.zeros(len(layers))
    shares = np.array([[layer["heads"][name] for name in CLASSES] for layer in layers])  # [L, classes, H]
    colours = np.array([to_rgb(colour) for colour in SINK_COLOURS])
    for place, name in enumerate(CLASSES):
        counts = shares[:, place].sum(axis=1)
        bars.bar(depth, counts, bottom=below, color=SINK_COLOURS[place], label=name.replace("_", "-"))
        below += counts
    label_axes(bars, "Sinks of an image", x="layer", y="heads, mean over images")
    mixed = 1 - np.einsum("lch,cx->hlx", shares, 1 - colours)  # white: a sink in no image
    extent = (0.5, len(layers) + 0.5, mixed.shape[0] + 0.5, 0.5)
    heads.imshow(mixed.clip(0, 1), aspect="auto", interpolation="nearest", extent=extent)
    label_axes(heads, "Each head (strong colour: in all images)", x="layer", y="head")
    heads.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for name, (words, colour, line) in SINK_LINES.items():
        if name in layers[0]:
            values = [layer[name] for layer in layers]
            lines.plot(depth, values, color=colour, linestyle=line, marker="o", markersize=3, label=words)
    label_axes(lines, "Class token, patches and registers", x="layer", y="cosine, or share")
    ranks.plot(depth, [layer["effective_rank"] for layer in layers], color=BLUE, marker="o", markersize=3)
    ranks.set_ylim(0, 1.15 * max(layer["effective_rank"] for layer in layers))
    label_axes(ranks, "Effective rank of the patches of an image", x="layer", y="dimensions")
    for ax in (bars, heads, lines, ranks):
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    add_legend(bars)
    if lines.lines:
        add_legend(lines)
    return save_figure(figure, path)


# Images ------------------------------------------------------------------------------------------------------------


def draw_norm_maps(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw the first images and the norms of their patches in up to six layers, with one scale per layer."""
    depth = len(report.layers)
    shown = np.unique(np.linspace(0, depth - 1, min(depth, 5)).round().astype(int)).tolist()
    shown = sorted({*shown, report.verdict["layer"] - 1})
    num_images = min(len(examples.images), MAX_MAPS)
    figure, axes = make_cells(num_images, len(shown) + 1, aspect=_aspect(examples))
    for row in range(num_images):
        show_image(axes[row, 0], examples.images[row])
        for ax, layer in zip(axes[row, 1:], shown):
            norms, median = examples.norms[layer], report.layers[layer]["median"]
            text = f"max {norms[row].max() / median:.1f} x median" if median > 0 else None
            show_image(ax, norms[row], cmap="viridis", vmin=norms.min(), vmax=norms.max(), text=text)
    titles = [f"norms, layer {layer + 1}\n{_range(examples.norms[layer])}" for layer in shown]
    show_titles(axes[0], ["image", *titles])
    return save_figure(figure, path)


def draw_attention(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw the first images, their norms, and the attention of class token and registers in the last layer, mean over
    heads. The last row is the mean over images, the part that does not depend on the image."""
    queries = list(examples.attention)[:MAX_MAPS]
    num_images = min(len(examples.images), len(examples.attention[queries[0]]), MAX_MAPS)
    layer = report.verdict["layer"] - 1
    has_means = all(query in examples.mean_maps for query in queries)
    figure, axes = make_cells(num_images + has_means, len(queries) + 2, aspect=_aspect(examples))
    norms = examples.norms[layer]
    for row in range(num_images):
        show_image(axes[row, 0], examples.images[row])
        show_image(axes[row, 1], norms[row], cmap="viridis", vmin=norms.min(), vmax=norms.max())
        for ax, query in zip(axes[row, 2:], queries):
            _show_map(ax, examples.attention[query][row].mean(axis=0))  # [H, rows, columns] -> [rows, columns]
    if has_means:
        number = report.attention["num_images"]
        axes[-1, 1].text(0.5, 0.5, f"mean of\n{number} images", ha="center", va="center", fontsize=8, color=INK)
        for ax, query in zip(axes[-1, 2:], queries):
            _show_map(ax, examples.mean_maps[query])
    titles = ["image", f"norms, layer {layer + 1}\n{_range(norms)}", *(query.replace("cls", "class token")
              for query in queries)]  # fmt: skip
    show_titles(axes[0], titles)
    return save_figure(figure, path)


def draw_heads(report: ArtifactReport, examples: Examples, path: str | os.PathLike) -> pathlib.Path:
    """Draw the attention of each head of the last layer on the first image, one row per query."""
    queries = list(examples.attention)[:MAX_MAPS]
    num_heads = min(examples.attention[queries[0]].shape[1], 2 * MAX_MAPS)
    figure, axes = make_cells(len(queries), num_heads, aspect=_aspect(examples), side=1.1, left=0.9)
    for row, query in zip(axes, queries):
        row[0].text(
            -0.08, 0.5, query.replace("cls", "class token"), ha="right", va="center", fontsize=8, color=INK,
            transform=row[0].transAxes,
        )  # fmt: skip
        for ax, values in zip(row, examples.attention[query][0]):
            show_image(ax, values, cmap="magma")
    show_titles(axes[0], [f"head {head}" for head in range(1, num_heads + 1)])
    return save_figure(figure, path)


def _show_map(ax: Axes, values: np.ndarray) -> None:
    show_image(
        ax, values, cmap="magma", text=f"{values.sum():.0%}, peak {values.max() / max(values.mean(), 1e-30):.1f}x"
    )


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _aspect(examples: Examples) -> float:
    return examples.images.shape[1] / examples.images.shape[2]

"""Figures of a run: curves of its log, norms of the patches over time, and what the model looks at.

Figures are drawn without pyplot, so that no back end is chosen and no window, setting or figure of the caller is
touched. A file is written beside its final place and renamed: whoever looks sees the old figure or the new one.

Letters for shapes: B images, P patches, R registers, D width.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersPreTrainedModel
from modeling_vitreg.files import atomic_write
from modeling_vitreg.modes import eval_mode

from .diagnosis import read_series
from .instruments import collapse_line


INK, FAINT = "#333333", "#b8b8b8"
COLOURS = {
    "total": "#333333",
    "dino": "#0072b2",
    "ibot": "#d55e00",
    "koleo": "#009e73",
    "class_distance": "#0072b2",
    "patch_distance": "#d55e00",
    "teacher_entropy": "#0072b2",
    "mean_entropy": "#d55e00",
    "knn": "#0072b2",
    "accuracy": "#0072b2",
    "zero_shot": "#d55e00",
    "mean_iou": "#0072b2",
    "pixel_accuracy": "#d55e00",
    "rmse": "#0072b2",
    "abs_rel": "#d55e00",
    "rank": "#009e73",
    "learning_rate": "#333333",
}
PANELS = {
    "Loss": ("total", "dino", "ibot", "koleo", "class_distance", "patch_distance"),
    "k-NN accuracy": ("knn",),
    "Accuracy on held-out images": ("accuracy", "zero_shot"),
    "Segmentation of held-out images": ("mean_iou", "pixel_accuracy"),
    "Error of depth on held-out images": ("rmse", "abs_rel"),
    "Entropy of the targets (nats)": ("teacher_entropy", "mean_entropy"),
    "Effective rank of the features": ("rank",),
    "Learning rate": ("learning_rate",),
}
LABELS = {
    "total": "total",
    "dino": "class token (DINO)",
    "ibot": "masked patches (iBOT)",
    "koleo": "spread (KoLeo)",
    "class_distance": "class token",
    "patch_distance": "patches",
    "accuracy": "of the classifier",
    "zero_shot": "zero-shot",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "accuracy of pixels",
    "rmse": "RMSE (metres)",
    "abs_rel": "absolute relative",
    "teacher_entropy": "of each target",
    "mean_entropy": "of their mean",
}
SHARES = ("Accuracy on held-out images", "Segmentation of held-out images")
MAX_LAYER_PANELS = 5


# Curves ------------------------------------------------------------------------------------------------------------


def draw_curves(records: list[dict], path: str | os.PathLike, *, num_prototypes: int | None = None) -> pathlib.Path:
    """Draw what a log holds, one panel a kind: loss terms, k-NN, what heads reach, entropies, rank, learning rate.

    Curves of many points are drawn faint, with their running median on top. The dashed line is ln K, the loss and
    entropy of uniform targets; the dotted one is chance, where records give `chance`.

    Args:
        records: as for `diagnosis.diagnose`; quantities that no record has are left out.
        path: file to write; the suffix chooses the format, PNG without one.
        num_prototypes: K of the class-token head; None leaves out the dashed line.

    Returns:
        The file written.

    Raises:
        ValueError: no record has any quantity that is drawn, or a record has no step.
    """
    panels = {}
    for title, keys in PANELS.items():
        series = {key: read_series(records, key=key) for key in keys}
        series = {key: points for key, points in series.items() if points[0]}
        if series:
            panels[title] = series
    if not panels:
        known = ", ".join(key for keys in PANELS.values() for key in keys)
        raise ValueError(f"expected records with any of {known}, got {len(records)} without a finite one of them")
    drawn = [step for series in panels.values() for steps, _ in series.values() for step in steps]
    figure, axes = _panels(len(panels), width=4.4, height=3.0)
    for ax, (title, series) in zip(axes, panels.items()):
        for key, (steps, values) in series.items():
            _draw_series(ax, steps, values, colour=COLOURS[key], label=LABELS.get(key))
        _dress(ax, title, steps=drawn)
        if num_prototypes is not None and ("dino" in series or "teacher_entropy" in series):
            _draw_level(ax, collapse_line(num_prototypes), f"ln K = {collapse_line(num_prototypes):.2f}", "--")
        if "knn" in series:
            _dress_accuracy(ax, records, best=max(series["knn"][1]))
        if title in SHARES:
            ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        if "learning_rate" in series:
            ax.yaxis.set_major_formatter(_write_plainly)
        if len(series) > 1:
            _explain(ax)
    return _save(figure, path)


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


def _dress_accuracy(ax: Axes, records: list[dict], *, best: float) -> None:
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    _, chances = read_series(records, key="chance")
    if chances:
        _draw_level(ax, chances[-1], f"chance {chances[-1]:.1%}", ":")
    ax.set_ylim(0, 1.1 * max(best, *chances, 0.01))


def _explain(ax: Axes) -> None:
    """A legend above the curves."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.2 * (top - bottom))
    ax.legend(loc="upper right", ncols=2, frameon=False, fontsize=8, labelcolor=INK)


def _draw_level(ax: Axes, value: float, text: str, style: str) -> None:
    ax.axhline(value, color=INK, linewidth=1, linestyle=style, zorder=1)
    ax.margins(y=0.1)  # room for the text, should the line be the highest thing
    ax.annotate(
        text, (1, value), (-3, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=INK,
    )  # fmt: skip


# Norms -------------------------------------------------------------------------------------------------------------


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
    axes[0].legend(loc="upper left", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    _draw_shares(axes[-1], steps, records)
    return _save(figure, path)


def _draw_layer_norms(ax: Axes, steps: list, layers: list[dict], multiple: float) -> None:
    median, q90, q99, largest = (np.array([layer[key] for layer in layers]) for key in ("median", "q90", "q99", "max"))
    colour, marker = COLOURS["dino"], "o" if len(steps) == 1 else None
    ax.fill_between(steps, median, q90, color=colour, alpha=0.35, linewidth=0)
    ax.fill_between(steps, q90, q99, color=colour, alpha=0.18, linewidth=0)
    ax.plot(steps, median, color=colour, linewidth=1.8, marker=marker, label="median")
    ax.plot(steps, q90, color=colour, linewidth=0.8, alpha=0.7, marker=marker, label="90 %")
    ax.plot(steps, q99, color=colour, linewidth=0.6, alpha=0.5, marker=marker, label="99 %")
    ax.plot(steps, largest, color=COLOURS["ibot"], linewidth=1.2, marker=marker, label="largest")
    ax.plot(
        steps, multiple * median, color=INK, linewidth=1, linestyle="--", marker=marker, label=f"{multiple:g} x median"
    )
    ax.set_yscale("log", subs=(2, 5))
    ax.yaxis.set_major_formatter(_write_plainly)
    ax.yaxis.set_minor_formatter(_write_plainly)
    _dress(ax, f"Norm of patches, layer {layers[0]['layer']}", steps=steps)


def _draw_shares(ax: Axes, steps: list, records: list[dict]) -> None:
    depth = len(records[0]["layers"])
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, depth))
    for number, colour in enumerate(colours):
        shares = [record["layers"][number]["outlier_share"] for record in records]
        ax.plot(steps, shares, color=colour, linewidth=1.4, marker="o", markersize=3)
    _dress(ax, f"Share of patches above {records[-1]['multiple']:g} x median", steps=steps)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    ax.set_ylim(bottom=0, top=max(0.01, ax.get_ylim()[1]))
    scale = ListedColormap(colours)
    bar = ax.figure.colorbar(ScalarMappable(Normalize(0.5, depth + 0.5), scale), ax=ax, ticks=[1, depth], pad=0.02)
    bar.set_label("layer", fontsize=8, color=INK, labelpad=-6)
    bar.ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)


# Attention ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_attention(
    model: ViTWithRegistersPreTrainedModel,
    images: Tensor,
    path: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> pathlib.Path:
    """Draw one row an image: image, attention of class token and registers, norms, and principal components.

    Attention is that of the last layer, the mean of its heads; each map has a scale of its own, from its smallest to
    its largest value, and says what share of the attention falls on patches and how far its peak is above its mean: a
    peak of 1.0x is no preference at all. Norms are those before the final layer norm, on one scale for all
    images; the number is largest over median. Colours are the first three principal components of the normed patches
    of all images together, so that like colours mean like patches across rows. The model works in evaluation mode, and
    every module then returns to the mode that it was in.

    Args:
        model: with or without a head, a class token, registers; what it lacks has no column.
        images: (B, 3, height, width), normalised by `mean` and `std`.
        path: file to write; the suffix chooses the format, PNG without one.
        mean, std: of each channel, to show the images as they were.

    Returns:
        The file written.

    Raises:
        ValueError: images or statistics that are not of three channels, or images that do not fit the model.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images) or len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"expected images (batch, 3, height, width) and 3 means and deviations, got {tuple(images.shape)}, "
            f"{len(mean)} and {len(std)}: take the statistics from the image processor of the model"
        )
    images = images.to(model.device)
    with eval_mode(model):
        maps = model.attention_maps(images, layers=-1, average_heads=True)
        tokens = model.base_model(images, output_pre_norm=True, return_dict=True)
    attention = {} if maps.cls is None else {"class token": maps.cls[:, 0]}
    for number in range(maps.registers.shape[2]):
        attention[f"register {number + 1}"] = maps.registers[:, 0, number]
    norms = tokens.pre_norm.patch_grid.float().norm(dim=-1).cpu()  # [B, rows, columns, D] -> [B, rows, columns]
    colours = _principal_colours(tokens.patch_grid).numpy()
    pictures = _unnormalise(images, mean, std)

    num_columns = len(attention) + 3
    figure, axes = _cells(len(images), num_columns, aspect=images.shape[2] / images.shape[3])
    for row, axs in enumerate(axes):
        _show(axs[0], pictures[row])
        for ax, values in zip(axs[1:], attention.values()):
            values = values[row].float().cpu()
            peak = values.max() / values.mean()
            _show(ax, values, cmap="magma", text=f"{values.sum():.0%}, peak {peak:.1f}x")
        text = f"{norms[row].max() / norms[row].median():.1f}x"
        _show(axs[-2], norms[row], cmap="viridis", vmin=norms.min(), vmax=norms.max(), text=text)
        _show(axs[-1], colours[row])
    titles = ["image", *attention, f"norms {norms.min():.3g} to {norms.max():.3g}", "components"]
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9, color=INK)
    return _save(figure, path)


def _principal_colours(patch_grid: Tensor) -> Tensor:
    """First three principal components of all patches as colours from 0 to 1, (B, rows, columns, 3)."""
    rows = patch_grid.flatten(0, 2).cpu().double()  # [B, rows, columns, D] -> [B P, D]
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    vectors = vectors[:, -3:].flip(1)
    # The sign of a component is arbitrary; fixed, colours do not flip from one step of a run to the next.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    components = rows @ (vectors * largest.sign())  # [B P, D] -> [B P, 3]
    low, high = np.quantile(components.numpy(), [0.01, 0.99], axis=0)  # a few outliers must not grey out the rest
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    missing = 3 - colours.shape[1]
    colours = nn.functional.pad(colours, (0, missing), value=0.5)
    return colours.unflatten(0, patch_grid.shape[:3]).float()


def _unnormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1)
    return pixels.permute(0, 2, 3, 1).numpy()  # [B, 3, height, width] -> [B, height, width, 3]


def _show(ax: Axes, values: np.ndarray | Tensor, *, text: str | None = None, **scale) -> None:
    # One extent for images and maps of any grid, so that a patch lies where it lies in the image.
    ax.imshow(np.asanyarray(values), extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest", **scale)
    if text:
        box = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
        ax.text(0.03, 0.97, text, color="white", fontsize=7, va="bottom", ha="left", bbox=box)


# Maps --------------------------------------------------------------------------------------------------------------


def draw_maps(
    images: Tensor,
    truth: Tensor,
    predicted: Tensor,
    path: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int | None = None,
) -> pathlib.Path:
    """Draw one row an image: image, what is true of each pixel, and what was predicted.

    Args:
        images: (B, 3, height, width), normalised by `mean` and `std`.
        truth, predicted: (B, height, width), class numbers or metres; white where a class number is none of them, or
            a depth is not known.
        path: file to write; the suffix chooses the format, PNG without one.
        mean, std: of each channel, to show the images as they were.
        num_classes: of class numbers; None: depths.

    Returns:
        The file written.

    Raises:
        ValueError: maps of another size than the images.
    """
    expected = (len(images), *images.shape[2:])
    if tuple(truth.shape) != expected or tuple(predicted.shape) != expected:
        raise ValueError(f"expected maps {expected}, got {tuple(truth.shape)} and {tuple(predicted.shape)}")
    pictures, is_depth = _unnormalise(images, mean, std), num_classes is None
    is_known = truth > 0 if is_depth else (truth >= 0) & (truth < num_classes)
    if not is_depth:
        # Neighbouring numbers get colours far from each other.
        places = np.arange(num_classes) * 0.618034 % 1
        scale = {"cmap": ListedColormap(matplotlib.colormaps["turbo"](places)), "vmin": 0, "vmax": num_classes - 1}
    figure, axes = _cells(len(images), 3, aspect=images.shape[2] / images.shape[3])
    for row, axs in enumerate(axes):
        if is_depth:  # one scale for truth and prediction
            scale = {"cmap": "viridis", "vmin": 0, "vmax": max(truth[row].max().item(), 1e-6)}
        _show(axs[0], pictures[row])
        text = f"to {scale['vmax']:.3g} m" if is_depth else None
        _show(axs[1], np.ma.masked_where(~is_known[row].numpy(), truth[row].numpy()), text=text, **scale)
        _show(axs[2], predicted[row].numpy(), **scale)
    for ax, title in zip(axes[0], ("image", "true depth" if is_depth else "true classes", "predicted")):
        ax.set_title(title, fontsize=9, color=INK)
    return _save(figure, path)


# Paper and file ----------------------------------------------------------------------------------------------------


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, up to four of them in rows of up to two, more in rows of three."""
    num_columns = min(count, 3) if count != 4 else 2
    num_rows = math.ceil(count / num_columns)
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained", facecolor="white")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _cells(num_rows: int, num_columns: int, *, aspect: float) -> tuple[Figure, np.ndarray]:
    side = 1.5  # inches
    size = (side * num_columns, side * aspect * num_rows + 0.3)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _dress(ax: Axes, title: str, *, steps: list) -> None:
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel("step", fontsize=8, color=INK)
    margin = 0.03 * (max(steps) - min(steps)) or 1
    ax.set_xlim(min(steps) - margin, max(steps) + margin)  # the same for all panels, however few points one has
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK, which="both")
    ax.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def _write_plainly(value: float, _: int | None) -> str:
    return f"{value:g}"


def _save(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png", dpi=130)
    return path


__all__ = ["draw_attention", "draw_curves", "draw_maps", "draw_norms"]

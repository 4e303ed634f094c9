"""Style of all figures: colours, panels, grids of images, and saving.

Figures are drawn without pyplot, so no back end is chosen and no state of the caller changes. The colours are those of
Okabe and Ito, and of viridis; they can be told apart with any colour vision.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from modeling_vitreg.files import atomic_write
from modeling_vitreg.settings import suggest_name


INK, FAINT = "#333333", "#b8b8b8"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, INK)


def make_panels(
    count: int, *, width: float = 5.2, height: float = 3.4, num_columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `width` x `height` inches, row by row; one column can be read on a phone."""
    num_rows = -(-count // num_columns)
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained", facecolor="white")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def make_cells(
    num_rows: int, num_columns: int, *, aspect: float = 1.0, side: float = 1.5, left: float = 0.0, top: float = 0.45
) -> tuple[Figure, np.ndarray]:
    """A grid of images without axes.

    Args:
        num_rows, num_columns: size of the grid.
        aspect: height of an image over its width.
        side: width of an image in inches.
        left, top: inches for labels.
    """
    size = (side * num_columns + left, side * aspect * num_rows + top)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def label_axes(ax: Axes, title: str, *, x: str, y: str = "", size: float = 9) -> None:
    """Title, labels, ticks and grid of a panel; `size` is that of the labels in points."""
    ax.set_title(title, fontsize=size + 2, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=size, color=INK)
    ax.set_ylabel(y, fontsize=size, color=INK)
    ax.tick_params(labelsize=size, color=FAINT, labelcolor=INK, which="both")
    ax.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def add_legend(ax: Axes, **options: object) -> None:
    """A legend without a frame."""
    ax.legend(**{"fontsize": 9, "frameon": False, "labelcolor": INK, **options})


def add_colorbar(ax: Axes, drawn: ScalarMappable, label: str, *, size: float = 9, **options: object) -> Colorbar:
    """A scale of colours beside a panel, without a frame."""
    bar = ax.figure.colorbar(drawn, ax=ax, pad=0.02, **options)
    bar.set_label(label, fontsize=size, color=INK)
    bar.ax.tick_params(labelsize=size, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    return bar


def show_percent(ax: Axes) -> None:
    """Shares from 0 to 1 as percent on the vertical axis."""
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))


def set_log_scale(ax: Axes, axis: str) -> None:
    """A logarithmic axis, "x" or "y", with plain numbers at 1, 2 and 5."""
    getattr(ax, f"set_{axis}scale")("log", subs=(2, 5))
    scaled = getattr(ax, f"{axis}axis")
    scaled.set_major_formatter(FuncFormatter(_format_number))
    scaled.set_minor_formatter(FuncFormatter(_format_number))


def _format_number(value: float, _: int | None) -> str:
    return f"{value:g}" if value < 1e6 else f"{value:.0e}"


def show_image(ax: Axes, values: np.ndarray, *, text: str | None = None, **options: object) -> None:
    """Draw an image or a map; all share one extent, so that a patch lies at the same place in each of them."""
    ax.imshow(values, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest", **options)
    if text:
        box = {"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
        ax.text(0.03, 0.97, text, color="white", fontsize=6.5, va="bottom", ha="left", bbox=box)


def show_depth(ax: Axes, depth: np.ndarray, *, num_layers: int) -> None:
    """Draw the layers (rows, columns) that patches ran before they halted; bright patches ran all of them."""
    text = f"mean {depth.mean():.1f} of {num_layers}"
    show_image(ax, depth, cmap="inferno", vmin=0, vmax=num_layers, text=text)


def paint(values: np.ndarray, colours: str) -> np.ndarray:
    """Values (rows, columns) from 0 to 1 in the named colours, (rows, columns, 3) from 0 to 1."""
    return colormaps[colours](values)[..., :3]


def show_titles(axes: Sequence[Axes], titles: Sequence[str], *, size: float = 8) -> None:
    """Titles above the first row of a grid of images."""
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=size, color=INK)


def plain_text(text: str, *, max_length: int = 40) -> str:
    """A name from outside (a path, a class) in one line, without mathematics, at most `max_length` of its last
    characters."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    line = line if len(line) <= max_length else f"…{line[1 - max_length :]}"
    return line.replace("$", r"\$")


def check_suffix(path: pathlib.Path) -> None:
    """Check before the work that a figure of this name can be saved.

    Raises:
        ValueError: matplotlib does not write this kind of file.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{path}: expected the name of a picture; {suggest_name(path.suffix[1:], known)}")


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 120) -> pathlib.Path:
    """Save a figure; the file appears whole or not at all. The suffix chooses the format, PNG without one."""
    path = pathlib.Path(path)
    with atomic_write(path) as sibling:
        figure.savefig(sibling, format=path.suffix.removeprefix(".") or "png", dpi=dpi)
    return path

"""The table and the plot of a comparison. Names from outside are escaped."""

from __future__ import annotations

import os
import pathlib
import statistics
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.evaluation.table import find_best, format_result, name_metric, name_models
from modeling_vitreg.metrics import METRICS
from modeling_vitreg.names import count_of
from modeling_vitreg.reports import escape_markdown
from modeling_vitreg.style import COLOURS, add_legend, label_axes, make_panels, plain_text, save_figure


if TYPE_CHECKING:
    from .run import ComparisonReport


COST_HEADS = ("parameters, M", "GFLOPs", "tokens", "images/s", "memory, MiB")  # of `describe_cost`
_HEADS = ("model", *COST_HEADS, "artifacts", "surviving outliers")


def make_table(report: ComparisonReport) -> str:
    """A Markdown table, one row for each model, with a note on how the numbers were measured."""
    columns = _collect(report)
    names = name_models([model["model"] for model in report.models])
    lines = [[*_HEADS, *columns], ["---", *["---:"] * (len(_HEADS) - 1 + len(columns))]]
    for number, (name, model) in enumerate(zip(names, report.models)):
        results = [
            format_result(results.get(number), is_best=number == find_best(results)) for results in columns.values()
        ]
        lines.append([escape_markdown(name), *describe_cost(model["cost"]), *_describe_artifacts(model), *results])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_caption(report)}\n"


def _collect(report: ComparisonReport) -> dict[str, dict[int, dict]]:
    """By the head of a column, the result of each model by its number."""
    columns: dict[str, dict[int, dict]] = {}
    for number, model in enumerate(report.models):
        for result in model["results"]:
            columns.setdefault(f"{result['task']}, {name_metric(result['metric'])}", {})[number] = result
    return columns


def describe_cost(cost: dict) -> list[str]:
    """The cost of a model in words, one for each of `COST_HEADS`."""
    speeds, (first, *_, last) = cost["images_per_second"], cost["tokens"]
    return [
        _short(cost["num_parameters"] / 1e6),
        _short(cost["flops"] / 1e9),
        _short(first) if first == last else f"{_short(first)} → {_short(last)}",
        f"{_short(statistics.median(speeds))} ({_short(min(speeds))} to {_short(max(speeds))})",
        _short(cost["peak_bytes"] / 2**20),
    ]


def _short(value: float) -> str:
    """Three figures, and all digits in front of the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _describe_artifacts(model: dict) -> list[str]:
    survivors = model["survivors"]
    return [model["verdict"]["level"], "-" if "skipped" in survivors else format_share(survivors["share"])]


def _caption(report: ComparisonReport) -> str:
    settings, made = report.settings, report.made_with
    threads = count_of(made["num_threads"], "thread")
    precisions = ", ".join(dict.fromkeys(settings["precisions"]))
    return (
        f"{escape_markdown(report.images['source'])}, {report.images['num_images']} test images. GFLOPs: one image, a "
        "product and its sum are two. Tokens: in the first layer → behind the last, prefix included. Images/s: "
        f"median (range) of {settings['num_rounds']} rounds in which the models take turns, batches of "
        f"{settings['batch_size']}, {precisions}, {made['device']}, {threads}. Memory: weights "
        "and the most that a batch needs beside them. Surviving outliers: share of the tokens at the end with a norm "
        "above the threshold of the last layer. In brackets: 95 % intervals over test images. Bold: better than every "
        "other model, without overlapping intervals."
    )


def draw(report: ComparisonReport, path: str | os.PathLike) -> pathlib.Path:
    """Draw the first result, or the operations without one, over the images per second, and tokens over layers."""
    figure, axes = make_panels(2, num_columns=2)
    names = [plain_text(name, max_length=28) for name in name_models([model["model"] for model in report.models])]
    columns = _collect(report)
    head = next((head for head, results in columns.items() if len(results) == len(names)), None)
    for number, (name, model) in enumerate(zip(names, report.models)):
        colour = COLOURS[number % len(COLOURS)]
        _draw_point(axes[0], model["cost"], columns[head][number] if head else None, color=colour, label=name)
        tokens = model["cost"]["tokens"]
        axes[1].plot(range(1, len(tokens) + 1), tokens, color=colour, marker="o", markersize=3, label=name)
    label_axes(axes[0], "Speed and quality" if head else "Speed", x="images per second", y=head or "GFLOPs per image")
    label_axes(axes[1], "Tokens", x="layer (last point: output of the model)", y="tokens that enter")
    axes[1].set_ylim(bottom=0)
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(axes[0], fontsize=7)
    return save_figure(figure, path)


def _draw_point(ax: Axes, cost: dict, result: dict | None, **style: object) -> None:
    speeds, height, interval = cost["images_per_second"], cost["flops"] / 1e9, None
    if result is not None:
        scale = 100 if METRICS[result["metric"]].unit == "%" else 1
        height, (low, high) = scale * result["value"], result["interval"]
        # Quantiles of draws may lie on one side of the value.
        interval = [[max(height - scale * low, 0.0)], [max(scale * high - height, 0.0)]]
    middle = statistics.median(speeds)
    reach = [[middle - min(speeds)], [max(speeds) - middle]]
    ax.errorbar(middle, height, xerr=reach, yerr=interval, fmt="o", markersize=5, capsize=2, **style)

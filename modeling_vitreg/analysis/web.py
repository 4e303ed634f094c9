"""Maps and charts of a page whose values can be read: beside each picture stand its numbers, which a script shows.

A map is an image of one pixel for each patch, and its values as 16 bits from the lowest to the highest. A chart is a
drawing of lines, with the words of each layer.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from modeling_vitreg.pages import format_number
from modeling_vitreg.reports import ArtifactReport
from modeling_vitreg.style import COLOURS, paint

from .settings import Examples
from .verdict import format_share


MAX_QUERIES = 8  # whose attention is shown
LEVELS = 2**16 - 1
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 240, 52, 30  # of a chart, and its margins


def example_rows(pairs: Sequence[tuple[ArtifactReport, Examples]], labels: Sequence[str]) -> list[dict]:
    """The first images, each with a strip of maps for each model.

    Args:
        pairs: reports of models on the same images, with their examples.
        labels: names of the models.

    Returns:
        For each image its cell `image`, and `strips` of a `label` and `cells`; the last row, without an image, has the
        attention averaged over images.
    """
    pairs = [(report, examples, label) for (report, examples), label in zip(pairs, labels)
             if report.layers and examples.images is not None]  # fmt: skip
    if not pairs:
        return []
    rows = [
        {
            "image": {
                "title": "image",
                "source": _encode(pairs[0][1].images[number], "jpeg"),
                "text": f"{number + 1}",
            },
            "strips": [
                {"label": label, "cells": _cells(report, examples, number)} for report, examples, label in pairs
            ],
        }
        for number in range(min(len(examples.images) for _, examples, _ in pairs))
    ]
    means = [
        {"label": label, "cells": [_attention_cell(query, values) for query, values in examples.mean_maps.items()]}
        for _, examples, label in pairs
    ]
    if any(strip["cells"] for strip in means):
        rows.append({"image": None, "strips": means, "number": pairs[0][0].attention.get("num_images")})
    return rows


def layer_chart(
    title: str, lines: Mapping[str, Sequence[tuple]], *, form: Callable = format_number, is_log: bool = False
) -> dict:
    """A chart over layers, from 1, for the macro `chart`.

    Args:
        title: what is drawn.
        lines: name of a line to (value, low, high) of each layer; low and high are None without an interval.
        form: makes words of a value.
        is_log: logarithmic axis; values that are not positive are left out.
    """
    values = [value for line in lines.values() for entry in line for value in entry if value is not None]
    values = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)] or [1.0]
    low, high = (min(values) / 1.2, max(values) * 1.2) if is_log else (0.0, max(*values, 1e-9) * 1.1)
    depth = max(map(len, lines.values()))

    def across(layer: int) -> float:
        return LEFT + (WIDTH - LEFT) * (layer - 0.5) / depth

    def up(value: float) -> float:
        share = (math.log(value / low) / math.log(high / low)) if is_log else value / high
        return (HEIGHT - BOTTOM) * (1 - share)

    def point(layer: int, value: float | None) -> str | None:
        is_drawn = value is not None and math.isfinite(value) and (value > 0 or not is_log)
        return f"{across(layer):.1f},{up(value):.1f}" if is_drawn else None

    drawn = []
    for (name, line), colour in zip(lines.items(), COLOURS * len(lines)):
        middle, lower, upper = (
            [point(layer, entry[part]) for layer, entry in enumerate(line, 1)] for part in range(3)
        )
        band = [*filter(None, lower), *reversed([each for each in upper if each])]
        drawn.append({"name": name, "colour": colour, "points": [*filter(None, middle)], "band": band})
    ticks = [low * (high / low) ** (part / 4) if is_log else high * part / 4 for part in range(5)]
    step = -(-depth // 12)
    return {
        "title": title, "lines": drawn, "width": WIDTH, "height": HEIGHT, "left": LEFT, "foot": HEIGHT - BOTTOM,
        "ticks": [(up(value), form(value)) for value in ticks],
        "layers": [
            {"x": across(layer), "start": LEFT + (WIDTH - LEFT) * (layer - 1) / depth, "wide": (WIDTH - LEFT) / depth,
             "label": layer if (layer - 1) % step == 0 else "",
             "words": f"layer {layer}: " + "; ".join(
                 f"{name} {_words(line[layer - 1], form)}" for name, line in lines.items() if layer <= len(line))}
            for layer in range(1, depth + 1)
        ],
    }  # fmt: skip


def report_charts(reports: Mapping[str, ArtifactReport]) -> dict[str, dict]:
    """Charts of outliers, norms and activations of one or several models, by the names of the models."""

    def lines(read: Callable[[dict], tuple], section: Callable = lambda report: report.layers) -> dict:
        found = {name: [read(layer) for layer in section(report)] for name, report in reports.items() if report.layers}
        return {name: line for name, line in found.items() if line}

    def share(layer: dict) -> tuple:
        rule = layer["rules"]["automatic"]  # without outliers the interval shows only how many images there are
        return (rule["share"], *((rule["low"], rule["high"]) if rule["share"] else (None, None)))

    charts = {
        "shares": ("Share of outliers, with 95 % interval", lines(share), {"form": format_share}),
        "norms": (
            "Largest norm over the median, patches",
            lines(lambda layer: (layer["max_over_median"], None, None)),
            {"is_log": True},
        ),
        "activations": (
            "Largest activation over the median",
            lines(lambda layer: (layer["largest_over_median"], None, None),
                  lambda report: report.massive_activations.get("layers", [])),
            {"is_log": True},
        ),
    }  # fmt: skip
    return {name: layer_chart(title, found, **options) for name, (title, found, options) in charts.items() if found}


def _words(entry: tuple, form: Callable) -> str:
    value, low, high = entry
    return form(value) + ("" if low is None else f" ({form(low)} to {form(high)})")


def _cells(report: ArtifactReport, examples: Examples, number: int) -> list[dict]:
    layer = report.verdict["layer"]
    norms, median = examples.norms[layer - 1], report.layers[layer - 1]["median"]
    text = f"largest {norms[number].max() / median:.1f} x median" if median > 0 else ""
    bounds = (float(norms.min()), float(norms.max()))
    cells = [map_cell(f"norms, layer {layer}", norms[number], "viridis", text=text, bounds=bounds)]
    if examples.colours is not None:
        source = _encode(examples.colours[number], "png")
        cells.append({"title": "components", "source": source, "text": "three, as colours"})
    for query in list(examples.attention)[:MAX_QUERIES]:
        if number < len(maps := examples.attention[query]):
            cells.append(_attention_cell(query, maps[number].mean(axis=0)))  # [H, rows, columns] -> [rows, columns]
    return cells


def _attention_cell(query: str, values: np.ndarray) -> dict:
    text = f"{values.sum():.0%} on patches, peak {values.max() / max(values.mean(), 1e-30):.1f} x mean"
    return map_cell(query.replace("cls", "class token"), values, "magma", text=text)


def map_cell(
    title: str, values: np.ndarray, colours: str, *, text: str, bounds: tuple[float, float] | None = None
) -> dict:
    """A map (rows, columns) for the macro `strip`; `bounds` of its colours, None: its own."""
    low, high = bounds or (float(values.min()), float(values.max()))
    scaled = np.clip((values - low) / max(high - low, 1e-30), 0, 1)
    levels = np.round(scaled * LEVELS).astype("<u2").tobytes()
    return {
        "title": title,
        "source": _encode(paint(scaled, colours), "png"),
        "text": text,
        "map": f"{values.shape[0]} {values.shape[1]} {low:.6g} {high:.6g}",
        "values": base64.b64encode(levels).decode("ascii"),
    }


def _encode(pixels: np.ndarray, kind: str) -> str:
    """An image (height, width, channels) from 0 to 1 as a data address; the first channels, if not three."""
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., [0, 0, 0]]
    buffer = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

"""Results of several models in one Markdown table, with one row per number and one column per model.

A row holds comparable results: one task, metric, dataset (by its hash), settings and seed. The image size may differ
between models, and the caption then names it. A value is bold if it is the best and its interval overlaps with no
other. Names from outside are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from modeling_vitreg.metrics import METRICS
from modeling_vitreg.reports import EvaluationReport, escape_markdown


_MAY_DIFFER = frozenset(("image_size", "patch_precision"))  # between the models of a row
_IDENTITY = ("task", "metric", "dataset", "dataset_hash", "settings", "seed")


def compare(reports: Sequence[EvaluationReport], *, labels: Sequence[str] | None = None) -> str:
    """A Markdown table, with shares in percent.

    Args:
        reports: one or more.
        labels: names of the columns; None: names of the models, numbered if they are equal.

    Raises:
        ValueError: no report, no result, or the labels are not one per report and all different.
    """
    labels = name_models([report.model for report in reports]) if labels is None else list(labels)
    if not reports or len(labels) != len(reports) or len(set(labels)) != len(labels):
        raise ValueError(f"expected reports with one label each, all different, got {len(reports)} with {labels}")
    rows = _collect(reports)
    if not rows:
        raise ValueError("expected reports with results, got none")
    labels = [escape_markdown(label) for label in labels]
    lines = [["task", "metric", "data", *labels], ["---"] * 3 + ["---:"] * len(labels)]
    for key, results in rows.items():
        task, metric = results[min(results)]["task"], results[min(results)]["metric"]
        best = find_best(results)
        cells = [format_result(results.get(number), is_best=number == best) for number in range(len(reports))]
        lines.append([task, name_metric(metric), escape_markdown(_name_data(key, rows)), *cells])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", _caption(rows, labels)]) + "\n"


def find_best(results: dict[int, dict]) -> int | None:
    """Index of the model whose interval is better than those of all others; None if there is no such model.

    Args:
        results: index of a model to its result.
    """
    for number, result in results.items():
        others = [other for other_number, other in results.items() if other_number != number]
        if others and all(_is_better(result, other) for other in others):
            return number
    return None


def name_models(names: Sequence[str]) -> list[str]:
    """Names of models, numbered if some are equal."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _collect(reports: Sequence[EvaluationReport]) -> dict[str, dict[int, dict]]:
    rows = {}
    for number, report in enumerate(reports):
        keys = [_key(result, ignored=_MAY_DIFFER) for result in report.results]
        for result, key in zip(report.results, keys):
            # A model that was measured at several image sizes has one row per size.
            key = key if keys.count(key) == 1 else _key(result, ignored=frozenset())
            rows.setdefault(key, {})[number] = result
    return rows


def _key(result: dict, *, ignored: frozenset) -> str:
    settings = {name: value for name, value in result["settings"].items() if name not in ignored}
    return json.dumps([{**result, "settings": settings}[name] for name in _IDENTITY], sort_keys=True)


def _is_better(result: dict, other: dict) -> bool:
    (low, high), (other_low, other_high) = result["interval"], other["interval"]
    return low > other_high if METRICS[result["metric"]].higher_is_better else high < other_low


def format_result(result: dict | None, *, is_best: bool) -> str:
    """Value and interval, in bold for the best; shares in percent."""
    if result is None:
        return "-"
    scale, digits = (100, 1) if METRICS[result["metric"]].unit == "%" else (1, 3)
    value, low, high = (f"{scale * number:.{digits}f}" for number in (result["value"], *result["interval"]))
    return f"**{value}** [{low}, {high}]" if is_best else f"{value} [{low}, {high}]"


def name_metric(metric: str) -> str:
    """Name of a metric with its direction and unit."""
    about = METRICS[metric]
    return f"{metric} {'↑' if about.higher_is_better else '↓'}{f', {about.unit}' if about.unit else ''}"


def _name_data(key: str, rows: dict) -> str:
    """Name of the dataset, with the settings in which rows of the same name differ."""
    own = dict(zip(_IDENTITY, json.loads(key)))
    others = [dict(zip(_IDENTITY, json.loads(other))) for other in rows]
    like = [other for other in others if all(other[name] == own[name] for name in ("task", "metric", "dataset"))]
    differs = [name for name in ("dataset_hash", "seed") if any(other[name] != own[name] for other in like)]
    words = [f"{name.replace('_', ' ')} {own[name]}" for name in differs]
    settings = [other["settings"] for other in like]
    differs = [name for name in own["settings"] if any(_differ(name, own["settings"], other) for other in settings)]
    # Methods have different settings; those that only one method has are named if no shared one differs.
    differs = differs or [name for name in own["settings"] if any(name not in other for other in settings)]
    words += [f"{name} {own['settings'][name]}" for name in differs]
    return f"{own['dataset']} ({', '.join(words)})" if words else own["dataset"]


def _differ(name: str, settings: dict, others: dict) -> bool:
    return name in others and others[name] != settings[name]


def _caption(rows: dict, labels: Sequence[str]) -> str:
    results = [result for row in rows.values() for result in row.values()]
    methods, counts = sorted({result["interval_method"] for result in results}), [result["n"] for result in results]
    images = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"{_name_sizes(rows, labels)}Test images: {images}. In brackets: intervals ({'; '.join(methods)}) over test "
        "images, not over training images or seeds. Bold: better than every other model, without overlapping "
        "intervals."
    )


def _name_sizes(rows: dict, labels: Sequence[str]) -> str:
    """Image size of each model, if the sizes differ."""
    models = {}
    for number, result in (pair for row in rows.values() for pair in row.items()):
        if "image_size" not in result["settings"]:  # discovery reads images at full resolution
            continue
        size = " x ".join(map(str, result["settings"]["image_size"]))
        models.setdefault(size, {})[labels[number]] = None
    sizes = "; ".join(f"{', '.join(names)} at {size}" for size, names in models.items())
    return f"Image sizes in pixels: {sizes}. " if len(models) > 1 else ""

"""Several models in one table of markdown: a row for each number, a column for each model.

A row holds what can be compared: one task, metric, data set (by its fingerprint), settings and seed. The size of the
images is the model's own affair, and the caption names it where models differ. A value is bold where it is the best
one, and its interval overlaps with that of no other model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from modeling_vitreg.metrics import METRICS
from modeling_vitreg.reports import EvaluationReport


_OF_THE_MODEL = frozenset(("image_size", "patch_precision"))  # settings that models of one row need not share
_IDENTITY = ("task", "metric", "dataset", "dataset_hash", "settings", "seed")


def compare(reports: Sequence[EvaluationReport], *, labels: Sequence[str] | None = None) -> str:
    """A table of markdown, shares in percent.

    Args:
        reports: one or more.
        labels: of the columns; None: the models' names.

    Raises:
        ValueError: no report, no result, or not one label for each report, all different.
    """
    labels = [report.model for report in reports] if labels is None else list(labels)
    if not reports or len(labels) != len(reports) or len(set(labels)) != len(labels):
        raise ValueError(f"expected reports with one label each, all different, got {len(reports)} with {labels}")
    rows = _collect(reports)
    if not rows:
        raise ValueError("expected reports with results, got none")
    lines = [["task", "metric", "data", *labels], ["---"] * 3 + ["---:"] * len(labels)]
    for key, results in rows.items():
        task, metric = results[min(results)]["task"], results[min(results)]["metric"]
        best = find_best(results)
        cells = [_format(results.get(number), is_best=number == best) for number in range(len(reports))]
        lines.append([task, _name_metric(metric), _name_data(key, rows), *cells])
    # A bar in a name would end the cell.
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", _caption(rows, labels)]) + "\n"


def find_best(results: dict[int, dict]) -> int | None:
    """Number of the model whose interval is better than that of each other; None where there is none to compare.

    Args:
        results: number of a model to its result.
    """
    for number, result in results.items():
        others = [other for other_number, other in results.items() if other_number != number]
        if others and all(_is_better(result, other) for other in others):
            return number
    return None


def _collect(reports: Sequence[EvaluationReport]) -> dict[str, dict[int, dict]]:
    rows = {}
    for number, report in enumerate(reports):
        keys = [_key(result, ignored=_OF_THE_MODEL) for result in report.results]
        for result, key in zip(report.results, keys):
            # A model that was measured at several sizes has a row for each.
            key = key if keys.count(key) == 1 else _key(result, ignored=frozenset())
            rows.setdefault(key, {})[number] = result
    return rows


def _key(result: dict, *, ignored: frozenset) -> str:
    settings = {name: value for name, value in result["settings"].items() if name not in ignored}
    return json.dumps([{**result, "settings": settings}[name] for name in _IDENTITY], sort_keys=True)


def _is_better(result: dict, other: dict) -> bool:
    (low, high), (other_low, other_high) = result["interval"], other["interval"]
    return low > other_high if METRICS[result["metric"]].higher_is_better else high < other_low


def _format(result: dict | None, *, is_best: bool) -> str:
    if result is None:
        return "-"
    scale, digits = (100, 1) if METRICS[result["metric"]].unit == "%" else (1, 3)
    value, low, high = (f"{scale * number:.{digits}f}" for number in (result["value"], *result["interval"]))
    return f"**{value}** [{low}, {high}]" if is_best else f"{value} [{low}, {high}]"


def _name_metric(metric: str) -> str:
    about = METRICS[metric]
    return f"{metric} {'↑' if about.higher_is_better else '↓'}{f', {about.unit}' if about.unit else ''}"


def _name_data(key: str, rows: dict) -> str:
    """Name of the data set, with what tells rows of the same name apart."""
    own = dict(zip(_IDENTITY, json.loads(key)))
    others = [dict(zip(_IDENTITY, json.loads(other))) for other in rows]
    like = [other for other in others if all(other[name] == own[name] for name in ("task", "metric", "dataset"))]
    differs = [name for name in ("dataset_hash", "seed") if any(other[name] != own[name] for other in like)]
    words = [f"{name.replace('_', ' ')} {own[name]}" for name in differs]
    settings = [other["settings"] for other in like]
    differs = [name for name in own["settings"] if any(_differ(name, own["settings"], other) for other in settings)]
    # Methods have settings of their own: where a shared one tells them apart, the others say nothing more.
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
        f"{_name_sizes(rows, labels)}Test images: {images}. In brackets: {'; '.join(methods)}; the interval covers "
        "the draw of test images, not of training images or seeds. Bold: better than each other model, intervals "
        "apart."
    )


def _name_sizes(rows: dict, labels: Sequence[str]) -> str:
    """Which model saw images of which size, where that differs."""
    models = {}
    for number, result in (pair for row in rows.values() for pair in row.items()):
        if "image_size" not in result["settings"]:  # at full resolution
            continue
        size = " x ".join(map(str, result["settings"]["image_size"]))
        models.setdefault(size, {})[labels[number]] = None
    sizes = "; ".join(f"{', '.join(names)} at {size}" for size, names in models.items())
    return f"Images in pixels: {sizes}. " if len(models) > 1 else ""


__all__ = ["compare", "find_best"]

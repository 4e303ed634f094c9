"""The page of a repair: the original beside the result, and the verdict in words.

FOLDER/index.html      the page, with all figures embedded
FOLDER/retrofit.json   the `RetrofitReport`
"""

from __future__ import annotations

import pathlib

from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.files import write_text
from modeling_vitreg.metrics import METRICS
from modeling_vitreg.omissions import list_left_out
from modeling_vitreg.pages import format_number, render_template
from modeling_vitreg.reports import RetrofitReport, write_report


REPORT_FILE = "retrofit.json"
CAPTIONS = {
    "look": "Held-out images, each before and after: norms, attention, principal components, and the object of LOST. "
    "The text on the attention of the class token gives the share of its update that comes through registers.",
    "shares": "Share of outliers in each layer, by the automatic threshold of that layer.",
    "norms_before": "Before: norms of the patches after each layer.",
    "norms_after": "After: norms of the patches after each layer.",
    "attention_before": "Before: attention of class token and registers in the last layer, mean over heads.",
    "attention_after": "After: attention of class token and registers in the last layer, mean over heads.",
}
_VALUES = (("before", "interval_before"), ("after", "interval"))
_WIDE = ("look", "attention_before", "attention_after")


def write_page(report: RetrofitReport, figures: dict[str, pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    """Write report and page; returns the page.

    Args:
        report: with a `comparison`.
        figures: of `comparison.compare_models`.
        folder: folder to write; it is created.
    """
    write_report(report, folder / REPORT_FILE)
    page = render_template(
        pathlib.Path(__file__).parent / "templates" / "retrofit.html",
        figures=figures,
        captions=CAPTIONS,
        wide=_WIDE,
        report=report,
        rows=result_rows(report),
        layer_rows=_layer_rows(report.comparison["layers"]),
        attention_rows=_attention_rows(report.comparison["attention"]),
        tried_rows=[
            [entry["num_units"], format_share(entry["share"]), format_number(entry["largest_norm"]),
             f"{entry['cosine']:.4f}"]
            for entry in report.tried
        ],
        skipped=report.comparison["skipped"],
        warnings=list_left_out(report.images),
    )  # fmt: skip
    write_text(folder / "index.html", page)
    return folder / "index.html"


def result_rows(report: RetrofitReport) -> list[list[str]]:
    """Rows (what, before, after, number of images) of the page and of the card."""
    result, control, layer = report.result, report.control, report.outliers["layer"]
    count, shares = str(result["num_images"]), {}
    for name, suffix in (("before", "_before"), ("after", "")):
        shares[name] = _with_interval(result[f"share{suffix}"], result[f"interval{suffix}"], format_share)
    norms = [format_number(result[name]) for name in ("largest_norm_before", "largest_norm")]
    rows = [
        [f"share of outliers, layer {layer}", *shares.values(), count],
        [f"largest norm, layer {layer}", *norms, count],
        ["cosine of the class token to the original", "1", f"{result['cosine']:.4f}", count],
        ["time of a forward", "1", f"{result['time_ratio']:.2f}", "-"],
    ]
    if control:
        text = f"{format_share(control['share'])}, {control['cosine']:.4f}"
        rows.append(["control: share of outliers, cosine", "-", text, count])
    for task in report.comparison.get("tasks", []):
        metric = METRICS[task["metric"]].label if task["metric"] in METRICS else task["metric"]
        values = [_with_interval(task[side], task[key]) for side, key in _VALUES]
        rows.append([f"{task['task'].replace('_', '-')}: {metric}", *values, str(task["n"])])
    return rows


def _with_interval(value: float, interval: list | None, form=lambda value: f"{value:.3f}") -> str:
    return form(value) + (f" ({form(interval[0])} to {form(interval[1])})" if interval else "")


def _layer_rows(layers: dict) -> list[list]:
    rows = []
    for before, after in zip(layers["before"], layers["after"]):
        cells = [
            cell
            for side in (before, after)
            for cell in (format_number(side["median"]), format_number(side["max"]), format_share(side["share"]))
        ]
        rows.append([before["layer"], *cells])
    return rows


def _attention_rows(attention: dict) -> list[list]:
    """One row for each query of the repaired model; a new register has no numbers before."""
    before, rows = {entry["query"]: entry for entry in attention["before"]}, []
    for after in attention["after"]:
        first, cells = before.get(after["query"]), []
        for name, form in (("patches", format_share), ("entropy", format_number), ("top_patch_ratio", format_number)):
            cells += ["-" if first is None else form(first[name]), form(after[name])]
        rows.append([after["query"].replace("cls", "class token"), *cells])
    return rows

"""Self-contained HTML pages of one or several reports, from the templates in `templates/`; see `pages.py`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from modeling_vitreg.omissions import list_left_out
from modeling_vitreg.pages import format_number, render_template
from modeling_vitreg.reports import ArtifactReport

from .verdict import FEW_SHARE, MANY_SHARE, format_share
from .web import report_charts


CAPTIONS = {
    "norms": "Norms of the patches after each layer. The histogram is of the layer that decides the verdict.",
    "shares": "Share of outliers in each layer, by the automatic threshold of that layer.",
    "outlier_positions": "Positions of outliers, and similarity of patches to their neighbours after the patch "
    "embedding. Outliers of the models in the paper are redundant patches with a similarity near 1.",
    "norm_maps": "The first images and the norms of their patches. All maps in a column have the range above it.",
    "attention": "Attention of the class token and the registers in the last layer, mean over heads. Each map has its "
    "own scale; the text gives the share of attention on patches, and the peak over the mean.",
    "heads": "Attention of each head of the last layer, on the first image.",
    "massive_activations": "Largest activation of each layer, and share of the squared norm in the largest channels.",
    "sinks": "Sinks: how many heads of each layer send most attention of most tokens to one token, and what it does.",
    "series": "Norms of the patches of the last layer with the automatic threshold, and share of outliers.",
}
_WIDE = ("norm_maps", "attention", "heads")
_TOKENS = {"cls": "class token", "distillation": "distillation token"}


def render_page(report: ArtifactReport, figures: dict[str, pathlib.Path], *, examples: Sequence[dict] = ()) -> str:
    """The page of one report.

    Args:
        report: what was measured.
        figures: name of a figure, a key of `CAPTIONS`, to its PNG file; missing figures are left out.
        examples: rows of `web.example_rows`.
    """
    rows = {
        "rule_rows": _rule_rows(report),
        "layer_rows": [_layer_row(layer) for layer in report.layers],
        "ablation_rows": _ablation_rows(report.ablation),
        "class_token_rows": _class_token_rows(report.ablation.get("class_token", {})),
        "edit_rows": _edit_rows(report.sinks.get("edits", {})),
        "patch_probe_rows": _patch_probe_rows(report.probes),
        "class_probe_rows": _class_probe_rows(report.probes),
        "sink_rows": _sink_rows(report.sinks),
        **_attention_tables(report.attention),
        **_activation_table(report.massive_activations),
    }
    shares = {"few_share": FEW_SHARE, "many_share": MANY_SHARE}
    charts = report_charts({report.model: report})
    return _render("report.html", figures, report=report, examples=examples, charts=charts, **shares, **rows)


def render_comparison(
    reports: Sequence[ArtifactReport],
    figures: dict[str, pathlib.Path],
    *,
    command: str,
    labels: Sequence[str] = (),
    examples: Sequence[dict] = (),
    pages: Sequence[str] = (),
) -> str:
    """The page of several reports side by side.

    Args:
        reports: two or more.
        figures, examples: as in `render_page`.
        command: command that makes the page.
        labels: short and different names of the models; empty: those of the reports.
        pages: address of the page of each model; empty: there are none.

    Raises:
        ValueError: fewer than two reports.
    """
    if len(reports) < 2:
        raise ValueError(f"expected two reports or more, got {len(reports)}")
    rows = [_comparison_row(report) for report in reports]
    labels = labels or [report.model for report in reports]
    named = dict(zip(labels, reports)) if len(set(labels)) == len(reports) else dict(enumerate(reports, start=1))
    tables = [(_attention_tables(report.attention), name) for name, report in named.items()]
    attention = [
        (table["attention_heads"], table["attention_rows"], name)
        for table, name in tables
        if "attention_rows" in table
    ]
    content = {"charts": report_charts(named), "attention": attention, "examples": examples, "pages": pages}
    return _render("comparison.html", figures, reports=reports, rows=rows, command=command, **content)


def _render(template: str, figures: dict[str, pathlib.Path], **content: object) -> str:
    return render_template(
        pathlib.Path(__file__).parent / "templates" / template,
        figures=figures,
        captions=CAPTIONS,
        wide=_WIDE,
        filters={"share": format_share},
        functions={"warnings": _warnings},
        **content,
    )


def _warnings(report: ArtifactReport) -> list[str]:
    images, lines = report.images, []
    if not images["is_complete"]:
        lines.append(f"Not all images were measured: {images['stopped_by']}.")
    lines += list_left_out(images)
    if "layers" in report.architecture:
        lines.append(f"Layers are {report.architecture['layers']}.")
    groups = report.attention.get("registers", {}).get("duplicates", [])
    if groups:
        words = "; ".join(", ".join(map(str, group)) for group in groups)
        lines.append(f"These registers are equal and act as one: {words}.")
    return lines


# Rows of tables ----------------------------------------------------------------------------------------------------


def _rule_rows(report: ArtifactReport) -> list[list]:
    if not report.layers:
        return []
    rules = report.layers[report.verdict["layer"] - 1]["rules"]
    return [
        [report.bins["rules"][rule], format_number(entry["threshold"]), format_share(entry["share"]), _interval(entry),
         entry["num_above"], entry["num_images_above"]]
        for rule, entry in rules.items()
    ]  # fmt: skip


def _layer_row(layer: dict) -> list:
    automatic = layer["rules"]["automatic"]
    numbers = map(format_number, (layer[key] for key in ("median", "q99", "max", "max_over_median", "valley_depth")))
    outliers = [format_number(automatic["threshold"]), format_share(automatic["share"]), _interval(automatic)]
    registers = ", ".join(map(format_number, layer["registers"])) or "-"
    return [layer["layer"], *numbers, layer["automatic_rule"], *outliers, format_number(layer["cls"]), registers]


def _attention_tables(attention: dict) -> dict:
    similarity = attention.get("registers", {}).get("similarity", [])
    names = [f"register {number}" for number in range(1, len(similarity) + 1)] if len(similarity) > 1 else []
    tables = {
        "similarity_heads": ["", *names],
        "similarity_rows": [[name, *map(format_number, row)] for name, row in zip(names, similarity)],
    }
    if "skipped" in attention:
        return tables
    last = attention["layers"][-1]
    shares = last["attention_share"]
    kinds = [kind for kind in shares[0] if any(row[kind] for row in shares)]
    tables["attention_heads"] = [
        "attention of", *(f"on {_TOKENS.get(kind, kind)}" for kind in kinds), "entropy (1: uniform)",
        "on the patch of largest norm", "times uniform",
    ]  # fmt: skip
    tables["attention_rows"] = [
        [_TOKENS.get(query, query), *(format_share(shares[place][kind]) for kind in kinds),
         format_number(last["entropy"][place]), format_share(last["top_patch_share"][place]),
         f"{last['top_patch_ratio'][place]:.1f}"]
        for place, query in enumerate(attention["queries"])
    ]  # fmt: skip
    return tables


def _activation_table(activations: dict) -> dict:
    if "skipped" in activations:
        return {}
    rows = []
    for layer in activations["layers"]:
        channels = ", ".join(f"{channel} ({value:.3g})" for channel, value in layer["top_channels"])
        carrier = max(layer["carriers"], key=layer["carriers"].get)
        massive = [format_number(sum(layer["massive"][name].values())) for name in activations["criteria"]]
        where = f"{_TOKENS.get(carrier, carrier)} ({format_share(layer['carriers'][carrier])})"
        numbers = [format_number(layer["median"]), format_number(layer["largest_over_median"])]
        rows.append([layer["layer"], *numbers, channels, where, *massive])
    heads = [
        "layer",
        "median |x|",
        "largest / median",
        "top channels (largest |x|)",
        "token with the largest (images)",
    ]
    heads += [f"entries per image {words}" for words in activations["criteria"].values()]
    return {"activation_heads": heads, "activation_rows": rows}


def _sink_rows(sinks: dict) -> list[list]:
    """Sinks per image behind layer 1: a row for each class, with a column for each kind of token."""
    rows = []
    for name, total in sinks.get("totals", {}).items():
        interval = "-" if total["low"] is None else f"{total['low']:.2f} to {total['high']:.2f}"
        kinds = [layer["per_image"][name] for layer in sinks["layers"][1:]]
        places = [sum(layer[kind] for layer in kinds) for kind in ("cls", "registers", "patches")]
        rows.append([name.replace("_", "-"), *(f"{value:.2f}" for value in (total["mean"], *places)), interval])
    return rows


def _edit_rows(edits: dict) -> list[list]:
    return [
        [name.replace("_", "-"), f"{head['layer']}, {head['head']}", head["num_events"], edits["meaning"][edit],
         *(f"{row[key]:.4f}" for key in ("change", "shared", "donor_cosine")),
         _percent(row["knn_before"]), _percent(row["knn"])]
        for name, found in edits.get("classes", {}).items()
        for head in found["heads"]
        for edit, row in head["edits"].items()
    ]  # fmt: skip


def _class_token_rows(ablation: dict) -> list[list]:
    rows = [(f"{mode}: {entry['meaning']}", entry["patches"]) for mode, entry in ablation.get("modes", {}).items()]
    return [
        [words, f"{part['cosine']:.4f}", f"{part['distance']:.4f} +- {part['distance_error']:.4f}"]
        for words, part in rows
    ]


def _ablation_rows(ablation: dict) -> list[list]:
    rows = []
    for mode, entry in ablation.get("modes", {}).items():
        cells = []
        for part in (entry["cls"], entry["patches"]):
            numbers = part and [f"{part['cosine']:.4f}", f"{part['distance']:.4f} +- {part['distance_error']:.4f}"]
            cells += numbers or ["-", "-"]
        rows.append([f"{mode}: {entry['meaning']}", *cells])
    return rows


def _patch_probe_rows(probes: dict) -> list[list]:
    position, pixels = probes.get("position", {}), probes.get("pixels", {})
    if "normal" not in position or "normal" not in pixels:
        return []
    return [
        [kind, position[kind]["num_test"], _percent(position[kind]["accuracy"]),
         *map(format_number, (position[kind]["distance"], pixels[kind]["error"]))]
        for kind in ("normal", "outlier")
    ]  # fmt: skip


def _class_probe_rows(probes: dict) -> list[list]:
    rows = []
    for token, entry in probes.get("class", {}).items() if "skipped" not in probes.get("class", {}) else ():
        if "skipped" in entry:
            rows.append([token, "-", "-", "-", entry["skipped"]])
            continue
        accuracy = f"{100 * entry['accuracy']:.1f} +- {100 * entry['spread']:.1f} %"
        rows.append([token, accuracy, _percent(entry["chance"]), entry["num_images"], entry["num_draws"]])
    return rows


def _comparison_row(report: ArtifactReport) -> list:
    verdict, attention = report.verdict, report.attention
    row = [report.model, report.images["num_images"], report.architecture["num_register_tokens"], verdict["level"]]
    if not report.layers:
        return [*row, *["-"] * 6]
    layer, on_patches = report.layers[verdict["layer"] - 1], "-"
    if "cls" in attention.get("queries", ()):
        on_patches = format_share(attention["layers"][-1]["attention_share"][0]["patches"])
    largest = max(entry["largest"] for entry in report.massive_activations["layers"])
    numbers = map(format_number, (verdict["from_layer"], layer["max_over_median"], largest))
    return [*row, format_share(verdict["share"]), _interval(verdict), *numbers, on_patches]


def _interval(entry: dict) -> str:
    return "-" if entry["low"] is None else f"{format_share(entry['low'])} to {format_share(entry['high'])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

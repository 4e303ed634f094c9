"""One self-contained HTML page of one or several reports: verdict, figures, numbers, and how they came about.

Figures are inside the page, so that it can be sent as one file; nothing is loaded from a network. It can be read on a
phone and on a wide screen: panels stand below each other, wide tables scroll on their own.
"""

from __future__ import annotations

import base64
import html
import os
import pathlib
from collections.abc import Sequence

from modeling_vitreg.reports import ArtifactReport

from .verdict import FEW_SHARE, MANY_SHARE, write_share


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 76rem;
  padding: 0 1rem 3rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 44rem; } .note { color: #555; font-size: .92rem; }
.verdict { border-left: .5rem solid #888; background: #f4f4f4; padding: .7rem 1rem; font-size: 1.1rem; }
.many { border-color: #d55e00; } .few { border-color: #e69f00; } .none { border-color: #009e73; }
.warning { border-left: .5rem solid #d55e00; padding: .3rem 1rem; background: #fdf1ea; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .92rem; max-width: 44rem; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; } .wide img { max-width: none; max-height: 48rem; }
@media (min-width: 60rem) { .wide img { max-width: 100%; max-height: none; } }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; }
"""

CAPTIONS = {
    "norms": "Norms of the patches after each layer; below, those of the layer of the verdict and all thresholds.",
    "shares": "Share of the patches of each layer whose norm is above the automatic threshold of that layer.",
    "places": "Where outliers lie, and how like their neighbours patches are right after the patch embedding: in the "
    "paper's models outliers are redundant patches, with a similarity near 1.",
    "norm_maps": "The first images and the norms of their patches. Each layer has one scale, given above it.",
    "attention": "Where class token and registers look in the last layer, mean over heads. Each map has a scale of "
    "its own; written on it are the share of the attention that falls on patches, and its peak over its mean.",
    "heads": "The same for every head, on the first image.",
    "massive_activations": "Largest activation of each layer, and the share of the squared norm in the largest "
    "channels.",
    "series": "Norms of the patches of the last layer, with the automatic threshold, and the share above it.",
}
_WIDE = ("norm_maps", "attention", "heads")
_NAMES = {"cls": "class token", "distillation": "distillation token"}


def render_page(report: ArtifactReport, figures: dict[str, pathlib.Path]) -> str:
    """The page of one report.

    Args:
        report: what was measured.
        figures: name of a figure (see `CAPTIONS`) to its file; those that are missing are left out.
    """
    sections = [
        _head(report),
        _section("Norms", figures, ("norms", "shares"), _norm_tables(report)),
        _section("Where outliers are", figures, ("norm_maps", "places"), _place_text(report)),
        _section("Attention and registers", figures, ("attention", "heads"), _attention_text(report)),
        _section("Massive activations", figures, ("massive_activations",), _peak_table(report)),
        _section("What registers are worth", figures, (), _ablation_table(report)),
        _section("What tokens hold", figures, (), _probe_tables(report)),
        _method(report),
    ]
    return _wrap(f"Artifacts of {report.model}", "\n".join(sections))


def render_comparison(reports: Sequence[ArtifactReport], figures: dict[str, pathlib.Path], *, command: str) -> str:
    """The page of several reports side by side; `figures` and captions as in `render_page`.

    Raises:
        ValueError: fewer than two reports.
    """
    if len(reports) < 2:
        raise ValueError(f"expected two reports or more, got {len(reports)}")
    verdicts = "\n".join(f"<h2>{html.escape(report.model)}</h2>{_verdict(report)}" for report in reports)
    rows = [[_escape(report.model), *_compared(report)] for report in reports]
    heads = ["model", "images", "registers", "verdict", "share", "95 % interval", "from layer", "max / median",
             "largest activation", "class token on patches"]  # fmt: skip
    note = "<p class='note'>Thresholds are each model's own: norms do not carry over from one model to another.</p>"
    body = f"<h1>Artifacts of {len(reports)} models</h1>{verdicts}<h2>Side by side</h2>{_table(heads, rows)}{note}"
    pictures = "".join(_figure(name, path) for name, path in figures.items())
    return _wrap("Artifacts side by side", f"{body}{pictures}<h2>Command</h2><pre>{html.escape(command)}</pre>")


def _compared(report: ArtifactReport) -> list[str]:
    verdict = report.verdict
    counts = [str(report.images["num_images"]), str(report.architecture["num_register_tokens"]), verdict["level"]]
    if not report.layers:
        return [*counts, *["-"] * 6]
    layer = report.layers[verdict["layer"] - 1]
    on_patches = "-"
    if "layers" in report.attention and "cls" in report.attention["queries"]:
        on_patches = write_share(report.attention["layers"][-1]["attention_share"][0]["patches"])
    largest = max(entry["largest"] for entry in report.massive_activations["layers"])
    return [
        *counts,
        write_share(verdict["share"]),
        _interval(verdict),
        _number(verdict["from_layer"]),
        _number(layer["max_over_median"]),
        _number(largest),
        on_patches,
    ]


# Sections ----------------------------------------------------------------------------------------------------------


def _head(report: ArtifactReport) -> str:
    images, made = report.images, report.architecture
    tokens = [
        f"{made['num_register_tokens']} registers",
        "a class token" if made["has_cls_token"] else "no class token",
    ]
    facts = (
        f"{made['family']}, {made['num_parameters'] / 1e6:.1f} M parameters, {made['num_hidden_layers']} layers, "
        f"width {made['hidden_size']}, {' and '.join(tokens)}; {images['num_images']} images "
        f"{'of ' + images['source'] if images['source'] else ''} at {images['size'][0]} x {images['size'][1]} pixels, "
        f"{images['grid'][0]} x {images['grid'][1]} patches"
    )
    return f"<h1>{_escape(report.model)}</h1><p class='note'>{_escape(facts)}</p>{_verdict(report)}"


def _verdict(report: ArtifactReport) -> str:
    verdict, images = report.verdict, report.images
    text = f"<p class='verdict {verdict['word']}'>{_escape(verdict['sentence'])}</p>"
    if not images["is_complete"]:
        text += f"<p class='warning'>Not all images were measured: {_escape(images['stopped_by'])}.</p>"
    if images["num_unreadable"]:
        named = "; ".join(images["unreadable"][:3])
        text += f"<p class='warning'>{images['num_unreadable']} images cannot be read: {_escape(named)}</p>"
    if images["num_nonfinite"]:
        text += (
            f"<p class='warning'>{images['num_nonfinite']} images have features that are not finite and were left out."
            "</p>"
        )
    groups = report.attention.get("registers", {}).get("duplicates", [])
    if groups:
        words = "; ".join(", ".join(map(str, group)) for group in groups)
        text += f"<p class='warning'>Registers that are equal and do the work of one: {words}.</p>"
    return text


def _section(title: str, figures: dict, names: Sequence[str], text: str) -> str:
    pictures = "".join(_figure(name, figures[name]) for name in names if name in figures)
    return f"<h2>{title}</h2>{pictures}{text}"


def _norm_tables(report: ArtifactReport) -> str:
    if not report.layers:
        return _skip("no image has finite features")
    layer = report.layers[report.verdict["layer"] - 1]
    rows = [
        [_escape(report.bins["rules"][rule]), _number(entry["threshold"]), write_share(entry["share"]),
         _interval(entry), str(entry["num_above"]), str(entry["num_images_above"])]
        for rule, entry in layer["rules"].items()
    ]  # fmt: skip
    heads = ["rule", "threshold", "share", "95 % interval", "patches above", "images with one"]
    first = f"<h3>Layer {layer['layer']}, rule by rule</h3>{_table(heads, rows)}"
    rows = [
        [str(layer["layer"]), _number(layer["median"]), _number(layer["q99"]), _number(layer["max"]),
         _number(layer["max_over_median"]), _number(layer["valley_depth"]), layer["automatic_rule"],
         _number(layer["rules"]["automatic"]["threshold"]), write_share(layer["rules"]["automatic"]["share"]),
         _interval(layer["rules"]["automatic"]), _number(layer["cls"]),
         ", ".join(map(_number, layer["registers"])) or "-"]
        for layer in report.layers
    ]  # fmt: skip
    heads = ["layer", "median", "99 %", "largest", "largest / median", "valley depth", "rule", "threshold",
             "outliers", "95 % interval", "class token", "registers"]  # fmt: skip
    return f"{first}<h3>All layers</h3>{_table(heads, rows)}"


def _place_text(report: ArtifactReport) -> str:
    places = report.outlier_positions
    if "skipped" in places:
        return _skip(places["skipped"])
    if places["border_share"] is None:
        return "<p>There is no outlier whose place could be told.</p>"
    similar = places["similarity"]
    means = {kind: similar[kind]["mean"] for kind in ("outlier", "normal")}
    hot = "; ".join(
        f"row {row}, column {column}: {write_share(share)}" for row, column, share in places["most_frequent"]
    )
    return (
        f"<p>{write_share(places['border_share'])} of the outliers of layer {places['layer']} lie on the border of "
        f"the grid, which has {write_share(places['border_share_by_chance'])} of the patches. Most frequent places "
        f"(share of images): {hot}. Mean similarity with the neighbours: outliers {_number(means['outlier'])}, normal "
        f"patches {_number(means['normal'])}.</p>"
    )


def _attention_text(report: ArtifactReport) -> str:
    attention = report.attention
    text = _skip(attention["skipped"]) if "skipped" in attention else _attention_table(attention)
    registers = attention.get("registers", {})
    if len(registers.get("similarity", [])) > 1:
        numbers = [f"register {number}" for number in range(1, len(registers["similarity"]) + 1)]
        rows = [[name, *map(_number, row)] for name, row in zip(numbers, registers["similarity"])]
        text += f"<h3>Cosine similarity of registers, last layer</h3>{_table(['', *numbers], rows)}"
    return text


def _attention_table(attention: dict) -> str:
    last = attention["layers"][-1]
    kinds = [
        kind for kind, mass in last["attention_share"][0].items() if any(row[kind] for row in last["attention_share"])
    ]
    rows = [
        [_NAMES.get(query, query), *(write_share(last["attention_share"][place][kind]) for kind in kinds),
         _number(last["entropy"][place]), write_share(last["top_patch_share"][place]),
         f"{last['top_over_even'][place]:.1f} x"]
        for place, query in enumerate(attention["queries"])
    ]  # fmt: skip
    heads = ["query", *(f"on {_NAMES.get(kind, kind)}" for kind in kinds), "entropy (1: even)",
             "on patch of largest norm", "against even"]  # fmt: skip
    note = f"<p class='note'>Last layer, mean over heads and {attention['num_images']} images.</p>"
    return f"{_table(heads, rows)}{note}"


def _peak_table(report: ArtifactReport) -> str:
    sinks = report.massive_activations
    if "skipped" in sinks:
        return _skip(sinks["skipped"])
    rows = []
    for layer in sinks["layers"]:
        channels = ", ".join(f"{channel} ({value:.3g})" for channel, value in layer["top_channels"])
        carrier = max(layer["carriers"], key=layer["carriers"].get)
        massive = [_number(sum(layer["massive"][name].values())) for name in sinks["criteria"]]
        where = f"{_NAMES.get(carrier, carrier)} ({write_share(layer['carriers'][carrier])})"
        rows.append([str(layer["layer"]), _number(layer["median"]), _number(layer["largest_over_median"]), channels,
                     where, *massive])  # fmt: skip
    heads = ["layer", "median |x|", "largest / median", "top channels (largest |x|)", "largest is in (images)"]
    heads += [f"entries an image {words}" for words in sinks["criteria"].values()]
    return _table(heads, rows)


def _ablation_table(report: ArtifactReport) -> str:
    ablation = report.ablation
    if "skipped" in ablation:
        return _skip(ablation["skipped"])
    rows = []
    for mode, entry in ablation["modes"].items():
        pair = (entry["cls"], entry["patches"])
        cells = [["-", "-"] if part is None else [f"{part['cosine']:.4f}", _with_error(part)] for part in pair]
        rows.append([f"{mode}: {_escape(entry['meaning'])}", *cells[0], *cells[1]])
    heads = ["registers", "class token: cosine", "relative distance", "patches: cosine", "relative distance"]
    note = (
        f"<p class='note'>{ablation['measured'].capitalize()}, {ablation['num_images']} images, changed from the "
        f"input of layer {ablation['from_layer']} on; +- is the standard error over images. Zero is a shock as well "
        "as a loss; mean, noise and registers of another image are the controls.</p>"
    )
    return f"{_table(heads, rows)}{note}"


def _probe_tables(report: ArtifactReport) -> str:
    probes = report.probes
    if "skipped" in probes:
        return _skip(probes["skipped"])
    text, position, pixels = "", probes["position"], probes["pixels"]
    if "skipped" in position or "skipped" in pixels:
        text += _skip("; ".join(part["skipped"] for part in (position, pixels) if "skipped" in part))
    else:
        rows = [
            [f"{kind} patches", str(position[kind]["num_test"]), _number(position[kind]["accuracy"], "%"),
             _number(position[kind]["distance"]), _number(pixels[kind]["error"])]
            for kind in ("normal", "outlier")
        ]  # fmt: skip
        heads = ["tokens of test images", "n", "position, top-1", "distance (patches)", "pixels, residual norm"]
        chance = (
            f"Chance for the position: {write_share(position['chance'])}. The mean patch as answer: residual norm "
        )
        text += f"{_table(heads, rows)}<p class='note'>{chance}{_number(pixels['error_of_mean'])}.</p>"
    if "skipped" in probes["class"]:
        return text + _skip(f"class: {probes['class']['skipped']}")
    rows = [
        [kind, *(["-", "-", "-", _escape(entry["skipped"])] if "skipped" in entry else [
            f"{100 * entry['accuracy']:.1f} +- {100 * entry['spread']:.1f} %", _number(entry["chance"], "%"),
            str(entry["num_images"]), str(entry["num_draws"])])]
        for kind, entry in probes["class"].items()
    ]  # fmt: skip
    return f"{text}<h3>Class from one token</h3>{_table(['token', 'accuracy', 'chance', 'images', 'draws'], rows)}"


def _method(report: ArtifactReport) -> str:
    images = report.images
    made = ", ".join(f"{name} {value}" for name, value in report.made_with.items())
    lines = [
        f"Norms are L2 norms of patch tokens after each layer, before the final norm; {images['num_images']} images "
        f"in one pass. Histograms have 64 bins to a decade, and thresholds are moved up to the next edge of a bin.",
        f"Verdict: none below {write_share(FEW_SHARE)} of the patches, many from {write_share(MANY_SHARE)} on, few "
        "between. The last layer decides, or, where it has none, the layer with the largest share above a valley.",
        "Automatic threshold: " + report.bins["rules"]["automatic"] + ".",
        "Intervals are 95 %, with images as the units, for patches of one image are not independent.",
        "Similarity is the mean cosine with the up to four neighbours, after the patch embedding, without positions.",
        "Attention and ablation are measured on the first images, as many as each table says; attention maps are "
        "probabilities over all tokens, so that a map sums to what its query gives to the patches.",
        "Probes are logistic and ridge regressions of scikit-learn on layer-normed, standardised tokens of the last "
        "layer, tested on images that they were not fitted on. An outlier is one of the four largest of its image.",
        f"Made with {made}.",
    ]
    items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    command = f"<h2>Command</h2><pre>{_escape(report.command)}</pre>" if report.command else ""
    return f"<h2>How it was measured</h2><ul class='note'>{items}</ul>{command}"


# Pieces ------------------------------------------------------------------------------------------------------------


def _wrap(title: str, body: str) -> str:
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _figure(name: str, path: str | os.PathLike) -> str:
    data = base64.b64encode(pathlib.Path(path).read_bytes()).decode("ascii")
    caption = _escape(CAPTIONS[name])
    kind = " class='wide'" if name in _WIDE else ""
    return (
        f"<figure><div{kind}><img alt='{caption}' src='data:image/png;base64,{data}'></div>"
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    head = "".join(f"<th>{_break(name)}</th>" for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='table'><table><tr>{head}</tr>{lines}</table></div>"


def _break(name: str) -> str:
    """A long heading in two lines."""
    middle = name.find(" ", len(name) // 2 - 2)
    return _escape(name) if len(name) < 14 or middle < 0 else f"{_escape(name[:middle])}<br>{_escape(name[middle:])}"


def _skip(reason: str) -> str:
    return f"<p class='note'>Not measured: {_escape(reason)}.</p>"


def _interval(entry: dict) -> str:
    return "-" if entry["low"] is None else f"{write_share(entry['low'])} to {write_share(entry['high'])}"


def _with_error(part: dict) -> str:
    return f"{part['distance']:.4f} +- {part['distance_error']:.4f}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _escape(text: str) -> str:
    return html.escape(str(text))


__all__ = ["CAPTIONS", "render_comparison", "render_page"]

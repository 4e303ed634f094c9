"""From histograms of norms to a threshold, a share of outliers and a verdict.

The automatic rule: if the norms of a layer have a second mode, the threshold is the valley before it; otherwise it is
`OUTLIER_MULTIPLE` times the median, the definition in `norms`. The rules of the literature are reported beside it. A
percentile marks the same share of every model, and the fixed norm was chosen for one model.

Source of the rules: Darcet et al. 2024, arXiv 2309.16588 (150, and a threshold by hand for each model); Jiang et al.
2025, arXiv 2506.08010 (mean + 3 standard deviations); the 98th percentile is that of later reproductions.
"""

from __future__ import annotations

from .histograms import FIXED_THRESHOLD, NormHistograms, find_valley, next_edge
from .norms import OUTLIER_MULTIPLE


FEW_SHARE = 0.0001  # of the patches of a layer; below, a model has no outliers
MANY_SHARE = 0.005  # DINOv2-g has 0.024
QUANTILES = {"q01": 0.01, "q10": 0.1, "median": 0.5, "q90": 0.9, "q98": 0.98, "q99": 0.99, "q999": 0.999}
RULES = {
    "automatic": f"the valley of the histogram if it has two modes, else {OUTLIER_MULTIPLE:g} x median",
    "median": f"{OUTLIER_MULTIPLE:g} x median",
    "moments": "mean + 3 standard deviations",
    "percentile": "98th percentile (2 % of the patches of any model)",
    "fixed": f"{FIXED_THRESHOLD:g} (fixed, from the paper, for DINOv2-g)",
}


def summarise_layer(histograms: NormHistograms, number: int) -> dict:
    """All numbers of one layer that are computed from its norms.

    Args:
        histograms: norms of the patches.
        number: index of the layer in `histograms`.

    Returns:
        `layer` (from 1), moments, quantiles, `max_over_median`, `valley_depth` (0: one mode), `modes` (None: one),
        `automatic_rule`, `histogram` (counts), and `rules`: for each of `RULES` `threshold` with the share above it.
    """
    quantiles = {name: histograms.quantile(number, share) for name, share in QUANTILES.items()}
    moments, median = histograms.moments(number), quantiles["median"]
    valley = find_valley(histograms.counts[number], images_above=histograms.images_above[number])
    values = {
        "automatic": valley.threshold if valley else OUTLIER_MULTIPLE * median,
        "median": OUTLIER_MULTIPLE * median,
        "moments": moments["mean"] + 3 * moments["std"],
        "percentile": quantiles["q98"],
        "fixed": FIXED_THRESHOLD,
    }
    rules = {}
    for rule, value in values.items():
        edge = next_edge(value)
        rules[rule] = {"threshold": edge, **histograms.share_above(number, edge)}
    return {
        "layer": number + 1,
        **moments,
        **quantiles,
        "max_over_median": moments["max"] / median if median > 0 else None,
        "valley_depth": valley.depth if valley else 0.0,
        "modes": [valley.low_mode, valley.high_mode] if valley else None,
        "automatic_rule": "valley" if valley else f"{OUTLIER_MULTIPLE:g} x median",
        "histogram": histograms.counts[number].tolist(),
        "rules": rules,
    }


def judge(layers: list[dict], *, input_share: float) -> dict:
    """The verdict. The last layer decides; if it has no outliers, the layer with the largest share above a valley
    does.

    A tail of large norms in a middle layer is no artifact unless it is a mode of its own or lasts to the end.

    Args:
        layers: results of `summarise_layer` for layers 1 ... L.
        input_share: share above the automatic threshold in layer 0. Outliers in layer 0 come from the pixels.

    Returns:
        `level`: none, few or many, by `FEW_SHARE` and `MANY_SHARE`; `layer` that decides; `from_layer` and `to_layer`,
        the first and last of the consecutive layers around it that have outliers (None: none); `is_in_input`, whether
        layer 0 has outliers; `rule`, `threshold`, `share`, `low`, `high`, `num_images_above` of the layer; `sentence`.
    """
    shares = [layer["rules"]["automatic"]["share"] for layer in layers]
    judged = _choose(layers, shares)
    has_any = [_level(share) != "none" for share in shares]
    start = end = judged
    while start > 0 and has_any[start - 1]:
        start -= 1
    while end < len(layers) - 1 and has_any[end + 1]:
        end += 1
    numbers = layers[judged]["rules"]["automatic"]
    verdict = {
        "level": _level(shares[judged]),
        "layer": judged + 1,
        "from_layer": start + 1 if has_any[judged] else None,
        "to_layer": end + 1 if has_any[judged] else None,
        "is_in_input": has_any[judged] and start == 0 and _level(input_share) != "none",
        "rule": layers[judged]["automatic_rule"],
        **{key: numbers[key] for key in ("threshold", "share", "low", "high", "num_images_above")},
    }
    return {**verdict, "sentence": _say(verdict, num_layers=len(layers))}


def _choose(layers: list[dict], shares: list[float]) -> int:
    """Index of the layer that decides."""
    last = len(layers) - 1
    if _level(shares[last]) != "none":
        return last
    modes = [number for number, layer in enumerate(layers) if layer["automatic_rule"] == "valley"]
    best = max(modes, key=shares.__getitem__, default=last)
    return best if _level(shares[best]) != "none" else last


def _level(share: float) -> str:
    return "many" if share >= MANY_SHARE else "few" if share >= FEW_SHARE else "none"


def _say(verdict: dict, *, num_layers: int) -> str:
    interval = ""
    if verdict["low"] is not None:
        interval = f" (95 % interval {format_share(verdict['low'])} to {format_share(verdict['high'])})"
    rule = "the valley of the histogram" if verdict["rule"] == "valley" else verdict["rule"]
    start = "No" if verdict["level"] == "none" else verdict["level"].capitalize()
    text = (
        f"{start} artifacts: {format_share(verdict['share'])} of the patches of layer {verdict['layer']} of "
        f"{num_layers}{interval} have a norm above {verdict['threshold']:.4g} ({rule})."
    )
    if verdict["level"] == "none":
        return text
    text += f" They appear in layer {verdict['from_layer']}"
    text += "." if verdict["to_layer"] == num_layers else f" and are gone after layer {verdict['to_layer']}."
    if verdict["is_in_input"]:
        text += " The embedding (layer 0) has outliers too, so they may come from the pixels and not from the model."
    return text


def format_share(share: float) -> str:
    """A share as a percentage of two figures, such as 2.4 %, 0.012 % or 0 %."""
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"

"""The original and the repaired model on held-out images: everything that the page of a repair shows.

FOLDER/1, FOLDER/2    the full analysis of each model (`analysis.report_dir`), and `evaluation.json` of the tasks
FOLDER/look.png       held-out images as both models see them
FOLDER/shares.png     share of outliers in each layer of both
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from modeling_vitreg.analysis.figures import draw_shares
from modeling_vitreg.analysis.report_dir import analyze
from modeling_vitreg.analysis.survey import SurveySettings
from modeling_vitreg.evaluation import (
    DiscoverySettings,
    EncodingSettings,
    EvaluationReport,
    EvaluationSettings,
    LabelledData,
    SegmentationSettings,
    evaluate,
)
from modeling_vitreg.features import Encoder
from modeling_vitreg.look import draw_looks, look
from modeling_vitreg.reports import ArtifactReport


TASKS = ("knn", "segmentation", "discovery", "zero_shot")
NUM_LOOKS = 3  # images that are drawn
NUM_STEPS = 300  # of the segmentation head
SIDES = ("before", "after")


@dataclass(frozen=True)
class HeldOutData:
    """Images that no choice was made on.

    Args:
        images: pairs of an image, cut to the size of the model, and its label.
        labelled: images that the repair was found on, and these, with their annotations; None: they have none.
        source: in words.
        image_size: side in pixels; None: that of the model.
        batch_size: images in a batch.
    """

    images: Sequence[tuple[Image.Image, int | None]]
    labelled: LabelledData | None
    source: str
    image_size: int | None
    batch_size: int


def compare_models(
    encoders: tuple[Encoder, Encoder],
    data: HeldOutData,
    *,
    folder: pathlib.Path,
    tokenizer: Callable | None = None,
    command: str = "",
) -> tuple[dict, dict[str, pathlib.Path]]:
    """Measure the original and the repaired model.

    Args:
        encoders: original and repaired model.
        data: held-out images.
        folder: folder to write, see above.
        tokenizer: of a dual encoder, for zero-shot classification.
        command: for the reports.

    Returns:
        `RetrofitReport.comparison`, and the figures of the page by their names.
    """
    settings = SurveySettings(num_images=None, image_size=data.image_size, batch_size=data.batch_size)
    words = {"settings": settings, "source": data.source, "command": command}
    reports, evaluations = [], []
    for number, encoder in enumerate(encoders, start=1):
        place = folder / str(number)
        reports.append(analyze(encoder, data.images, output_folder=place, **words))
        evaluations.append(_evaluate(encoder, data, place, tokenizer, command))
    figures = {
        "shares": draw_shares([report for report in reports if report.layers], folder / "shares.png"),
        "look": _draw_looks(encoders, data, folder / "look.png"),
    }
    for number, side in enumerate(SIDES, start=1):
        paths = {f"{name}_{side}": folder / str(number) / f"{name}.png" for name in ("norms", "attention")}
        figures |= {name: path for name, path in paths.items() if path.exists()}
    return {
        "layers": dict(zip(SIDES, map(_layers, reports))),
        "attention": dict(zip(SIDES, map(_attention, reports))),
        "tasks": _pair(*evaluations),
        "skipped": _skipped(*evaluations),
    }, figures


def _evaluate(
    encoder: Encoder, data: HeldOutData, folder: pathlib.Path, tokenizer: Callable | None, command: str
) -> EvaluationReport | str:
    """Results of the tasks, or why there are none."""
    if data.labelled is None:
        return "the images have no annotations that can be read by their number"
    settings = EvaluationSettings(
        encoding=EncodingSettings(image_size=data.image_size, batch_size=data.batch_size),
        segmentation=SegmentationSettings(num_steps=NUM_STEPS),
        discovery=DiscoverySettings(is_centered=True),
    )
    options = {"settings": settings, "tokenizer": tokenizer, "command": command}
    with tempfile.TemporaryDirectory() as features:
        try:
            return evaluate(
                encoder,
                tasks=TASKS,
                data=data.labelled,
                output_folder=folder,
                feature_folder=features,
                **options,
            )
        except ValueError as error:  # no task applies to these images
            return " ".join(str(error).split())


def _draw_looks(encoders: tuple[Encoder, Encoder], data: HeldOutData, path: pathlib.Path) -> pathlib.Path:
    images = (image for image, _ in data.images[:NUM_LOOKS])
    looks = [look(encoder, image, name=side) for image in images for side, encoder in zip(SIDES, encoders)]
    return draw_looks(looks, path)


def _layers(report: ArtifactReport) -> list[dict]:
    """Norms and outliers of each layer."""
    shares = ("share", "low", "high")
    return [
        {name: layer[name] for name in ("layer", "median", "max")}
        | {name: layer["rules"]["automatic"][name] for name in shares}
        for layer in report.layers
    ]


def _attention(report: ArtifactReport) -> list[dict]:
    """Attention of each query in the last layer; empty where there is none."""
    if "skipped" in report.attention:
        return []
    last = report.attention["layers"][-1]
    columns = (report.attention["queries"], last["attention_share"], last["entropy"], last["top_patch_ratio"])
    return [
        {"query": query, "patches": shares["patches"], "entropy": entropy, "top_patch_ratio": ratio}
        for query, shares, entropy, ratio in zip(*columns)
    ]


def _pair(before: EvaluationReport | str, after: EvaluationReport | str) -> list[dict]:
    """Results that both models have, beside each other."""
    if isinstance(before, str) or isinstance(after, str):
        return []
    found = {(result["task"], result["metric"]): result for result in after.results}
    return [
        {
            **{name: result[name] for name in ("task", "metric", "n")},
            "before": result["value"],
            "interval_before": result["interval"],
            "after": found[key]["value"],
            "interval": found[key]["interval"],
        }
        for result in before.results
        if (key := (result["task"], result["metric"])) in found
    ]


def _skipped(*evaluations: EvaluationReport | str) -> dict[str, str]:
    reasons = [{"tasks": each} if isinstance(each, str) else each.skipped for each in evaluations]
    return reasons[1] | reasons[0]

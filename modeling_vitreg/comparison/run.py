"""From encoders and data to a `ComparisonReport`, a table and a plot.

    OUTPUT/comparison.json   the `ComparisonReport`
    OUTPUT/table.md          the table
    OUTPUT/comparison.png    the plot
    OUTPUT/models/HASH       features of a model, by the hash of its weights, and its `evaluation.json` for each choice
                             of data and settings

The next run reads features and results from there; cost and verdict are measured anew.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from modeling_vitreg import evaluation
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.encoding import Crop
from modeling_vitreg.encoding.precision import choose_precision
from modeling_vitreg.evaluation import EvaluationReport, EvaluationSettings, LabelledData
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.model_hash import hash_weights
from modeling_vitreg.files import check_writable, write_text
from modeling_vitreg.reports import ArtifactReport, made_with, short_hash, write_report

from .cost import Cost, measure_costs
from .survivors import FirstImages, Survivors
from .table import draw, make_table


@dataclass(frozen=True)
class ComparisonReport:
    """Cost and quality of several models, measured in one run. All values are plain JSON values.

    Args:
        models: for each its `model`, `architecture`, `cost` (see `cost.Cost`), `verdict` on its artifacts, `survivors`
            (share of outliers among the tokens that are left at the end, see `survivors`; its `num_tokens` is that of
            an image), and the `results` and the `skipped` tasks of its `EvaluationReport`.
        images: `source`, and the counts of the test images as in an `ArtifactReport`.
        settings: `batch_size` and `num_rounds` of the timing, `precisions` of the models, and `seed`.
        command: command that made the report.
        made_with: see `reports.made_with`.
    """

    kind: ClassVar[str] = "comparison"
    version: ClassVar[int] = 1

    models: list
    images: dict
    settings: dict
    command: str
    made_with: dict = field(default_factory=dict)


@dataclass(frozen=True)
class CostSettings:
    """How the cost is measured: rounds in which the models take turns, on batches of `encoding.batch_size`."""

    num_rounds: int = 9

    def __post_init__(self):
        if self.num_rounds < 1:
            raise ValueError(f"expected cost.num_rounds of 1 or more, got {self.num_rounds}")


def compare(
    encoders: Sequence[Encoder],
    *,
    data: LabelledData,
    tasks: Sequence[str],
    output_folder: str | os.PathLike,
    settings: EvaluationSettings | None = None,
    cost: CostSettings | None = None,
    command: str = "",
) -> ComparisonReport:
    """Measure several models, and write report, table and plot.

    Args:
        encoders: one or more.
        data: test images are measured on; the tasks are left out if no training image has a label.
        tasks: keys of `evaluation.TASKS`.
        output_folder: folder to write, see above.
        settings, cost: settings.
        command: command that makes the report, for the report.

    Raises:
        ValueError: images that do not fit a model, or a model whose features are not finite.
        OSError: the folder cannot be written, which is checked before images are read.
    """
    settings, cost = settings or EvaluationSettings(), cost or CostSettings()
    folder, encoding = check_writable(output_folder), settings.encoding
    precisions = [choose_precision(encoder, encoding.precision) for encoder in encoders]
    found = [_survey(encoder, data, settings) for encoder in encoders]
    costs = measure_costs(
        encoders,
        [pixels for _, _, pixels in found],
        num_rounds=cost.num_rounds,
        precisions=precisions,
        has_progress_bar=encoding.has_progress_bar,
    )
    measured = [None] * len(encoders)
    if tasks and any(label is not None for label in data.train.labels):
        measured = [_evaluate(encoder, data, tasks, settings, folder / "models", command) for encoder in encoders]
    report = ComparisonReport(
        models=[_describe(*parts) for parts in zip([each[:2] for each in found], costs, measured)],
        images={"source": data.name, **found[0][0].images},
        settings={
            "batch_size": min(len(pixels) for _, _, pixels in found),
            "num_rounds": cost.num_rounds,
            "precisions": precisions,
            "seed": settings.seed,
        },
        command=command,
        made_with=made_with(device=str(encoders[0].device), num_threads=torch.get_num_threads()),
    )
    write_report(report, folder / "comparison.json")
    write_text(folder / "table.md", make_table(report))
    draw(report, folder / "comparison.png")
    return report


def _survey(encoder: Encoder, data: LabelledData, settings: EvaluationSettings) -> tuple[ArtifactReport, dict, Tensor]:
    """Verdict on the artifacts, outliers among the surviving tokens, and the first batch of pixels."""
    names = ("image_size", "batch_size", "precision", "workers", "compile", "has_progress_bar")
    shared = {name: getattr(settings.encoding, name) for name in names}
    chosen = SurveySettings(num_images=None, num_attention_images=0, num_ablation_images=0, num_shown=0, **shared)
    transform = Crop(chosen.image_size)
    survivors, first = Survivors(transform), FirstImages(chosen.batch_size, transform)
    report, _ = survey(encoder, data.test, settings=chosen, source=data.name, others=[survivors, first])
    if not report.layers:
        raise ValueError(f"{encoder.name}: expected finite features, got NaN or infinity: the weights are damaged")
    found = {"skipped": survivors.skipped} if survivors.skipped else None
    threshold = report.layers[-1]["rules"]["automatic"]["threshold"]
    return report, found or survivors.compute(threshold), first.pixels


def _evaluate(
    encoder: Encoder,
    data: LabelledData,
    tasks: Sequence[str],
    settings: EvaluationSettings,
    folder: pathlib.Path,
    command: str,
) -> EvaluationReport:
    """Results of the tasks, with features by the weights, and a report for each choice of data and settings."""
    home = folder / hash_weights(encoder)
    choice = short_hash([dataclasses.asdict(settings), data.train.dataset_hash, data.test.dataset_hash])
    words = {"tasks": tasks, "data": data, "settings": settings, "command": command}
    found = evaluation.evaluate(encoder, output_folder=home / choice, feature_folder=home / "features", **words)
    return dataclasses.replace(found, results=[each for each in found.results if each["task"] in tasks])


def _describe(found: tuple[ArtifactReport, dict], cost: Cost, measured: EvaluationReport | None) -> dict:
    report, survivors = found
    return {
        "model": report.model,
        "architecture": report.architecture,
        "cost": dataclasses.asdict(cost),
        "verdict": report.verdict,
        "survivors": survivors,
        "results": measured.results if measured else [],
        "skipped": measured.skipped if measured else {},
    }

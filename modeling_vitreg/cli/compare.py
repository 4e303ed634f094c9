"""`vitreg compare`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .evaluate import read_counts, read_evaluation, read_splits, read_tasks, scene_size
from .options import COMPUTE, DATA, OUTPUT, option
from .processes import refuse_several_processes
from .tell import tell_unreadable


_OUTPUT = pathlib.Path("comparison")
_MODELS = "Folders of models, names on the Hub or timm/NAME; MODEL@merge=13 merges patches."
_IMAGES = "Folder of images or of a dataset, .tar shards, Hub dataset, scenes or scenes:single. Labels are optional."
_COLUMNS = "Columns of the dataset, such as label=colours."
_TASKS = "Tasks for images with labels, as in vitreg evaluate; none: leave accuracy out."


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL ...", help=_MODELS)],
    images: Annotated[str, option(DATA, _IMAGES)] = "scenes:single",
    columns: Annotated[list[str] | None, option(DATA, _COLUMNS, metavar="KIND=COLUMN,...")] = None,
    split: Annotated[str, option(DATA, "Training and test split.", metavar="TRAIN,TEST")] = "train",
    num_images: Annotated[str, option(DATA, "Maximum number of images.", metavar="TRAIN,TEST")] = "2000,500",
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    tasks: Annotated[str, option(COMPUTE, _TASKS, metavar="TASK,...")] = "knn",
    batch_size: options.BatchSize = 32,
    precision: options.Precision = None,
    workers: options.Workers = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    settings: options.Set = None,
    output: Annotated[pathlib.Path, option(OUTPUT, "Folder to write.")] = _OUTPUT,
) -> None:
    """Compare what models cost with what they are worth, in one table and one plot.

    * `vitreg compare outputs/demo-cpu/model outputs/demo-cpu/model@merge=1`

    * `vitreg compare outputs/without/model outputs/demo-cpu/model --images my_photos --tasks knn,linear`

    * `vitreg compare facebook/dinov2-small facebook/dinov2-with-registers-small --images my_photos`

    Parameters, FLOPs, tokens in each layer, images per second (the models take turns), memory, accuracy with interval,
    the verdict on artifacts, and the outliers among the tokens that are left. Writes table.md, comparison.png and
    comparison.json. Settings for --set: those of `vitreg evaluate`, and `cost.num_rounds`.
    """
    with plain_errors():
        refuse_several_processes("compare")
        options.check_output(output, images=images)
        names, device = options.check_inputs(models, images, device)
        counts = read_counts(num_images)
        from modeling_vitreg import comparison, evaluation
        from modeling_vitreg.comparison.run import CostSettings
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.reports import command_line
        from modeling_vitreg.scenes import is_scenes

        wanted = [] if tasks.strip() == "none" else read_tasks(tasks, evaluation.TASKS)
        usual = {"batch_size": batch_size, "workers": workers, "precision": precision}
        chosen, data_options, others = read_evaluation(
            settings, columns, usual, seed, is_scenes=is_scenes(images), cost=CostSettings
        )
        loading = {"device": device, "trust_remote_code": trust_remote_code, "parts": parts}
        encoders = [load_encoder(name, dtype=options.weights_dtype(precision), **loading) for name in names]
        side = chosen.encoding.image_size or max(max(encoder.image_size) for encoder in encoders)
        opening = {**read_splits(split), **counts, "seed": seed, "options": data_options}
        data = evaluation.open_data(images, image_size=scene_size(images, side), **opening)
        typer.echo(data.train.describe_labels(), err=True)
        words = {"tasks": wanted, "output_folder": output, "settings": chosen, "command": command_line()}
        report = comparison.compare(encoders, data=data, **words, **others)
    tell_unreadable(report.images)
    typer.echo((output / "table.md").read_text(encoding="utf-8"))
    for model in report.models:
        for task, reason in model["skipped"].items():
            typer.echo(f"{model['model']}: {task} skipped: {reason}")
    typer.echo(f"wrote {output}")

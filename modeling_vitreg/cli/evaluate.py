"""`vitreg evaluate`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import options
from .errors import plain_errors
from .options import COMPUTE, DATA, OUTPUT, option
from .tell import tell_unreadable


_OUTPUT = pathlib.Path("evaluation")
_COLUMNS = "Columns of the dataset: image, label, mask, depth, box, text. For scenes: label=colours or label=label."
_TASKS = "Tasks: knn, linear, logistic, segmentation, depth, zero_shot, discovery."
_NUM_IMAGES = (2000, 500)  # to train on, to measure on
_DISCOVERY_BATCH = 8  # images at full resolution


def _data(text: str, metavar: str) -> Any:
    return option(DATA, text, metavar=metavar)


def evaluate(
    model: options.Model,
    data: options.Images = "scenes:single",
    columns: Annotated[list[str] | None, _data(_COLUMNS, "KIND=COLUMN,...")] = None,
    annotations: options.Annotations = None,
    split: Annotated[
        str,
        _data("Training and test split. TEST defaults to test, else validation, else 30 % held out.", "TRAIN,TEST"),
    ] = "train",
    num_images: Annotated[str, _data("Maximum number of images of each split.", "TRAIN,TEST")] = "2000,500",
    compare: options.Compare = None,
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    tasks: Annotated[str, option(COMPUTE, _TASKS, metavar="TASK,...")] = "knn,linear",
    batch_size: options.BatchSize = 32,
    precision: options.Precision = None,
    workers: options.Workers = None,
    compile: options.Compile = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    settings: options.Set = None,
    output: Annotated[
        pathlib.Path, option(OUTPUT, "Folder to write. Results that it already has are kept.")
    ] = _OUTPUT,
) -> None:
    """Measure frozen features by k-NN, probes, segmentation, depth and object discovery, each with an interval.

    * `vitreg evaluate outputs/demo-cpu/model --tasks knn,linear,segmentation,depth,discovery`

    * `vitreg evaluate outputs/without/model my_photos --compare outputs/demo-cpu/model`

    * `vitreg evaluate facebook/dinov2-small owner/rooms --tasks depth --columns depth=range --set data.max_depth=80`

    Scenes have all annotations; a folder with one subfolder per class has labels. Images are encoded once, and the
    same command continues after Ctrl-C. evaluation.json holds every number with its n, interval and seed. Settings for
    --set: `data.NAME`, `encoding.NAME` (such as `encoding.image_size=224`), `TASK.NAME` (such as
    `discovery.method=tokencut`).
    """
    with plain_errors():
        options.check_output(output, images=data)
        names, device = options.check_inputs([model, *(compare or [])], data, device)
        counts = read_counts(num_images)
        from modeling_vitreg import evaluation
        from modeling_vitreg.distributed import first_process_first, joined_processes, tell_others
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.files import write_text
        from modeling_vitreg.scenes import is_scenes

        wanted = read_tasks(tasks, evaluation.TASKS)
        usual = {"batch_size": batch_size, "workers": workers, "precision": precision, "compile": compile}
        chosen, data_options, _ = read_evaluation(settings, columns, usual, seed, is_scenes=is_scenes(data))
        loading = {"device": device, "trust_remote_code": trust_remote_code, "parts": parts}
        encoders = [load_encoder(name, dtype=options.weights_dtype(precision), **loading) for name in names]
        side = chosen.encoding.image_size or max(max(encoder.image_size) for encoder in encoders)
        opening = {**read_splits(split), **counts, "annotations": annotations, "seed": seed, "options": data_options}
        folders = [output / str(number) for number in range(1, len(names) + 1)] if len(names) > 1 else [output]
        with joined_processes() as context:
            with first_process_first(context):
                opened = evaluation.open_data(data, image_size=scene_size(data, side), **opening)
            if not annotations and not context.rank:
                typer.echo(opened.train.describe_labels(), err=True)
            found = []
            for encoder, folder in zip(encoders, folders):
                found.append(_measure(encoder, wanted, opened, folder, chosen))
                if tell_others(found[-1].stopped_by, context):  # Ctrl-C ends the command, not only this model
                    break
        if context.rank:
            return
        measured = [report for report in found if report.results]
        table = evaluation.compare(measured) if measured else "stopped before anything was measured"
        write_text(output / "table.md", table)
    _tell_omissions(found, told=() if annotations else opened.train.left_out)  # told with its labels
    typer.echo(table)
    _tell_skipped(found)
    typer.echo(f"wrote {output}")


def _tell_omissions(reports: list, *, told: Sequence[str]) -> None:
    """Notes on annotations, and images that were left out; tasks may have read the same with other annotations."""
    from modeling_vitreg.evaluation import notes_of

    for note in dict.fromkeys(note for report in reports for note in notes_of(report) if note not in told):
        typer.echo(note, err=True)
    data = reports[0].data
    parts = [(part, facts[part]) for facts in data.values() for part in ("train", "test") if part in facts]
    for part, facts in {(part, *facts.get("unreadable", ())): (part, facts) for part, facts in parts}.values():
        tell_unreadable(facts, part=part)


def _tell_skipped(reports: list) -> None:
    for report in reports:
        if report.stopped_by:
            typer.echo(f"{report.model}: {report.stopped_by}; the same command continues", err=True)
        for task, reason in report.skipped.items():
            typer.echo(f"{report.model}: {task} skipped: {reason}")


def _measure(encoder, tasks: list[str], data, folder: pathlib.Path, settings):
    """Evaluate one model; DINO-seg reads the published head of attention, where there are as many."""
    from modeling_vitreg import evaluation
    from modeling_vitreg.reports import command_line

    num_heads = encoder.num_heads or 1
    if settings.discovery.head >= num_heads:
        discovery = dataclasses.replace(settings.discovery, head=num_heads - 1)
        settings = dataclasses.replace(settings, discovery=discovery)
    return evaluation.evaluate(
        encoder,
        tasks=tasks,
        data=data,
        output_folder=folder,
        settings=settings,
        tokenizer=evaluation.load_tokenizer(encoder) if "zero_shot" in tasks else None,
        command=command_line(),
    )


def scene_size(data: str, side: int) -> int | tuple[int, int]:
    """Pixels of rendered scenes for a model that reads `side` pixels; of other images that side."""
    scene_settings, _ = options.scene_settings(data, side)
    return scene_settings.image_size if scene_settings else side


def read_splits(text: str) -> dict[str, str | None]:
    """Arguments of `open_data` for --split."""
    train, _, test = text.partition(",")
    return {"split": train or "train", "test_split": test or None}


def read_counts(text: str) -> dict[str, int]:
    """Numbers of images to train on and to measure on; one that is left out has its default."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() or not part for part in parts) or "0" in parts:
        raise ValueError(f"--num-images: expected TRAIN,TEST such as 2000,500, got {text!r}")
    train, test = [int(part) if part else usual for part, usual in zip([*parts, ""], _NUM_IMAGES)]
    return {"num_train": train, "num_test": test}


def read_tasks(text: str, known: dict[str, Any]) -> list[str]:
    """Names of --tasks.

    Raises:
        ValueError: no task, or an unknown one.
    """
    from modeling_vitreg.settings import suggest_name

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ValueError(f"--tasks: there is no task {name!r}; {suggest_name(name, known)}")
    if not names:
        raise ValueError(f"--tasks: expected one or more of {', '.join(known)}")
    return names


def read_evaluation(texts, columns, encoding: dict, seed: int, *, is_scenes: bool, **others: type) -> tuple:
    """Settings of the evaluation, of its data and of `others` by name, from --set, --columns and other options."""
    from modeling_vitreg.evaluation import EvaluationSettings
    from modeling_vitreg.images import DataOptions, parse_columns

    fields = {field.name: field for field in dataclasses.fields(EvaluationSettings) if field.name != "seed"}
    kinds = {name: field.default_factory for name, field in fields.items()}
    found = options.read_settings(texts, {"data": DataOptions, **kinds, **others})
    rest = {name: kind(**found.pop(name)) for name, kind in others.items()}
    usual_columns = {"label_column": "colours"} if is_scenes else {}
    data = DataOptions(**(usual_columns | found.pop("data") | parse_columns(columns or ())))
    usual = {"encoding": encoding, "discovery": {"batch_size": min(_DISCOVERY_BATCH, encoding["batch_size"])}}
    groups = {name: kinds[name](**(usual.get(name, {}) | values)) for name, values in found.items()}
    return EvaluationSettings(**groups, seed=seed), data, rest

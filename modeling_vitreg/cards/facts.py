"""All facts for a card, from files: the configuration, the reports beside it, the training run.

Reports are found in the folder of the model, in that of its training run, and in their folders `reports`, `analysis`,
`evaluation` and `training`; others may be named. On the Hub they lie in `reports/` and `training/`, where a downloaded
folder has them too, so that its card can be rendered again.

Read from `training.json`: `init`, the model that training started from, a name of the Hub or an absolute path; `data`
with `name`, `split` and, for a dataset of the Hub, `revision`; `recipe` with `objective` and `batch_size`; `steps`.
The rest is shown unchanged.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from modeling_vitreg.images import split_hub_name
from modeling_vitreg.reports import ArtifactReport, ConversionReport, RetrofitReport, read_report, rename_old_keys

from .errors import CardError
from .model_folder import ModelFolder, open_folder, read_json


_KINDS = {
    "conversion.json": "conversion",
    "artifacts.json": "artifacts",
    "evaluation*.json": "evaluation",
    "retrofit.json": "retrofit",
}
_FOLDERS = ("", "reports", "analysis", "evaluation")
_FIGURES = ("norms.png", "norm_maps.png")  # of the analysis
_RUN_FILES = ("training.json", "recipe.yaml", "curves.png", "norms.png", "attention.png", "maps.png")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_RESULT = ("task", "dataset", "metric", "value", "interval", "n", "seed", "dataset_hash")
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_register_tokens")


@dataclass(frozen=True)
class Parent:
    """The model that weights were made from.

    Args:
        name: on the Hub, or of a file.
        hub_name: the name on the Hub, or None.
        licence: on record, or None.
        relation: as the Hub calls it, or None for a conversion.
    """

    name: str
    hub_name: str | None
    licence: str | None
    relation: str | None


@dataclass(frozen=True)
class Facts:
    """Everything that is recorded about a model.

    Args:
        folder: the model.
        parent: the model that it was made from, or None.
        conversion, artifacts, retrofit: reports, or None.
        results: results of all evaluation reports, as `read_results` gives them.
        training: record of the training run, or None.
        files: reports and figures, by their path on the Hub.
    """

    folder: ModelFolder
    parent: Parent | None
    conversion: ConversionReport | None = None
    artifacts: ArtifactReport | None = None
    results: list[dict] = field(default_factory=list)
    training: dict | None = None
    files: dict[str, pathlib.Path] = field(default_factory=dict)
    retrofit: RetrofitReport | None = None

    @property
    def recipe(self) -> dict:
        """The recipe of the training run; empty without one."""
        recipe = (self.training or {}).get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def data(self) -> dict:
        """The data of the training run; empty without one."""
        data = (self.training or {}).get("data")
        return data if isinstance(data, dict) else {}


def collect_facts(folder: str | os.PathLike, *, reports: Sequence[str | os.PathLike] = ()) -> Facts:
    """Read everything that is recorded about a model.

    Args:
        folder: folder of a model, an adapter or a training run.
        reports: files of reports, or folders that hold them, from elsewhere.

    Raises:
        CardError: the folder is incomplete, a report cannot be read or was made from another model, or there are two
            reports of conversion or of artifacts.
    """
    model = open_folder(folder)
    found = _find_reports(model, [pathlib.Path(report) for report in reports])
    files: dict[str, pathlib.Path] = {}
    conversion = _only(found, "conversion", ConversionReport)
    artifacts = _only(found, "artifacts", ArtifactReport)
    retrofit = _only(found, "retrofit", RetrofitReport)
    if artifacts is not None:
        _check_same_model(artifacts.architecture, model, found["artifacts"][0], name=artifacts.model)
        files |= _with_figures(found["artifacts"][0])
    results = []
    for number, path in enumerate(found["evaluation"]):
        results += read_results(path, model=model)
        files[f"reports/evaluation{number or ''}.json"] = path
    weights = {result["weights_hash"] for result in results} - {None}
    if len(weights) > 1:
        raise CardError(
            f"the evaluation reports are of {len(weights)} different models ({', '.join(sorted(map(str, weights)))}): "
            "keep only the reports of this model"
        )
    for kind, report in (("conversion", conversion), ("retrofit", retrofit)):
        if report is not None and f"{kind}.json" not in model.files:
            files[f"{kind}.json"] = found[kind][0]
    training, run_files = _read_training(model)
    parent = _find_parent(model, conversion, training)
    if retrofit is not None:
        parent = _find_original(retrofit, parent)
    return Facts(model, parent, conversion, artifacts, results, training, files | run_files, retrofit)


def find_on_hub(name: str, revision: str | None) -> tuple[str, str | None] | None:
    """Name and configuration of a dataset of the Hub; None for any other.

    A dataset of the Hub has a revision; a folder may have a name like one. The name may be in the form
    "owner/name:configuration@revision".
    """
    found = split_hub_name(name) if revision else None
    return found[:2] if found else None


def read_results(path: pathlib.Path, *, model: ModelFolder) -> list[dict]:
    """Results of an `EvaluationReport`, each with everything that its number depends on.

    Args:
        path: path of the report.
        model: model that the report must belong to.

    Returns:
        One dictionary a number: `task`, `dataset`, `metric`, `value`, `interval`, `interval_method`, `n`, `seed`,
        `settings`, `dataset_hash`, `weights_hash`; and of the report `command`, `commit` of the code and
        `revision` of a dataset of the Hub.

    Raises:
        CardError: the file is no evaluation report, was made from another model, or a result lacks a field or has a
            value that is no finite number.
    """
    report = rename_old_keys(read_json(path))
    if report.get("kind") != "evaluation" or not isinstance(report.get("results"), list):
        raise CardError(f"{path}: expected an evaluation report, got kind {report.get('kind')!r}")
    _check_same_model(report.get("architecture") or {}, model, path, name=report.get("model"))
    results = []
    for result in report["results"]:
        missing = [name for name in _RESULT if name not in result]
        if missing:
            raise CardError(f"{path}: the result of {result.get('task')} lacks {', '.join(missing)}: measure it again")
        for value in (result["value"], *(result["interval"] or ())):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CardError(f"{path}: the result of {result['task']} is {value!r}, not a finite number")
        data = (report.get("data") or {}).get(result["dataset_hash"]) or {}
        circumstances = {
            "command": report.get("command") or "not recorded",
            "commit": (report.get("made_with") or {}).get("commit"),
            "revision": data.get("revision"),
        }
        results.append({"interval_method": None, "settings": {}, "weights_hash": None, **result, **circumstances})
    return results


def _check_same_model(sizes: dict, model: ModelFolder, path: pathlib.Path, *, name: str | None) -> None:
    """Refuse a report with the sizes of another model; an adapter has no sizes of its own."""
    architecture = {} if model.is_adapter else model.architecture
    for name_of_size in _SIZES:
        measured = sizes.get(name_of_size)
        actual = architecture.get(name_of_size, measured)
        if measured not in (None, actual):
            raise CardError(
                f"{path}: is a report of another model, {name}: its {name_of_size} is {measured}, that of "
                f"{model.path} is {actual}"
            )


def _find_reports(model: ModelFolder, named: list[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """Files of each kind: of the model, of its run, and those that were named."""
    places = [place / name for place in (model.path, model.run) if place for name in _FOLDERS]
    found: dict[str, list[pathlib.Path]] = {kind: [] for kind in _KINDS.values()}
    for path in named:
        if path.is_dir():
            places.append(path)
            if not any(list(path.glob(pattern)) for pattern in _KINDS):
                raise CardError(f"{path}: expected a folder with {', '.join(_KINDS)}, found none of them")
        elif not path.exists():
            raise CardError(
                f"--reports {path}: no such file or folder: give the output folder of vitreg evaluate, analyze or "
                "retrofit"
            )
        else:
            kind = read_json(path).get("kind")
            if kind not in found:
                raise CardError(f"{path}: expected a report of {', '.join(found)}, got kind {kind!r}")
            found[kind].append(path)
    for place in places:
        for pattern, kind in _KINDS.items():
            found[kind] += sorted(place.glob(pattern))
    return {kind: list({path.resolve(): path for path in paths}.values()) for kind, paths in found.items()}


def _only(found: dict[str, list[pathlib.Path]], kind: str, report: type):
    paths = found[kind]
    if len(paths) > 1:
        raise CardError(f"expected one report of {kind}, got {', '.join(map(str, paths))}: remove or name only one")
    try:
        return read_report(paths[0], kind=report) if paths else None
    except ValueError as error:
        raise CardError(str(error)) from None


def _with_figures(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """An artifact report and its figures; figures beside a training run belong to that run."""
    is_beside_run = (path.parent / "training.json").is_file()
    figures = [] if is_beside_run else [path.with_name(name) for name in _FIGURES]
    return {"reports/artifacts.json": path, **{f"reports/{file.name}": file for file in figures if file.is_file()}}


def _read_training(model: ModelFolder) -> tuple[dict | None, dict[str, pathlib.Path]]:
    place = model.run or model.path / "training"
    if not (place / "training.json").is_file():
        return None, {}
    files = {f"training/{name}": place / name for name in _RUN_FILES if (place / name).is_file()}
    return read_json(place / "training.json"), files


def _find_parent(model: ModelFolder, conversion: ConversionReport | None, training: dict | None) -> Parent | None:
    if model.is_adapter:
        name = model.settings.get("base_model_name_or_path")
        if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or pathlib.Path(name).exists():
            raise CardError(
                f"{model.path / 'adapter_config.json'}: the model of the adapter is {name!r}, which is not on the "
                "Hub: publish it first, and write its name on the Hub into base_model_name_or_path"
            )
        return Parent(name, name, None, "adapter")
    if conversion is not None:
        source = str(conversion.source["path"])
        hub_name = f"timm/{source.removeprefix('timm:')}" if source.startswith("timm:") else None
        if source.startswith("hf-hub:"):
            hub_name = source.removeprefix("hf-hub:")
        return Parent(hub_name or pathlib.Path(source).name, hub_name, conversion.source.get("licence"), None)
    init = (training or {}).get("init")
    if not init or pathlib.Path(init).resolve() in (model.path.resolve(), model.path.resolve().parent):
        return None  # from scratch, or a run that continues from itself
    is_hub_name = bool(_HUB_NAME.fullmatch(init)) and not pathlib.Path(init).exists()
    converted = model.run / "init" if model.run else None  # of another library's model, see examples/arguments.py
    if converted is not None and (converted / "conversion.json").is_file():
        parent = dataclasses.replace(collect_facts(converted).parent, relation="finetune")
        return dataclasses.replace(parent, name=init, hub_name=init) if is_hub_name else parent
    name = init if is_hub_name else pathlib.Path(init).name
    return Parent(name, init if is_hub_name else None, _licence_of(pathlib.Path(init)), "finetune")


def _find_original(retrofit: RetrofitReport, parent: Parent | None) -> Parent:
    """The model that was repaired. A conversion on the way knows its name on the Hub and its licence."""
    if parent is not None:
        return replace(parent, relation="finetune")
    start = pathlib.Path(retrofit.model)
    return Parent(start.name, None, _licence_of(start), "finetune")


def _licence_of(start: pathlib.Path) -> str | None:
    """The recorded licence of a model on this disk that training started from, or of the model before that."""
    try:
        parent = collect_facts(start).parent
    except (CardError, RecursionError):  # not on this disk any more, of another kind, or runs in a circle
        return None
    return parent.licence if parent else None

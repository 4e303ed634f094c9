"""Everything that a card may say, from files: the configuration, the reports that lie beside it, the training run.

Reports are looked for in the folder of the model, in that of its training run, and in their folders `reports`,
`analysis`, `evaluation` and `training`; others may be named. On the Hub they lie in `reports/` and `training/`, where
a downloaded folder has them too, so that its card can be rendered again.

Of `training.json` these are read, and the rest is shown as it is: `init`, the model that training started from, a name
of the Hub or an absolute path; `data`, with `name`, `split` and, of a dataset of the Hub, `revision`; `recipe`, with
`objective` and `batch_size`; and `steps`.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from modeling_vitreg.reports import ArtifactReport, ConversionReport, read_report

from .errors import CardError
from .model_folder import ModelFolder, open_folder, read_json
from .results import check_same_model, check_same_weights, read_results


_KINDS = {"conversion.json": "conversion", "artifacts.json": "artifacts", "evaluation*.json": "evaluation"}
_FOLDERS = ("", "reports", "analysis", "evaluation")
_FIGURES = ("norms.png", "norm_maps.png")  # of the analysis
_RUN_FILES = ("training.json", "recipe.yaml", "curves.png", "norms.png", "attention.png", "maps.png")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Parent:
    """What weights were made from.

    Args:
        name: in words: a name of the Hub, or of a file.
        hub_name: the name of the Hub, or None.
        licence: on record, or None.
        relation: as the Hub calls it, or None for a conversion.
    """

    name: str
    hub_name: str | None
    licence: str | None
    relation: str | None


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Args:
        folder: the model.
        parent: what it was made from, or None.
        conversion, artifacts: reports, or None.
        results: of all evaluation reports, as `read_results` gives them.
        training: what the training run recorded, or None.
        files: reports and figures, by their path on the Hub.
    """

    folder: ModelFolder
    parent: Parent | None
    conversion: ConversionReport | None = None
    artifacts: ArtifactReport | None = None
    results: list[dict] = field(default_factory=list)
    training: dict | None = None
    files: dict[str, pathlib.Path] = field(default_factory=dict)


def collect_facts(folder: str | os.PathLike, *, reports: Sequence[str | os.PathLike] = ()) -> Facts:
    """Read everything that is known of a model.

    Args:
        folder: of a model, an adapter or a training run.
        reports: files of reports, or folders that hold them, from elsewhere.

    Raises:
        CardError: the folder is not whole, a report cannot be read, there are two of which there can be one, or one
            was made of another model.
    """
    model = open_folder(folder)
    found = _find_reports(model, [pathlib.Path(report) for report in reports])
    files: dict[str, pathlib.Path] = {}
    conversion = _only(found, "conversion", ConversionReport)
    artifacts = _only(found, "artifacts", ArtifactReport)
    if artifacts is not None:
        check_same_model(artifacts.architecture, model, found["artifacts"][0], name=artifacts.model)
        files |= _with_figures(found["artifacts"][0])
    results = []
    for number, path in enumerate(found["evaluation"]):
        results += read_results(path, model=model)
        files[f"reports/evaluation{number or ''}.json"] = path
    check_same_weights(results)
    if conversion is not None and "conversion.json" not in model.files:
        files["conversion.json"] = found["conversion"][0]
    training, run_files = _read_training(model)
    parent = _find_parent(model, conversion, training)
    return Facts(model, parent, conversion, artifacts, results, training, files | run_files)


def _find_reports(model: ModelFolder, named: list[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
    """Files of each kind: of the model, of its run, and those that were named."""
    places = [place / name for place in (model.path, model.run) if place for name in _FOLDERS]
    found: dict[str, list[pathlib.Path]] = {kind: [] for kind in _KINDS.values()}
    for path in named:
        if path.is_dir():
            places.append(path)
            if not any(list(path.glob(pattern)) for pattern in _KINDS):
                raise CardError(f"{path}: expected a folder with {', '.join(_KINDS)}, found none of them")
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
    """An artifact report and its figures; beside a training run lie figures of that run under the same names."""
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
        if not name or not _HUB_NAME.fullmatch(name) or pathlib.Path(name).exists():
            raise CardError(
                f"{model.path / 'adapter_config.json'}: the model that the adapter belongs to is {name!r}, which "
                "nobody else has: publish it first, and write its name on the Hub into base_model_name_or_path"
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
        return None  # from scratch, or going on with itself
    is_hub_name = bool(_HUB_NAME.fullmatch(init)) and not pathlib.Path(init).exists()
    name = init if is_hub_name else pathlib.Path(init).name
    return Parent(name, init if is_hub_name else None, _licence_of(pathlib.Path(init)), "finetune")


def _licence_of(start: pathlib.Path) -> str | None:
    """The licence on record for a model on this disk that training started from, or that this one started from."""
    try:
        parent = collect_facts(start).parent
    except CardError:  # not on this disk any more, or a model of another kind
        return None
    return parent.licence if parent else None


__all__ = ["Facts", "Parent", "collect_facts"]

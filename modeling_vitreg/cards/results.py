"""Numbers of evaluation reports: read, checked, and each together with how it came about."""

from __future__ import annotations

import math
import pathlib

from modeling_vitreg.images import split_hub_name
from modeling_vitreg.reports import rename_old_keys

from .errors import CardError
from .model_folder import ModelFolder, read_json


_RESULT = ("task", "dataset", "metric", "value", "interval", "n", "seed", "dataset_hash")


def find_on_hub(name: str, revision: str | None) -> tuple[str, str | None] | None:
    """Name and configuration of a data set of the Hub; None for any other.

    One of the Hub has a revision there; a folder may have a name like one. The name may be that which was typed,
    "owner/name:configuration@revision".
    """
    found = split_hub_name(name) if revision else None
    return found[:2] if found else None


def read_results(path: pathlib.Path, *, model: ModelFolder) -> list[dict]:
    """Results of an `EvaluationReport`, each with all that makes its number mean something.

    Args:
        path: of the report.
        model: that it must have been made of.

    Returns:
        One dictionary a number: `task`, `dataset`, `metric`, `value`, `interval`, `interval_method`, `n`, `seed`,
        `settings`, `dataset_hash`, `weights_hash`; and of the report `command`, `commit` of the code and
        `revision` of a data set of the Hub.

    Raises:
        CardError: the file is no evaluation report, was made of another model, or a result lacks a field or has a
            value that is no finite number.
    """
    report = rename_old_keys(read_json(path))
    if report.get("kind") != "evaluation" or not isinstance(report.get("results"), list):
        raise CardError(f"{path}: expected an evaluation report, got kind {report.get('kind')!r}")
    check_same_model(report.get("architecture") or {}, model, path, name=report.get("model"))
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


def check_same_model(sizes: dict, model: ModelFolder, path: pathlib.Path, *, name: str | None) -> None:
    """Keep numbers of another model out.

    Args:
        sizes: of the model that was measured, as reports hold them.
        model: that the card is for.
        path: of the report.
        name: of the model that was measured.

    Raises:
        CardError: a size differs.
    """
    if model.is_adapter:  # it has no sizes of its own
        return
    architecture = model.architecture
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_register_tokens"):
        measured, actual = sizes.get(field), architecture[field]
        if measured not in (None, actual):
            raise CardError(
                f"{path}: was measured on another model, {name}: its {field} is {measured}, that of {model.path} is "
                f"{actual}"
            )


def check_same_weights(results: list[dict]) -> None:
    """Keep two states of one training apart.

    Raises:
        CardError: results of `read_results` are of different weights.
    """
    found = {result["weights_hash"] for result in results} - {None}
    if len(found) > 1:
        raise CardError(
            f"the evaluation reports are of {len(found)} different models ({', '.join(sorted(found))}): keep those of "
            "this one"
        )


__all__ = ["check_same_model", "check_same_weights", "find_on_hub", "read_results"]

"""From an encoder and data to an `EvaluationReport` of several tasks. An evaluation that was stopped can be resumed.

    OUTPUT/evaluation.json   the `EvaluationReport`, written after each task
    OUTPUT/features/         see `encoding` and `objects`; it may be deleted, or shared by several models and outputs
    OUTPUT/errors.log        tracebacks of tasks that failed, if any

A task whose results are in the report for the same model, data, settings and seed is not measured again. Ctrl-C keeps
the results, and images that were encoded are not encoded again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from modeling_vitreg.features import Encoder
from modeling_vitreg.features.model_hash import describe_model, hash_weights
from modeling_vitreg.files import check_writable
from modeling_vitreg.images import LabelledData
from modeling_vitreg.omissions import Failures
from modeling_vitreg.reports import EvaluationReport, read_report, short_hash, write_report

from .encoding import encode
from .objects import OBJECTS, find_objects
from .settings import EvaluationSettings
from .shards import Features
from .tasks import TASKS, Prompts, TaskInputs


REPORT_NAME = "evaluation.json"


def evaluate(
    encoder: Encoder,
    *,
    tasks: Sequence[str],
    data: LabelledData,
    output_folder: str | os.PathLike,
    settings: EvaluationSettings | None = None,
    tokenizer: Callable | None = None,
    class_embeddings: Tensor | None = None,
    feature_folder: str | os.PathLike | None = None,
    command: str = "",
    is_strict: bool = False,
) -> EvaluationReport:
    """Measure tasks, and write the report after each of them.

    A task that cannot be measured is skipped with its reason, and the others are measured. Results in the folder for
    other data, settings or seeds are kept.

    Args:
        encoder: from `modeling_vitreg.features.load_encoder`; heads are trained on its device.
        tasks: keys of `tasks.TASKS`.
        data: from `sources.open_data`.
        output_folder: folder to write, see above; it is created.
        settings: settings of the encoding and of each task.
        tokenizer: tokenizer of a dual encoder, for zero-shot classification.
        class_embeddings: (classes, E), instead of a tokenizer.
        feature_folder: folder of encoded images; None: in the output folder.
        command: command that makes the report, for the report.
        is_strict: raise the unexpected error of a task instead of skipping the task.

    Returns:
        The report that was written.

    Raises:
        ValueError: an unknown task, a folder with the report of another model, or no task could be measured.
        OSError: the folder cannot be written, which is checked before images are read.
    """
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(f"expected tasks out of {', '.join(TASKS)}, got {', '.join(tasks) or 'none'}")
    folder, prompts = check_writable(output_folder), Prompts(tokenizer, class_embeddings)
    run = _Run(encoder, data, settings or EvaluationSettings(), folder, feature_folder, command)
    run.failures.is_strict = is_strict
    waiting = run.choose(dict.fromkeys(tasks), prompts)
    try:
        features = run.encode(waiting)
        for name in waiting:
            run.measure(name, features, prompts)
    except KeyboardInterrupt:
        return run.write(stopped_by="stopped by hand")
    if not run.results:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in run.skipped.items())
        raise ValueError(f"{data.name}: no task could be measured:{reasons}")
    return run.write()


def notes_of(report: EvaluationReport) -> list[str]:
    """Sentences about the annotations that were read, in the order of the report."""
    parts = [part for data in report.data.values() for part in (data, data.get("train", {}), data.get("test", {}))]
    return list(dict.fromkeys(note for part in parts for note in part.get("notes", [])))


class _Run:
    """State of a running evaluation."""

    def __init__(
        self,
        encoder: Encoder,
        data: LabelledData,
        settings: EvaluationSettings,
        folder: pathlib.Path,
        feature_folder: str | os.PathLike | None,
        command: str,
    ):
        self.encoder, self.data, self.settings, self.folder = encoder, data, settings, folder
        self.feature_folder = pathlib.Path(feature_folder or folder / "features")
        self.command, self.made_with = command, encoder.made_with()
        self.weights_hash = hash_weights(encoder)
        self.parts = {"train": data.train.dataset_hash, "test": data.test.dataset_hash}
        self.dataset_hash = short_hash([self.parts, data.mask_names, data.ignore_index, data.max_depth])
        self.results, self.facts = self._read()
        self.skipped, self.failures = {}, Failures()

    def choose(self, names: Sequence[str], prompts: Prompts) -> list[str]:
        """Tasks to measure: those that are not done and apply to the model and the data."""
        waiting = []
        for name in names:
            if any(self._is_of(result, name, prompts) for result in self.results):
                continue
            if reason := self._unavailable_reason(name, prompts):
                self.skipped[name] = reason
            else:
                waiting.append(name)
        return waiting

    def encode(self, names: Sequence[str]) -> dict[str, dict[str, Features]]:
        """Features of both parts for all tasks, in one pass over each; discovery makes its own pass."""
        tasks = [TASKS[name] for name in names if TASKS[name].kind != OBJECTS]
        kinds = {"train": [task.kind for task in tasks if task.reads_train], "test": [task.kind for task in tasks]}
        features = {}
        for part, wanted in kinds.items():
            if not wanted:
                continue
            features[part] = encode(
                self.encoder,
                getattr(self.data, part),
                kinds=list(dict.fromkeys(wanted)),
                folder=self.feature_folder,
                weights_hash=self.weights_hash,
                settings=self.settings.encoding,
                title=f"images to {part}",
            )
        if features:
            self._note(self.dataset_hash, self.parts, features)
        return features

    def measure(self, name: str, features: dict[str, dict[str, Features]], prompts: Prompts) -> None:
        """Measure a task and write the report; a task that fails is skipped with its reason."""
        start = time.perf_counter()
        try:
            measured, facts = TASKS[name].measure(self._prepare(name, features, prompts))
        except Exception as error:  # the other tasks can still be measured
            self.skipped[name] = self.failures.note(name, error)
            self.failures.write(self.folder)
            return
        seconds = round(time.perf_counter() - start, 2)
        shared = {
            **self._identify(name, prompts),
            "dataset": self.data.name,
            "split": "test",
            "revision": self.data.revision,
            "facts": facts,
            "seconds": seconds,
            "command": self.command,
            "commit": self.made_with["commit"],
        }
        for number in measured:
            self.results.append({**shared, **dataclasses.asdict(number), "interval": list(number.interval)})
        self.write()

    def write(self, stopped_by: str | None = None) -> EvaluationReport:
        """Write the report."""
        report = EvaluationReport(
            model=self.encoder.name,
            architecture={**describe_model(self.encoder), "weights_hash": self.weights_hash},
            data=self.facts,
            results=self.results,
            skipped=self.skipped,
            stopped_by=stopped_by,
            command=self.command,
            made_with=self.made_with,
        )
        write_report(report, self.folder / REPORT_NAME)
        return report

    def _prepare(self, name: str, features: dict[str, dict[str, Features]], prompts: Prompts) -> TaskInputs:
        """Inputs of a task.

        Raises:
            ValueError: no image could be read, or none has finite features.
        """
        kind = TASKS[name].kind
        found = (
            {"test": self._find_objects()}
            if kind == OBJECTS
            else {part: features[part].get(kind) for part in features}
        )
        parts = {part: found.get(part) for part in ("train", "test")}
        if empty := [part for part in parts.values() if part is not None and not len(part)]:
            reasons = "".join(f"\n  {line}" for line in empty[0].unreadable[:3])
            raise ValueError(f"no image could be read, or none has finite features{reasons}")
        return TaskInputs(
            encoder=self.encoder,
            data=self.data,
            **parts,
            settings=getattr(self.settings, name),
            seed=self.settings.seed,
            has_progress_bar=self.settings.encoding.has_progress_bar,
            prompts=prompts,
        )

    def _find_objects(self) -> Features:
        encoding = self.settings.encoding
        found = find_objects(
            self.encoder,
            self.data.test,
            folder=self.feature_folder,
            weights_hash=self.weights_hash,
            settings=self.settings.discovery,
            shard_size=encoding.shard_size,
            has_progress_bar=encoding.has_progress_bar,
        )
        fingerprint = self.data.test.box_fingerprint
        self._note(fingerprint, {"test": fingerprint}, {"test": {OBJECTS: found}})
        return found

    def _note(self, fingerprint: str, parts: dict[str, str], features: dict[str, dict[str, Features]]) -> None:
        """Record which data were read, and how many images."""
        counts = {part: next(iter(found.values())).counts() for part, found in features.items()}
        facts = {"name": self.data.name, "hashes": parts, "revision": self.data.revision}
        facts["notes"] = list(self.data.notes)
        self.facts[fingerprint] = {**self.facts.get(fingerprint, {}), **facts, **counts}

    def _unavailable_reason(self, name: str, prompts: Prompts) -> str | None:
        """Why a task does not apply, None if it does."""
        if TASKS[name].reads_train and not len(self.data.train):
            return "there are no images to train on: a file of boxes (--annotations) is for discovery alone"
        return TASKS[name].unavailable_reason(self.encoder, self.data, prompts)

    def _read(self) -> tuple[list, dict]:
        path = self.folder / REPORT_NAME
        if not path.exists():
            return [], {}
        report = read_report(path, kind=EvaluationReport)
        if report.architecture["weights_hash"] != self.weights_hash:
            raise ValueError(
                f"{path}: expected an evaluation of this model, got an evaluation of {report.model} or of other "
                "weights: choose another output folder, or remove this one"
            )
        return report.results, report.data

    def _identify(self, name: str, prompts: Prompts) -> dict:
        """The facts that identify a result; a task with the same facts is not measured again."""
        encoding, is_discovery = self.settings.encoding, TASKS[name].kind == OBJECTS
        sides = self.encoder.image_size if encoding.image_size is None else (encoding.image_size, encoding.image_size)
        settings = {"image_size": sides, **dataclasses.asdict(getattr(self.settings, name))}
        if is_discovery:
            settings = self.settings.discovery.asked_for()  # images are read at full resolution
        if TASKS[name].kind.endswith("patches"):
            settings["patch_precision"] = encoding.patch_precision
        if name == "zero_shot" and prompts.class_embeddings is not None:
            settings = {"image_size": sides, "class_embeddings": short_hash(prompts.class_embeddings.tolist())}
        return {
            "task": name,
            "settings": json.loads(json.dumps(settings)),  # tuples become lists, as in a report read from a file
            "seed": self.settings.seed,
            # Other tasks do not depend on the boxes, and discovery does not depend on the training images.
            "dataset_hash": self.data.test.box_fingerprint if is_discovery else self.dataset_hash,
            "weights_hash": self.weights_hash,
        }

    def _is_of(self, result: dict, name: str, prompts: Prompts) -> bool:
        return all(result[key] == value for key, value in self._identify(name, prompts).items())


__all__ = ["REPORT_NAME", "evaluate", "notes_of"]

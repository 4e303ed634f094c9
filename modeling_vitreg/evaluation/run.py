"""From an encoder and data to an `EvaluationReport` of several tasks. An evaluation that was stopped can be resumed.

    OUTPUT/evaluation.json   the `EvaluationReport`, written after each task
    OUTPUT/features/         features and objects of images; it may be deleted, or shared by several models and outputs
    OUTPUT/errors.log        tracebacks of tasks that failed, if any

Images are read once for all tasks, by all processes; the first process then measures the tasks. A task whose results
are in the report for the same model, data, settings and seed is not measured again. Ctrl-C keeps the results, and
images that were encoded are not encoded again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from modeling_vitreg.discovery.finder import ObjectFinder
from modeling_vitreg.distributed import distributed_context
from modeling_vitreg.encoding import Consumer, run_pass
from modeling_vitreg.encoding.precision import choose_precision
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.model_hash import describe_model, hash_weights
from modeling_vitreg.files import check_writable
from modeling_vitreg.images import LabelledData
from modeling_vitreg.omissions import Failures
from modeling_vitreg.reports import EvaluationReport, read_report, short_hash, write_report

from .cache import FeatureCache, Features
from .settings import EvaluationSettings
from .tasks import OBJECTS, TASKS, Prompts, TaskInputs


REPORT_NAME = "evaluation.json"
_FORMAT = 2  # of the files of features; those of earlier versions are not read


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
        command: command that makes the report.
        is_strict: raise the unexpected error of a task instead of skipping the task.

    Returns:
        The report, which the first process has written; of another process one without results.

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
    stopped_by = run.encode(waiting)
    if run.context.rank > 0:
        return run.report(stopped_by)
    try:
        for name in () if stopped_by else waiting:
            run.measure(name, prompts)
    except KeyboardInterrupt:
        stopped_by = "stopped by hand"
    if not run.results and not stopped_by:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in run.skipped.items())
        raise ValueError(f"{data.name}: no task could be measured:{reasons}")
    return run.write(stopped_by)


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
        self.context, self.failures = distributed_context(), Failures()
        self.precision = choose_precision(encoder, self.settings.encoding.precision)
        self.command, self.made_with = command, {**encoder.made_with(), "precision": self.precision}
        self.weights_hash = hash_weights(encoder)
        self.parts = {"train": data.train.dataset_hash, "test": data.test.dataset_hash}
        self.dataset_hash = short_hash([self.parts, data.mask_names, data.ignore_index, data.max_depth])
        self.results, self.facts = self._read()
        self.skipped: dict[str, str] = {}
        self._found: dict[str, dict[str, Features | ObjectFinder]] = {"train": {}, "test": {}}

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

    def encode(self, names: Sequence[str]) -> str | None:
        """Encode the images of both parts for all tasks, in one pass over each.

        Returns:
            Why a pass ended early; None if none did.
        """
        for part in ("train", "test"):
            kinds = dict.fromkeys(TASKS[name].kind for name in names if part == "test" or TASKS[name].reads_train)
            if not (consumers := self._make_consumers(part, list(kinds))):
                continue
            settings = self.settings.encoding.for_pass(title=f"images to {part}")
            options = {"context": self.context, "failures": self.failures}
            counts = run_pass(self.encoder, getattr(self.data, part), consumers, settings, **options)
            if counts.stopped_by:
                return counts.stopped_by
            for consumer in consumers if self.context.rank == 0 else ():
                self._collect(part, consumer, names)
        return None

    def measure(self, name: str, prompts: Prompts) -> None:
        """Measure a task and write the report; a task that fails is skipped with its reason."""
        if name in self.skipped:
            return
        start = time.perf_counter()
        try:
            measured, facts = TASKS[name].measure(self._prepare(name, prompts))
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

    def report(self, stopped_by: str | None = None) -> EvaluationReport:
        """The report."""
        return EvaluationReport(
            model=self.encoder.name,
            architecture={**describe_model(self.encoder), "weights_hash": self.weights_hash},
            data=self.facts,
            results=self.results,
            skipped=self.skipped,
            stopped_by=stopped_by,
            command=self.command,
            made_with=self.made_with,
        )

    def write(self, stopped_by: str | None = None) -> EvaluationReport:
        """Write the report."""
        report = self.report(stopped_by)
        write_report(report, self.folder / REPORT_NAME)
        return report

    def _make_consumers(self, part: str, kinds: Sequence[str]) -> list[Consumer]:
        """Consumers that store kinds of features, and objects."""
        encoder, images, settings, consumers = self.encoder, getattr(self.data, part), self.settings, []
        if features := [kind for kind in kinds if kind != OBJECTS]:
            facts = [images.dataset_hash, list(self._sides), settings.encoding.shard_size]
            folder = self._folder_of([*facts, settings.encoding.patch_precision])
            consumers.append(
                FeatureCache(encoder, folder, kinds=features, settings=settings.encoding, num_images=len(images))
            )
        if OBJECTS in kinds:
            facts = [images.box_fingerprint, settings.discovery.asked_for(), settings.encoding.shard_size]
            try:
                consumers.append(ObjectFinder(encoder, [settings.discovery], folder=self._folder_of(facts)))
            except ValueError as error:
                self.skipped["discovery"] = self.failures.note("discovery", error)
        return consumers

    def _folder_of(self, facts: list) -> pathlib.Path:
        reduced = [self.precision] if self._is_reduced else []
        return self.feature_folder / short_hash([_FORMAT, self.weights_hash, *facts, *reduced])

    def _collect(self, part: str, consumer: Consumer, names: Sequence[str]) -> None:
        """Take what a consumer stored, and record how many images it saw; or why there is nothing."""
        is_finder = isinstance(consumer, ObjectFinder)
        if consumer.skipped:
            users = [name for name in names if (TASKS[name].kind == OBJECTS) == is_finder]
            self.skipped |= dict.fromkeys(users, consumer.skipped)
            return
        found = {OBJECTS: consumer} if is_finder else consumer.compute()
        self._found[part] |= found
        # Discovery does not depend on labels and maps, and the other tasks not on boxes.
        key, hashes = self.dataset_hash, self.parts
        if is_finder:
            key = self.data.test.box_fingerprint
            hashes = {"test": key}
        facts = {"name": self.data.name, "hashes": hashes, "revision": self.data.revision}
        facts["notes"] = list(self.data.notes)
        counts = next(iter(found.values())).counts.describe()
        self.facts[key] = {**self.facts.get(key, {}), **facts, part: counts}

    def _prepare(self, name: str, prompts: Prompts) -> TaskInputs:
        """Inputs of a task.

        Raises:
            ValueError: no image could be read, or none has finite features.
        """
        parts = {part: found.get(TASKS[name].kind) for part, found in self._found.items()}
        if empty := [part for part in parts.values() if part is not None and not part.counts.num_images]:
            reasons = "".join(f"\n  {line}" for line in list(empty[0].counts.unreadable.values())[:3])
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
        encoding, is_discovery, sides = self.settings.encoding, TASKS[name].kind == OBJECTS, self._sides
        settings = {"image_size": sides, **dataclasses.asdict(getattr(self.settings, name))}
        if is_discovery:
            settings = self.settings.discovery.asked_for()  # images are read at full resolution
        if TASKS[name].kind.endswith("patches"):
            settings["patch_precision"] = encoding.patch_precision
        if name == "zero_shot" and prompts.class_embeddings is not None:
            settings = {"image_size": sides, "class_embeddings": short_hash(prompts.class_embeddings.tolist())}
        if self._is_reduced:
            settings["precision"] = self.precision
        return {
            "task": name,
            "settings": json.loads(json.dumps(settings)),  # tuples become lists, as in a report read from a file
            "seed": self.settings.seed,
            # Other tasks do not depend on the boxes, and discovery does not depend on the training images.
            "dataset_hash": self.data.test.box_fingerprint if is_discovery else self.dataset_hash,
            "weights_hash": self.weights_hash,
        }

    @property
    def _sides(self) -> tuple[int, int]:
        size = self.settings.encoding.image_size
        return self.encoder.image_size if size is None else (size, size)

    @property
    def _is_reduced(self) -> bool:
        return self.precision not in str(self.encoder.dtype)

    def _is_of(self, result: dict, name: str, prompts: Prompts) -> bool:
        return all(result[key] == value for key, value in self._identify(name, prompts).items())

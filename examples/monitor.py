"""The log of a training run, its evaluation on images that are not trained on, its pictures and its warnings."""

import json
import platform
import time

import psutil
import torch
from arguments import MAPS, Run, name_data, versions
from eval_images import EvalImages, ProbeScenes, encode
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_vitreg.analysis import summarise_norms, token_norms
from modeling_vitreg.evaluation import knn_accuracy
from modeling_vitreg.files import write_text
from modeling_vitreg.images.annotations import NoteCounter
from modeling_vitreg.metrics import METRICS, MetricDescription
from modeling_vitreg.modes import eval_mode
from modeling_vitreg.pretraining.monitoring.curves import draw_curves, draw_norms
from modeling_vitreg.pretraining.monitoring.diagnosis import diagnose
from modeling_vitreg.pretraining.monitoring.instruments import collapse_line, effective_rank, register_similarity
from modeling_vitreg.pretraining.monitoring.jsonl import JsonlLogger, read_jsonl
from modeling_vitreg.pretraining.monitoring.non_finite import NonFiniteDetector
from modeling_vitreg.pretraining.monitoring.patches import BestPatches
from modeling_vitreg.pretraining.monitoring.pictures import draw_attention, draw_maps
from modeling_vitreg.pretraining.objectives.objective import TARGETS, Objective
from modeling_vitreg.pretraining.run.sharding import gather_model


PATCH_METRICS = ("segmentation", "patch_consistency", "patch_best_step")


class Monitor:
    """Writes the log, evaluates the model, draws pictures and warns of problems."""

    def __init__(self, run: Run, objective: Objective, source, metadata: dict):
        self.run, self.objective = run, objective
        last_step = metadata["step"]
        self.lacks_evaluation = self._lacks_evaluation(last_step)

        def keeps(record: dict) -> bool:
            is_evaluation = "total" not in record
            return last_step >= 0 and record["step"] <= last_step - (is_evaluation and self.lacks_evaluation)

        self.logger = JsonlLogger(run.folder / "log.jsonl", keeps=keeps, is_writer=run.is_main)
        self.norms = JsonlLogger(run.folder / "norms.jsonl", keeps=keeps, is_writer=run.is_main)
        self.eval_images = EvalImages(run, source, objective.encoder.config.num_channels)
        self._metrics = ("knn", *objective.metrics)
        self._probe = None
        if objective.annotation is None and run.is_main:  # what has labels or maps measures what they ask for
            config = objective.encoder.config
            self._probe = ProbeScenes(run, config.num_channels, config.patch_shape)
            path = run.folder / "similarities.safetensors"
            self._best = BestPatches(path, counts_start=metadata["init"] is not None)
        self._first_step, self._non_finite, self._named = last_step + 1, NonFiniteDetector(), set()
        self._headline, self._value, self._init = None, None, metadata["init"]
        self._unreadable = next((r["unreadable"] for r in reversed(self.logger.records) if "unreadable" in r), 0)
        self._notes, self._num_read = NoteCounter(), 0
        self._data = {"name": name_data(run.options, run.recipe), "revision": source.revision}
        self._source_notes = (*source.left_out, *source.notes)
        self._begin = time.monotonic() - metadata["seconds"]
        self._last_time, self._last_step = time.monotonic(), last_step
        if run.options.tracker:
            run.accelerator.init_trackers("vitreg-pretraining", config={"recipe": json.dumps(run.recipe.as_dict())})

    def _lacks_evaluation(self, last_step: int) -> bool:
        """Whether the run that continues after a step was killed before the evaluation that follows it."""
        records = read_jsonl(self.run.folder / "log.jsonl")
        is_evaluated = any("rank" in record and record["step"] == last_step for record in records)
        is_last = last_step + 1 == self.run.recipe.num_steps
        is_done = is_evaluated and (self._is_finished() or not is_last)
        return last_step < 0 or (self.run.is_time(self.run.options.eval_every, last_step) and not is_done)

    def _is_finished(self) -> bool:
        """Whether training.json of the whole run has been written."""
        try:
            return json.loads((self.run.folder / "training.json").read_text())["steps"] == self.run.recipe.num_steps
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def seconds(self) -> float:
        """Since the run began, without the time it was down."""
        return time.monotonic() - self._begin

    def count_steps(self, first_step: int):
        """Numbers of the steps, under a progress bar."""
        self.bar = tqdm(
            range(first_step, self.run.recipe.num_steps),
            initial=first_step,
            total=self.run.recipe.num_steps,
            disable=not self.run.is_main,
            unit="step",
            dynamic_ncols=True,
            mininterval=1,
        )
        return self.bar

    def report_unreadable(self, batch: dict) -> None:
        """Name images that could not be read; they were replaced."""
        for name, reason in batch["unreadable"]:
            self._unreadable += 1
            with open(self.run.folder / "unreadable.txt", "a") as file:
                file.write(f"{name}\t{reason}\n")
            if self._unreadable <= 3:
                tqdm.write(f"unreadable image {name} ({reason}): replaced, listed in {file.name}")
        for name, note in batch["notes"]:
            if note not in self._notes.counts:
                tqdm.write(f"data: {name}: {note}")
            self._notes.add(name, [note])
        self._num_read += len(batch["numbers"])

    def log_step(self, step: int, losses: dict, gradients: dict, optimizer: torch.optim.Optimizer) -> None:
        """Take the values of a step; write them to the log when it is time."""
        self._non_finite.update(losses | gradients if self.run.accelerator.scaler is None else losses, step=step)
        if not self.run.is_time(self.run.options.log_every, step):
            return
        self.check_finite()
        total, size = self.run.processes.all_reduce_sum, self.run.processes.size
        seconds = time.monotonic() - self._last_time
        device = self.run.accelerator.device
        record = {
            "step": step,
            **{name: (total(value) / size).item() for name, value in losses.items()},
            # With float16 a step is skipped now and then, because the scale of its gradients was too large.
            **{name: float(norm) if norm.isfinite() else None for name, norm in gradients.items()},
            **self.objective.rates(step=step),
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "weight_decay": max(group["weight_decay"] for group in optimizer.param_groups),
            "images_per_second": (step - self._last_step) * self.run.recipe.batch_size / seconds,
            "unreadable": self._unreadable,
        }
        if device.type == "cuda":
            record["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            record["memory_gib"] = psutil.Process().memory_info().rss / 2**30  # without the workers
        self._last_time, self._last_step = time.monotonic(), step
        self.logger.write(record)
        self._track(record)
        line = f"loss {record['total']:.3f}"
        if self.objective.num_prototypes and "dino" in record:
            line += f" (class {record['dino']:.3f}, ln K {collapse_line(self.objective.num_prototypes):.3f})"
        line += f", {describe(self._headline).label} {write(self._headline, self._value)}" if self._headline else ""
        self.bar.set_postfix_str(f"{line}, {record['images_per_second']:.0f} images/s", refresh=False)

    def check_finite(self) -> None:
        """Stop, with the last good state kept, if any number was not finite."""
        try:
            self._non_finite.check(self.run.folder / "state")
        except RuntimeError as error:
            raise SystemExit(str(error)) from None

    def evaluate(self, *, step: int) -> None:
        """Measure features and norms, draw pictures and warn of problems."""
        model = gather_model(self.objective)
        encoder = self.objective.encoder_of(model)
        with eval_mode(model), self.run.accelerator.autocast():
            features = self.eval_images.encode_train(encoder)
        if self.run.is_main:
            with eval_mode(model):
                self._evaluate(model, features, step)
        self.run.accelerator.wait_for_everyone()
        self._last_time = time.monotonic()

    def finish(self, *, step: int, is_stopped: bool) -> None:
        """Write the summary of the run, and print it with the next command."""
        self.bar.close()
        if not self.run.is_main:
            return
        folder = self.run.folder
        if is_stopped:
            print(f"stopped after step {step + 1} of {self.run.recipe.num_steps}; the same command continues")
            return
        summary = {
            "recipe": self.run.recipe.as_dict(),
            "data": {
                **self._data,
                "split": self.run.options.split,
                "notes": [*self._source_notes, *self._notes.lines(self._num_read)],
            },
            "init": self._init,
            "steps": step + 1,
            "seconds": round(self.seconds, 1),
            "processes": self.run.processes.size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "unreadable": self._unreadable,
            "versions": versions(),
            **{f"untrained_{name}": value for name, value in self._measured(first=True).items()},
            **self._measured(first=False),
        }
        is_complete = self._first_step > step and not self.lacks_evaluation and self._is_finished()
        if is_complete:
            print(f"all {step + 1} steps were complete already")
        else:
            write_text(folder / "training.json", json.dumps(summary, indent=2) + "\n")
        shown = f"{len(self.eval_images.shown)} {self.eval_images.origin}"
        for name in [name for name in self._metrics if name in summary]:
            before = (
                f"{write(name, summary[f'untrained_{name}'])} untrained, " if f"untrained_{name}" in summary else ""
            )
            chance = f" (chance {summary['chance']:.1%})" if name == "knn" else ""
            print(f"{describe(name).label} on {shown}: {before}{write(name, summary[name])} trained{chance}")
        if "patch_best_step" in summary:
            print(
                f"probe of patches on scenes: mean IoU {summary['segmentation']:.1%}, best at step "
                f"{summary['patch_best_step']}; similarities of patches correlate by "
                f"{summary['patch_consistency']:.2f} with those of that step"
            )
        kind = getattr(self.objective.saved, "_auto_class", None) or type(self.objective.saved).__name__
        print(f"{step + 1} steps in {self.seconds:.0f} seconds")
        print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
        print(f"model:    {folder / 'model'}")
        print(
            f'next:     python -c "from transformers import {kind}; '
            f"print({kind}.from_pretrained('{folder / 'model'}', trust_remote_code=True))\""
        )

    def _measured(self, *, first: bool) -> dict:
        """Metrics of the first or the last evaluation."""
        evaluations = [record for record in self.logger.records if "rank" in record]
        chosen = evaluations[0 if first else -1] if evaluations else {}
        names = (*self._metrics, "chance", *PATCH_METRICS[: 1 if first else None])
        return {name: chosen[name] for name in names if name in chosen}

    def _evaluate(self, model: PreTrainedModel, features: Tensor, step: int) -> None:
        encoder = self.objective.encoder_of(model)
        run, folder, data = self.run, self.run.folder, self.eval_images
        record = {"step": step, "rank": effective_rank(features)}
        similarity = register_similarity(encoder)
        if similarity is not None:
            record["register_similarity"] = similarity
        if data.num_classes > 1:
            with run.accelerator.autocast():
                images = encode(encoder, data.images, lambda pixels: pixels)
            accuracy = knn_accuracy(features, data.train_labels, images, data.targets["labels"])
            record |= {"knn": accuracy, "chance": 1 / data.num_classes}
        if data.images is not None:
            try:
                record |= self.objective.evaluate(model, data.images, data.targets)
            except ValueError as error:  # the annotations are not what the recipe says
                raise SystemExit(str(error)) from None
        if self._probe is not None:
            with run.accelerator.autocast():
                patches = self._probe.encode(encoder)
            words = {"classes": self._probe.classes, "num_classes": self._probe.num_classes}
            record |= self._best.compare(self.logger.records, step=step, patches=patches, **words)
        self._headline = next((name for name in reversed(self._metrics) if name in record), None)
        self._value = record.get(self._headline)
        device = run.accelerator.device
        self.norms.write({"step": step} | summarise_norms(token_norms(encoder, data.first_train_images(device))))
        # Last, for an evaluation without it is taken again when a killed run continues.
        self.logger.write(record)
        self._track(record)
        for alarm in diagnose(self.logger.records, num_prototypes=self.objective.num_prototypes):
            kind = " ".join(alarm.split()[:5])
            if kind not in self._named:
                self._named.add(kind)
                tqdm.write(f"warning: {alarm}")
        if step >= 0:
            draw_curves(
                self.logger.records,
                folder / "curves.png",
                panels=self.objective.panels,
                num_prototypes=self.objective.num_prototypes,
            )
            draw_norms(self.norms.records, folder / "norms.png")
            shown = data.shown[:6].to(device)
            pixels = run.recipe.statistics(encoder.config.num_channels)
            draw_attention(encoder, shown, folder / "attention.png", **pixels)
            if self.objective.annotation in MAPS:
                targets = data.targets[TARGETS[self.objective.annotation]][:6]
                num_classes = encoder.config.num_labels if self.objective.annotation == "mask" else None
                found = self.objective.predict(model, shown)
                draw_maps(shown.cpu(), targets, found, folder / "maps.png", **pixels, num_classes=num_classes)

    def _track(self, record: dict) -> None:
        if self.run.options.tracker:
            values = {name: value for name, value in record.items() if name != "step"}
            self.run.accelerator.log(values, step=record["step"] + 1)


def describe(name: str) -> MetricDescription:
    """Label and unit of a metric; an unknown one is a plain number."""
    return METRICS.get(name, MetricDescription(name.replace("_", " "), unit=""))


def write(name: str, value: float) -> str:
    """A value of a metric with its unit."""
    unit = describe(name).unit
    return f"{value:.1%}" if unit == "%" else f"{value:.3f} {unit}".rstrip()

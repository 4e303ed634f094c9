"""Pretrain a ViT with registers on images without labels.

    accelerate launch examples/pretrain.py                                       # minutes on a laptop
    accelerate launch examples/pretrain.py --recipe small-data --data my_photos  # a folder, one GPU
    accelerate launch examples/pretrain.py --registers 0 --output outputs/without

The same command goes on where it stopped, after Ctrl-C, a kill or a crash, with the same numbers. Whatever decides the
numbers stands in a recipe (examples/recipes/*.yaml); `--set name=value` changes one value of it, also an inner one
(`--set crops.num_local=2 --set settings.koleo_weight=0`).

The output folder holds model/ (for AutoModel.from_pretrained), state/ (to go on), log.jsonl and norms.jsonl (every
number), curves.png, norms.png, attention.png, training.json (the facts) and recipe.yaml.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import time


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the cores to the data workers

import accelerate
import psutil
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.analysis import summarise_norms, token_norms
from modeling_vitreg.cards import CardError, PublishError, publish
from modeling_vitreg.evaluation import knn_accuracy
from modeling_vitreg.images import ImageSource, UnreadableImage, decode_image, derive_seed, open_images
from modeling_vitreg.modes import evaluation_mode
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.contrast import find_words
from modeling_vitreg.pretraining.crops import MultiCrop
from modeling_vitreg.pretraining.diagnosis import diagnose
from modeling_vitreg.pretraining.figures import draw_attention, draw_curves, draw_norms
from modeling_vitreg.pretraining.instruments import collapse_line, effective_rank, register_similarity
from modeling_vitreg.pretraining.journal import Journal
from modeling_vitreg.pretraining.lamb import Lamb
from modeling_vitreg.pretraining.loader import ViewLoader
from modeling_vitreg.pretraining.masking import MaskMaker
from modeling_vitreg.pretraining.objective import Objective
from modeling_vitreg.pretraining.parameters import parameter_groups, set_rates
from modeling_vitreg.pretraining.processes import Processes, all_processes
from modeling_vitreg.pretraining.recipe import Recipe, make_recipe, read_recipe
from modeling_vitreg.pretraining.schedules import cosine
from modeling_vitreg.pretraining.sharding import gather_model, shard
from modeling_vitreg.pretraining.state import last_state, load_state, read_facts, save_state, write_text
from modeling_vitreg.pretraining.watch import FiniteWatch
from modeling_vitreg.scenes import SceneSettings


RECIPES = pathlib.Path(__file__).parent / "recipes"
HELD_OUT_SCENES = 2**30  # first index; training scenes are counted from 0


def main(*, description: str = __doc__, default_recipe: str = "demo-cpu") -> None:
    options = parse_options(description, default_recipe)
    recipe = choose_recipe(options)
    source = open_source(options, recipe)
    recipe = name_classes(recipe, source)
    transformers.utils.logging.disable_progress_bar()  # of saving, which takes less time than drawing it
    accelerator = Accelerator(
        mixed_precision=options.precision,
        log_with=options.tracker,
        project_dir=options.output,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    run = Run(options, recipe, accelerator, all_processes())
    last = open_output(run)

    # Everything that learns is one module: student, teacher and heads are wrapped, sharded and saved together.
    try:
        objective = make_objective(recipe, init=None if last else options.init, processes=run.processes)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if options.checkpoint_activations:
        objective.trained["backbone"].gradient_checkpointing_enable()
    if options.compile:
        objective.compile_layers()
    objective = objective.to(accelerator.device)
    if options.shard:
        objective = shard(objective, precision=accelerator.mixed_precision)
    optimizer = make_optimizer(objective, recipe)
    model = objective if options.shard else accelerator.prepare_model(objective)

    facts = {"step": -1, "seconds": 0.0, "loaders": None}
    if last:
        facts = load_state(last, objective=objective, optimizer=optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(facts["scaler"])
        run.say(f"going on after step {facts['step'] + 1} of {recipe.num_steps}, from {last}")
    first_step = facts["step"] + 1
    loader = make_loader(run, source, objective, facts)
    monitor = Monitor(run, objective, source, facts)
    stop = StopRequest(run)
    objective.train()
    if first_step == 0:
        monitor.look(step=-1)

    batches = iter(loader) if first_step < recipe.num_steps else None
    step = facts["step"]
    for step in monitor.count_steps(first_step):
        set_rates(optimizer, **rates_of(recipe, step))
        losses = {}
        for micro in range(run.num_accumulations):
            batch = next(batches)
            monitor.report_unreadable(batch)
            batch = objective.to_device(batch, device=accelerator.device, mean=recipe.mean, std=recipe.std)
            # Whatever is drawn in a step is seeded by it: there is no random state to save.
            torch.manual_seed(derive_seed(recipe.seed, step, micro, run.processes.rank))
            is_last = micro + 1 == run.num_accumulations
            with contextlib.nullcontext() if is_last or options.shard else accelerator.no_sync(model):
                with accelerator.autocast():
                    terms = model(batch, step=step)
                accelerator.backward(terms["total"] / run.num_accumulations)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach().float() / run.num_accumulations
        norms = update(objective, optimizer, accelerator.scaler, clip=recipe.clip)
        objective.follow(step=step)

        monitor.see(step, losses, norms, optimizer)
        if stop.is_due(step) or run.is_time(options.save_every, step):
            monitor.check_finite()
            save(run, objective, optimizer, loader, source, step=step, seconds=monitor.seconds)
        if stop.is_requested:
            break
        if run.is_time(options.look_every, step):
            monitor.look(step=step)
    monitor.finish(step=step, is_stopped=stop.is_requested)
    accelerator.end_training()


@dataclasses.dataclass(frozen=True)
class Run:
    """What every part of the program needs to know."""

    options: argparse.Namespace
    recipe: Recipe
    accelerator: Accelerator
    processes: Processes

    @property
    def folder(self) -> pathlib.Path:
        return self.options.output

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def micro_batch(self) -> int:
        """Images that go through the network at once, in one process."""
        return self.options.micro_batch or self.recipe.batch_size // self.processes.size

    @property
    def num_accumulations(self) -> int:
        at_once = self.micro_batch * self.processes.size
        if at_once == 0 or self.recipe.batch_size % at_once:
            raise SystemExit(
                f"batch_size {self.recipe.batch_size} is not a multiple of --micro-batch {self.micro_batch} times "
                f"{self.processes.size} processes: change one of them"
            )
        return self.recipe.batch_size // at_once

    def is_time(self, interval: int, step: int) -> bool:
        return (step + 1) % interval == 0 or step + 1 == self.recipe.num_steps

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)


# Setting up --------------------------------------------------------------------------------------------------------


def parse_options(description: str, default_recipe: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    what = parser.add_argument_group("what is trained")
    shown = f"a YAML file, or one of: {names} (default: {default_recipe})"
    what.add_argument("--recipe", default=default_recipe, help=shown)
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a value of the recipe")
    what.add_argument("--registers", type=int, help="number of registers, in place of the recipe's; 0 for none")
    what.add_argument("--init", help="start from a model (folder or Hub name) or from the output of another run")
    data = parser.add_argument_group("on which images")
    data.add_argument(
        "--data",
        default="scenes",
        help='"scenes" (built in, default), a folder of images, WebDataset shards such as "shards/{000..099}.tar", a '
        "folder or Hub name of a dataset",
    )
    data.add_argument("--split", default="train", help="of the data (default: train)")
    data.add_argument("--held-out", help="split whose labels k-NN accuracy is measured on (default: found)")
    data.add_argument("--streaming", action="store_true", help="read the data while training instead of preparing it")
    data.add_argument("--image-column", help="default: found by its type")
    data.add_argument(
        "--label-column",
        help="default: found by its type; only k-NN accuracy reads labels. Of scenes: colours (of the main object, "
        "default) or label (its shape and texture, which takes far longer to learn)",
    )
    data.add_argument("--text-column", help="of captions, for CLIP (default: caption or text)")
    data.add_argument("--num-scenes", type=int, default=4096, help="of the built-in data (default: 4096)")
    data.add_argument("--max-unreadable", type=float, default=0.05, help="share at which to stop (default: 0.05)")
    how = parser.add_argument_group("how (changes no number, but for rounding)")
    how.add_argument("--output", type=pathlib.Path, help="folder (default: outputs/RECIPE)")
    how.add_argument("--micro-batch", type=int, help="images at once in a process (default: all, no accumulation)")
    how.add_argument("--workers", type=int, help="processes that cut views (default: one a core, at most 8)")
    how.add_argument("--precision", choices=("no", "bf16", "fp16"), help="default: that of `accelerate config`")
    how.add_argument("--compile", action="store_true", help="compile the layers")
    how.add_argument("--checkpoint-activations", action="store_true", help="a third slower, far less memory")
    how.add_argument("--shard", action="store_true", help="spread the parameters over the processes (FSDP2)")
    look = parser.add_argument_group("looking and saving")
    look.add_argument("--tracker", help="tensorboard, trackio, wandb ... beside log.jsonl")
    look.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="USER/NAME", help="publish the run when it ends, privately"
    )
    look.add_argument("--licence", help="of the published weights, where they inherit none, such as apache-2.0")
    look.add_argument("--log-every", type=int, default=10, help="steps (default: 10)")
    look.add_argument("--look-every", type=int, help="steps between k-NN, norms and pictures (default: a tenth)")
    look.add_argument("--save-every", type=int, help="steps between states (default: a tenth, at most 1000)")
    look.add_argument("--num-looked-at", type=int, default=2000, help="images that are looked at (default: 2000)")
    options = parser.parse_args()
    if options.workers is None:
        options.workers = min(os.cpu_count() or 1, 8)
    return options


def choose_recipe(options: argparse.Namespace) -> Recipe:
    path = pathlib.Path(options.recipe)
    path = path if path.suffix == ".yaml" else RECIPES / f"{options.recipe}.yaml"
    if not path.exists():
        known = ", ".join(sorted(known.stem for known in RECIPES.glob("*.yaml")))
        raise SystemExit(f"there is no recipe {path}: give a YAML file, or one of {known}")
    changes = {}
    for change in options.set:
        name, separator, value = change.partition("=")
        if not separator:
            raise SystemExit(f"--set expects NAME=VALUE, got {change!r}")
        changes[name] = yaml.safe_load(value)
    if options.registers is not None:
        changes["num_register_tokens"] = options.registers
    try:
        recipe = read_recipe(path).with_changes(changes)
    except (ValueError, TypeError) as error:
        raise SystemExit(str(error)) from None
    options.output = options.output or pathlib.Path("outputs") / path.stem
    options.look_every = options.look_every or max(recipe.num_steps // 10, 1)
    options.save_every = options.save_every or min(max(recipe.num_steps // 10, 1), 1000)
    return recipe


def open_output(run: Run) -> pathlib.Path | None:
    """Make the folder, or find the state in it to go on from; refuse a folder of another run."""
    try:
        if run.is_main:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_text(run.folder / ".writable", "")
            (run.folder / ".writable").unlink()
        last = last_state(run.folder / "state")
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"the output folder {run.folder} cannot be used: {error}") from None
    if last is not None:
        # Values that a recipe did not have yet are those that it has by default.
        before, now = make_recipe(read_facts(last)["recipe"]).as_dict(), run.recipe.as_dict()
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            changes = "; ".join(f"{name}: {before.get(name)} there, {now[name]} now" for name in differing)
            raise SystemExit(
                f"{run.folder} holds a run of another recipe ({changes}). Give the values of that run to go on with "
                f"it, another --output to begin anew, or --init {run.folder} with another --output to start from it"
            )
    elif run.is_main:
        write_text(run.folder / "recipe.yaml", yaml.safe_dump(run.recipe.as_dict(), sort_keys=False))
    return last


def open_source(options: argparse.Namespace, recipe: Recipe, *, split: str | None = None):
    """The images to learn from, or those of another split."""
    scenes = range(options.num_scenes)
    # Larger than a view, and filled by one object, as photographs of objects are.
    looks = SceneSettings(image_size=recipe.crops.global_size * 4 // 3, max_objects=1, zoom=1.6)
    if split == "held-out scenes":
        scenes, split = range(HELD_OUT_SCENES, HELD_OUT_SCENES + options.num_looked_at // 4), "train"
    try:
        return open_images(
            options.data,
            split=split or options.split,
            is_streaming=options.streaming,
            image_column=options.image_column,
            label_column=options.label_column or ("colours" if options.data == "scenes" else None),
            text_column=(options.text_column or "caption") if recipe.objective == "clip" else None,
            scenes=scenes,
            scene_settings=looks,
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


def name_classes(recipe: Recipe, source) -> Recipe:
    """The recipe with the classes of the data, where it learns classes and does not name them."""
    changes = {}
    if recipe.objective == "clip" and not (recipe.settings.get("words") or recipe.settings.get("tokenizer")):
        if not isinstance(source, ImageSource):
            raise SystemExit("the words of a stream are not known: name a tokenizer by --set settings.tokenizer=...")
        changes["settings.words"] = find_words(source.texts())
    if recipe.objective == "clip" and source.class_names and not recipe.settings.get("class_names"):
        changes["settings.class_names"] = list(source.class_names)
    if recipe.objective != "classify" or recipe.settings.get("class_names"):
        return recipe.with_changes(changes)
    if not source.class_names:
        raise SystemExit(
            "classification needs classes: give --data a folder with a folder for each class, a dataset with a column "
            "of classes (--label-column), or name them by --set settings.class_names=[cat,dog]"
        )
    return recipe.with_changes({"settings.class_names": list(source.class_names)})


def make_optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    backbone, *heads = objective.trained.values()
    groups = parameter_groups(
        backbone,
        heads,
        layer_decay=recipe.layer_decay,
        patch_multiplier=recipe.patch_multiplier,
        decays_tokens=recipe.decays_tokens,
    )
    if recipe.optimizer == "lamb":
        return Lamb(groups, betas=recipe.betas)
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)


def make_loader(run: Run, source, objective: Objective, facts: dict) -> ViewLoader:
    state = None
    if facts["loaders"]:
        state = facts["loaders"][run.processes.rank if len(facts["loaders"]) == run.processes.size else 0]
        if len(facts["loaders"]) != run.processes.size:
            run.say(f"the run had {len(facts['loaders'])} processes and now has {run.processes.size}")
            if not isinstance(source, ImageSource):
                raise SystemExit(
                    f"a stream is divided among the processes: go on with {len(facts['loaders'])} of them, or start "
                    f"with --init {run.folder} and another --output"
                )
    grid = tuple(run.recipe.crops.global_size // side for side in objective.encoder.config.patch_shape)
    make_masks = None
    if objective.masks is not None:
        make_masks = MaskMaker(num_views=run.recipe.crops.num_global, grid=grid, settings=objective.masks)
    try:
        return ViewLoader(
            source,
            make_views=MultiCrop(run.recipe.crops),
            make_masks=make_masks,
            make_text=objective.make_text,
            micro_batch_size=run.micro_batch,
            num_accumulations=run.num_accumulations,
            rank=run.processes.rank,
            num_processes=run.processes.size,
            seed=run.recipe.seed,
            num_workers=run.options.workers,
            first_step=facts["step"] + 1,
            state=state,
            max_unreadable_share=run.options.max_unreadable,
            pin_memory=run.accelerator.device.type == "cuda",
        )
    except ValueError as error:
        raise SystemExit(f"{run.folder}: {error}") from None


# Learning ----------------------------------------------------------------------------------------------------------


def rates_of(recipe: Recipe, step: int) -> dict:
    """What `set_rates` writes into the optimiser at a step."""
    return {
        "learning_rate": cosine(
            step,
            base=recipe.peak_learning_rate,
            final=recipe.last_learning_rate,
            num_steps=recipe.num_steps,
            num_warmup=int(recipe.warmup * recipe.num_steps),
        ),
        "weight_decay": cosine(
            step, base=recipe.weight_decay[0], final=recipe.weight_decay[1], num_steps=recipe.num_steps
        ),
        "is_last_layer_frozen": step < recipe.freeze_last_layer * recipe.num_steps,
    }


def update(objective: Objective, optimizer: torch.optim.Optimizer, scaler, *, clip: float) -> dict[str, Tensor]:
    """Clip the gradient of each part on its own and take a step; returns the norms before clipping."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    norms = {}
    for name, part in objective.trained.items():
        norm = torch.nn.utils.clip_grad_norm_(part.parameters(), clip or math.inf)
        norms[f"gradient_{name}"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()
    return norms


class StopRequest:
    """Ctrl-C and SIGTERM ask for a last state; a second one stops at once."""

    def __init__(self, run: Run):
        self._run, self._is_asked, self.is_requested = run, False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self._is_asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._is_asked = True
        self._run.say(f"{signal.Signals(number).name}: saving after this step; once more stops at once")

    def is_due(self, step: int) -> bool:
        """Whether any process was asked; several processes agree on it whenever they log."""
        if self._run.processes.size == 1:
            self.is_requested = self._is_asked
        elif self._run.is_time(self._run.options.log_every, step):
            asked = torch.tensor(float(self._is_asked), device=self._run.accelerator.device)
            self.is_requested = bool(self._run.processes.largest(asked))
        return self.is_requested


def save(run: Run, objective, optimizer, loader: ViewLoader, source, *, step: int, seconds: float) -> None:
    """The state to go on from, and the model to use."""
    states = [None] * run.processes.size
    states[run.processes.rank] = loader.state_after(step)
    if run.processes.size > 1:
        torch.distributed.all_gather_object(states, states[run.processes.rank])
    scaler = run.accelerator.scaler
    facts = {
        "step": step,
        "seconds": seconds,
        "recipe": run.recipe.as_dict(),
        "loaders": states,
        "scaler": None if scaler is None else scaler.state_dict(),
        "versions": versions(),
    }
    model = whole_model(run, objective)
    try:
        save_state(run.folder / "state", objective=objective, optimizer=optimizer, facts=facts, is_writer=run.is_main)
        if run.is_main:
            save_model(objective, model, run.folder / "model", mean=run.recipe.mean, std=run.recipe.std)
    except (RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
    run.accelerator.wait_for_everyone()


def save_model(objective: Objective, model: PreTrainedModel, folder: pathlib.Path, *, mean, std) -> None:
    """Write a folder for `from_pretrained` beside the old one, and put it in its place."""
    partial, old = folder.with_name("model.partial"), folder.with_name("model.old")
    shutil.rmtree(partial, ignore_errors=True)
    objective.write(model, partial)
    processor = partial / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    processor.write_text(json.dumps(settings | {"image_mean": list(mean), "image_std": list(std)}, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def whole_model(run: Run, objective: Objective) -> PreTrainedModel:
    """The model to look at and to save; a sharded one is gathered by all processes together."""
    return gather_model(objective) if run.options.shard else objective.saved


def name_init(init: str | None) -> str | None:
    """What a run started from: the licence of its weights is inherited from there."""
    return os.path.abspath(init) if init and os.path.exists(init) else init


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


# Looking -----------------------------------------------------------------------------------------------------------


class Monitor:
    """Writes down every number, draws the pictures, and says in words what goes wrong."""

    def __init__(self, run: Run, objective: Objective, source, facts: dict):
        self.run, self.objective = run, objective
        last_step = facts["step"]
        self.journal = Journal(run.folder / "log.jsonl", last_step=last_step, is_writer=run.is_main)
        self.norms = Journal(run.folder / "norms.jsonl", last_step=last_step, is_writer=run.is_main)
        self.sample = Sample(run, source) if run.is_main else None
        self._first_step, self._watch, self._named = last_step + 1, FiniteWatch(), set()
        self._unreadable, self._accuracy = 0, None
        self._data = {"name": run.options.data, "revision": source.revision}
        self._begin = time.monotonic() - facts["seconds"]
        self._last_time, self._last_step = time.monotonic(), last_step
        if run.options.tracker:
            run.accelerator.init_trackers("vitreg-pretraining", config={"recipe": json.dumps(run.recipe.as_dict())})

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

    def see(self, step: int, losses: dict, gradients: dict, optimizer: torch.optim.Optimizer) -> None:
        """Take the numbers of a step; write them down when it is time."""
        self._watch.see(losses | gradients if self.run.accelerator.scaler is None else losses, step=step)
        if not self.run.is_time(self.run.options.log_every, step):
            return
        self.check_finite()
        total, size = self.run.processes.total, self.run.processes.size
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
        self.journal.write(record)
        self._track(record)
        line = f"loss {record['total']:.3f}"
        if self.objective.num_prototypes and "dino" in record:
            line += f" (class {record['dino']:.3f}, ln K {collapse_line(self.objective.num_prototypes):.3f})"
        line += "" if self._accuracy is None else f", k-NN {self._accuracy:.1%}"
        self.bar.set_postfix_str(f"{line}, {record['images_per_second']:.0f} images/s", refresh=False)

    def check_finite(self) -> None:
        """Stop, with the last good state kept, if any number was not finite."""
        try:
            self._watch.check(self.run.folder / "state")
        except RuntimeError as error:
            raise SystemExit(str(error)) from None

    def look(self, *, step: int) -> None:
        """Measure features and norms, draw, and name what is wrong."""
        encoder = self.objective.encoder_of(whole_model(self.run, self.objective))
        if self.run.is_main:
            with evaluation_mode(encoder):
                self._measure(encoder, step)
        self.run.accelerator.wait_for_everyone()
        self._last_time = time.monotonic()

    def finish(self, *, step: int, is_stopped: bool) -> None:
        """The facts of the run, and what to type next."""
        self.bar.close()
        if not self.run.is_main:
            return
        folder = self.run.folder
        if is_stopped:
            print(f"stopped after step {step + 1} of {self.run.recipe.num_steps}; the same command goes on")
            return
        facts = {
            "recipe": self.run.recipe.as_dict(),
            "data": {**self._data, "split": self.run.options.split},
            "init": name_init(self.run.options.init),
            "steps": step + 1,
            "seconds": round(self.seconds, 1),
            "processes": self.run.processes.size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "unreadable": self._unreadable,
            "versions": versions(),
            **{f"untrained_{name}": value for name, value in self._of("knn", first=True).items()},
            **self._of("knn", first=False),
        }
        write_text(folder / "training.json", json.dumps(facts, indent=2) + "\n")
        if self.run.options.push_to_hub:
            self._publish(folder, self.run.options.push_to_hub)
        if "zero_shot" in facts:
            shown = f"{self.sample.num_held_out} {self.sample.held_out_name}"
            print(f"zero-shot accuracy on {shown}: {facts['zero_shot']:.1%}")
        if "accuracy" in facts:
            print(f"accuracy on {self.sample.num_held_out} {self.sample.held_out_name}: {facts['accuracy']:.1%}")
        if "knn" in facts:
            print(
                f"k-NN accuracy on {self.sample.num_held_out} {self.sample.held_out_name}: "
                f"{facts['untrained_knn']:.1%} untrained, {facts['knn']:.1%} trained (chance {facts['chance']:.1%})"
            )
        kind = getattr(self.objective.saved, "_auto_class", None) or type(self.objective.saved).__name__
        print(f"{step + 1} steps in {self.seconds:.0f} seconds")
        print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
        print(f"model:    {folder / 'model'}")
        print(
            f'next:     python -c "from transformers import {kind}; '
            f"print({kind}.from_pretrained('{folder / 'model'}', trust_remote_code=True))\""
        )

    def _publish(self, folder: pathlib.Path, name: str) -> None:
        try:
            publish(folder, name, licence=self.run.options.licence)
        except (CardError, PublishError) as error:  # the run is done and stays, whatever the Hub says
            print(f"not published: {error}\n  the run is whole; try again with: vitreg publish {folder} {name}")

    def _of(self, key: str, *, first: bool) -> dict:
        records = [record for record in self.journal.records if key in record]
        chosen = records[0 if first else -1] if records else {}
        return {name: chosen[name] for name in (key, "accuracy", "zero_shot", "chance") if name in chosen}

    def _measure(self, encoder: ViTWithRegistersModel, step: int) -> None:
        run, folder, sample = self.run, self.run.folder, self.sample
        features = encode(encoder, sample.images)
        record = {"step": step, "rank": effective_rank(features)}
        similarity = register_similarity(encoder)
        if similarity is not None:
            record["register_similarity"] = similarity
        if sample.held_out is not None:
            held_out = encode(encoder, sample.held_out)
            self._accuracy = knn_accuracy(features, sample.labels, held_out, sample.held_out_labels)
            record |= {"knn": self._accuracy, "chance": 1 / sample.num_classes}
            record |= self.objective.evaluate(sample.held_out, sample.held_out_labels)
        self.journal.write(record)
        self._track(record)
        device = run.accelerator.device
        self.norms.write({"step": step} | summarise_norms(token_norms(encoder, sample.images[:64].to(device))))
        for alarm in diagnose(self.journal.records, num_prototypes=self.objective.num_prototypes):
            kind = " ".join(alarm.split()[:5])
            if kind not in self._named:
                self._named.add(kind)
                tqdm.write(f"warning: {alarm}")
        if step >= 0:
            draw_curves(self.journal.records, folder / "curves.png", num_prototypes=self.objective.num_prototypes)
            draw_norms(self.norms.records, folder / "norms.png")
            shown = sample.shown[:6].to(device)
            draw_attention(encoder, shown, folder / "attention.png", mean=run.recipe.mean, std=run.recipe.std)

    def _track(self, record: dict) -> None:
        if self.run.options.tracker:
            values = {name: value for name, value in record.items() if name != "step"}
            self.run.accelerator.log(values, step=record["step"] + 1)


class Sample:
    """Images that are looked at during a run, and, where there are labels, others to measure k-NN accuracy on.

    Neighbours come from the training data; what is classified comes from another split, or else from other images of
    the training data, whose labels nothing has seen either.
    """

    def __init__(self, run: Run, source):
        options, recipe = run.options, run.recipe
        self._cut = v2.Compose(
            [
                v2.Resize(recipe.crops.global_size, interpolation=InterpolationMode.BICUBIC),
                v2.CenterCrop(recipe.crops.global_size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(recipe.mean), list(recipe.std)),
            ]
        )
        number = options.num_looked_at
        self.images, labels = self._read(source, number + number // 4)
        other, self.held_out_name = self._find_held_out(run, source)
        self.held_out = self.held_out_labels = None
        self.labels, self.num_classes = torch.tensor(labels), len(set(labels))
        if min(labels) >= 0 and self.num_classes > 1:
            if other is None:
                number = len(labels) * 4 // 5
                self.held_out, self.held_out_labels = self.images[number:], self.labels[number:]
            else:
                self.held_out, held_out_labels = self._read(other, number // 4)
                self.held_out_labels = torch.tensor(held_out_labels)
        self.images, self.labels = self.images[:number], self.labels[:number]
        self.shown = self.images if self.held_out is None else self.held_out

    @property
    def num_held_out(self) -> int:
        return len(self.held_out)

    def _find_held_out(self, run: Run, source):
        if run.options.data == "scenes":
            return open_source(run.options, run.recipe, split="held-out scenes"), "held-out scenes"
        if run.options.held_out:
            other = open_source(run.options, run.recipe, split=run.options.held_out)
            return other, f"images of the split {run.options.held_out}"
        if isinstance(source, ImageSource):
            for split in ("validation", "test"):
                with contextlib.suppress(SystemExit):
                    return open_source(run.options, run.recipe, split=split), f"images of the split {split}"
        return None, "other images of the training data"

    def _read(self, source, number: int) -> tuple[Tensor, list]:
        if isinstance(source, ImageSource):
            order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:number].tolist()
            readers = (functools.partial(source.read, index) for index in order)
        else:
            examples = itertools.islice(source.examples(rank=0, num_processes=1, seed=0), number)
            readers = (functools.partial(read_raw, raw) for raw, _ in examples)
        images, labels = [], []
        for read in tqdm(readers, total=number, desc="images to look at", leave=False, delay=2):
            with contextlib.suppress(UnreadableImage):
                image, label = read()
                images.append(self._cut(image))
                labels.append(-1 if label is None else label)
        return torch.stack(images), labels


def read_raw(raw: dict) -> tuple:
    return decode_image(raw), raw["label"]


@torch.no_grad()
def encode(encoder: ViTWithRegistersModel, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """Pooled features (images, D) of normalised images on the CPU."""
    device = next(encoder.parameters()).device
    parts = [encoder(part.to(device)).pooler_output.float() for part in images.split(batch_size)]
    return torch.cat(parts).cpu()


if __name__ == "__main__":
    main()

"""Pretrain a ViT with registers on images without labels.

    accelerate launch examples/pretrain.py                                       # minutes on a laptop
    accelerate launch examples/pretrain.py --recipe small-data --data my_photos  # a folder, one GPU
    accelerate launch examples/pretrain.py --registers 0 --output outputs/without

After Ctrl-C, a kill or a crash the same command continues the run, with the same numbers. A recipe
(examples/recipes/*.yaml) holds all settings that change the numbers; `--set name=value` changes one of them, also an
inner one (`--set crops.num_local=2 --set settings.koleo_weight=0`).

The output folder holds model/ (for AutoModel.from_pretrained), state/ (to continue), log.jsonl and norms.jsonl (the
log), curves.png, norms.png, attention.png, training.json (the summary) and recipe.yaml.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import tempfile
import time


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the cores to the data workers

import torch
import transformers
import yaml
from arguments import Run, choose_recipe, convert_init, name_classes, name_init, open_source, parse_options, versions
from launching import ends_in_words, make_accelerator
from monitor import Monitor
from torch import Tensor

from modeling_vitreg.cards import CardError, PublishError, publish
from modeling_vitreg.cli.options import check_outside
from modeling_vitreg.distributed import distributed_context, new_control_group
from modeling_vitreg.files import atomic_folder, make_folder, write_text
from modeling_vitreg.images import ImageSource, derive_seed
from modeling_vitreg.modes import fast_attention
from modeling_vitreg.pretraining.build import backbone_class, make_objective
from modeling_vitreg.pretraining.objectives.objective import Objective
from modeling_vitreg.pretraining.run.lamb import Lamb
from modeling_vitreg.pretraining.run.parameters import parameter_groups, set_rates
from modeling_vitreg.pretraining.run.recipe import Recipe, make_recipe
from modeling_vitreg.pretraining.run.sharding import gather_model, shard
from modeling_vitreg.pretraining.state import (
    StateSaver,
    is_model_of,
    last_state,
    load_state,
    read_metadata,
    record_model,
)
from modeling_vitreg.pretraining.views.loader import ViewLoader
from modeling_vitreg.pretraining.views.masking import MaskMaker


@ends_in_words
def main(*, description: str = __doc__, default_recipe: str = "demo-cpu", arguments: list[str] | None = None) -> None:
    options = parse_options(description, default_recipe, arguments)
    recipe = choose_recipe(options)
    check_output(options.output, images=options.data)
    source = open_source(options, recipe)
    recipe = name_classes(recipe, source, data=options.data)
    transformers.utils.logging.disable_progress_bar()  # of saving, which takes less time than drawing it
    accelerator = make_accelerator(
        mixed_precision=options.precision, log_with=options.tracker, project_dir=options.output
    )
    run = Run(options, recipe, accelerator, distributed_context())
    for note in source.notes:
        run.say(f"data: {note}")
    last = open_output(run)
    run.say(source.describe_labels())

    init = None if last else convert_init(run)
    config = read_metadata(last).get("model_config") if last else None
    config = config and backbone_class(config.get("model_type", "vitreg")).config_class(**config)
    # Everything that learns is one module: student, teacher and heads are wrapped, sharded and saved together.
    try:
        objective = make_objective(recipe, init=init, config=config, processes=run.processes)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if not last and init is None and objective.needs_init:
        raise SystemExit(objective.needs_init)
    pixels = recipe.statistics(objective.encoder.config.num_channels)
    if options.checkpoint_activations:
        objective.trained["backbone"].gradient_checkpointing_enable()
    if options.compile:
        objective.compile_layers()
    if options.shard:  # goes to the device layer by layer: no device ever holds the whole
        try:
            words = {"precision": accelerator.mixed_precision, "kind": options.shard}
            objective = shard(objective, device=accelerator.device, **words)
        except (ValueError, RuntimeError) as error:
            raise SystemExit(str(error)) from None
    else:
        objective = objective.to(accelerator.device)
    optimizer = make_optimizer(objective, recipe)
    model = objective if options.shard else accelerator.prepare_model(objective)

    metadata = {"step": -1, "seconds": 0.0, "loaders": None, "init": name_init(options.init)}
    if last:
        metadata |= read_state(run, last, objective, optimizer)
    step, first_step = metadata["step"], metadata["step"] + 1
    loader = make_loader(run, source, objective, metadata)
    monitor = Monitor(run, objective, source, metadata)
    saver = StateSaver(run.folder / "state")
    stop = StopRequest(run, saver)
    objective.train()
    # A kill may have come between the state that the run continues from and its model or its evaluation.
    if last and run.is_true_anywhere(run.is_main and not is_model_of(run.folder, step)):
        save_model(run, objective, step=step)
    if run.is_true_anywhere(run.is_main and monitor.lacks_evaluation):
        monitor.evaluate(step=step)

    batches = iter(loader) if first_step < recipe.num_steps else None
    for step in monitor.count_steps(first_step):
        set_rates(optimizer, **recipe.rates(step))
        losses = {}
        for micro in range(run.num_accumulations):
            batch = next(batches)
            monitor.report_unreadable(batch)
            try:
                batch = objective.to_device(batch, device=accelerator.device, **pixels)
            except ValueError as error:  # the data are not what the recipe says
                raise SystemExit(str(error)) from None
            # Whatever is drawn in a step is seeded by it: there is no random state to save.
            torch.manual_seed(derive_seed(recipe.seed, step, micro, run.processes.rank))
            is_last = micro + 1 == run.num_accumulations
            with contextlib.nullcontext() if is_last or options.shard else accelerator.no_sync(model):
                with accelerator.autocast(), fast_attention(accelerator.device.type):
                    terms = model(batch, step=step)
                accelerator.backward(terms["total"] / run.num_accumulations)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach().float() / run.num_accumulations
        norms = update(objective, optimizer, accelerator.scaler, max_grad_norm=recipe.max_grad_norm)
        objective.after_step(step=step)

        monitor.log_step(step, losses, norms, optimizer)
        if stop.is_due(step) or run.is_time(options.save_every, step):
            monitor.check_finite()
            save(run, saver, objective, optimizer, loader, metadata | {"step": step, "seconds": monitor.seconds})
        if stop.is_requested:
            break
        if run.is_time(options.eval_every, step):
            monitor.evaluate(step=step)
    wait_for_state(saver)
    monitor.finish(step=step, is_stopped=stop.is_requested)
    if options.push_to_hub and run.is_main and not stop.is_requested:
        publish_run(run)
    accelerator.end_training()


# Setting up --------------------------------------------------------------------------------------------------------


def check_output(folder: pathlib.Path, *, images: str) -> None:
    """Make the folder and write something into it, before any work that could be lost."""
    try:
        check_outside(folder, images)
        with tempfile.TemporaryFile(dir=make_folder(folder)) as file:
            file.write(b"writable")
    except (OSError, ValueError) as error:
        raise SystemExit(f"the output folder {folder} cannot be used: {error}") from None


def open_output(run: Run) -> pathlib.Path | None:
    """The state in the output folder from which the run continues, or None; a run of another recipe is refused."""
    try:
        last = run.from_main(lambda: last_state(run.folder / "state", warn=run.say))
    except RuntimeError as error:
        raise SystemExit(f"the output folder {run.folder} cannot be used: {error}") from None
    if last is not None:
        # A key that an older recipe lacks has its default.
        before, now = make_recipe(read_metadata(last)["recipe"]).as_dict(), run.recipe.as_dict()
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            changes = "; ".join(f"{name}: {before.get(name)} there, {now[name]} now" for name in differing)
            raise SystemExit(
                f"{run.folder} holds a run of another recipe ({changes}). Use the same values to continue it, "
                f"another --output to start again, or --init {run.folder} with another --output to start from it"
            )
    elif run.is_main:
        write_text(run.folder / "recipe.yaml", yaml.safe_dump(run.recipe.as_dict(), sort_keys=False))
    return last


def read_state(run: Run, state: pathlib.Path, objective: Objective, optimizer: torch.optim.Optimizer) -> dict:
    """Load a state into the objective and the optimiser; returns its metadata."""
    try:
        metadata = load_state(state, objective=objective, optimizer=optimizer)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(metadata["scaler"])
    run.say(f"continuing after step {metadata['step'] + 1} of {run.recipe.num_steps}, from {state}")
    return metadata


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


def make_loader(run: Run, source, objective: Objective, metadata: dict) -> ViewLoader:
    state = None
    if metadata["loaders"]:
        state = metadata["loaders"][run.processes.rank if len(metadata["loaders"]) == run.processes.size else 0]
        if len(metadata["loaders"]) != run.processes.size:
            run.say(f"the run had {len(metadata['loaders'])} processes and now has {run.processes.size}")
            if not isinstance(source, ImageSource):
                raise SystemExit(
                    f"a stream is divided among the processes: continue with {len(metadata['loaders'])} of them, or "
                    f"start with --init {run.folder} and another --output"
                )
    make_masks = None
    if objective.masks is not None:
        words = {"settings": objective.masks, "patch_shape": tuple(objective.encoder.config.patch_shape)}
        masks = MaskMaker(num_views=run.recipe.crops.num_global, grid=(0, 0), **words)
        make_masks = masks.of_size((run.recipe.crops.global_size,) * 2)
    try:
        return ViewLoader(
            source,
            num_channels=objective.encoder.config.num_channels,
            make_views=objective.make_views,
            make_masks=make_masks,
            make_text=objective.make_text,
            micro_batch_size=run.micro_batch,
            num_accumulations=run.num_accumulations,
            num_repeats=run.recipe.repeated_augmentation,
            rank=run.processes.rank,
            num_processes=run.processes.size,
            seed=run.recipe.seed,
            num_workers=run.options.workers,
            first_step=metadata["step"] + 1,
            state=state,
            max_unreadable_share=run.options.max_unreadable,
            pin_memory=run.accelerator.device.type == "cuda",
            changes_colors=run.accelerator.device.type == "cpu",  # where workers have the only free cores
        )
    except ValueError as error:
        raise SystemExit(f"{run.folder}: {error}") from None


# Learning ----------------------------------------------------------------------------------------------------------


def update(
    objective: Objective, optimizer: torch.optim.Optimizer, scaler, *, max_grad_norm: float
) -> dict[str, Tensor]:
    """Clip the gradient of each part on its own and take a step; returns the norms before clipping."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    norms = {}
    for name, part in objective.trained.items():
        norm = torch.nn.utils.clip_grad_norm_(part.parameters(), max_grad_norm or math.inf)
        norms[f"gradient_{name}"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()
    return norms


def publish_run(run: Run) -> None:
    """Publish the finished run; a failure is reported and changes nothing on the disk."""
    name = run.options.push_to_hub
    try:
        publish(run.folder, name, licence=run.options.license)
    except (CardError, PublishError) as error:
        print(f"not published: {error}\n  the run is complete; try again with: vitreg publish {run.folder} {name}")


class StopRequest:
    """Ctrl-C and SIGTERM ask for a last state; a second one, more than a second later, stops at once.

    A launcher passes a signal on to processes that may have got it themselves. A state that could not be written stops
    the run too.
    """

    def __init__(self, run: Run, saver: StateSaver):
        self._run, self._saver, self._asked_at, self.is_requested = run, saver, None, False
        self._group, self._answer, self._reduction = new_control_group(), torch.zeros(()), None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._asked_at = time.monotonic()
        self._run.say(
            f"{signal.Signals(number).name}: a state is saved after this step; send the signal again to stop at once"
        )

    def is_due(self, step: int) -> bool:
        """Whether any process was asked to stop; several processes know it a step later, without waiting for it."""
        is_asked = self._asked_at is not None or self._saver.has_failed
        if self._group is None:
            self.is_requested = is_asked
            return self.is_requested
        if self._reduction is not None:
            self._reduction.wait()
            self.is_requested = bool(self._answer)
        self._answer.fill_(is_asked)
        self._reduction = torch.distributed.all_reduce(
            self._answer, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return self.is_requested


def save(run: Run, saver: StateSaver, objective: Objective, optimizer, loader: ViewLoader, metadata: dict) -> None:
    """Begin to write the state, and write the model; all processes call it together."""
    step, scaler = metadata["step"], run.accelerator.scaler
    states = [None] * run.processes.size
    states[run.processes.rank] = loader.state_after(step)
    if run.processes.size > 1:
        torch.distributed.all_gather_object(states, states[run.processes.rank])
    metadata = metadata | {
        "recipe": run.recipe.as_dict(),
        "model_config": objective.encoder.config.to_diff_dict(),
        "loaders": states,
        "scaler": None if scaler is None else scaler.state_dict(),
        "versions": versions(),
    }
    wait_for_state(saver)
    saver.save(objective=objective, optimizer=optimizer, metadata=metadata)
    try:
        save_model(run, objective, step=step)
    except SystemExit:
        wait_for_state(saver)
        raise


def wait_for_state(saver: StateSaver) -> None:
    try:
        saver.wait()
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


def save_model(run: Run, objective: Objective, *, step: int) -> None:
    """Write model/ with the mean and std of the recipe; all processes call it together."""
    model = gather_model(objective)
    folder = run.folder / "model"
    if run.is_main:
        try:
            with atomic_folder(folder) as part:
                objective.write(model, part)
                processor = part / "preprocessor_config.json"
                pixels = run.recipe.statistics(objective.encoder.config.num_channels)
                statistics = {f"image_{name}": list(values) for name, values in pixels.items()}
                processor.write_text(json.dumps(json.loads(processor.read_text()) | statistics, indent=2) + "\n")
            record_model(run.folder, step)
        except OSError as error:
            raise SystemExit(
                f"the model of step {step + 1} could not be written to {folder}: {error}. The state of this step is "
                "saved: free some space, or check the permissions of the folder, and run the same command again"
            ) from None
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()

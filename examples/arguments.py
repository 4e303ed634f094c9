"""Options of the training programs, the recipe that they name, and the data that they open."""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import snapshot_download
from tqdm import tqdm

from modeling_vitreg import reports
from modeling_vitreg.cli.renamed import rewrite
from modeling_vitreg.conversion import convert
from modeling_vitreg.distributed import DistributedContext
from modeling_vitreg.features.folders import conversion_command
from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, ImageSource, MissingSplit, open_images, parse_columns
from modeling_vitreg.names import is_hub_name
from modeling_vitreg.pretraining.build import is_of_this_family, make_config
from modeling_vitreg.pretraining.objectives.objective import DataSummary
from modeling_vitreg.pretraining.objectives.registry import objective_class
from modeling_vitreg.pretraining.objectives.teachers import model_of_run
from modeling_vitreg.pretraining.run.recipe import Recipe, read_recipe
from modeling_vitreg.pretraining.run.sharding import KINDS as SHARDING_KINDS
from modeling_vitreg.scenes import FIRST_TEST_SCENE, SEMANTIC_NAMES, describe_preset, is_scenes, preset_settings
from modeling_vitreg.settings import make_settings, suggest_name


RECIPES = pathlib.Path(__file__).parent / "recipes"
MAPS = ("mask", "depth")  # annotations of each pixel
EVAL_SCENES = "evaluation scenes"  # those from FIRST_TEST_SCENE on; training scenes are numbered from 0
RENAMED = {  # options of older versions, see `modeling_vitreg.cli.renamed`
    "--look-every": "--eval-every {}",
    "--num-looked-at": "--num-eval-images {}",
    "--held-out": "--eval-split {}",
    "--licence": "--license {}",
    "--push_to_hub": "--push-to-hub {}",
    **{f"--{kind}-column": f"--columns {kind}={{}}" for kind in ("image", "label", "text", "mask", "depth")},
    "--reduce-labels": "--set data.reduce_labels=true",
    "--depth-scale": "--set data.depth_scale={}",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Options, recipe and processes of a run."""

    options: argparse.Namespace
    recipe: Recipe
    accelerator: Accelerator
    processes: DistributedContext

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

    def is_true_anywhere(self, flag: bool) -> bool:
        """Whether a flag is set in any process; all processes ask together."""
        return bool(self.processes.all_reduce_max(torch.tensor(float(flag), device=self.accelerator.device)))

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What the main process makes, in every process; all processes ask together."""
        made = [make() if self.is_main else None]
        return broadcast_object_list(made)[0] if self.processes.size > 1 else made[0]

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)


def parse_options(description: str, default_recipe: str, arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    model = parser.add_argument_group("Model")
    model.add_argument(
        "--recipe",
        default=default_recipe,
        help=f"recipe: a YAML file or one of {names} (default: {default_recipe})",
    )
    model.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a value of the recipe")
    model.add_argument("--registers", type=int, help="number of registers (default: that of the recipe)")
    model.add_argument(
        "--init",
        help="model or output folder of another run to start from; a model of another library (folder, Hub name, "
        "timm:NAME, checkpoint file) is converted first",
    )
    data = parser.add_argument_group("Data")
    data.add_argument(
        "--data",
        help='folder of images, WebDataset shards such as "shards/{000..099}.tar", dataset (folder or Hub name), or '
        "the built-in data, scenes:single (default) or scenes (default for masks and depth)",
    )
    data.add_argument("--split", default="train", help="training split (default: train)")
    data.add_argument("--eval-split", help="evaluation split (default: validation or test, if there is one)")
    data.add_argument("--streaming", action="store_true", help="stream the data instead of preparing it first")
    data.add_argument(
        "--annotations",
        type=pathlib.Path,
        help="COCO file (.json) or folder of Pascal VOC files (.xml) for the folder of images --data; classes of the "
        "images with --columns label=categories and settings.loss=multi_label",
    )
    data.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="KIND=COLUMN,...",
        help="columns of the data: image, label, text, mask, depth (default: found by type; caption, mask, depth). "
        "Scenes have label=colours (of the main object, default) and label=label (its shape and texture, harder). "
        "The meaning of their values: --set data.reduce_labels=true, --set data.depth_scale=0.001 ...",
    )
    data.add_argument("--num-scenes", type=int, default=4096, help="number of scenes (default: 4096)")
    data.add_argument(
        "--max-unreadable",
        type=float,
        default=0.05,
        help="share of unreadable images that stops the run (default: 0.05)",
    )
    compute = parser.add_argument_group("Compute", "These options change results by rounding at most.")
    compute.add_argument(
        "--micro-batch", type=int, help="images per forward pass and process (default: no accumulation)"
    )
    compute.add_argument("--workers", type=int, help="data workers per process (default: one per core, at most 8)")
    compute.add_argument("--precision", choices=("no", "bf16", "fp16"), help="default: that of `accelerate config`")
    compute.add_argument("--compile", action="store_true", help="compile the layers")
    compute.add_argument("--checkpoint-activations", action="store_true", help="save memory, a third slower")
    compute.add_argument(
        "--shard",
        nargs="?",
        const="full",
        choices=SHARDING_KINDS,
        help="shard the parameters over all processes (FSDP2), or with hybrid over those of each machine",
    )
    output = parser.add_argument_group("Output")
    output.add_argument("--output", type=pathlib.Path, help="output folder (default: outputs/RECIPE)")
    output.add_argument("--log-every", type=int, default=10, help="steps between records of the log (default: 10)")
    output.add_argument("--eval-every", type=int, help="steps between evaluations (default: a tenth of all)")
    output.add_argument("--save-every", type=int, help="steps between states (default: a tenth of all, at most 1000)")
    output.add_argument("--num-eval-images", type=int, default=2000, help="images for k-NN and norms (default: 2000)")
    output.add_argument("--tracker", help="tensorboard, trackio, wandb ... beside log.jsonl")
    output.add_argument("--push-to-hub", metavar="USER/NAME", help="publish the finished run as a private repository")
    output.add_argument("--license", help="license of published weights that inherit none, such as apache-2.0")
    options = parse_known(parser, sys.argv[1:] if arguments is None else arguments)
    for name in ("log_every", "eval_every", "save_every", "num_eval_images", "micro_batch", "num_scenes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more, got {getattr(options, name)}")
    if options.workers is not None and options.workers < 0:
        parser.error(f"--workers is 0 or more, got {options.workers}")
    try:
        options.columns = parse_columns(options.columns)
    except ValueError as error:
        parser.error(str(error))
    if options.workers is None:
        options.workers = min(os.cpu_count() or 1, 8)
    return options


def parse_known(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse a command; older names are accepted, and unknown ones are answered with the nearest known name."""
    current, notes = rewrite(arguments, RENAMED)
    if notes:
        print(f"renamed: {', '.join(notes)}", file=sys.stderr)
    options, unknown = parser.parse_known_args(current)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {name}; {suggest_name(name, known)}")
    return options


def choose_recipe(options: argparse.Namespace) -> Recipe:
    path = pathlib.Path(options.recipe)
    path = path if path.suffix == ".yaml" else RECIPES / f"{options.recipe}.yaml"
    if not path.exists():
        known = suggest_name(path.stem, (known.stem for known in RECIPES.glob("*.yaml")))
        raise SystemExit(f"there is no recipe {options.recipe}: expected a YAML file or a name; {known}")
    changes, options.data_settings = {}, {}
    for change in options.set:
        name, separator, value = change.partition("=")
        if not separator:
            raise SystemExit(f"--set expects NAME=VALUE, got {change!r}")
        is_data = name.startswith("data.")
        try:
            (options.data_settings if is_data else changes)[name.removeprefix("data.")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SystemExit(f"--set {change}: the value is not YAML: {error}") from None
    if options.registers is not None:
        changes["num_register_tokens"] = options.registers
    try:
        recipe = read_recipe(path).with_changes(changes)
        make_config(recipe)  # what the model does not allow is refused before any data is read
    except (ValueError, TypeError) as error:
        raise SystemExit(str(error)) from None
    options.output = options.output or pathlib.Path("outputs") / path.stem
    options.data = options.data or ("scenes" if annotation_of(recipe) in MAPS else "scenes:single")
    try:
        is_scenes(options.data)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.num_scenes > FIRST_TEST_SCENE:
        raise SystemExit(f"--num-scenes: expected at most {FIRST_TEST_SCENE}, because later scenes are test images")
    options.eval_every = options.eval_every or max(recipe.num_steps // 10, 1)
    options.save_every = options.save_every or min(max(recipe.num_steps // 10, 1), 1000)
    return recipe


def open_source(options: argparse.Namespace, recipe: Recipe):
    """The training images."""
    try:
        return open_split(options, recipe, options.split, make_data_options(options, recipe))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


def open_split(options: argparse.Namespace, recipe: Recipe, split: str, data_options: DataOptions):
    """Images of a split, or `EVAL_SCENES`.

    Raises:
        MissingSplit: there is no such split.
        ValueError, RuntimeError: see `open_images`.
    """
    if options.annotations and split not in ("train", options.split):
        raise MissingSplit(f"a file of annotations has no split {split!r}")
    scenes, settings = range(options.num_scenes), None
    if is_scenes(options.data):
        settings = preset_settings(options.data, side=recipe.crops.global_size)
    if split == EVAL_SCENES:
        scenes, split = range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + options.num_eval_images // 4), "train"
    return open_images(
        options.data,
        split=split,
        is_streaming=options.streaming,
        options=data_options,
        scenes=scenes,
        scene_settings=settings,
        annotations=options.annotations,
    )


def convert_init(run: Run) -> str | None:
    """What --init names; another library's model is converted into the folder `init` of the run first."""
    init, output = run.options.init, run.folder / "init"
    if init is None:
        return None

    def convert_model() -> tuple[str | None, str | None]:
        source = f"timm:{init[5:]}" if init.startswith("timm/") else init
        words, _, command = (conversion_command(model_of_run(source)) or "").partition("first, with: ")
        try:
            if is_of_this_family(model_of_run(source)):
                return init, None
            if not command:
                return None, f"--init: {words}"
            if is_hub_name(source) and not pathlib.Path(source).exists():
                source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
            shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped before its first state
            report = convert(source, output)
        except (ValueError, OSError, RuntimeError) as error:
            return None, f"--init: {error}. To convert it by hand: {command}"
        found = report.verification
        run.say(f"init: {init} was converted into {output}: {report.ledger['coverage']}")
        error = f"{found['largest_relative_error']:.1e}" if found["is_verified"] else f"not known, {found['why']}"
        run.say(f"init: largest error of a token compared with {found.get('reference', 'the original')}: {error}")
        return str(output), None

    folder, problem = run.from_main(convert_model)
    if problem:
        raise SystemExit(problem)
    return folder


def name_data(options: argparse.Namespace, recipe: Recipe) -> str:
    """Name of the data for reports; for rendered scenes the preset and the size."""
    if not is_scenes(options.data):
        return options.data
    return describe_preset(options.data, preset_settings(options.data, side=recipe.crops.global_size))


def make_data_options(options: argparse.Namespace, recipe: Recipe) -> DataOptions:
    """Columns that the objective needs, and the meaning of their values."""
    kind = annotation_of(recipe)
    columns: dict[str, str | None] = {"image_column": None, "label_column": None}
    if kind in MAPS or kind == "text":
        columns[f"{kind}_column"] = "caption" if kind == "text" else kind
    if is_scenes(options.data):
        columns |= {"label_column": "colours"} | {
            name: SCENE_COLUMNS[name] for name in columns if name in SCENE_COLUMNS
        }
    settings = {name: column for name, column in options.columns.items() if name in columns}
    for name in sorted(options.columns.keys() - columns.keys()):
        print(
            f"--columns {name.removesuffix('_column')}: not read by the objective {recipe.objective}", file=sys.stderr
        )
    if kind == "depth":
        settings["max_depth"] = recipe.settings.get("max_depth", DataOptions.max_depth)
    if kind == "label" and recipe.settings.get("loss") == "multi_label":
        settings["allows_label_lists"] = True
    if kind == "mask":
        named = recipe.settings.get("class_names") or (SEMANTIC_NAMES if is_scenes(options.data) else ())
        settings["num_classes"] = recipe.settings.get("num_classes") or len(named)
    return make_settings(DataOptions, {**columns, **settings, **options.data_settings}, of="data")


def annotation_of(recipe: Recipe) -> str | None:
    """Kind of annotation that the objective of a recipe needs."""
    return objective_class(recipe.objective).annotation


def name_classes(recipe: Recipe, source, *, data: str) -> Recipe:
    """The recipe completed by values from the data, such as names of classes."""
    summary = DataSummary(
        class_names=tuple(source.class_names or ()),
        mask_names=SEMANTIC_NAMES if is_scenes(data) else (),
        texts=source.texts if isinstance(source, ImageSource) else None,
    )
    try:
        found = objective_class(recipe.objective).settings_from_data(recipe.settings, summary)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return recipe.with_changes({f"settings.{name}": value for name, value in found.items()})


def name_init(init: str | None) -> str | None:
    """Model that the run started from, whose licence its weights inherit."""
    return os.path.abspath(init) if init and os.path.exists(init) else init


def versions() -> dict[str, str]:
    return reports.versions("torch", "transformers", "accelerate")

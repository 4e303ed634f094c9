"""What a training program is told: its options, the recipe that they name, the images that it learns from."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from modeling_vitreg import reports
from modeling_vitreg.distributed import DistributedContext
from modeling_vitreg.images import DataOptions, ImageSource, open_images
from modeling_vitreg.pretraining.build import make_config
from modeling_vitreg.pretraining.objectives.objective import DataSummary
from modeling_vitreg.pretraining.objectives.registry import objective_class
from modeling_vitreg.pretraining.run.recipe import Recipe, read_recipe
from modeling_vitreg.scenes import SEMANTIC_NAMES, SceneSettings


RECIPES = pathlib.Path(__file__).parent / "recipes"
MAPS = ("mask", "depth")  # annotations of each pixel
HELD_OUT_SCENES = 2**30  # first index; training scenes are counted from 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What every part of the program needs to know."""

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
    data.add_argument("--text-column", help="of captions, for CLIP (default: caption)")
    data.add_argument("--mask-column", help="of masks, for segmentation: 255 is no class (default: mask)")
    data.add_argument("--reduce-labels", action="store_true", help="0 is no class, others count from 1, as in ADE20k")
    data.add_argument("--depth-column", help="of depth maps, for depth (default: depth)")
    data.add_argument("--depth-scale", type=float, default=1.0, help="metres of a unit, 0.001 for millimetres")
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
        try:
            changes[name] = yaml.safe_load(value)
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
    options.look_every = options.look_every or max(recipe.num_steps // 10, 1)
    options.save_every = options.save_every or min(max(recipe.num_steps // 10, 1), 1000)
    return recipe


def open_source(options: argparse.Namespace, recipe: Recipe, *, split: str | None = None):
    """The images to learn from, or those of another split."""
    scenes = range(options.num_scenes)
    # Larger than a view; where the image has one label, filled by one object, as photographs of objects are.
    objects = {} if annotation_of(recipe) in MAPS else {"max_objects": 1, "zoom": 1.6}
    looks = SceneSettings(image_size=recipe.crops.global_size * 4 // 3, **objects)
    if split == "held-out scenes":
        scenes, split = range(HELD_OUT_SCENES, HELD_OUT_SCENES + options.num_looked_at // 4), "train"
    try:
        return open_images(
            options.data,
            split=split or options.split,
            is_streaming=options.streaming,
            options=make_data_options(options, recipe),
            scenes=scenes,
            scene_settings=looks,
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


def make_data_options(options: argparse.Namespace, recipe: Recipe) -> DataOptions:
    """The columns that the objective learns from, and the meaning of their values."""
    of_scenes = {"mask": "semantic_mask", "label": "colours"} if options.data == "scenes" else {}
    columns = {"image_column": options.image_column, "label_column": options.label_column or of_scenes.get("label")}
    kind = annotation_of(recipe)
    if kind == "text":
        columns["text_column"] = options.text_column or "caption"
    if kind in MAPS:
        columns[f"{kind}_column"] = getattr(options, f"{kind}_column") or of_scenes.get(kind, kind)
    max_depth = recipe.settings.get("max_depth", DataOptions.max_depth)
    return DataOptions(
        **columns, depth_scale=options.depth_scale, reduce_labels=options.reduce_labels, max_depth=max_depth
    )


def annotation_of(recipe: Recipe) -> str | None:
    """What the objective of a recipe learns from beside images."""
    return objective_class(recipe.objective).annotation


def name_classes(recipe: Recipe, source, *, data: str) -> Recipe:
    """The recipe with values that it leaves to the data, such as names of classes."""
    summary = DataSummary(
        class_names=tuple(source.class_names or ()),
        mask_names=SEMANTIC_NAMES if data == "scenes" else (),
        texts=source.texts if isinstance(source, ImageSource) else None,
    )
    try:
        found = objective_class(recipe.objective).settings_from_data(recipe.settings, summary)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return recipe.with_changes({f"settings.{name}": value for name, value in found.items()})


def name_init(init: str | None) -> str | None:
    """What a run started from: the licence of its weights is inherited from there."""
    return os.path.abspath(init) if init and os.path.exists(init) else init


def versions() -> dict[str, str]:
    return reports.versions("torch", "transformers", "accelerate")

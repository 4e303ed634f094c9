"""Give registers to a finished model by training: append them, distil them, or refine the model with them.

    accelerate launch examples/retrofit.py --init MODEL --output repaired --data my_photos --method append
    accelerate launch examples/retrofit.py --init MODEL --output repaired --data my_photos --method distill
    accelerate launch examples/retrofit.py --init MODEL --output repaired --data my_photos --method refine \\
        --set settings.registers=ring                          # the published ring of blank patches, no new tokens

MODEL is a folder, a Hub name, timm:NAME, or anything else that `vitreg convert` takes. Architecture, size and
statistics of the images come from it, all other settings from the recipe retrofit-METHOD. The run is in
OUTPUT-training, with the files of every run of pretrain.py; the same command continues it. At its end the result is
compared with the original on held-out images and written to OUTPUT if outliers fall to a fifth and the class token
keeps its direction. `vitreg retrofit --method ...` runs this program.
"""

import argparse
import json
import os
import pathlib
import shlex
import sys
import time

from arguments import choose_recipe, name_data, open_source, parse_options
from launching import ends_in_words
from pretrain import main as train

from modeling_vitreg.cards import record_expected_outputs
from modeling_vitreg.files import write_text
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.retrofit import (
    METHODS,
    NUM_REGISTERS,
    RetrofitSettings,
    check_places,
    finish_training,
    prepare_training,
)


@ends_in_words
def main() -> None:
    own, others = parse_own()
    run = pathlib.Path(f"{own.output}-training")
    recipe_options = [f"--recipe={own.recipe or f'retrofit-{own.method}'}", *(f"--set={change}" for change in own.set)]
    options = parse_options(__doc__, "", [*others, *recipe_options, f"--output={run}"])
    if options.registers is not None:
        raise SystemExit("--registers is the number of registers of a new model: use --num-registers")
    recipe = choose_recipe(options)
    try:
        check_places(own.output, own.report)
        settings = RetrofitSettings(
            num_registers=own.num_registers or NUM_REGISTERS[own.method], num_images=own.num_images, force=own.force
        )
        recipe = prepare(own, run, recipe, options, settings)
        started = [f"--recipe={run / 'start' / 'recipe.yaml'}", f"--init={run / 'start' / 'model'}"]
        train(description=__doc__, arguments=[*others, *started, f"--output={run}"])
        if is_main() and is_complete(run, recipe):
            finish(own, run, recipe, options, settings)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def parse_own() -> tuple[argparse.Namespace, list[str]]:
    """Options of this program, and those of every run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further options are those of examples/pretrain.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--init", required=True, metavar="MODEL", help="model to give registers to")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write the model to")
    parser.add_argument("--method", required=True, choices=list(METHODS), help="how the registers are trained")
    numbers = ", ".join(f"{number} for {name}" for name, number in NUM_REGISTERS.items())
    parser.add_argument("--num-registers", type=int, help=f"registers to add (default: {numbers})")
    parser.add_argument("--num-images", type=int, default=200, help="images to measure outliers on (default: 200)")
    parser.add_argument("--report", type=pathlib.Path, help="folder for a page that compares before and after")
    parser.add_argument("--force", action="store_true", help="write the model even if it is not repaired")
    parser.add_argument("--recipe", help="YAML file or name of a recipe (default: retrofit-METHOD)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a value of the recipe"
    )
    return parser.parse_known_args()


def prepare(
    own: argparse.Namespace, run: pathlib.Path, recipe: Recipe, options: argparse.Namespace, settings: RetrofitSettings
) -> Recipe:
    """The recipe for this model; the first process makes what the run starts from, the others wait."""
    while not is_main() and not (run / "start" / "recipe.yaml").exists():
        time.sleep(0.2)
    words = {"method": own.method, "recipe": recipe, "settings": settings}
    completed = prepare_training(own.init, run, images=open_source(options, recipe), **words)
    if is_main():
        write_text(run / "start" / "recipe.yaml", json.dumps(completed.as_dict(), indent=1))  # JSON is YAML
    return completed


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_complete(run: pathlib.Path, recipe: Recipe) -> bool:
    """Whether all steps were taken; a run that was stopped is continued by the same command."""
    summary = run / "training.json"
    return summary.exists() and json.loads(summary.read_text())["steps"] == recipe.num_steps


def finish(
    own: argparse.Namespace, run: pathlib.Path, recipe: Recipe, options: argparse.Namespace, settings: RetrofitSettings
) -> None:
    """Compare with the original, and write the model."""
    made = finish_training(
        run,
        own.output,
        images=open_source(options, recipe),
        settings=settings,
        report_folder=own.report,
        source_of_images=name_data(options, recipe),
        command=shlex.join(["accelerate", "launch", *sys.argv]),
    )
    record_expected_outputs(own.output)
    print(made.verdict["sentence"])
    print(f"wrote {own.output}" + (f" and {own.report / 'index.html'}" if own.report and made.comparison else ""))


if __name__ == "__main__":
    main()

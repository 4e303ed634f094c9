"""Estimate memory, operations and time of a training run; takes seconds and no GPU.

python examples/plan.py --recipe dinov2-vitg14 --processes 64 --micro-batch 12 --shard
"""

import argparse
import json
import pathlib

import yaml

from modeling_vitreg.pretraining.estimate import PRECISIONS, estimate
from modeling_vitreg.pretraining.run.recipe import read_recipe


RECIPES = pathlib.Path(__file__).parent / "recipes"


def main() -> None:
    options = parse_options()
    path = pathlib.Path(options.recipe)
    path = path if path.suffix == ".yaml" else RECIPES / f"{options.recipe}.yaml"
    try:
        changes = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in options.set)}
        recipe = read_recipe(path).with_changes(changes)
        made = estimate(
            recipe,
            num_processes=options.processes,
            micro_batch=options.micro_batch or max(recipe.batch_size // options.processes, 1),
            precision=options.precision,
            is_sharded=options.shard,
            checkpoints_activations=options.checkpoint_activations,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(made.as_dict(), indent=2) if options.json else made)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--recipe", default="demo-cpu", help=f"a YAML file, or one of: {names} (default: demo-cpu)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a value of the recipe"
    )
    parser.add_argument("--processes", type=int, default=1, help="GPUs, all nodes together (default: 1)")
    parser.add_argument("--micro-batch", type=int, help="images at once in a process (default: all, no accumulation)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: bf16")
    parser.add_argument("--shard", action="store_true", help="spread the parameters over the processes")
    parser.add_argument("--checkpoint-activations", action="store_true", help="a third slower, far less memory")
    parser.add_argument("--json", action="store_true", help="every number, for a program")
    return parser.parse_args()


if __name__ == "__main__":
    main()

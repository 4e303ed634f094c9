"""Estimate memory, operations and time of a training run; takes seconds and no GPU.

python examples/plan.py --recipe dinov2-vitg14 --processes 64 --micro-batch 12 --shard
"""

import argparse
import dataclasses
import json
import math
import pathlib

import yaml

from modeling_vitreg.pretraining.estimate import DEVICES, PRECISIONS, UTILISATION, Estimate, estimate
from modeling_vitreg.pretraining.run.recipe import read_recipe


RECIPES = pathlib.Path(__file__).parent / "recipes"


def main() -> None:
    options = parse_options()
    path = pathlib.Path(options.recipe)
    path = path if path.suffix == ".yaml" else RECIPES / f"{options.recipe}.yaml"
    try:
        if wrong := [text for text in options.set if "=" not in text]:
            raise ValueError(f"--set expects NAME=VALUE, got {wrong[0]!r}")
        changes = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in options.set)}
        recipe = read_recipe(path).with_changes(changes)
        made = estimate(
            recipe,
            num_processes=options.processes,
            micro_batch=options.micro_batch or max(recipe.batch_size // max(options.processes, 1), 1),
            precision=options.precision,
            is_sharded=options.shard,
            checkpoints_activations=options.checkpoint_activations,
        )
    except (ValueError, yaml.YAMLError) as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(dataclasses.asdict(made), indent=2) if options.json else write_table(made))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--recipe", default="demo-cpu", help=f"a YAML file, or one of: {names} (default: demo-cpu)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a value of the recipe"
    )
    parser.add_argument("--processes", type=int, default=1, help="GPUs, all nodes together (default: 1)")
    parser.add_argument(
        "--micro-batch", type=int, help="images per forward pass and process (default: no accumulation)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: bf16")
    parser.add_argument("--shard", action="store_true", help="shard the parameters over the processes (FSDP2)")
    parser.add_argument(
        "--checkpoint-activations", action="store_true", help="recompute activations: less memory, a third slower"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    return parser.parse_args()


def write_table(made: Estimate) -> str:
    """The estimate as a table."""

    def share(name: str) -> str:
        return f"{made.flops[name] / made.flops_per_step:.0%}"

    how = ["sharded" if made.is_sharded else "not sharded"]
    how += ["activations checkpointed"] if made.checkpoints_activations else []
    accumulated = f" x {made.num_accumulations} accumulations" if made.num_accumulations > 1 else ""
    rows = [
        f"{made.objective} on {made.num_processes} processes x {made.micro_batch} images{accumulated}, "
        f"{made.precision}, {', '.join(how)}",
        "",
        "parameters",
        *(f"  {name:<14}{_million(count):>12}" for name, count in made.parameters.items()),
        "memory per process",
        *(f"  {name:<14}{_size(size):>12}" for name, size in made.memory.items() if size),
        f"  {'total':<14}{_size(made.total_memory):>12}  and 1 to 2 GiB for the device's own libraries",
        "step",
        f"  {'images':<14}{made.images_per_step:>12,}",
        f"  {'tokens':<14}{made.tokens_per_step:>12,}",
        f"  {'operations':<14}{_scaled(made.flops_per_step):>12}  teacher {share('teacher')}, student "
        f"{share('student')} (its heads {share('heads')}), backward {share('backward')}",
        f"  {'sent':<14}{_size(made.reduced_bytes):>12}  by each process",
        "state",
        f"  {'on disk':<14}{_size(made.state_bytes):>12}",
        f"  {'host memory':<14}{_size(made.host_bytes):>12}  in the process that writes it",
        "run",
        f"  {'steps':<14}{made.num_steps:>12,}",
        f"  {'operations':<14}{made.total_flops:>12.3g}",
        *(
            f"  {'hours':<14}{made.hours(flops_per_second=rate):>12,.1f}  if {made.num_processes} {name} reach "
            f"{UTILISATION:.0%} of {rate / 1e12:.0f} T/s, an assumption"
            for name, rate in DEVICES.items()
        ),
    ]
    return "\n".join(rows)


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def _scaled(number: float) -> str:
    power = max(0, min(int(math.log10(max(number, 1))) // 3, 4))
    return f"{number / 1000**power:,.1f} {' KMGT'[power]}"


def _million(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


if __name__ == "__main__":
    main()

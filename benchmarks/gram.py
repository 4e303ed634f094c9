"""Time and memory of the Gram term of DINOv2 on a CPU: its share of a step, and the loss at 768 pixels.

    python benchmarks/gram.py

A step is forward and backward of the objective with 2 global views of 256 and 8 local views of 112 pixels, as in
DINOv3: without a Gram term, with one at equal size, and with one at twice the size (512 for 256, as published), in
turns; a share is (with - without) / with, of medians. Operations are counted from shapes, for larger models too.
Memory is that of tensors that are alive in forward and backward of the loss alone, on 2 images of 768 pixels at patch
16, 2,304 patches.
"""

import argparse
import statistics
import time

import torch

from modeling_vitreg.memory import MemoryTracker
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.estimate import estimate
from modeling_vitreg.pretraining.objectives.gram import GramSettings, gram_loss
from modeling_vitreg.pretraining.run.recipe import Recipe, make_recipe
from modeling_vitreg.pretraining.views.masking import MaskSettings, draw_masks


TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "patch_size": 16,
}
GRAMS = {"without": {}, "equal size": {"weight": 2.0}, "twice the size": {"weight": 2.0, "resolution": 2.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="images (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, batch {options.batch}, {options.rounds} rounds\n")
    time_steps(options)
    count_operations()
    measure_memory()


def recipe_of(gram: dict, model: dict) -> Recipe:
    crops = {"global_size": 256, "local_size": 112, "num_local": 8}
    return make_recipe({"model": model, "crops": crops, "settings": {"gram": gram}, "batch_size": 8, "num_steps": 100})


def time_steps(options: argparse.Namespace) -> None:
    objectives = {name: make_objective(recipe_of(gram, TINY)).train() for name, gram in GRAMS.items()}
    masks = (
        draw_masks(
            options.batch,
            num_views=2,
            grid=(16, 16),
            settings=MaskSettings(),
            generator=torch.Generator().manual_seed(0),
        )
        .flatten(0, 1)
        .flatten(1)
    )
    batch = {"masks": masks, "masked_patches": masks.flatten().nonzero().squeeze(1)}
    batch["global_views"] = torch.randn(2, options.batch, 3, 256, 256)
    batch["local_views"] = torch.randn(8, options.batch, 3, 112, 112)
    seconds = {name: [] for name in [*GRAMS, "loss alone"]}
    tokens = [torch.randn(2 * options.batch, 256, 64, requires_grad=is_own) for is_own in (True, False)]
    for _ in range(options.rounds + 1):
        for name, objective in objectives.items():
            side = 512 if name == "twice the size" else 256
            batch["gram_views"] = torch.randn(2, options.batch, 3, side, side)
            start = time.process_time()
            objective(batch, step=0)["total"].backward()
            seconds[name].append(time.process_time() - start)
        start = time.process_time()
        gram_loss(*tokens, settings=GramSettings()).backward()
        seconds["loss alone"].append(time.process_time() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first round warms up
    print("a step with a tiny model and heads of 65,536 prototypes, seconds of CPU time")
    for name, median in medians.items():
        times = seconds[name][1:]
        share = median / medians["equal size"] if name == "loss alone" else 1 - medians["without"] / median
        print(f"  {name:<16}{median:9.4f}  ({min(times):.4f} to {max(times):.4f})  share of the term {share:6.1%}")


def count_operations() -> None:
    print("\noperations of a step, from shapes, and the share of the term")
    for name, model in {"tiny": TINY, "ViT-S/16": {"preset": "small/16"}, "ViT-L/16": {"preset": "large/16"}}.items():
        counts = {
            label: estimate(recipe_of(gram, model), num_processes=1, micro_batch=8).flops_per_step
            for label, gram in GRAMS.items()
        }
        shares = ", ".join(f"{label} {1 - counts['without'] / count:.1%}" for label, count in counts.items())
        print(f"  {name:<10}{counts['without']:.3g} without; {shares}")


def measure_memory() -> None:
    print("\npeak of the loss at 768 pixels, forward and backward, 2 images; a P x P matrix of both: 81 MiB")
    for width in (384, 768, 1024):
        peaks = []
        for negatives in ("keep", "clip"):  # clipped, the products of D x D cannot be used
            student, teacher = torch.randn(2, 2304, width, requires_grad=True), torch.randn(2, 2304, width)
            with MemoryTracker(known=[student, teacher]) as tracker:
                gram_loss(student, teacher, settings=GramSettings(negatives=negatives)).backward()
            peaks.append(tracker.peak / 2**20)
        print(f"  D {width:<6}by D x D {peaks[0]:7.1f} MiB    by P x P {peaks[1]:7.1f} MiB")


if __name__ == "__main__":
    main()

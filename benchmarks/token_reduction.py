"""Time models that work on fewer tokens beside the plain model with the same weights.

    python benchmarks/token_reduction.py

The models take turns, round after round, so that a machine that changes its speed changes it for all. A figure is the
median over the rounds of plain time / time, with its smallest and largest value: above 1, fewer tokens are faster.
float32, random weights, CPU or the first GPU.
"""

import argparse
import statistics
import time

import torch

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification


# Joined patches of each layer: 13 of 196, and the same share of 37 x 37.
JOBS = {
    "ViT-S/16, 224 px": (
        "small/16",
        224,
        {
            "merge 13": {"kind": "merge", "per_layer": 13},
            "learn 8": {"kind": "learn", "num_tokens": 8},  # in the middle
            "learn 8, fuser": {"kind": "learn", "num_tokens": 8, "has_fuser": True},
        },
    ),
    "ViT-S/14, 518 px": ("small/14", 518, {"merge 90": {"kind": "merge", "per_layer": 90}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all models (default 9)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"batch {options.batch_size}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for job, (preset, size, reductions) in JOBS.items():
        models = build(preset, size, {"plain": None, **reductions}, device)
        times = measure(models, torch.randn(options.batch_size, 3, size, size, device=device), options.rounds)
        for name, seconds in times.items():
            ratios = [plain / own for plain, own in zip(times["plain"], seconds)]
            speed = options.batch_size / statistics.median(seconds)
            shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{job:20} {name:12} {speed:8.1f} images/s   {shown}")


def build(preset: str, size: int, reductions: dict, device: str) -> dict:
    """Models with the same weights, where they have the same parameters."""
    models = {}
    for name, reduction in reductions.items():
        torch.manual_seed(0)
        config = ViTWithRegistersConfig.from_preset(preset, image_size=size, token_reduction=reduction)
        models[name] = ViTWithRegistersForImageClassification(config).eval().to(device)
    return models


@torch.inference_mode()
def measure(models: dict, images: torch.Tensor, rounds: int) -> dict:
    """Seconds of each model in each round, after one round that does not count."""
    times = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()

"""Time the removal of halted patches (A-ViT) beside masking them and beside a model in which nothing halts.

    python benchmarks/token_halting.py

The images of a batch halt at random places, each at others. The models have the same weights and take turns, round
after round. A figure is the median over the rounds of time / time of removal, with its smallest and largest value:
above 1, removal is faster. ViT-S/16 at 224 px, float32, random weights, CPU or the first GPU.
"""

import argparse
import math
import statistics

import torch
from token_reduction import measure

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersForImageClassification


SCALE, CENTER, PATCH, SIDE = 10.0, 30.0, 16, 224
JOBS = [(share, layer) for layer in (2, 6, 10) for share in (0.1, 0.3, 0.5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all models (default 9)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"batch {options.batch_size}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for share, layer in JOBS:
        models = build(layer, device)
        images = draw(share, options.batch_size).to(device)
        with torch.inference_mode():
            depth = models["removed"](images).reduction.halting_depth.float()
        times = measure(models, images, options.rounds)
        found = f"{(depth == layer).float().mean():.0%} halt behind layer {layer}, mean depth {depth.mean():.2f} of 12"
        for name in ("masked", "plain"):
            ratios = [own / removed for own, removed in zip(times[name], times["removed"])]
            print(f"{found}: {name:6} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def build(layer: int, device: str) -> dict:
    """Models with the same weights, in which a patch of white pixels halts behind `layer` and a black one never."""
    models = {}
    score = 1 / layer  # so many of them add up to 1
    first_channel = (CENTER + math.log(score / (1 - score))) / SCALE
    for name, has_removal in (("plain", None), ("masked", False), ("removed", True)):
        torch.manual_seed(0)
        reduction = {"kind": "halt", "scale": SCALE, "center": CENTER, "has_removal": has_removal}
        reduction = None if has_removal is None else reduction
        config = ViTWithRegistersConfig.from_preset("small/16", image_size=SIDE, token_reduction=reduction)
        model = ViTWithRegistersForImageClassification(config).eval().to(device)
        embeddings = model.vitreg.embeddings
        with torch.no_grad():
            embeddings.patch_embeddings.weight[0] = first_channel / (3 * PATCH * PATCH)
            embeddings.position_embeddings.weight[..., 0] = 0
            for each in model.vitreg.layers:  # the first channel stays as it is
                for part in (each.attention.proj, each.mlp.fc2):
                    part.weight[0] = part.bias[0] = 0
        models[name] = model
    return models


def draw(share: float, num_images: int) -> torch.Tensor:
    """Images in which a patch is white with the probability `share`, else black."""
    generator = torch.Generator().manual_seed(0)
    white = torch.rand(num_images, 1, SIDE // PATCH, SIDE // PATCH, generator=generator) < share
    return white.float().repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(-1, 3, -1, -1)


if __name__ == "__main__":
    main()

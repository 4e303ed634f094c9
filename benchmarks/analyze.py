"""Time a whole survey of artifacts beside plain forward passes of the same images through the same model.

    python benchmarks/analyze.py

The plain pass of a batch is run and timed just before the survey measures that batch, so that a machine that changes
its speed changes it for both. Both prepare the images (resize, normalise); the survey includes attention, ablation and
the report, and no probes, no figures. CPU or the first GPU; float32, random weights.
"""

import argparse
import time

import numpy as np
import torch
from PIL import Image

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import load_encoder


def main() -> None:
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = ViTWithRegistersConfig.from_preset(f"{options.size}/16", num_register_tokens=4)
    encoder = load_encoder(ViTWithRegistersModel(config).eval(), device=device, name=f"ViT-{options.size}/16")
    settings = SurveySettings(num_images=None, batch_size=options.batch_size)
    warm_up = list(make_images(options.batch_size))
    survey(encoder, warm_up, settings=settings)
    times = {}
    start = time.perf_counter()
    images = interleave(encoder, options.images, options.batch_size, times)
    report, _ = survey(encoder, images, settings=settings)
    whole = time.perf_counter() - start - times["plain"] - times["making"]
    plain = times["plain"]
    print(f"\n{report.model}, {report.images['num_images']} images of 224 px, batch {options.batch_size}, {device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"plain forward passes {plain:8.2f} s")
    print(f"survey               {whole:8.2f} s = {whole / plain:.3f} times")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="preset of the model (default small)")
    parser.add_argument("--images", type=int, default=1000, help="number of images (default 1000)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default 32)")
    return parser.parse_args()


def make_images(number: int):
    """Smooth colour noise, decoded already: the time of reading files is no part of this."""
    random = np.random.default_rng(0)
    for _ in range(number):
        yield Image.fromarray(random.integers(0, 256, (28, 28, 3)).astype(np.uint8)).resize((256, 256))


def interleave(encoder, number: int, batch_size: int, times: dict):
    """The images for the survey; on the way each batch goes through the plain model, on the clock of `times`."""
    times |= {"plain": 0.0, "making": 0.0}
    for first in range(0, number, batch_size):
        start = time.perf_counter()
        batch = list(make_images(min(batch_size, number - first)))
        middle = time.perf_counter()
        run_plainly(encoder, batch)
        times["making"] += middle - start
        times["plain"] += time.perf_counter() - middle
        yield from batch


@torch.no_grad()
def run_plainly(encoder, batch: list) -> None:
    encoder.model(encoder.prepare(batch).to(encoder.device))
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

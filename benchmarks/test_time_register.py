"""Time a model with a test-time register beside the original: ViT-S/14 at 518 pixels, eager and compiled.

    python benchmarks/test_time_register.py

Both run in turn, round after round. The figure is the least processor time of each, because other programs on the
machine only ever add to it; the machine need not be idle. CPU, float32, random weights and units.
"""

import argparse
import time

import torch

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.retrofit.register_neurons import add_test_time_register


UNITS = {4: range(10), 5: range(20), 6: range(20)}  # 50 units, as published for DINOv2 L/14


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    config = ViTWithRegistersConfig.from_preset(
        "small/14", image_size=518, num_register_tokens=0, layer_scale_init_value=1.0
    )
    original = ViTWithRegistersModel(config).eval()
    repaired = add_test_time_register(original, {layer: list(units) for layer, units in UNITS.items()})
    control = add_test_time_register(original, {})
    images = torch.randn(1, 3, options.size, options.size)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds, {options.size} px")
    for name in ("eager", "compiled"):
        models = {"original": original, "with a zero token alone": control, "with a test-time register": repaired}
        if name == "compiled":
            models = {key: torch.compile(model) for key, model in models.items()}
        seconds = measure(models, images, options.rounds)
        for key, value in seconds.items():
            print(f"{name:9} {key:26} {1000 * value:8.1f} ms  {value / seconds['original']:.3f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=518, help="side of the image in pixels (default 518)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all models (default 15)")
    return parser.parse_args()


@torch.no_grad()
def measure(models: dict, images: torch.Tensor, rounds: int) -> dict[str, float]:
    """Least processor time of a forward of each model, in seconds."""
    found = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            start = time.process_time()
            model(images)
            found[name].append(time.process_time() - start)
    return {name: min(values[2:]) for name, values in found.items()}  # the first rounds warm up and compile


if __name__ == "__main__":
    main()

"""Time batched LOST beside the loop of its authors, on the same features.

    git clone https://github.com/valeoai/LOST ../LOST
    python benchmarks/lost.py --lost ../LOST

Features are given, 32 x 32 patches an image; both programs end with boxes. They take turns, round after round, so that
a machine that changes its speed changes it for both; the figures are medians over rounds, of times and of ratios
within a round. Beside them stands the bare product features @ features.T by the library, of all images at once; ours
may be faster, for it multiplies each pair of patches once. The lines below say what a sweep over biases costs, in
units of that product. CPU or the first GPU, float32.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time
import types

import torch
from torch import Tensor

from modeling_vitreg.discovery import lost, lost_with_biases
from modeling_vitreg.discovery.boxes import component_boxes, seed_components


GRID, PATCH = (32, 32), (16, 16)
BIASES = [-0.1 * step for step in range(9)]


def main() -> None:
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    reference = load_reference(options.lost)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"LOST, {options.num_images} images, {GRID[0]} x {GRID[1]} patches, torch {torch.__version__}, {threads}")
    print(f"{options.rounds} rounds; ratios within a round\n")
    print(f"{'width':>6} {'ours, ms':>9} {'theirs':>7} {'theirs/ours':>12} {'product, ms':>12} {'ours/product':>13}")
    for width in options.widths:
        features = make_features(options.num_images, width).to(device)
        programs = {
            "ours": functools.partial(run_ours, features),
            "theirs": functools.partial(run_theirs, reference, features),
            "product": lambda features=features: features @ features.transpose(1, 2),
        }
        for number in (0, len(BIASES) - 1):
            programs[number] = functools.partial(run_sweep, features, BIASES[: number + 1])
        check_equal(features, reference)
        times = measure(programs, options.rounds, features.device)
        report(width, times, options.num_images)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lost", type=pathlib.Path, required=True, help="folder of a clone of valeoai/LOST")
    parser.add_argument("--num-images", type=int, default=16, help="images in a batch (default 16)")
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768], help="of the features (default 384 768)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all programs (default 7)")
    return parser.parse_args()


def load_reference(folder: pathlib.Path) -> types.ModuleType:
    """The module `object_discovery` of the clone, without the data sets that it asks for and does not use here."""
    if not (folder / "object_discovery.py").is_file():
        raise SystemExit(f"{folder}: expected a clone of valeoai/LOST, with object_discovery.py")
    known = sys.modules.get("datasets")
    sys.modules["datasets"] = types.SimpleNamespace(bbox_iou=None)
    sys.path.insert(0, str(folder))
    try:
        import object_discovery
    finally:
        sys.path.pop(0)
        del sys.modules["datasets"]
        if known is not None:
            sys.modules["datasets"] = known
    return object_discovery


def make_features(num_images: int, width: int) -> Tensor:
    """Features that change smoothly over the image, with a common direction, as those of networks do."""
    maps = torch.nn.functional.avg_pool2d(torch.randn(num_images, width, *GRID), 5, 1, 2)
    return maps.flatten(2).transpose(1, 2).contiguous() + 0.02


def run_ours(features: Tensor) -> object:
    found = lost(features)
    return component_boxes(seed_components(found.mask, found.seeds, grid=GRID), patch_shape=PATCH)


def run_theirs(reference: types.ModuleType, features: Tensor) -> list:
    size = (3, *(side * patch for side, patch in zip(GRID, PATCH)))
    return [reference.lost(image[None], GRID, PATCH, size)[0] for image in features]


def run_sweep(features: Tensor, biases: list[float]) -> list:
    results = lost_with_biases(features, biases=biases, is_normalized=True)
    return [
        component_boxes(seed_components(found.mask, found.seeds, grid=GRID), patch_shape=PATCH) for found in results
    ]


def check_equal(features: Tensor, reference: types.ModuleType) -> None:
    """The boxes of both programs; the authors' order of patches with equal degrees is not defined."""
    pairs = zip(run_ours(features).tolist(), run_theirs(reference, features))
    num_equal = sum(ours == [float(side) for side in theirs] for ours, theirs in pairs)
    print(f"{'':6} {num_equal} of {len(features)} boxes equal; the others differ by ties in the degree")


def measure(programs: dict, rounds: int, device: torch.device) -> dict:
    """Seconds of each program in each round, after one round that is not counted."""
    times = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def report(width: int, times: dict, num_images: int) -> None:
    def ratio(first: object, second: object) -> float:
        return statistics.median(a / b for a, b in zip(times[first], times[second]))

    milliseconds = {name: 1000 * statistics.median(values) / num_images for name, values in times.items()}
    print(
        f"{width:6} {milliseconds['ours']:9.2f} {milliseconds['theirs']:7.2f} {ratio('theirs', 'ours'):12.2f} "
        f"{milliseconds['product']:12.2f} {ratio('ours', 'product'):13.2f}"
    )
    for number in (0, len(BIASES) - 1):
        words = f"sweep of {number + 1} bias{'es' if number else ''}"
        print(f"{'':6} {words:18} {milliseconds[number]:6.2f} ms = {ratio(number, 'product'):.2f} products")


if __name__ == "__main__":
    main()

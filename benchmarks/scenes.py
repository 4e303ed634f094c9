"""Count the scenes per second that the renderer, and a loader with several workers, deliver at several sizes.

    OMP_NUM_THREADS=1 python benchmarks/scenes.py

Column `render` is one process without a dataset, per second of its CPU time, which hardly depends on who else uses
the machine. The others read the stream through a DataLoader, with its encoding and decoding, per second of wall time.
The figure is the best of the rounds, which take turns.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader

from modeling_vitreg.scenes import SceneSettings, render_scene, stream_scenes


def main() -> None:
    options = parse_options()
    names = ["render", *(f"{workers} worker{'s' * (workers != 1)}" for workers in options.workers)]
    print(f"scenes per second, {os.cpu_count()} CPUs\n\n{'pixels':>8}" + "".join(f"{name:>12}" for name in names))
    for size in options.sizes:
        settings = SceneSettings(image_size=size)
        best = [0.0] * len(names)
        for _ in range(options.rounds):
            rates = [measure(render(settings), options.seconds, clock=time.process_time)]
            rates += [measure(load(settings, w), options.seconds, clock=time.perf_counter) for w in options.workers]
            best = [max(pair) for pair in zip(best, rates)]
        print(f"{size:8}" + "".join(f"{rate:12.1f}" for rate in best), flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 224], help="sides of the image")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers of the loader")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each (default 2)")
    return parser.parse_args()


def render(settings: SceneSettings) -> Iterator:
    return (render_scene(index, settings=settings) for index in itertools.count())


def load(settings: SceneSettings, workers: int) -> Iterator:
    return iter(DataLoader(stream_scenes(settings=settings), batch_size=None, num_workers=workers))


def measure(scenes: Iterator, seconds: float, *, clock: Callable[[], float]) -> float:
    for _ in range(8):  # tables are filled and workers are up
        next(scenes)
    count, start = 0, clock()
    while clock() - start < seconds:
        next(scenes)
        count += 1
    return count / (clock() - start)


if __name__ == "__main__":
    main()

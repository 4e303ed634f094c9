"""Count the images per second whose views one process cuts: ours beside facebookresearch/dinov2 and lightly.

    git clone https://github.com/facebookresearch/dinov2
    pip install lightly
    python benchmarks/views.py --dinov2 dinov2

Photographs that scikit-image brings along, already decoded, give two views of 224 and eight of 96 pixels each;
`--jpeg` starts from JPEG files of 500 x 375 pixels. The programs have the same sizes, scales, colours and
probabilities, those of the blur among them: the class of dinov2 blurs with one minus the probability that it is told,
and the others are told what it does. They take turns, on one thread; the figures are medians over rounds, in seconds
of CPU time, which depend less than the wall clock on who else uses the machine.

"cut" is the transform of one image, "worker" that and stacking: the work of a worker of the training loader for a
model on a GPU. "all" is whatever is done until the training loop has what it feeds to the network, on this CPU. Ours
cuts bytes and draws how their colours change; `change_batch` changes the colours of the batch, and
`Objective.to_device` normalises it. The others come normalised from the transform, are stacked, and cast to float16 as
dinov2's loader does. Ratios are ours / peer (above 1: ours is faster), of everything.

`--older FILE` adds the `MultiCrop` of another version of modeling_vitreg/pretraining/views/crops.py, from `git show`.

What stays different: lightly blurs with Pillow's approximation, the others with a kernel of 9 pixels. A peer that is
not at hand is left out. Needs `pip install "modeling-vitreg[train,analysis]"`.
"""

import argparse
import importlib.util
import io
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import IMAGENET_MEAN, IMAGENET_STD
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.views.colors import change_batch
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop
from modeling_vitreg.pretraining.views.masking import MaskSettings


GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)
GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 224, 96, 8
JPEG_SIZE = (500, 375)
BLUR = (0.0, 0.9, 0.5)  # what dinov2 does: first global view, second, local views
PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket", "hubble_deep_field", "retina")
CROPS = {
    "num_local": NUM_LOCAL,
    "global_size": GLOBAL_SIZE,
    "local_size": LOCAL_SIZE,
    "global_scale": GLOBAL_SCALE,
    "local_scale": LOCAL_SCALE,
    "blur": BLUR,
}
HOW_TO_GET = {
    "older": "see --older",
    "dinov2": "git clone https://github.com/facebookresearch/dinov2, then --dinov2 dinov2",
    "lightly": "pip install lightly, or git clone https://github.com/lightly-ai/lightly, then --lightly lightly",
}


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")  # the peers' imports name what they lack
    torch.set_num_threads(1)
    programs = make_programs(options)
    print(
        f"2 views of {GLOBAL_SIZE} and {NUM_LOCAL} of {LOCAL_SIZE} pixels, blur {BLUR}, one thread, torch "
        f"{torch.__version__}\nimages per second of CPU time and process\n"
    )
    header = f"{'photograph':18} {'pixels':>11}"
    for name in programs:
        header += f" | {name:>7}: {'cut':>6} {'worker':>6} {'all':>6}" + (f" {'ratio':>6}" if name != "ours" else "")
    print(header)
    overall = {name: [] for name in programs}
    for photograph in options.photographs:
        image = Image.fromarray(getattr(skimage.data, photograph)()).convert("RGB")
        if options.jpeg:
            image, file = image.resize(JPEG_SIZE, Image.Resampling.BICUBIC), io.BytesIO()
            image.save(file, "jpeg", quality=90)
            seconds = measure(programs, lambda file=file: Image.open(file).convert("RGB"), options)
        else:
            seconds = measure(programs, lambda image=image: image, options)
        for name in programs:
            overall[name].append({part: statistics.median(values) for part, values in seconds[name].items()})
        report(f"{photograph:18} {f'{image.width} x {image.height}':>11}", {n: overall[n][-1] for n in programs})
    means = {
        name: {part: statistics.mean(row[part] for row in rows) for part in rows[0]} for name, rows in overall.items()
    }
    report(f"{'all, one of each':18} {'':>11}", means)
    ours = means["ours"]
    print("\nmilliseconds an image: " + ", ".join(f"{part} {1000 * ours[part]:.2f}" for part in ours) + " (ours)")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=pathlib.Path, help="a clone of facebookresearch/dinov2")
    parser.add_argument("--lightly", type=pathlib.Path, help="a clone of lightly-ai/lightly (default: as installed)")
    parser.add_argument("--older", type=pathlib.Path, help="crops.py of another version")
    parser.add_argument("--jpeg", action="store_true", help="start from JPEG files of 500 x 375 pixels")
    parser.add_argument("--photographs", nargs="+", default=PHOTOGRAPHS, help="functions of skimage.data")
    parser.add_argument("--batch", type=int, default=16, help="images in a round (default 16)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all programs (default 5)")
    return parser.parse_args()


# The same job for all ------------------------------------------------------------------------------------------------


def make_programs(options: argparse.Namespace) -> dict:
    programs = {"ours": Ours()}
    for name, kind in (("older", Older), ("dinov2", Dinov2), ("lightly", Lightly)):
        try:
            programs[name] = kind(getattr(options, name))
        except ImportError as error:
            print(f"{name} is left out ({error}): {HOW_TO_GET[name]}")
    return programs


class Program:
    """What one image, then a batch, goes through."""

    def stack(self, images: list) -> dict[str, Tensor]:
        return {name: torch.stack([views[name] for views in images], dim=1) for name in images[0]}

    def change_colors(self, batch: dict) -> dict:
        return batch

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class Ours(Program):
    change_colors = staticmethod(change_batch)

    def __init__(self):
        self.cut = MultiCrop(CropSettings(**CROPS))
        # The smallest there is: only what it does to a batch is measured.
        config = ViTWithRegistersConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=16, has_mask_token=True
        )
        self._objective = DINOv2(
            ViTWithRegistersModel(config),
            settings=DINOv2Settings(num_prototypes=8, hidden_width=8, bottleneck_width=8),
            crops=CropSettings(**CROPS),
            masks=MaskSettings(),
            num_steps=1,
        )

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._objective.to_device(batch, device=torch.device("cpu"), mean=IMAGENET_MEAN, std=IMAGENET_STD)


class Older(Ours):
    """Another version of `MultiCrop`, which changes colours itself or not."""

    def __init__(self, path: pathlib.Path | None):
        if path is None:
            raise ImportError("no --older")
        super().__init__()
        spec = importlib.util.spec_from_file_location("older_crops", path)
        module = sys.modules["older_crops"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.cut = module.MultiCrop(module.CropSettings(**CROPS))


class Dinov2(Program):
    def __init__(self, folder: pathlib.Path | None):
        if folder is None:
            raise ImportError("no --dinov2")
        put_first(folder)
        from dinov2.data.augmentations import DataAugmentationDINO

        self.cut = DataAugmentationDINO(
            GLOBAL_SCALE, LOCAL_SCALE, NUM_LOCAL, global_crops_size=GLOBAL_SIZE, local_crops_size=LOCAL_SIZE
        )
        first, others, local = self.cut.global_transfo1, self.cut.global_transfo2, self.cut.local_transfo
        blur = first.transforms[1].p, others.transforms[1].transforms[0].p, local.transforms[1].p
        if any(abs(theirs - told) > 1e-9 for theirs, told in zip(blur, BLUR)):
            raise SystemExit(f"this clone of dinov2 blurs with probabilities {blur}, not {BLUR}: change BLUR")

    def stack(self, images: list) -> dict[str, Tensor]:
        stacked = {}
        for name in ("global_crops", "local_crops"):
            views = zip(*(image[name] for image in images))
            stacked[name] = torch.stack([part for parts in views for part in parts]).half()
        return stacked


class Lightly(Program):
    def __init__(self, folder: pathlib.Path | None):
        if folder is not None:
            put_first(folder)
        from lightly.transforms import DINOTransform

        self.cut = DINOTransform(
            global_crop_size=GLOBAL_SIZE,
            global_crop_scale=GLOBAL_SCALE,
            local_crop_size=LOCAL_SIZE,
            local_crop_scale=LOCAL_SCALE,
            n_local_views=NUM_LOCAL,
            gaussian_blur=BLUR,
        )

    def stack(self, images: list) -> list[Tensor]:
        return [torch.stack(views) for views in zip(*images)]


def put_first(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}")
    sys.path.insert(0, str(folder.resolve()))


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(programs: dict, read: Callable[[], Image.Image], options: argparse.Namespace) -> dict:
    """Seconds an image of each part of the work, in each round, after one round that does not count."""
    seconds = {name: {"cut": [], "stack": [], "colours": [], "on device": []} for name in programs}
    for round_number in range(options.repeats + 1):
        for name, program in programs.items():
            torch.manual_seed(round_number)
            np.random.seed(round_number)  # lightly draws from both
            times = [time.process_time()]
            views = [program.cut(read()) for _ in range(options.batch)]
            times.append(time.process_time())
            batch = program.stack(views)
            times.append(time.process_time())
            batch = program.change_colors(batch)
            times.append(time.process_time())
            program.to_device(batch)
            times.append(time.process_time())
            if round_number:
                for part, begin, end in zip(seconds[name], times, times[1:]):
                    seconds[name][part].append((end - begin) / options.batch)
    return seconds


def report(title: str, parts: dict) -> None:
    """One line: images per second of each program, and ours over the peer's with everything counted."""
    line, ours = title, sum(parts["ours"].values())
    for name, times in parts.items():
        worker = times["cut"] + times["stack"]
        line += (
            f" | {' ' * len(f'{name:>7}:')} {1 / times['cut']:6.1f} {1 / worker:6.1f} {1 / sum(times.values()):6.1f}"
        )
        line += f" {sum(times.values()) / ours:6.2f}" if name != "ours" else ""
    print(line, flush=True)


if __name__ == "__main__":
    main()

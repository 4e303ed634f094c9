"""Time our model beside transformers' and timm's on the same weights' shapes, images and threads.

    python benchmarks/forward.py

Each row is one job, done by the programs in turn, round after round, so that a machine that changes its speed changes
it for all; the figure is the median over rounds of each program's time, and of the ratio peer / ours within a round
(above 1: ours is faster). CPU or the first GPU; float32, random weights. Needs `pip install "modeling-vitreg[test]"`.
"""

import argparse
import statistics
import time

import timm
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel


SIZES = {"small": (384, 12, 6), "base": (768, 12, 12)}


def main() -> None:
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    programs = {name: program.to(device) for name, program in build(options.size).items()}
    print(f"ViT-{options.size}/14 with 4 registers, batch {options.batch_size}, torch {torch.__version__}, {device}")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds; ours = 1.00, above 1 is slower than ours\n")
    print(f"{'job':44} {'ours, ms':>9} {'transformers':>13} {'timm':>6}")
    for job, pixels in (("features", 224), ("features", 518), ("features", 322), ("training step", 224)):
        images = torch.randn(options.batch_size, 3, pixels, pixels, device=device)
        run = train if job == "training step" else extract
        times = measure({name: (run, program, images) for name, program in programs.items()}, options.rounds)
        report(f"{job} at {pixels} x {pixels}", times)
    images = torch.randn(options.batch_size, 3, 518, 518, device=device)
    ours, theirs = programs["ours"], programs["transformers"]
    theirs.set_attn_implementation("eager")
    jobs = {"ours": (attention_by_maps, ours, images), "transformers": (attention_by_flag, theirs, images)}
    report("attention of class token, last layer, 518", measure(jobs, max(options.rounds // 2, 1)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="width and depth (default small)")
    parser.add_argument("--batch-size", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all programs (default 7)")
    return parser.parse_args()


def build(size: str) -> dict:
    """The same architecture by three libraries: DINOv2 with registers, position table of 37 x 37."""
    width, depth, heads = SIZES[size]
    ours = ViTWithRegistersConfig.from_preset(f"{size}/14", image_size=518, layer_scale_init_value=1.0)
    theirs = Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=518, patch_size=14
    )
    return {
        "ours": ViTWithRegistersModel(ours),
        "transformers": Dinov2WithRegistersModel(theirs),
        "timm": timm.create_model(f"vit_{size}_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True),
    }


def extract(program: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        program.eval()(images)


def train(program: torch.nn.Module, images: torch.Tensor) -> None:
    program.train()
    output = program(images)
    (output if isinstance(output, torch.Tensor) else output.pooler_output).square().mean().backward()
    program.zero_grad()


def attention_by_maps(program: torch.nn.Module, images: torch.Tensor) -> None:
    program.eval().attention_maps(images, layers=-1, queries="cls")


def attention_by_flag(program: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        program.eval()(images, output_attentions=True).attentions[-1][:, :, 0, 5:].unflatten(-1, (37, 37))


def measure(jobs: dict, rounds: int) -> dict:
    """Seconds of each job in each round, after one round that does not count."""
    times = {name: [] for name in jobs}
    for round_number in range(rounds + 1):
        for name, (run, program, images) in jobs.items():
            start = time.perf_counter()
            run(program, images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return times


def report(job: str, times: dict) -> None:
    ours = times["ours"]
    cells = [f"{1000 * statistics.median(ours):9.1f}"]
    for name, width in (("transformers", 13), ("timm", 6)):
        ratios = [theirs / mine for theirs, mine in zip(times.get(name, []), ours)]
        cells.append(f"{statistics.median(ratios):{width}.2f}" if ratios else " " * (width - 1) + "-")
    print(f"{job:44} {' '.join(cells)}")


if __name__ == "__main__":
    main()

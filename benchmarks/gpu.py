"""Everything that is timed on a GPU, in one table beside other libraries, in less than four minutes.

    python benchmarks/gpu.py --dinov2 CLONE --write      # on a GPU; the table goes into benchmarks/README.md
    python benchmarks/gpu.py --tiny                      # two layers on any machine: shows that the script runs

Features run in bfloat16, ours also compiled, and training steps in bf16 autocast. "of peak" is the share of the speed
of a large matrix product in bfloat16 on the same card, in the operations that torch counts. Ratios are the time of the
other library divided by ours, within a round: above 1, ours is faster. A library that is not installed is left out.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import forward
import numpy as np
import pretrain_step
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.modes import fast_attention


ROOT = pathlib.Path(__file__).parents[1]
README = pathlib.Path(__file__).with_name("README.md")
BEGIN, END = "<!-- begin of gpu.py -->", "<!-- end of gpu.py -->"
FEATURES = (("small", 224, 256), ("base", 224, 256), ("large", 224, 128), ("large", 518, 16))  # size, pixels, batch
STEPS = (("small/16", 16), ("small/16", 64), ("large/16", 32))  # preset, images
forward.SIZES["large"] = (1024, 24, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=pathlib.Path, help="a clone of facebookresearch/dinov2")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a machine without a GPU")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    parser.add_argument("--workers", type=int, default=15, help="data workers of the training run (default: 15)")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: not run here. --tiny shows that the script runs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 1 if options.tiny else 5
    torch.manual_seed(0)
    peak = measure_peak(device, side=256 if options.tiny else 8192)
    rows = [f"| matrix product in bfloat16 | {peak / 1e12:.1f} TFLOP/s | 1.00 | |"]
    for size, pixels, batch in FEATURES[: 1 if options.tiny else None]:
        rows.append(
            time_features(size, 28 if options.tiny else pixels, 2 if options.tiny else batch, device, rounds, peak)
        )
        print(rows[-1], flush=True)
    for preset, batch in STEPS[: 1 if options.tiny else None]:
        rows.append(
            time_step(
                options, "32x2/16" if options.tiny else preset, 2 if options.tiny else batch, device, rounds, peak
            )
        )
        print(rows[-1], flush=True)
    rows += time_commands(options)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny sizes: no measurement"
    head = [f"{name}, torch {torch.__version__}, {datetime.date.today()}", ""]
    head += ["| job | ours | of peak | ratios |", "| --- | --- | --- | --- |"]
    table = "\n".join([*head, *rows, ""])
    print(f"\n{table}")
    if options.write:
        text = README.read_text()
        README.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}{text[text.index(END) :]}")


def measure_peak(device: str, *, side: int) -> float:
    """Operations per second of a product of two square matrices in bfloat16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = forward.measure({"product": (torch.matmul, left, right)}, 10)["product"]
    return 2 * side**3 / statistics.median(seconds)


def time_features(size: str, pixels: int, batch: int, device: str, rounds: int, peak: float) -> str:
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=torch.bfloat16)
    programs = {
        name: program.to(device, torch.bfloat16).requires_grad_(False) for name, program in forward.build(size).items()
    }
    compiled = torch.compile(programs["ours"], backend="inductor" if device == "cuda" else "eager")
    jobs = {name: (forward.extract, program, images) for name, program in programs.items()}
    jobs["ours"] = (extract_fast, programs["ours"], images)
    jobs["compiled"] = (extract_fast, compiled, images)
    with FlopCounterMode(display=False) as counter:
        forward.extract(programs["ours"], images)
    times = forward.measure(jobs, rounds)
    rate, fast = (batch / statistics.median(times[name]) for name in ("ours", "compiled"))
    share, fast_share = (counter.get_total_flops() / batch * each / peak for each in (rate, fast))
    job = f"features, ViT-{size}/14, {pixels} px, batch {batch}"
    ours = f"{rate:,.0f} images/s, compiled {fast:,.0f}"
    return f"| {job} | {ours} | {share:.2f}, compiled {fast_share:.2f} | {ratios(times, 'ours')} |"


def extract_fast(program: torch.nn.Module, images: torch.Tensor) -> None:
    with fast_attention(images.device.type):
        forward.extract(program, images)


def time_step(options: argparse.Namespace, preset: str, batch: int, device: str, rounds: int, peak: float) -> str:
    words = [
        "--width",
        preset,
        "--batch",
        str(batch),
        "--device",
        device,
        "--precision",
        "bf16",
        "--repeats",
        str(rounds),
    ]
    words += ["--dinov2", str(options.dinov2)] if options.dinov2 else []
    words += ["--prototypes", "64", "--local-crops", "1"] if options.tiny else []
    chosen = pretrain_step.parse_options(words)
    config = pretrain_step.make_config(chosen)
    data, programs = pretrain_step.make_batch(chosen, config), pretrain_step.make_programs(chosen, config)
    first = next(iter(programs))
    with FlopCounterMode(display=False) as counter, pretrain_step.autocast(chosen):
        programs[first].losses(data)["total"].backward()
    for parameter in programs[first].parameters():
        parameter.grad = None
    with fast_attention(device):  # for all
        results = pretrain_step.measure(programs, data, chosen)
    times = {name: result["seconds"] for name, result in results.items()}
    median = statistics.median(times[first])
    share = counter.get_total_flops() / median / peak
    job, ours = f"DINOv2 step, {preset}, batch {batch}", f"{1000 * median:.1f} ms, {batch / median:,.0f} images/s"
    return f"| {job} | {ours} | {share:.2f} | {ratios(times, first)} |"


def time_commands(options: argparse.Namespace) -> list[str]:
    """`analyze` of a ViT-L, and a training run, on JPEG files of 500 x 375 pixels."""
    numbers = (8, 24) if options.tiny else (256, 4096)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_photographs(folder / "photos", numbers[1])
        settings = {"num_hidden_layers": 2, "image_size": 32} if options.tiny else {}
        preset = "small/16" if options.tiny else "large/16"
        ViTWithRegistersModel(ViTWithRegistersConfig.from_preset(preset, **settings)).save_pretrained(folder / "model")
        seconds = []
        for number in numbers:
            words = ["-m", "modeling_vitreg", "analyze", str(folder / "model"), str(folder / "photos")]
            words += ["--num-images", str(number), "--batch-size", "64", "--output", str(folder / "report")]
            begin = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        rate = (numbers[1] - numbers[0]) / (seconds[1] - seconds[0])
        rows = [f"| `vitreg analyze`, ViT-{preset} | {rate:,.0f} images/s | | |"]
        words = ["--recipe", "demo-cpu" if options.tiny else "small-data", "--data", str(folder / "photos")]
        words += ["--output", str(folder / "run"), "--log-every", "1", "--num-eval-images", "8"]
        workers = 0 if options.tiny else options.workers
        words += ["--set", f"num_steps={2 if options.tiny else 60}", "--workers", str(workers)]
        words += ["--set", "batch_size=4"] if options.tiny else ["--precision", "bf16"]
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / "pretrain.py"), *words], check=True, capture_output=True
        )
        lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    rates = [rate for line in lines if (rate := json.loads(line).get("images_per_second"))]
    rate = statistics.median(rates[len(rates) // 2 :])  # the first steps are slower
    return [*rows, f"| `pretrain.py`, {workers} workers | {rate:,.0f} images/s | | |"]


def write_photographs(folder: pathlib.Path, number: int) -> None:
    """Smooth noise as JPEG, about as large as a photograph; 64 different ones, linked."""
    folder.mkdir()
    for index in range(min(number, 64)):
        small = np.random.default_rng(index).integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{index:05d}.jpg", quality=90
        )
    for index in range(64, number):
        (folder / f"{index:05d}.jpg").hardlink_to(folder / f"{index % 64:05d}.jpg")


def ratios(times: dict, ours: str) -> str:
    found = []
    for name in times:
        if name not in (ours, "compiled") and not name.startswith("ours"):
            ratio = statistics.median(theirs / mine for theirs, mine in zip(times[name], times[ours]))
            found.append(f"{name} {ratio:.2f}")
    return ", ".join(found)


if __name__ == "__main__":
    main()

"""Training programs as their users run them: real processes on a CPU, in a folder of their own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file


ROOT = pathlib.Path(__file__).parents[1]


def start(program: str, folder: pathlib.Path, *options: str, output: str, processes: int = 1) -> subprocess.Popen:
    """Start a program of `examples` with the recipe tiny.yaml of the folder; options come last and win."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "examples" / program)]
    usual = ["--recipe", "tiny.yaml", "--log-every", "1", "--save-every", "3", "--workers", "0", "--output", output]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *usual, *options],
        cwd=folder,
        env=os.environ | environment | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(program: str, folder: pathlib.Path, *options: str, **settings) -> str:
    """Run a program to its end; what it wrote to the screen."""
    process = start(program, folder, *options, **settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out + err


def assert_a_killed_run_goes_on(program: str, folder: pathlib.Path, *options: str, num_steps: int) -> None:
    """Kill a run after its first state, go on, and compare with the one in "whole": the same losses, the same bits."""
    process = start(program, folder, *options, output="killed")
    while not (folder / "killed" / "state" / "LAST").exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(losses_of(folder / "killed")) < num_steps
    run(program, folder, *options, output="killed")
    assert losses_of(folder / "killed") == losses_of(folder / "whole")
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses_of(folder: pathlib.Path) -> list[float]:
    """Total loss of each step of a run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["total"] for record in records if "total" in record]

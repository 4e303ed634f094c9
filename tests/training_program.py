"""Training programs in processes of their own, which can be killed for real, without the seconds that imports take.

Programs are forked from a server that has imported what they import. `launch` starts one as its users do, with a
launcher, for the tests of the commands that pages name.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from unittest import mock

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from modeling_vitreg.scenes import SceneSettings, render_scene


ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# A backbone that learns within seconds.
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
_IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "matplotlib.backends.backend_agg", "datasets", "monitor"]
_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, [ROOT, EXAMPLES, ROOT / "tests"])),
    "HF_HOME": tempfile.mkdtemp(prefix="hf-of-training-programs-"),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Program:
    """A running program, of one process or of several that work together; like `subprocess.Popen`."""

    def __init__(self, processes: list[multiprocessing.Process], screens: list[pathlib.Path]):
        self.processes, self._screens = processes, screens

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """Of the first process that failed; 0 if none did; None while one runs."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        for process in self.processes:
            process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"the program did not end within {timeout} seconds: {self.screen()[-3000:]}")
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote to standard output and to standard error."""
        self.wait(timeout)
        out, err = ("".join(path.read_text() for path in self._screens[number::2]) for number in (0, 1))
        return out, err

    def screen(self) -> str:
        return "".join(path.read_text() for path in self._screens if path.exists())

    def send_signal(self, number: int) -> None:
        """To the program, and with SIGINT or SIGKILL to its workers too, as a terminal does."""
        for process in self.processes:
            if process.exitcode is None:
                (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)


def make_run_folder(folder: pathlib.Path, recipe: dict, *, num_photos: int = 24, side: int = 64) -> pathlib.Path:
    """Write the recipe tiny.yaml and rendered photographs for `start`."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "photos").mkdir()
    for index in range(num_photos):
        scene = render_scene(index, settings=SceneSettings(image_size=side))
        Image.fromarray(scene.image).save(folder / "photos" / f"{index}.png")
    return folder


def start(
    program: str,
    folder: pathlib.Path,
    *options: str,
    output: str,
    processes: int = 1,
    per_machine: int | None = None,
    draws: bool = False,
    max_file_size: int | None = None,
    before: Callable[[], None] | None = None,
) -> Program:
    """Start a program of `examples` with the recipe tiny.yaml of the folder; options come last and win.

    Args:
        program: file name.
        folder: where it runs.
        options: of its command line.
        output: folder that it writes.
        processes: that work together.
        per_machine: of them, as a launcher would say.
        draws: whether it draws its pictures, which take most of the time of so small a run.
        max_file_size: bytes after which its disk is full.
        before: called in the process before the program, to make something fail; a function of a module.
    """
    usual = ["--recipe", "tiny.yaml", "--log-every", "1", "--eval-every", "1000", "--save-every", "3"]
    usual += ["--workers", "0", "--output", output]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        forkserver.ensure_running()
    group = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started, screens = [], []
    for rank in range(processes):
        if group:
            group |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            group |= {"LOCAL_WORLD_SIZE": str(per_machine or processes)}
        screens += [pathlib.Path(tempfile.mkstemp(prefix=f"screen-{rank}-", dir=folder)[1]) for _ in ("out", "err")]
        arguments = [str(EXAMPLES / program), *usual, *options]
        failing = (max_file_size, before)
        process = context.Process(target=_be, args=(arguments, folder, screens[-2:], dict(group), draws, *failing))
        process.start()
        started.append(process)
    return Program(started, screens)


def _be(arguments, folder, screens, environment, draws, max_file_size, before) -> None:
    """Become the program, in a process of the server."""
    os.setsid()
    for number, path in enumerate(screens, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    multiprocessing.set_start_method("fork", force=True)  # as in a program that was started by its name
    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, str(EXAMPLES))
    if not draws:
        import monitor

        for name in [name for name in vars(monitor) if name.startswith("draw_")]:
            setattr(monitor, name, lambda *_, **__: None)
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    if before is not None:
        before()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def fail_at_rename(target: str, count: int, error: int | None, log: str) -> None:
    """For `before`: fail in place of a rename of a file or folder. All targets are written to a log first.

    Args:
        target: end of the path of the file or folder.
        count: of its renames, from 0.
        error: number of the error; None kills the process.
        log: file for the targets.
    """
    rename, counts = os.replace, itertools.count()

    def fail(source, place) -> None:
        name = os.path.relpath(place)
        if ".part" not in name:
            with open(log, "a") as file:
                file.write(f"{name}\n")
        if not name.endswith(f"/{target}") or next(counts) != count:
            return rename(source, place)
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(error, os.strerror(error), str(source), None, str(place))

    os.replace = fail


def fill_the_memory() -> None:
    """For `before`: no step of the optimiser finds room."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    torch.optim.AdamW.step = fail


def run(program: str, folder: pathlib.Path, *options: str, **settings) -> str:
    """Run a program to its end; what it wrote to the screen."""
    out, err = (process := start(program, folder, *options, **settings)).communicate()
    assert process.returncode == 0, err[-3000:]
    return out + err


def refuse(program: str, folder: pathlib.Path, *options: str, **settings) -> str:
    """Run a program that ends with an error in words; what it wrote to standard error."""
    out, err = (process := start(program, folder, *options, **settings)).communicate()
    assert process.returncode != 0, out
    assert "Traceback" not in err, err
    return err


def launch(folder: pathlib.Path, *command: str) -> subprocess.Popen:
    """Start a command as a page names it: no variable of the environment helps."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": _ENVIRONMENT["HF_HOME"], "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(command), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_a_killed_run_goes_on(program: str, folder: pathlib.Path, *options: str, num_steps: int) -> None:
    """Kill a run after its first state, go on, and compare with the one in "whole": the same losses, the same bits."""
    process = start(program, folder, *options, output="killed")
    while not (folder / "killed" / "state" / "LAST").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses_of(folder / "killed")) < num_steps
    run(program, folder, *options, output="killed")
    assert losses_of(folder / "killed") == losses_of(folder / "whole")
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses_of(folder: pathlib.Path) -> list[float]:
    """Total loss of each step of a run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["total"] for record in records if "total" in record]

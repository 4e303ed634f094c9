"""The Hub files on several versions of transformers, as remote code, each against what the others saved.

The environments share torch with the running one and stay in build/versions; making them needs the package index.
"""

import functools
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("portable_checks.py")
CHECKS = list(runpy.run_path(str(PROGRAM))["CHECKS"])
NEWEST = transformers.__version__
VERSIONS = list(dict.fromkeys(["4.57.1", "4.57.6", "5.0.0", "5.10.4", NEWEST]))

Answer = namedtuple("Answer", ["models", "result", "printed"])


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Run a command of the program in a version, once, off the network, on what a version saved, by default itself."""
    folder = tmp_path_factory.mktemp("versions")

    @functools.cache
    def ask(version: str, command: str, saver: str | None = None) -> Answer:
        models = folder / (saver or version)
        result = folder / f"{command}_{models.name}_in_{version}"
        environment = {
            **os.environ,
            "HF_HOME": str(folder / f"home_{version}"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT) if command == "save" else "",
        }
        if command != "save":
            ask(models.name, "save")
        printed = _run(_interpreter(version), PROGRAM, command, models, result, cwd=folder, env=environment)
        return Answer(models, result, printed)

    return ask


@pytest.mark.parametrize(("saver", "loader"), list(itertools.product(VERSIONS, repeat=2)))
def test_every_output_has_the_same_bits_in_the_version_that_saves_and_in_the_one_that_loads(ask, saver, loader):
    found, expected = load_file(ask(loader, "load", saver).result), load_file(ask(saver, "save").result)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_folder_is_the_same_but_for_the_weights_and_the_number_of_the_version(ask, version):
    folder, reference = ask(version, "save").models, ask(NEWEST, "save").models
    names = {path.relative_to(folder) for path in folder.rglob("*.*")}
    assert names == {path.relative_to(reference) for path in reference.rglob("*.*")}
    for name in names:
        if name.suffix == ".json":
            assert _settings(folder / name) == _settings(reference / name)
        elif name.suffix == ".py":
            assert (folder / name).read_bytes() == (ROOT / "modeling_vitreg" / name.name).read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("check", CHECKS)
def test_as_remote_code(ask, check, version):
    failures = json.loads(ask(version, "check").result.read_text())[check]
    assert not failures, failures


def test_the_newest_version_loads_and_runs_every_model_without_a_word(ask):
    assert ask(NEWEST, "load", NEWEST).printed == ""


def _settings(path: Path) -> dict:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "transformers_version"}


def _interpreter(version: str) -> Path:
    if version == NEWEST:
        return Path(sys.executable)
    environment = ROOT / "build" / "versions" / version
    python = environment / "bin" / "python"
    try:
        is_usable = _run(python, "-c", "import transformers, torch; print(torch.__file__)").strip() == torch.__file__
    except (OSError, RuntimeError):
        is_usable = False
    if not is_usable:
        _build(environment, version)
    return python


def _build(environment: Path, version: str) -> None:
    # In a sibling that is renamed at the end, so that nobody takes half an environment for a whole one.
    unfinished = environment.with_name(f"{version}.unfinished")
    for remains in (unfinished, environment):
        shutil.rmtree(remains, ignore_errors=True)
    _run(sys.executable, "-m", "venv", unfinished)
    packages = next(unfinished.glob("lib/python*/site-packages"))
    (packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    _run(unfinished / "bin" / "python", "-m", "pip", "install", "--quiet", f"transformers=={version}")
    unfinished.rename(environment)


def _run(*command, **kwargs) -> str:
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} returned {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout

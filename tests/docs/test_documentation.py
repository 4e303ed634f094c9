"""README and docs: links lead somewhere, programs run, and every documented command is one that exists."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from typer.main import get_command

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.cli import app


ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")
README_LIMIT = 13_000  # bytes


def _blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    """(note, text) of the code blocks of a page; the note is the comment above a block, or empty."""
    return [(note, text) for note, kind, text in BLOCK.findall(page.read_text()) if kind == language]


def _commands(text: str) -> list[list[str]]:
    """Words of each command of a block, without its comments; commands joined by && are separate."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split(" && ") if (words := shlex.split(part, comments=True))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < README_LIMIT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken, f"{page}: {broken}"


def test_every_page_can_be_reached_from_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text()) if "://" not in link}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_documented_command_parses(page):
    verbs = get_command(app).commands
    programs = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    for words in (words for _, text in _blocks(page, "bash") for words in _commands(text)):
        if words[0] == "vitreg":
            verbs[words[1]].make_context(words[1], list(words[2:]))
        script = next((word for word in words if word.startswith("examples/") and word.endswith(".py")), None)
        if script:
            name = pathlib.Path(script).name
            known = programs[name] + ("" if name == "plan.py" else programs["arguments.py"])
            options = [word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
            assert not [option for option in options if f'"{option}"' not in known], words


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda recipe: recipe.stem
)
def test_every_option_of_the_commands_of_a_recipe_exists(recipe):
    known = "".join(path.read_text() for path in (ROOT / "examples").glob("*.py"))
    commands = re.findall(r"^#.*?(examples/\w+\.py.*)$", recipe.read_text(), re.MULTILINE)
    assert commands
    options = [word.split("=")[0] for command in commands for word in command.split() if word.startswith("--")]
    assert not [option for option in options if f'"{option}"' not in known]


def _run_python(programs: list[str], folder: pathlib.Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A clone's docs, and a small untrained model where the first command leaves its own."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "docs").symlink_to(ROOT / "docs")
    config = ViTWithRegistersConfig.from_preset("tiny/16", num_hidden_layers=2, image_size=64)
    ViTWithRegistersModel(config).save_pretrained(folder / "outputs" / "demo-cpu" / "model")
    return folder


def test_python_that_uses_a_saved_model_runs_without_the_package(demo):
    readme = [text for note, text in _blocks(ROOT / "README.md", "python")]
    tokens = [text for note, text in _blocks(ROOT / "docs" / "use" / "tokens.md", "python")]
    assert readme and tokens
    _run_python(['import sys; sys.modules["modeling_vitreg"] = None', *readme, *tokens], demo)
    assert (demo / "attention.png").exists()


def test_python_that_uses_the_package_runs(demo):
    pages = [page for page in PAGES if page.name not in ("README.md", "tokens.md")]
    blocks = [(note, text) for page in pages for note, text in _blocks(page, "python")]
    programs = [text for note, text in blocks if not note.startswith("not run")]
    assert len(programs) >= 3
    _run_python(programs, demo)
    assert ViTWithRegistersModel.from_pretrained(demo / "my-model").config.num_register_tokens == 8


@pytest.mark.slow
def test_every_documented_command_runs_as_written(tmp_path):
    # In the order of a newcomer: README first, then the pages as the index lists them.
    copy = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", "outputs", ".venv")
    shutil.copytree(ROOT, copy, ignore=ignored)
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    skipped = ("pip ", "python -m pytest", "hf auth")
    done, failed = set(), []
    order = [PAGES[0], *(ROOT / "docs" / link for link in LINK.findall((ROOT / "docs" / "index.md").read_text()))]
    for page in (page for page in order if page.suffix == ".md" and page in PAGES):
        for note, text in _blocks(page, "bash"):
            if note.startswith("not run"):
                continue
            for command in (
                part.strip() for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")
            ):
                command = command.split("  #")[0].strip()
                if not command or command.startswith(skipped) or command in done:
                    continue
                done.add(command)
                run = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
                if run.returncode:
                    failed.append(f"{page.relative_to(ROOT)}: {command}\n{run.stdout[-500:]}{run.stderr[-1500:]}")
    assert not failed, "\n\n".join(failed)
    assert len(done) > 15

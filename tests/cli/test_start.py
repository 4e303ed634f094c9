"""What is imported before anything is done: counted, for a clock would measure the machine."""

import json
import os
import subprocess
import sys


HEAVY = {
    "PIL",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "transformers",
}


def _imported_by(program: str) -> list[str]:
    """Names of the modules that a program in a process of its own has imported at its end."""
    program += "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _tops(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_help_of_every_verb_imports_only_what_prints_it():
    program = """
from typer.testing import CliRunner
from modeling_vitreg.cli import app
verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
for words in ([], *([verb] for verb in verbs)):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, result.output
"""
    modules = _imported_by(program)
    assert not _tops(modules) & HEAVY
    # 209 of the commands, the rest of typer, rich and the test runner; torch alone has more than 1000.
    assert len(modules) < 600, len(modules)

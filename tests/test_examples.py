"""The examples, as a newcomer runs them."""

import os
import pathlib
import subprocess
import sys


ROOT = pathlib.Path(__file__).parents[1]


def _launch(script: str, *options: str, folder: pathlib.Path) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", ROOT / "examples" / script]
    run = subprocess.run(
        [*command, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_first_look_trains_saves_and_draws(tmp_path):
    output = _launch("first_look.py", "--steps", "2", "--batch-size", "4", folder=tmp_path)
    assert "tokens.register_tokens  (1, 4, 192)" in output
    assert "tokens.patch_grid       (1, 16, 16, 192)" in output
    written = tmp_path / "outputs" / "first_look"
    for name in ("attention.png", "reconstruction.png", "model/model.safetensors", "model/modeling_vitreg.py"):
        assert (written / name).stat().st_size > 1000, name

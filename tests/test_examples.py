"""The examples, as a newcomer runs them."""

import os
import pathlib
import subprocess
import sys

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel


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


def _snippet(name: str) -> str:
    """The Python block of README behind the comment that names it."""
    return (ROOT / "README.md").read_text().split(f"<!-- runs in tests: {name} -->\n```python\n")[1].split("```")[0]


def test_the_snippets_of_the_readme_run(tmp_path, photograph):
    photograph.save(tmp_path / "photograph.png")
    config = ViTWithRegistersConfig.from_preset("tiny/16", num_hidden_layers=2, image_size=64)
    ViTWithRegistersModel(config).save_pretrained(tmp_path / "outputs" / "first_look" / "model")
    remote = 'import sys; sys.modules["modeling_vitreg"] = None\n' + _snippet("remote")
    for program in (remote, _snippet("package"), _snippet("scenes")):
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "attention.png").exists()
    assert ViTWithRegistersModel.from_pretrained(tmp_path / "my-model").config.num_register_tokens == 8

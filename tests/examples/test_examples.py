"""The examples, as a newcomer runs them."""

import os
import pathlib
import subprocess
import sys

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel


ROOT = pathlib.Path(__file__).parents[2]


def _snippet(name: str) -> str:
    """The Python block of README behind the comment that names it."""
    return (ROOT / "README.md").read_text().split(f"<!-- runs in tests: {name} -->\n```python\n")[1].split("```")[0]


def test_the_snippets_of_the_readme_run(tmp_path, photograph):
    photograph.save(tmp_path / "photograph.png")
    config = ViTWithRegistersConfig.from_preset("tiny/16", num_hidden_layers=2, image_size=64)
    ViTWithRegistersModel(config).save_pretrained(tmp_path / "outputs" / "demo-cpu" / "model")
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

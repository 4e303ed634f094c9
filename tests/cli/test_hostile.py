"""Hostile and damaged folders given to every verb: words and exit code 1, no traceback, no model written."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.cli import app


def _settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _write(path, text):
    path.write_text(text)


def _tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGE = {
    "config that does not parse": lambda folder: (folder / "config.json").write_text("{"),
    "config of another type": lambda folder: (folder / "config.json").write_text("[[]]"),
    "config nested too deeply": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "endless layers": lambda folder: _settings(folder, num_hidden_layers=99999999999),
    "layers that are words": lambda folder: _settings(folder, num_hidden_layers="many"),
    "labels of another type": lambda folder: _settings(folder, id2label=3),
    "dtype of another type": lambda folder: _settings(folder, dtype={"a": 1}),
    "type that is unknown": lambda folder: _settings(folder, model_type="evil", auto_map=None),
    "type of another type": lambda folder: _settings(folder, model_type=["vitreg"]),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + 63 * b"\0"),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "tensors missing": lambda folder: _tensors(folder, lambda found: found.pop("layernorm.weight")),
    "mean of words": lambda folder: _write(folder / "preprocessor_config.json", '{"image_mean": "x"}'),
    "processor of another type": lambda folder: (folder / "preprocessor_config.json").write_text("7"),
}  # fmt: skip
VERBS = {
    "analyze": ["analyze", "{model}", "{images}", "--output", "{out}"],
    "discover": ["discover", "{model}", "{images}", "--output", "{out}"],
    "evaluate": ["evaluate", "{model}", "{images}", "--output", "{out}"],
    "convert": ["convert", "{model}", "{out}.pth", "--to", "dinov2"],
    "publish": ["publish", "{model}", "user/name", "--license", "mit", "--dry-run"],
    "doctor": ["doctor", "{model}"],
}


@pytest.fixture
def places(tiny, tmp_path):
    torch.set_num_threads(1)
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path / "model")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), (90 * number, 50, 0)).save(tmp_path / "images" / name / f"{number}.png")
    return {"model": tmp_path / "model", "images": tmp_path / "images", "out": tmp_path / "out"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_model_ends_in_words(places, verb, damage):
    DAMAGE[damage](places["model"])
    done = CliRunner().invoke(app, [word.format(**places) for word in VERBS[verb]])
    unread = {"discover": {"labels of another type"}, "convert": {"mean of words", "processor of another type"}}
    if done.exit_code == 0:  # what a verb does not read does not stop it
        harmless = {"labels of another type", "dtype of another type", *unread.get(verb, ())}
        assert damage in harmless, done.output
        return
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (done.exception, done.output)
    assert "Traceback" not in done.output and len(done.output) > 20
    assert not places["out"].exists() and not places["out"].with_suffix(".pth").exists()


@pytest.mark.parametrize("verb", ["analyze", "discover", "evaluate"])
def test_an_output_below_a_file_or_on_a_full_disk_ends_in_words(places, verb):
    (places["out"].parent / "file").write_text("mine")
    words = [word.format(**{**places, "out": places["out"].parent / "file" / "out"}) for word in VERBS[verb]]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "file is a file, so no folder can be made in it" in done.output
    assert (places["out"].parent / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("verb", ["analyze", "discover", "evaluate", "card"])
def test_a_disk_that_fills_up_leaves_words_and_nothing_half_written(places, verb):
    """The limit of a file's size stands for the full disk: every write beyond it fails."""
    program = """
import resource, signal, sys
from modeling_vitreg.cli import app
import torch, transformers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
sys.argv = ["vitreg", *sys.argv[1:]]
app()
"""
    words = [word.format(**places) for word in VERBS.get(verb, ())]
    if verb == "card":
        words = ["card", str(places["model"]), "user/name", "--output", str(places["out"] / "README.md")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and "File too large" in done.stderr, done.stderr
    left = [path for path in places["out"].rglob("*") if path.is_file()] if places["out"].exists() else []
    assert all(path.suffix == ".json" and json.loads(path.read_text()) for path in left), left

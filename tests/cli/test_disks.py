"""A disk that turns read-only while a verb works, and images that cannot be read: every verb, in words."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersModel, files
from modeling_vitreg.cli import app


ANALYZE = ["analyze", "{model}", "{images}", "--num-images", "4", "--output", "{out}/report"]
WRITERS = {
    "analyze": ANALYZE,
    "discover": ["discover", "{model}", "{images}", "--output", "{out}/report"],
    "evaluate": ["evaluate", "{model}", "{images}", "--tasks", "knn", "--output", "{out}/report"],
    "convert": ["convert", "{other}", "{out}/model"],
    "convert --to timm": ["convert", "{model}", "{out}/model", "--to", "timm"],
    "card": ["card", "{model}", "user/name", "--output", "{out}/README.md"],
    "retrofit": ["retrofit", "{model}", "{out}/model", "--images", "{images}", "--num-images", "16", "--force"],
    "look": ["look", "{photo}", "--model", "{model}", "--output", "{out}/look.png"],
    "embed": ["embed", "{model}", "{images}", "{out}/features"],
}
KNOWN = {command.callback.__name__ for command in app.registered_commands}
WRITERS = {name: words for name, words in WRITERS.items() if words[0] in KNOWN}
READERS = {name: words for name, words in WRITERS.items() if "{images}" in words}


@pytest.fixture
def places(tiny, tmp_path):
    torch.set_num_threads(1)
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path / "model")
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "other")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (40, 40), (25 * number, 50, 0)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "out").mkdir()
    names = ("model", "other", "images", "out")
    return {name: tmp_path / name for name in names} | {"photo": tmp_path / "images" / "a" / "1.png"}


@pytest.fixture
def disk(places):
    """The folder `out` as a file system of its own, and functions that make it read-only and writable."""

    def mount(*words: str) -> bool:
        done = subprocess.run(["mount", *words, str(places["out"])], capture_output=True)
        return done.returncode == 0

    if sys.platform != "linux" or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        pytest.skip("this user may not mount a file system")
    yield lambda mode: mount("-o", f"remount,{mode}")
    subprocess.run(["umount", "--lazy", str(places["out"])], check=True)


def _invoke(places, words):
    return CliRunner().invoke(app, [word.format(**places) for word in words])


def _assert_words(done) -> None:
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (done.exception, done.output)
    assert "Read-only file system" in done.output and "Traceback" not in done.output
    assert "choose another output" in done.output


def _whole_files(folder: pathlib.Path) -> list[pathlib.Path]:
    hidden = [path for path in folder.rglob("*") if any(part.startswith(".") for part in path.parts)]
    return [path for path in folder.rglob("*") if path.is_file() and path not in hidden]


@pytest.mark.parametrize("verb", WRITERS)
def test_a_disk_that_turns_read_only_midway_is_named_and_the_verb_can_be_repeated(places, disk, monkeypatch, verb):
    flush, changed = files._flush, []

    def fail(path) -> None:
        """The content is written; before it is moved to its place the disk turns read-only."""
        flush(path)
        if not changed:
            changed.append(disk("ro"))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", fail)
        done = _invoke(places, WRITERS[verb])
    assert changed == [True], done.output
    _assert_words(done)
    assert _whole_files(places["out"]) == []
    assert disk("rw")
    done = _invoke(places, WRITERS[verb])
    assert done.exit_code == 0, done.output
    assert _whole_files(places["out"])
    assert not list(places["out"].rglob("*.part")), "what the failed command left behind"


@pytest.mark.parametrize("verb", WRITERS)
def test_a_rename_that_fails_leaves_nothing_where_nothing_may_be_mounted(places, monkeypatch, verb):
    def fail(source, target, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source), None, str(target))

    monkeypatch.setattr(files.os, "replace", fail)
    done = _invoke(places, WRITERS[verb])
    _assert_words(done)
    assert [path for path in places["out"].rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("verb", READERS)
def test_every_verb_lists_images_that_cannot_be_read(places, verb):
    for number in range(2):
        torn = places["images"] / "b" / f"torn-{number}.png"
        torn.write_bytes((places["images"] / "a" / "1.png").read_bytes()[:60])
    words = ["100" if word.isdigit() else word for word in READERS[verb]]
    done = _invoke(places, words)
    assert done.exit_code == 0, done.output
    assert "could not be read and are left out" in done.output
    for number in range(2):
        assert f"torn-{number}.png" in done.output

"""Features as Parquet files: they are those of the encoder, none is lost or doubled, and others are not mixed in."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import weakref

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import tqdm
from datasets import load_dataset
from PIL import Image
from planted_models import pictures, plain_model

from modeling_vitreg.encoding import PassSettings, parquet
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.images import open_images


ROOT = pathlib.Path(__file__).parents[2]
QUICK = PassSettings(batch_size=4, has_progress_bar=False)


@pytest.fixture
def folder(tmp_path):
    """23 images of two classes and a broken one."""
    return _write_images(tmp_path / "images", 23)


def _write_images(folder: pathlib.Path, number: int) -> str:
    for place, image in enumerate(pictures(number)[0]):
        path = folder / ("cat", "dog")[place % 2] / f"{place:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    return str(folder)


def _embed(folder: str, output: pathlib.Path, *, model=None, reading: PassSettings = QUICK, **settings):
    encoder, images = load_encoder(model or plain_model(), name="model"), open_images(folder)
    chosen = parquet.EmbeddingSettings(shard_size=5, **settings)
    return encoder, parquet.embed(encoder, images, output_folder=output, settings=chosen, reading=reading)


def _load(output: pathlib.Path):
    return load_dataset("parquet", data_dir=str(output), split="train", cache_dir=str(output.parent / "cache"))


def test_the_library_datasets_opens_the_features_of_the_encoder(folder, tmp_path):
    encoder, counts = _embed(folder, tmp_path / "out", has_registers=True, has_patches=True)
    assert counts.num_images == 23 and [line.rpartition("/")[2][:10] for line in counts.unreadable.values()]
    rows = _load(tmp_path / "out")
    assert rows.column_names == ["number", "name", "label", "class_token", "mean_patch", "registers", "patches"]
    assert rows.features["label"].names == ["cat", "dog"] and len(rows) == 23
    found = rows.with_format("numpy")[:]
    images = [Image.open(name) for name in found["name"]]
    tokens = extract_features(encoder, encoder.prepare(images), is_normed=True)[0]
    assert [pathlib.Path(name).parent.name for name in found["name"]] == [("cat", "dog")[n] for n in found["label"]]
    np.testing.assert_allclose(found["class_token"], tokens.cls_token, atol=1e-5)
    np.testing.assert_allclose(found["mean_patch"], tokens.patch_tokens.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(found["registers"], tokens.register_tokens, atol=2e-3)
    np.testing.assert_allclose(found["patches"], tokens.patch_tokens, atol=2e-3)
    facts = json.loads(pq.read_schema(tmp_path / "out" / "features-00000.parquet").metadata[b"vitreg"])
    assert facts["numbers"] == [0, 5] and facts["precision"] == "float32" and len(facts["weights_hash"]) == 16


def test_a_model_without_class_token_and_a_source_without_labels(tmp_path):
    image = pictures(1)[0][0]
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "0.png")
    model = plain_model(has_cls_token=False, pooling="mean", num_register_tokens=0)
    _embed(str(tmp_path / "images"), tmp_path / "out", model=model, has_registers=True, layer=2, is_normed=False)
    rows = _load(tmp_path / "out")
    assert rows.column_names == ["number", "name", "label", "mean_patch"] and rows["label"][:] == [None]


def test_shards_that_are_there_are_not_computed_again(folder, tmp_path):
    _embed(folder, tmp_path / "out", reading=PassSettings(batch_size=4, has_progress_bar=False, limit=12))
    files = sorted((tmp_path / "out").iterdir())
    times = [file.stat().st_mtime_ns for file in files[:2]]
    files[1].unlink()
    _, counts = _embed(folder, tmp_path / "out")
    assert files[0].stat().st_mtime_ns == times[0] and files[1].stat().st_mtime_ns > times[1]
    assert counts.num_images == 23
    assert sorted(_load(tmp_path / "out")["number"][:]) == [n for n in range(24) if n not in counts.unreadable]


def test_the_progress_bar_counts_shards_that_are_there(folder, tmp_path, monkeypatch):
    places = []

    class Bar(tqdm.tqdm):
        def close(self):
            if not self.disable:
                places.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr("modeling_vitreg.encoding.one_pass.tqdm.tqdm", Bar)
    reading = PassSettings(batch_size=4)
    _embed(folder, tmp_path / "out", reading=reading)
    (tmp_path / "out" / "features-00001.parquet").unlink()
    _embed(folder, tmp_path / "out", reading=reading)
    assert places == [(0, 24, 24), (19, 24, 24)]


@pytest.mark.parametrize("number", [30, 90])
def test_no_more_than_a_shard_is_held_however_many_images_there_are(number, tmp_path, monkeypatch):
    batches, held, update = weakref.WeakSet(), [], parquet.ParquetStore.update

    def count(store, batch):
        update(store, batch)
        batches.add(batch)
        held.append((sum(len(rows["number"]) for rows in store._rows), len(batches)))

    monkeypatch.setattr(parquet.ParquetStore, "update", count)
    _embed(_write_images(tmp_path / "images", number), tmp_path / "out")
    assert len(held) >= number // 5 and np.max(held, axis=0).tolist() == [5, 1]  # images of a shard, one batch


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layer": 2}, "expected features of the same settings"),
        ({"model": plain_model(num_register_tokens=1)}, "expected features of the same weights_hash"),
        ({"reading": PassSettings(precision="bfloat16")}, "expected features of the same precision"),
        ({"reading": PassSettings(limit=4)}, "features of 5 images or more, expected at most 4"),
    ],
)
def test_a_folder_with_other_features_is_refused(folder, tmp_path, changes, words):
    _embed(folder, tmp_path / "out", reading=PassSettings(batch_size=4, has_progress_bar=False, limit=5))
    with pytest.raises(ValueError, match=words):
        _embed(folder, tmp_path / "out", **changes)


def test_a_damaged_file_is_named(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "features-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"features-00000.parquet: is damaged, or was not written by vitreg embed"):
        _embed(folder, tmp_path / "out")


def test_a_value_that_float16_cannot_hold_is_refused_in_words(folder, tmp_path):
    model = plain_model()
    with torch.no_grad():
        model.layernorm.bias.fill_(1e5)
    with pytest.raises(RuntimeError, match="patches: a value is above 65504"):
        _embed(folder, tmp_path / "out", model=model, has_patches=True)
    assert not list((tmp_path / "out").iterdir())
    _embed(folder, tmp_path / "out", model=model, has_patches=True, patch_precision="float32")


def test_the_neighbours_in_the_docs_are_those_of_the_features(tmp_path, randomise, monkeypatch, capsys):
    folder, model = _write_images(tmp_path / "images", 8), randomise(plain_model())
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    shutil.copy(ROOT / "docs" / "use" / "scene.jpg", tmp_path / "images" / "cat" / "copy.jpg")
    model.save_pretrained(tmp_path / "outputs" / "demo-cpu" / "model")
    _embed(folder, tmp_path / "features", model=model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    page = (ROOT / "docs" / "use" / "embed.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("1.000 ") and first.endswith("copy.jpg") and len(others) == 4


# Kills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_after_a_kill_the_same_command_goes_on_and_no_row_is_lost_or_doubled(tmp_path, num_processes):
    folder, output = _write_images(tmp_path / "images", 400), tmp_path / "out"
    plain_model().save_pretrained(tmp_path / "model")
    program = ["-m", "modeling_vitreg", "embed", str(tmp_path / "model"), folder, str(output), "--batch-size", "1"]
    program += ["--workers", "0", "--set", "embedding.shard_size=5"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if num_processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen([sys.executable, *launcher, *program], env=environment, **pipes)
    while run.poll() is None and len(list(output.glob("*.parquet"))) < 3:
        time.sleep(0.01)
    victim = psutil.Process(run.pid)
    (victim.children()[1] if launcher else victim).kill()
    text, _ = run.communicate()
    done = {file: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    assert run.returncode and 3 <= len(done) < 81
    assert num_processes == 1 or "another process of the command died" in text or "died before it was done" in text
    again = subprocess.run([sys.executable, *program], env=environment, **pipes)
    assert not again.returncode and "features of 400 images" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert not [name for name in os.listdir(output) if not name.startswith("features-")]
    rows = _load(output)
    assert len(rows) == 400 and len(set(rows["number"][:])) == 400
    encoder = load_encoder(str(tmp_path / "model"))
    found = rows.with_format("torch")[:]
    images = [Image.open(name) for name in found["name"]]
    expected = extract_features(encoder, encoder.prepare(images), is_normed=True)[0].cls_token
    torch.testing.assert_close(found["class_token"], expected, atol=1e-5, rtol=1e-5)

"""Checkpoints that are opened, and those that are refused: truncated, dangerous, damaged, of no known family."""

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import official_layouts as official
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert
from modeling_vitreg.conversion.layouts import clip
from modeling_vitreg.conversion.sources import hash_files, open_source


TWO_HEADS = {"num_attention_heads": 2}
STATE = official.fill(official.dinov2(32, 2, side=4, num_registers=4))


class Malicious:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    torch.save({"cls_token": Malicious(tmp_path / "ran")}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"cls_token": Malicious(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ConversionError, match=r"refused, because reading it would run code \(posix.system\)"):
        open_source(tmp_path / "new.pth")
    with pytest.raises(ConversionError, match=r"refused|damaged"):
        open_source(tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "new.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so that the test can fail


def test_a_malicious_archive_of_torchscript_does_not_run(tmp_path):
    content = pickle.dumps(Malicious(tmp_path / "ran"), protocol=2)
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:
        archive.writestr("clip/data.pkl", content)
        archive.writestr("clip/constants.pkl", pickle.dumps(()))
    with pytest.raises(ConversionError, match=r"refused, because reading it would run code \(posix.system\)"):
        open_source(tmp_path / "clip.pt")
    assert not (tmp_path / "ran").exists()


def test_an_archive_of_torchscript_is_read_without_its_code(tmp_path):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Linear(3, 4)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, images):
            return self.visual(images)

    tower = Tower()
    tower.visual.weight.data = tower.visual.weight.data.half()
    torch.jit.trace(tower.float(), torch.zeros(1, 3)).save(str(tmp_path / "ViT-B-16.pt"))
    source = open_source(tmp_path / "ViT-B-16.pt")
    assert source.shapes == {"visual.weight": (4, 3), "visual.bias": (4,), "input_resolution": ()}
    assert torch.equal(source.read("visual.weight"), tower.visual.weight)
    assert source.read("input_resolution") == 224


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named_so(tmp_path, suffix, share):
    path = tmp_path / f"dinov2{suffix}"
    torch.save(STATE, path) if suffix == ".pth" else save_file(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match=r"download it again"):
        open_source(path)


def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data/0", bytes(2**24))
        archive.writestr("bomb/data.pkl", pickle.dumps({}))
    with pytest.raises(ConversionError, match=r"claims 16,777,\d+ bytes in a file of"):
        open_source(tmp_path / "bomb.pth")


def test_what_old_checkpoints_hold_beside_tensors_is_left(tmp_path):
    state = {"model": {"cls_token": torch.ones(2)}, "args": argparse.Namespace(lr=0.1), "loss": np.float64(2.0)}
    torch.save(state | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "checkpoint.pth")
    source = open_source(tmp_path / "checkpoint.pth")
    assert source.checkpoint_key == "model" and source.shapes == {"cls_token": (2,)}
    assert set(source.left) == {"args", "loss", "optimizer"}
    with pytest.raises(ConversionError, match=r"has no state under 'student'"):
        open_source(tmp_path / "checkpoint.pth", checkpoint_key="student")


def test_the_format_before_zip_is_read_too(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    source = open_source(tmp_path / "old.pth")
    assert torch.equal(source.read("cls_token"), STATE["cls_token"])


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    names = list(STATE)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:])):
        save_file({name: STATE[name] for name in part}, tmp_path / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(tmp_path)
    assert source.shapes.keys() == STATE.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in STATE.items())
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"1 shards are missing: model-1.safetensors"):
        open_source(tmp_path)


def test_a_hash_in_a_name_is_checked(tmp_path):
    torch.save(STATE, tmp_path / "plain.pth")
    digest = hash_files([tmp_path / "plain.pth"])
    right, wrong = tmp_path / f"deit_base-{digest[:8]}.pth", tmp_path / "deit_base-00000000.pth"
    for path in (right, wrong):
        path.write_bytes((tmp_path / "plain.pth").read_bytes())
    assert hash_files([right]) == digest
    with pytest.raises(ConversionError, match=r"the name claims SHA-256 00000000\.\.\."):
        hash_files([wrong])
    with pytest.raises(ConversionError, match=r"the name claims SHA-256 5806e77cd80f\.\.\."):
        hash_files([(tmp_path / "plain.pth").rename(tmp_path / "ViT-B-16.pt")], known=clip.HASHES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", r"no such file or folder: expected a checkpoint"),
        ("facebook/dinov2-small", r"hf download facebook/dinov2-small --local-dir dinov2-small"),
        ("empty", r"expected one of model.safetensors.index.json"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(tmp_path, monkeypatch, name, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=message):
        open_source(name)


def test_a_training_run_names_its_model(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text('{"model_type": "vitreg"}')
    save_file({"x": torch.ones(1)}, tmp_path / "run" / "model" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"training run: give the folder of its model, .*model"):
        convert(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"is a model of this family already.*token_reduction=.*--to dinov2"):
        convert(tmp_path / "run" / "model", tmp_path / "out")


def test_another_family_is_refused_with_the_nearest(tmp_path):
    torch.save({"conv1.weight": torch.ones(2), "layer1.0.bn1.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    with pytest.raises(ConversionError, match=r"no family fits; the nearest is .*Families: dinov2, dinov3"):
        convert(tmp_path / "resnet.pth", tmp_path / "out")
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text('{"model_type": "swin"}')
    save_file({"x": torch.ones(1)}, tmp_path / "swin" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model type 'swin' cannot be represented: expected one of vit, deit"):
        convert(tmp_path / "swin", tmp_path / "out")


def test_nothing_is_written_over_what_is_there(tmp_path):
    torch.save(STATE, tmp_path / "dinov2.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match=r"exists and is not empty"):
        convert(tmp_path / "dinov2.pth", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_full_disk_is_said_before_any_work(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "dinov2_reg.pth")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match=r"needs [\d,]+ bytes, the disk has 1,000 left"):
        convert(tmp_path / "dinov2_reg.pth", tmp_path / "out", settings=ConversionSettings(config_overrides=TWO_HEADS))


# One edit of a real state dict is always caught, by the name of the tensor.
NAMES = st.sampled_from(sorted(STATE))
NOT_SQUARE = st.sampled_from([name for name, t in STATE.items() if t.ndim == 2 and t.shape[0] != t.shape[1]])


@given(
    edit=st.one_of(
        st.tuples(st.just("renamed"), NAMES),
        st.tuples(st.just("missing"), NAMES),
        st.tuples(st.just("extra"), NAMES),
        st.tuples(st.just("transposed"), NOT_SQUARE),
        st.tuples(st.just("nan"), NAMES),
        st.tuples(st.just("infinite"), NAMES),
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_edit_of_a_checkpoint_is_caught_by_name(tmp_path_factory, edit):
    kind, name = edit
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    wanted = name
    if kind == "renamed":
        wanted = name.replace("t", "T", 1) if "t" in name else f"{name}2"
        state[wanted] = state.pop(name)
    elif kind == "missing":
        del state[name]
    elif kind == "extra":
        wanted = f"{name}.copy"
        state[wanted] = state[name]
    elif kind == "transposed":
        state[name] = state[name].T.contiguous()
    else:
        state[name].view(-1)[-1] = float("nan" if kind == "nan" else "inf")
    folder = tmp_path_factory.mktemp("edit")
    torch.save(state, folder / "dinov2.pth")
    settings = ConversionSettings(config_overrides=TWO_HEADS, family="dinov2", is_quiet=True)
    optional = {"register_tokens"}  # without them it is a checkpoint of a model without registers
    if kind == "missing" and name in optional:
        assert convert(folder / "dinov2.pth", folder / "out", settings=settings).verification["is_verified"]
        return
    with pytest.raises(ConversionError) as caught:
        convert(folder / "dinov2.pth", folder / "out", settings=settings)
    assert wanted in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_a_large_checkpoint_is_converted_in_little_more_memory_than_its_size(tmp_path):
    shapes = official.dinov2(1024, 24, num_registers=4)
    torch.save(official.fill(shapes), tmp_path / "dinov2_vitl14_reg4_pretrain.pth")
    # The high-water mark of this program alone; that of getrusage outlives the fork from a larger one.
    program = """
import pathlib, re
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
from modeling_vitreg.conversion import ConversionSettings, convert
import transformers, timm
before = peak()
convert("dinov2_vitl14_reg4_pretrain.pth", "out", settings=ConversionSettings(skip_verification=True))
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    size = (tmp_path / "dinov2_vitl14_reg4_pretrain.pth").stat().st_size
    print(f"{int(run.stdout) / size:.2f} times the size of the checkpoint")
    assert int(run.stdout) <= 1.3 * size

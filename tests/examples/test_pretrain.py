"""The training program as its users run it: real processes, killed for real."""

import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import training_program
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_program import Program

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.scenes import SceneSettings, render_scene


ROOT = pathlib.Path(__file__).parents[2]
RECIPE = {
    "objective": "dinov2",
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 8,
        "drop_path_rate": 0.2,
    },
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "settings": {"num_prototypes": 32, "hidden_width": 32, "bottleneck_width": 16},
    "num_steps": 10,
    "batch_size": 8,
}
LOSSES = ("total", "dino", "ibot", "koleo", "teacher_entropy", "gradient_backbone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe, photographs in class folders and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    for index in range(40):
        scene = render_scene(index, settings=SceneSettings(image_size=40))
        path = folder / "photos" / "train" / ("round" if scene.label % 2 else "square") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path)
    return folder


USUAL = ("--data", "photos", "--look-every", "5")
_start = functools.partial(training_program.start, "pretrain.py")
_run = functools.partial(training_program.run, "pretrain.py")
_refuse = functools.partial(training_program.refuse, "pretrain.py")


def _records(output: pathlib.Path) -> list:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "total" in record]


def _losses(output: pathlib.Path) -> list:
    return [[record["step"], *(record[name] for name in LOSSES)] for record in _records(output)]


def _kill_after(process: Program, output: pathlib.Path, *, step: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to the program, and a kill to its workers, as soon as a step is in the log."""
    while process.poll() is None:
        if (output / "log.jsonl").exists() and (output / "log.jsonl").read_text().count('"total"') > step:
            break
        time.sleep(0.002)
    assert process.poll() is None, process.screen()
    process.send_signal(number)
    process.wait(timeout=60)


def _weights(output: pathlib.Path) -> dict:
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing disturbed."""
    out = _run(folder, *USUAL, output="whole", draws=True)
    return folder / "whole", out


def test_a_run_ends_with_a_model_pictures_and_facts(whole):
    output, out = whole
    for name in ("curves.png", "norms.png", "attention.png"):
        assert Image.open(output / name).size[0] > 300
    facts = json.loads((output / "training.json").read_text())
    assert facts["steps"] == 10
    assert facts["recipe"]["num_register_tokens"] == 4
    assert 0 <= facts["knn"] <= 1
    assert facts["chance"] == 0.5
    assert (facts["data"]["split"], facts["data"]["revision"]) == ("train", None)  # a folder has no commit
    assert "next:" in out
    records = _records(output)
    assert [record["step"] for record in records] == list(range(10))
    assert records[-1]["momentum"] > records[0]["momentum"]
    norms = [json.loads(line) for line in (output / "norms.jsonl").read_text().splitlines()]
    assert [record["step"] for record in norms] == [-1, 4, 9]
    assert len(norms[0]["layers"]) == 2


def test_the_model_loads_where_nobody_has_heard_of_us(whole):
    program = f"""
import sys
sys.modules["modeling_vitreg"] = None
import torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({str(whole[0] / "model")!r}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({str(whole[0] / "model")!r})
print(tuple(model(torch.rand(1, 3, 32, 32)).register_tokens.shape), processor.size)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "(1, 4, 32)" in run.stdout, run.stderr
    assert "shortest_edge=37" in run.stdout  # before a crop of 32, as 256 before 224


def test_killed_twice_and_resumed_a_run_has_the_same_bits(folder, whole):
    options = ("--workers", "2")  # the undisturbed run had none
    for step in (4, 7):
        process = _start(folder, *USUAL, *options, output="killed")
        _kill_after(process, folder / "killed", step=step)
    # A kill in the middle of writing leaves a partial folder and half a line behind.
    (folder / "killed" / "state" / "step-00000009.partial").mkdir()
    with open(folder / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "tot')
    out = _run(folder, *USUAL, *options, output="killed")
    assert "continuing after step" in out
    assert _losses(folder / "killed") == _losses(whole[0])
    before, after = _weights(whole[0]), _weights(folder / "killed")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stream_under_accumulation_is_resumed_with_the_same_bits(folder):
    options = ("--streaming", "--workers", "1", "--micro-batch", "4", "--set", "num_steps=8")
    _run(folder, *USUAL, *options, output="stream")
    for step in (3, 5):
        process = _start(folder, *USUAL, *options, output="stream-killed")
        _kill_after(process, folder / "stream-killed", step=step)
    _run(folder, *USUAL, *options, output="stream-killed")
    assert _losses(folder / "stream-killed") == _losses(folder / "stream")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(folder, whole, number):
    options, output = ("--save-every", "100", "--workers", "2"), f"stopped-{number.name}"
    process = _start(folder, *USUAL, *options, output=output)
    _kill_after(process, folder / output, step=3, number=number)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "the same command continues" in out
    _run(folder, *USUAL, *options, output=output)
    assert _losses(folder / output) == _losses(whole[0])


@pytest.fixture(scope="module")
def without_depth(folder):
    """One process, without stochastic depth, which each process draws on its own."""
    _run(folder, *USUAL, "--set", "model.drop_path_rate=0", output="one")
    return folder / "one"


PACKED = ("--set", "settings.is_packed=true")  # as on a GPU


@pytest.mark.parametrize("options", [(), ("--shard",), ("--shard", *PACKED)], ids=["ddp", "fsdp2", "fsdp2 packed"])
def test_two_processes_with_half_the_batch_equal_one(folder, without_depth, options):
    name = "-".join(["two", *options])
    _run(folder, *USUAL, "--set", "model.drop_path_rate=0", *options, output=name, processes=2)
    ours, expected = torch.tensor(_losses(folder / name)), torch.tensor(_losses(without_depth))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    before, after = _weights(without_depth), _weights(folder / name)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-5)


def test_a_sharded_run_goes_on_in_one_process(folder, without_depth):
    options = ("--set", "model.drop_path_rate=0")
    process = _start(folder, *USUAL, *options, "--shard", output="shrunk", processes=2)
    _kill_after(process, folder / "shrunk", step=5)
    out = _run(folder, *USUAL, *options, output="shrunk")
    assert "the run had 2 processes and now has 1" in out
    ours, expected = torch.tensor(_losses(folder / "shrunk")), torch.tensor(_losses(without_depth))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_another_recipe_is_refused_with_what_differs(folder, whole):
    message = _refuse(folder, *USUAL, "--set", "batch_size=4", output="whole")
    assert "batch_size: 8 there, 4 now" in message
    assert "--init whole" in message


def test_other_data_is_refused(folder, whole):
    shutil.copytree(folder / "photos", folder / "more", dirs_exist_ok=True)
    Image.new("RGB", (40, 40)).save(folder / "more" / "train" / "round" / "new.png")
    assert "the same data" in _refuse(folder, *USUAL, "--data", "more", output="whole")


def test_a_full_disk_keeps_the_last_good_state(folder):
    _run(folder, *USUAL, "--set", "num_steps=4", output="full")
    state = folder / "full" / "state"
    kept = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    (state / "LAST").write_text("step-00000002")  # as if it had been stopped there
    message = _refuse(
        folder, *USUAL, "--set", "num_steps=4", output="full", max_file_size=20_000
    )  # bytes: the weights do not fit
    assert "The last good state is full/state/step-00000002" in message
    assert "run the same command again" in message
    assert all(path.read_bytes() == kept[path] for path in kept if "step-00000002" in str(path))
    assert not list(state.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_lost(folder):
    (folder / "file").write_text("")
    assert "file cannot be used" in _refuse(folder, *USUAL, output="file")


def test_numbers_that_break_are_named_and_the_last_good_state_is_kept(folder):
    message = _refuse(folder, *USUAL, "--set", "learning_rate=1e30", "--set", "warmup_ratio=0.5", output="broken")
    assert "is not finite" in message
    assert "step 1" in message or "step 2" in message
    assert "lower learning_rate" in message


def test_unreadable_images_are_replaced_and_named(folder):
    shutil.copytree(folder / "photos", folder / "torn", dirs_exist_ok=True)
    torn = sorted((folder / "torn" / "train" / "round").glob("*.png"))[0]
    torn.write_bytes(torn.read_bytes()[:200])
    out = _run(folder, *USUAL, "--data", "torn", "--set", "num_steps=6", output="torn-run")
    assert torn.name in (folder / "torn-run" / "unreadable.txt").read_text()
    assert "replaced" in out


def test_a_last_phase_starts_from_a_run_with_larger_views_and_other_registers(folder, whole):
    larger = ("--init", "whole", "--set", "crops.global_size=48", "--registers", "2", "--set", "num_steps=2")
    _run(folder, *USUAL, *larger, output="larger")
    model = ViTWithRegistersModel.from_pretrained(folder / "larger" / "model")
    assert model.config.image_size == 48
    assert model.config.num_register_tokens == 2
    # Heads came along: the loss starts where the first phase ended, not at that of new heads.
    ends, begins, fresh = _records(whole[0])[-1]["dino"], _records(folder / "larger")[0]["dino"], None
    fresh = _records(whole[0])[0]["dino"]
    assert abs(begins - ends) < abs(begins - fresh)


def test_a_wrong_name_in_a_recipe_is_answered_with_the_right_one(folder):
    assert "did you mean 'batch_size'?" in _refuse(folder, *USUAL, "--set", "batchsize=4", output="never")
    assert not (folder / "never").exists()

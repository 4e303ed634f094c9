"""The training program as its users run it: real processes, killed for real."""

import errno
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import training_program
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_program import Program

from modeling_vitreg import ViTWithRegistersModel, evaluation
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import DataOptions
from modeling_vitreg.pretraining.state import last_state, load_objective
from modeling_vitreg.scenes import SceneSettings, preset_settings, render_scene


ROOT = pathlib.Path(__file__).parents[2]
RECIPE = {
    "objective": "dinov2",
    "model": {**training_program.MODEL, "drop_path_rate": 0.2},
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


USUAL = ("--data", "photos", "--eval-every", "5")
_start = functools.partial(training_program.start, "pretrain.py")
_run = functools.partial(training_program.run, "pretrain.py")
_refuse = functools.partial(training_program.refuse, "pretrain.py")


def _records(output: pathlib.Path) -> list:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "total" in record]


def _evaluations(output: pathlib.Path) -> list:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "rank" in record]


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


def test_evaluate_measures_what_the_run_measured_on_the_scenes_of_the_same_name(folder):
    usual = ("--num-eval-images", "160", "--num-scenes", "200", "--eval-every", "10")
    out = _run(folder, *usual, output="scenes")
    facts = json.loads((folder / "scenes" / "training.json").read_text())
    assert facts["data"]["name"] == "scenes:single of 42 pixels" and "40 held-out scenes:single of 42 pixels" in out
    encoder = load_encoder(folder / "scenes" / "model")
    settings = preset_settings("scenes:single", side=max(encoder.image_size))
    data = {"num_train": 160, "num_test": 40, "options": DataOptions(label_column="colours")}
    opened = evaluation.open_data("scenes:single", image_size=settings.image_size, **data)
    report = evaluation.evaluate(encoder, tasks=["knn"], data=opened, output_folder=folder / "evaluated")
    assert next(iter(report.data.values()))["name"] == "scenes:single of 42 pixels, labels: colours"
    (result,) = report.results
    assert result["metric"] == "top1" and result["value"] == pytest.approx(facts["knn"], abs=1.5 / 40)


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
    assert re.search(r"shortest_edge\W+37\b", run.stdout)  # before a crop of 32, as 256 before 224


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
    options += ("--set", "schedule=wsd", "--set", "decay_ratio=0.5")
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
    first, expected = (_evaluations(output)[0] for output in (folder / name, without_depth))  # each reads a part
    assert first == pytest.approx(expected, rel=1e-4) and {"rank", "knn"} <= first.keys()


def test_a_sharded_run_goes_on_in_one_process(folder, without_depth):
    options = ("--set", "model.drop_path_rate=0")
    process = _start(folder, *USUAL, *options, "--shard", output="shrunk", processes=2)
    _kill_after(process, folder / "shrunk", step=5)
    out = _run(folder, *USUAL, *options, output="shrunk")
    assert "the run had 2 processes and now has 1" in out
    ours, expected = torch.tensor(_losses(folder / "shrunk")), torch.tensor(_losses(without_depth))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_sharded_within_two_machines_equals_one_process_and_goes_on_in_any_other_way(
    folder, without_depth
):
    options = (*USUAL, "--set", "model.drop_path_rate=0")
    process = _start(folder, *options, "--shard", "hybrid", output="hybrid", processes=4, per_machine=2)
    _kill_after(process, folder / "hybrid", step=3)
    files = [path.name for path in (folder / "hybrid" / "state" / "step-00000002").glob("objective*")]
    assert len(files) >= 2 and all(name.endswith("-of-00004.safetensors") for name in files)
    process = _start(folder, *options, "--shard", output="hybrid", processes=2)
    _kill_after(process, folder / "hybrid", step=6)
    _run(folder, *options, output="hybrid", processes=2)
    ours, expected = torch.tensor(_losses(folder / "hybrid")), torch.tensor(_losses(without_depth))
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
    # The moments of the optimiser do not fit, the weights of the model do.
    message = _refuse(folder, *USUAL, "--set", "num_steps=4", output="full", max_file_size=150_000)
    assert "The last good state is full/state/step-00000002" in message
    assert "run the same command again" in message
    assert all(path.read_bytes() == kept[path] for path in kept if "step-00000002" in str(path))
    assert not _left_over(folder / "full")


def _left_over(output: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in output.rglob(".*") if path.suffix in (".part", ".old")]


_fail = training_program.fail_at_rename
_BEST = "similarities.safetensors"
SHORT = (*USUAL, "--set", "num_steps=2", "--save-every", "1")


@pytest.fixture(scope="module")
def short(folder):
    """A run of two steps that nothing disturbed, and the renames that it makes."""
    log = folder / "renames.txt"
    _run(folder, *SHORT, output="short", before=functools.partial(_fail, "", -1, None, str(log)))
    return folder / "short", [name.removeprefix("short/") for name in log.read_text().splitlines()]


def _content(output: pathlib.Path) -> dict:
    """What a run leaves behind, without what depends on the clock."""
    timed = ("images_per_second", "memory_gib", "seconds")
    records = [json.loads(line) for name in ("log", "norms") for line in (output / f"{name}.jsonl").open()]
    training = json.loads((output / "training.json").read_text())
    for record in (*records, training):
        for name in timed:
            record.pop(name, None)
    files = ("model/model.safetensors", "model/config.json", "model.json", "recipe.yaml", "state/LAST", _BEST)
    return {"log": records, "training": training} | {name: (output / name).read_bytes() for name in files}


def test_killed_at_any_rename_a_run_ends_with_the_same_files(folder, short):
    whole, renames = short
    assert renames.count("model") == 2 and renames[-1] == "training.json"
    written = (
        "state/step-00000000",
        "state/LAST",
        "state/step-00000001",
        "model",
        "model.json",
        "training.json",
        _BEST,
    )
    for target, count in itertools.product(written, (0, 1)):
        if count >= renames.count(target):
            continue
        output = f"killed-at-{target.replace('/', '-')}-{count}"
        kill = functools.partial(_fail, target, count, None, str(folder / "killed.txt"))
        process = _start(folder, *SHORT, output=output, before=kill)
        assert process.wait() == -signal.SIGKILL
        out = _run(folder, *SHORT, output=output)
        assert f"model:    {output}/model" in out
        assert _content(folder / output) == _content(whole), f"killed before {target} was written"
        assert not _left_over(folder / output)


def test_a_finished_run_is_left_as_it_is(folder, short):
    files = {path: path.stat().st_mtime_ns for path in short[0].rglob("*.*") if path.suffix != ".jsonl"}
    assert "all 2 steps were complete already" in _run(folder, *SHORT, output="short")
    assert {path: path.stat().st_mtime_ns for path in short[0].rglob("*.*") if path.suffix != ".jsonl"} == files


def test_a_finished_run_whose_model_was_lost_or_damaged_writes_it_again(folder, short):
    shutil.copytree(short[0], folder / "lost")
    for damage in (shutil.rmtree, lambda model: (model / "model.safetensors").write_bytes(b"")):
        damage(folder / "lost" / "model")
        _run(folder, *SHORT, output="lost")
        assert _content(folder / "lost") == _content(short[0])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("state/step-00000001", "The last good state is full-at/state/step-00000000"),
        ("model", "The state of this step is saved"),
        ("training.json", "it continues from the last state"),
    ],
)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_fails_midway_is_named_and_the_run_can_be_continued(folder, short, target, words, error):
    whole, renames = short
    fail = functools.partial(_fail, target, renames.count(target) - 1, error, str(folder / "failed.txt"))
    shutil.rmtree(folder / "full-at", ignore_errors=True)
    message = _refuse(folder, *SHORT, output="full-at", before=fail)
    assert words in message and os.strerror(error) in message and target.split("/")[-1] in message
    assert not _left_over(folder / "full-at")
    _run(folder, *SHORT, output="full-at")
    assert _content(folder / "full-at") == _content(whole)


def test_a_damaged_state_is_named_and_the_run_continues_from_the_one_before(folder, whole):
    shutil.copytree(whole[0], folder / "damaged")
    state = folder / "damaged" / "state" / "step-00000009" / "optimizer.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    out = _run(folder, *USUAL, output="damaged")
    assert "step-00000009/optimizer.safetensors is damaged" in out
    assert "continuing after step 9 of 10" in out
    assert _losses(folder / "damaged") == _losses(whole[0])
    assert all(torch.equal(_weights(whole[0])[name], value) for name, value in _weights(folder / "damaged").items())


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(folder, output):
    (folder / "file").write_text("")
    message = _refuse(folder, "--data", "no/such/data", output=output)
    assert f"the output folder {output} cannot be used" in message
    assert "a file, but a folder is needed: 'file'" in message


def test_an_output_among_the_images_is_refused(folder):
    message = _refuse(folder, *USUAL, output="photos/run")
    assert (
        "the output folder photos/run cannot be used: --output photos/run: lies in the folder of the images" in message
    )
    assert not (folder / "photos" / "run").exists()


# The commands of the pages, without any variable of the environment.
PAGE = (ROOT / "docs" / "train" / "scale.md").read_text()
ON_CPUS = {
    "torch": "python -m torch.distributed.run --standalone --nproc_per_node 2 examples/pretrain.py",
    "accelerate": "accelerate launch --cpu --num_processes 2 examples/pretrain.py",
}


def _launch(folder, command: str, *options: str, output: str):
    program, *words = command.replace("examples/", f"{ROOT}/examples/").split()
    usual = ["--recipe", "tiny.yaml", "--log-every", "1", "--workers", "0", "--output", output, *USUAL]
    return training_program.launch(
        folder, str(pathlib.Path(sys.executable).with_name(program)), *words, *usual, *options
    )


# That of torch is launched by four quick tests below, and one of them compares its losses.
@pytest.mark.parametrize(
    "command", [pytest.param(ON_CPUS["torch"], marks=pytest.mark.slow), ON_CPUS["accelerate"]], ids=ON_CPUS
)
def test_the_commands_for_two_processes_on_cpus_are_those_of_the_page(folder, without_depth, command):
    assert command in PAGE
    output = command.split()[0] + "-two"
    process = _launch(folder, command, "--set", "model.drop_path_rate=0", output=output)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert json.loads((folder / output / "training.json").read_text())["processes"] == 2
    ours, expected = torch.tensor(_losses(folder / output)), torch.tensor(_losses(without_depth))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


ENDLESS = ("--set", "num_steps=100000", "--eval-every", "100000", "--save-every", "100000")
LOST = "process {}: another process of this run ended, so this one ends too"


def _wait_for_a_step(process, output: pathlib.Path) -> None:
    while process.poll() is None and not ((output / "log.jsonl").exists() and _records(output)):
        time.sleep(0.05)


def test_when_one_process_is_killed_the_launcher_and_the_other_end_within_seconds_and_in_words(folder):
    process = _launch(folder, ON_CPUS["torch"], *ENDLESS, output="lost-main")
    _wait_for_a_step(process, folder / "lost-main")
    (main,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "0"]
    main.kill()
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode != 0
    assert LOST.format(1) in err and "The same command continues from the last state" in err


LONGER = ("--set", "num_steps=24", "--eval-every", "24")


@pytest.fixture(scope="module")
def two(folder):
    """A run of two processes that nothing disturbed."""
    _run(folder, *USUAL, *LONGER, output="two-whole", processes=2)
    return folder / "two-whole"


@pytest.mark.parametrize("damage", [os.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_a_damaged_part_of_one_process_is_named_and_the_state_before_is_taken(two, tmp_path, damage):
    shutil.copytree(two / "state", tmp_path / "state")
    newest, before = sorted((tmp_path / "state").glob("step-*"), reverse=True)
    damage(newest / "optimizer-00002-of-00002.safetensors")
    said = []
    assert last_state(tmp_path / "state", warn=said.append) == before
    assert f"{newest}/optimizer-00002-of-00002.safetensors" in said[0]
    # Two processes that do not shard write each tensor once, and together all of them.
    files = [load_file(before / f"objective-0000{number}-of-00002.safetensors").keys() for number in (1, 2)]
    assert not files[0] & files[1] and files[0] | files[1] == load_objective(before).keys()


def _processes_of(launcher, output: pathlib.Path, *, step: int) -> dict[str, psutil.Process]:
    """The processes that a launcher started, by rank, as soon as a step is in the log."""
    while launcher.poll() is None and not ((output / "log.jsonl").exists() and len(_records(output)) > step):
        time.sleep(0.01)
    children = psutil.Process(launcher.pid).children()
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_killed_process_comes_back_by_itself_from_the_last_state(folder, two, rank):
    command = ON_CPUS["torch"].replace("--nproc", "--max-restarts 3 --nproc")
    assert "--max-restarts 3" in PAGE and ON_CPUS["torch"] in PAGE
    output = folder / f"restarted-{rank}"
    launcher = _launch(folder, command, *LONGER, "--save-every", "3", output=output.name)
    _processes_of(launcher, output, step=8)[rank].kill()
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err[-3000:]
    assert "continuing after step" in out + err
    assert _losses(output) == _losses(two)
    assert all(torch.equal(_weights(two)[name], value) for name, value in _weights(output).items())


@pytest.mark.parametrize("is_sent_to_all", [False, True], ids=["launcher", "all"])
def test_a_launcher_that_is_told_to_end_ends_all_processes_with_a_state(folder, two, is_sent_to_all):
    output = folder / f"terminated-{is_sent_to_all}"
    launcher = _launch(folder, ON_CPUS["torch"], *LONGER, "--save-every", "100", output=output.name)
    processes = _processes_of(launcher, output, step=3)
    for process in processes.values() if is_sent_to_all else ():
        process.terminate()
    launcher.terminate()
    out, err = launcher.communicate(timeout=60)
    (number,) = re.findall(r"stopped after step (\d+) of 24; the same command continues", out)
    assert (output / "state" / "LAST").read_text() == f"step-{int(number) - 1:08d}"
    assert not any(process.is_running() for process in processes.values())
    assert 'pretrain.py", line' not in err, err  # no traceback but that of the launcher
    _run(folder, *USUAL, *LONGER, output=output.name, processes=2)
    assert _losses(output) == _losses(two)


def test_without_a_launcher_too_a_process_ends_in_words_when_another_is_killed(folder):
    process = _start(folder, *USUAL, *ENDLESS, output="lost-too", processes=2)
    _wait_for_a_step(process, folder / "lost-too")
    os.kill(process.processes[1].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.processes[0].exitcode == 1
    assert LOST.format(0) in err and "Traceback" not in err


def test_a_full_memory_is_told_with_what_helps(folder):
    message = _refuse(folder, *USUAL, output="memory", before=training_program.fill_the_memory)
    assert "process 0: out of memory: CUDA out of memory" in message
    assert "--micro-batch" in message and "--shard" in message


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
    assert re.search(rf"1 of \d+ evaluation images cannot be read: \S*{torn.name}", out)


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

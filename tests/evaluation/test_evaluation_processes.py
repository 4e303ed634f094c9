"""Two processes give one report, with the numbers of one process; a killed one loses no finished shard."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.discovery import DiscoverySettings, Sweep, discover
from modeling_vitreg.evaluation import EncodingSettings, EvaluationSettings, SegmentationSettings, evaluate, open_data
from modeling_vitreg.evaluation.cache import FeatureCache
from modeling_vitreg.features import load_encoder


ROOT = pathlib.Path(__file__).parents[2]
TASKS = ("knn", "segmentation", "discovery")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def _evaluate(model, folder, *, batch_size=3):
    encoding = EncodingSettings(has_progress_bar=False, shard_size=8, workers=0, batch_size=batch_size)
    settings = EvaluationSettings(encoding=encoding, segmentation=SegmentationSettings(num_steps=5))
    return evaluate(
        load_encoder(model),
        tasks=TASKS,
        data=open_data("scenes", image_size=32, num_train=40, num_test=20),
        settings=settings,
        output_folder=folder,
    )


def _discover(model, folder):
    images = open_data("scenes", image_size=32, num_train=1, num_test=20).test
    settings = DiscoverySettings(has_progress_bar=False, batch_size=3)
    reading = settings.for_pass(shard_size=4)
    sweep = Sweep(features=("key",), biases=(0.0, -0.2))
    return discover(load_encoder(model), images, settings=settings, sweep=sweep, reading=reading, folder=folder)


def _work(rank: int, folder: str) -> None:
    folder = pathlib.Path(folder)
    torch.set_num_threads(1)
    for name in ("both", "killed"):
        options = {"init_method": f"file://{folder}/{name}-meeting", "rank": rank, "world_size": 2}
        torch.distributed.init_process_group("gloo", **options)
        if name == "both":
            found = _discover(folder / "model", folder / "objects"), _evaluate(folder / "model", folder / name)
            if rank == 0:
                (folder / "discovery.json").write_text(json.dumps(vars(found[0])))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            continue
        if rank == 1:
            _die_at_the_second_shard()
        try:
            _evaluate(folder / "model", folder / name)
        except RuntimeError as error:
            (folder / "words").write_text(str(error))
    os._exit(0)


def _die_at_the_second_shard() -> None:
    end_shard = FeatureCache.end_shard

    def die(self, shard) -> None:
        if shard.index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        end_shard(self, shard)

    FeatureCache.end_shard = die


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config = ViTWithRegistersConfig(**SIZES, num_register_tokens=2, initializer_range=0.2)
    ViTWithRegistersModel(config).save_pretrained(folder / "model")
    # Not torch.multiprocessing.spawn, which ends the process that is left before it can say what it saw.
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    return folder


def _numbers(folder):
    report = json.loads((folder / "evaluation.json").read_text())
    return report, {(result["task"], result["metric"]): result["value"] for result in report["results"]}


def test_two_processes_evaluate_as_one_does(folder):
    report, numbers = _numbers(folder / "both")
    _evaluate(folder / "model", folder / "one", batch_size=8)
    single, expected = _numbers(folder / "one")
    assert numbers.keys() == expected.keys() and len({task for task, _ in numbers}) == 3
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, abs=1e-6), name
    counts = [list(data["data"].values()) for data in (report, single)]
    assert counts[0] == counts[1] and counts[0][0]["train"]["num_images"] == 40


def test_two_processes_discover_as_one_does(folder):
    found = json.loads((folder / "discovery.json").read_text())
    expected = json.loads(json.dumps(vars(_discover(folder / "model", None))))
    for name in ("as_published", "sweep", "best_of_sweep", "predictions", "images"):
        assert found[name] == expected[name], name


def test_a_killed_process_is_told_and_no_finished_shard_is_encoded_again(folder, monkeypatch):
    assert "another of the 2 processes died" in (folder / "words").read_text()
    assert "run the same command again" in (folder / "words").read_text()
    finished = sorted(file.name for file in (folder / "killed" / "features").rglob("*.pooled.*"))
    assert finished == [f"0000{shard}.pooled.safetensors" for shard in (0, 1, 2, 4)]  # of the training images
    update, seen = FeatureCache.update, []

    def count(self, batch) -> None:
        seen.extend(batch.numbers.tolist())
        update(self, batch)

    monkeypatch.setattr(FeatureCache, "update", count)
    _evaluate(folder / "model", folder / "killed")
    assert _numbers(folder / "killed")[1] == pytest.approx(_numbers(folder / "both")[1], abs=1e-6)
    assert seen == [*range(24, 32), *range(20)]  # the shard of the killed process, and the test images


COMMANDS = {
    "torch": "-m torch.distributed.run --standalone --nproc_per_node 2 -m modeling_vitreg",
    "accelerate": "-m accelerate.commands.accelerate_cli launch --cpu --num_processes 2 -m modeling_vitreg",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("verb", ["analyze", "evaluate", "discover"])
def test_the_commands_for_two_processes_write_one_report(folder, tmp_path, command, verb):
    words = {"evaluate": ["scenes", "--num-images", "40,20", "--tasks", "knn"], "discover": ["--num-images", "20"]}
    words["analyze"] = ["--num-images", "40", "--set", "encoding.image_size=32"]
    words = [verb, str(folder / "model"), *words[verb], "--workers", "0"]
    runs = []
    for name, start in (("two", command), ("one", "-m modeling_vitreg")):
        line = [sys.executable, *start.split(), *words, "--output", str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        runs.append(run.stdout.replace(str(tmp_path / name), "FOLDER").splitlines())
    assert runs[0] == runs[1]

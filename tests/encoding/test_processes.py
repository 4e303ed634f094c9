"""Several processes share the images of a pass, and one report comes out: that of a single process."""

import math
import os
import socket
import threading

import torch
from planted_models import pictures, planted_model

from modeling_vitreg.analysis.settings import SurveySettings
from modeling_vitreg.analysis.survey import survey
from modeling_vitreg.distributed import DistributedContext, distributed_context, gather_to_first, joined_processes
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import open_images


SETTINGS = {
    "batch_size": 4,
    "num_attention_images": 10,
    "num_ablation_images": 6,
    "num_probe_images": 20,
    "has_progress_bar": False,
    "is_strict": True,
    "workers": 0,
}


def _survey(folder: str, context: DistributedContext, is_streaming: bool):
    model = planted_model(layer=3, magnitude=30.0, channel=5)
    source = open_images(folder, is_streaming=is_streaming)
    return survey(load_encoder(model, name="model"), source, settings=SurveySettings(**SETTINGS), context=context)


def _run(function, *arguments, num_processes: int = 2) -> list:
    """What a function returns in each of several processes that exchange through gloo."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_start, (num_processes, port, queue, function, arguments), nprocs=num_processes)
    return dict(sorted(queue.get() for _ in range(num_processes)))


def _start(rank: int, num_processes: int, port: int, queue, function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with joined_processes() as context:
        queue.put((rank, function(context, *arguments)))


def _reports(context: DistributedContext, folder: str) -> list[dict | None]:
    lock = threading.Lock()  # what is local need not pickle
    received = gather_to_first({"lock": lock, "rank": context.rank}, context, local={"lock": lock})
    assert received == ([{"lock": lock, "rank": rank} for rank in range(2)] if context.rank == 0 else None)
    found = [_survey(folder, context, is_streaming) for is_streaming in (False, True)]
    return [each and vars(each[0]) for each in found]


def _same(first, second, path=()) -> list:
    if isinstance(first, dict) and isinstance(second, dict):
        return [line for key in first | second for line in _same(first.get(key), second.get(key), (*path, key))]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [line for n, pair in enumerate(zip(first, second)) for line in _same(*pair, (*path, n))]
    is_close = isinstance(first, float) and isinstance(second, float) and math.isclose(first, second, rel_tol=1e-6)
    return [] if first == second or is_close else [(path, first, second)]


def test_two_processes_report_what_one_does(tmp_path):
    for number, image in enumerate(pictures(23)[0]):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        image.save(tmp_path / str(number % 2) / f"{number:02}.png")
    (tmp_path / "0" / "01.png").write_bytes(b"no picture")
    found = _run(_reports, str(tmp_path))
    assert found[1] == [None, None]
    for is_streaming, report in zip((False, True), found[0]):
        alone = vars(_survey(str(tmp_path), distributed_context(), is_streaming)[0])
        assert alone["images"]["num_images"] == 23 and alone["images"]["num_unreadable"] == 1
        differences = _same(alone, {**report, "made_with": alone["made_with"]})
        assert not differences, differences[:5]
        assert report["made_with"]["num_processes"] == 2

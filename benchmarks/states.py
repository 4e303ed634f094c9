"""Memory of two processes that write and read the state of a sharded run (FSDP2 on CPUs).

python -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/states.py

Each line is the peak of the resident memory of a process above its memory before, in GiB. The objective is DINOv2 on a
ViT-L/16 of `--layers` layers with 65,536 prototypes.
"""

import argparse
import pathlib
import shutil
import tempfile
import time

import psutil
import torch
from torch import distributed

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.run.sharding import shard
from modeling_vitreg.pretraining.state import last_state, load_state, save_state
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.masking import MaskSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="default: 12, half of a ViT-L")
    layers = parser.parse_args().layers
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    objective, optimizer = _make(layers)
    whole = sum(tensor.numel() * 4 for tensor in objective.state_dict().values())
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    whole += sum(value.numel() * 4 for state in optimizer.state.values() for value in state.values())
    _say(f"state, whole: {whole / 2**30:.2f} GiB; memory of a process: {_memory():.2f} GiB")
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(folder)
    folder = pathlib.Path(folder[0])
    with _Peak("save"):
        save_state(folder, objective=objective, optimizer=optimizer, metadata={"step": 0}, is_writer=rank == 0)
    with _Peak("load"):
        load_state(last_state(folder), objective=objective, optimizer=optimizer)
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    distributed.destroy_process_group()


def _make(layers: int):
    config = ViTWithRegistersConfig.from_preset(
        "large/16", num_hidden_layers=layers, num_register_tokens=4, has_mask_token=True
    )
    objective = DINOv2(
        ViTWithRegistersModel(config),
        settings=DINOv2Settings(num_prototypes=65536),
        crops=CropSettings(),
        masks=MaskSettings(),
        num_steps=10,
    )
    objective = shard(objective)
    return objective, torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)


class _Peak:
    """Prints the peak of each process above its memory before."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self):
        distributed.barrier()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before, self._begin = _memory(), time.perf_counter()

    def __exit__(self, *_):
        peak, seconds = _memory(peak=True) - self._before, time.perf_counter() - self._begin
        peaks = [None] * distributed.get_world_size()
        distributed.all_gather_object(peaks, peak)
        _say(f"{self._name}: {' and '.join(f'{value:.2f}' for value in peaks)} GiB, {seconds:.1f} s")


def _memory(*, peak: bool = False) -> float:
    if not peak:
        return psutil.Process().memory_info().rss / 2**30
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def _say(text: str) -> None:
    if distributed.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()

"""Two processes with a part of the batch each compute what one computes with all of it."""

import copy
import pathlib

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext, distributed_context
from modeling_vitreg.pretraining.monitoring.instruments import entropy_of_mean
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.objectives.lejepa import LeJEPA, LeJEPASettings
from modeling_vitreg.pretraining.objectives.losses import EmaCenter, koleo_loss, sinkhorn
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.masking import MaskSettings, draw_masks


NUM_PROCESSES = 2
PARTS = {
    "halves": (slice(0, 4), slice(4, 8)),
    "unequal": (slice(0, 3), slice(3, 8)),
    "none": (slice(0, 8), slice(8, 8)),
}
CENTRINGS = ("sinkhorn", "moving_mean")
METHODS = (*CENTRINGS, "lejepa")


# What all processes know -------------------------------------------------------------------------------------------


def _logits(step: int = 0) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step)) / 3


def _koleo_network() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(5, 4)


def _batch(images: slice = slice(None)) -> dict[str, Tensor]:
    """Views of 4 images, and their masks, of which some images have none."""
    generator = torch.Generator().manual_seed(5)
    masks = draw_masks(4, num_views=2, grid=(4, 4), settings=MaskSettings(), generator=generator)
    masks = masks[:, images].flatten(0, 1)
    return {
        "global_views": torch.randn(2, 4, 3, 32, 32, generator=generator)[:, images],
        "local_views": torch.randn(3, 4, 3, 16, 16, generator=generator)[:, images],
        "masks": masks,
        "masked_patches": masks.flatten().nonzero().squeeze(1),
    }


def _objective(method: str, processes: DistributedContext = SINGLE_PROCESS) -> DINOv2 | LeJEPA:
    torch.manual_seed(1)
    config = ViTWithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        has_mask_token=method in CENTRINGS,
        initializer_range=0.3,  # so that class tokens differ from the first step on
    )
    backbone = ViTWithRegistersModel(config)
    common = {
        "crops": CropSettings(num_local=3, global_size=32, local_size=16),
        "num_steps": 10,
        "processes": processes,
    }
    if method == "lejepa":
        settings = LeJEPASettings(num_directions=16, hidden_width=32, projection_width=8)
        return LeJEPA(backbone, settings=settings, **common).train()
    settings = DINOv2Settings(
        num_prototypes=24, num_patch_prototypes=16, hidden_width=32, bottleneck_width=8, centering=method
    )
    return DINOv2(backbone, settings=settings, masks=MaskSettings(), **common).train()


def _train(model, objective: DINOv2 | LeJEPA, images: slice) -> dict:
    """Two steps, so that a moving centre has moved; losses, gradients and parameters of the second."""
    for step in range(2):
        losses = model(_batch(images), step=step)
        losses["total"].backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in [p for p in objective.parameters() if p.requires_grad]:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        objective.after_step(step=step)
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": gradients,
        "state": copy.deepcopy(objective.state_dict()),
    }


# What each process does --------------------------------------------------------------------------------------------


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    processes = distributed_context()
    results = {"rank": processes.rank, "size": processes.size}
    for name, parts in PARTS.items():
        rows = _logits()[parts[rank]]
        results[f"sinkhorn {name}"] = sinkhorn(rows, temperature=0.05, processes=processes)
        if name != "none":
            results[f"mean entropy {name}"] = entropy_of_mean(rows.softmax(dim=1), processes=processes)
        centre = EmaCenter(5)
        targets = [centre(_logits(step)[parts[rank]], temperature=0.1, processes=processes) for step in range(3)]
        results[f"centre {name}"] = centre.center
        results[f"centred targets {name}"] = targets[-1]

    half = PARTS["halves"][rank]
    network = DistributedDataParallel(_koleo_network())
    loss = koleo_loss(network(_logits()[half]), processes=processes)
    loss.backward()
    results["koleo"], results["koleo gradients"] = loss.detach(), [p.grad for p in network.parameters()]

    for method in METHODS:
        objective = _objective(method, processes)
        model = DistributedDataParallel(objective, broadcast_buffers=False)
        results[method] = _train(model, objective, slice(2 * rank, 2 * rank + 2))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=NUM_PROCESSES)
    return [torch.load(pathlib.Path(folder) / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


# What one process expects ------------------------------------------------------------------------------------------


def test_a_process_on_its_own_is_alone():
    assert distributed_context() is SINGLE_PROCESS
    values = torch.ones(2)
    assert SINGLE_PROCESS.all_reduce_sum(values) is values


def test_processes_know_their_rank_and_number(results):
    assert [(result["rank"], result["size"]) for result in results] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("parts", PARTS)
def test_sinkhorn_assigns_the_rows_of_all_processes_together(results, parts):
    found = torch.cat([result[f"sinkhorn {parts}"] for result in results])
    torch.testing.assert_close(found, sinkhorn(_logits(), temperature=0.05))
    own = torch.cat([sinkhorn(_logits()[rows], temperature=0.05) for rows in PARTS["halves"]])
    assert (own - sinkhorn(_logits(), temperature=0.05)).abs().max() > 0.01  # it matters


@pytest.mark.parametrize("parts", PARTS)
def test_the_centre_moves_to_the_mean_of_all_processes(results, parts):
    centre = EmaCenter(5)
    targets = [centre(_logits(step), temperature=0.1) for step in range(3)]
    for result in results:
        torch.testing.assert_close(result[f"centre {parts}"], centre.center)
    found = torch.cat([result[f"centred targets {parts}"] for result in results])
    torch.testing.assert_close(found, targets[-1])


@pytest.mark.parametrize("parts", ["halves", "unequal"])
def test_the_entropy_of_the_mean_is_that_of_all_rows(results, parts):
    expected = entropy_of_mean(_logits().softmax(dim=1))
    for result in results:
        torch.testing.assert_close(result[f"mean entropy {parts}"], expected)


def test_koleo_and_its_averaged_gradients_are_those_of_the_whole_batch(results):
    network = _koleo_network()
    loss = koleo_loss(network(_logits()))
    loss.backward()
    torch.testing.assert_close(sum(result["koleo"] for result in results) / 2, loss.detach())
    for result in results:
        for found, parameter in zip(result["koleo gradients"], network.parameters()):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_two_processes_with_half_the_images_are_those_of_one_with_all(results, method):
    objective = _objective(method)
    expected = _train(objective, objective, slice(None))
    first, second = (result[method] for result in results)
    for name in expected["losses"]:
        mean = (first["losses"][name] + second["losses"][name]) / 2
        torch.testing.assert_close(mean, expected["losses"][name], rtol=1e-5, atol=1e-5)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-5, atol=1e-5)
        assert torch.equal(first["gradients"][name], second["gradients"][name])
    for name, value in expected["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first["state"][name], second["state"][name]), name

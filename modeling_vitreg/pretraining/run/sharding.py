"""FSDP2: the parameters of an objective sharded over the processes, layer by layer, with `fully_shard` of torch."""

from __future__ import annotations

import copy
import os

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from modeling_vitreg.hat_vitreg import HATNetLayer
from modeling_vitreg.mamba_vitreg import MambaRLayer
from modeling_vitreg.modeling_vitreg import ViTWithRegistersLayer

from ..objectives.heads import PrototypeHead
from ..objectives.objective import Objective


KINDS = ("full", "hybrid")
UNITS = (ViTWithRegistersLayer, MambaRLayer, HATNetLayer, PrototypeHead)  # what is gathered at a time


def shard(
    objective: Objective, *, device: torch.device | None = None, precision: str = "no", kind: str = "full"
) -> Objective:
    """Shard an objective in place: each layer, each head, and the rest, one after the other.

    Student and teacher are sharded alike, so that the average is updated shard by shard.

    Args:
        objective: before its optimiser is made.
        device: where the shards go; None: where the objective lies. A layer moves there before it is sharded, so an
            objective that lies on the CPU is never whole on a GPU.
        precision: "no", "bf16" or "fp16": of gathered parameters and of computation; sums of gradients stay float32.
        kind: "full" shards over all processes, "hybrid" over those of a machine, with a copy on each machine.

    Raises:
        RuntimeError: there is only one process, or the launcher does not say how many a machine has.
        ValueError: a parameter is a single number, which torch does not shard.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "sharding needs several processes, got one: start them with `accelerate launch --num_processes ...`, or "
            "on CPUs with `python -m torch.distributed.run --nproc_per_node ...`"
        )
    scalars = [name for name, parameter in objective.named_parameters() if not parameter.ndim]
    if scalars:
        raise ValueError(f"torch cannot shard {', '.join(scalars)}, which is a single number: leave out --shard")
    device = (device or next(objective.parameters()).device).type
    mesh = _make_mesh(device, kind)
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(objective.modules()):
        if isinstance(module, UNITS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    if device == "cpu":  # in torch 2.8 gloo adds where it is asked for a mean: let FSDP add, and divide itself
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return objective


def _make_mesh(device: str, kind: str) -> DeviceMesh:
    num_processes = torch.distributed.get_world_size()
    if kind == "full":
        return init_device_mesh(device, (num_processes,))
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if per_machine < 1 or num_processes % per_machine:
        raise RuntimeError(
            f"--shard hybrid: expected the same number of processes on every machine, got {num_processes} processes "
            f"and LOCAL_WORLD_SIZE={per_machine or 'unset'}: start them with `accelerate launch` or "
            "`python -m torch.distributed.run`"
        )
    return init_device_mesh(device, (num_processes // per_machine, per_machine), mesh_dim_names=("replicate", "shard"))


def gather_model(objective: Objective) -> PreTrainedModel:
    """The saved model of an objective, whole, on its device; all processes call it together if it is sharded."""
    model = objective.saved
    if not isinstance(objective, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    # Sharding has put a class of its own in the place of the model's.
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    whole = kind.from_pretrained(None, config=copy.deepcopy(model.config), state_dict=weights)
    return whole.to(next(model.parameters()).device)

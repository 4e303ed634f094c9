"""Registers that are added to a finished model before it trains on, and the way back into the whole model.

Letters: B images, N tokens, P patches, R registers, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel

from .register_neurons import Outliers, image_tower


NUM_ROUNDS = 20  # of the clustering


def add_registers(tower: ViTWithRegistersModel, values: Tensor, *, is_gated: bool) -> ViTWithRegistersModel:
    """A copy of a model with further registers behind its own ones of their kind.

    Args:
        tower: not changed.
        values: of the new registers (R, D).
        is_gated: behind gates, which start closed: the copy has the outputs of the original.

    Raises:
        ValueError: an architecture without room for such registers.
    """
    config, count = tower.config, len(values)
    fields = {"num_register_tokens": config.num_register_tokens + count}
    fields |= {"num_gated_registers": config.num_gated_registers + count} if is_gated else {}
    larger = ViTWithRegistersModel(ViTWithRegistersConfig.from_dict(config.to_dict() | fields))
    place = config.num_register_tokens - config.num_test_time_registers
    place -= 0 if is_gated else config.num_gated_registers
    weights, name = tower.state_dict(), "embeddings.register_tokens.weight"
    old = weights.pop(name, values[:0])
    weights[name] = torch.cat([old[:place], values.to(old), old[place:]])
    for name, gates in larger.state_dict().items():
        if name.endswith("register_gates"):
            gates[:, : config.num_gated_registers] = weights.get(name, gates[:, :0])
            weights[name] = gates
    larger.load_state_dict(weights)
    larger.config._name_or_path = config._name_or_path  # where the image processor lies
    return larger.to(tower.device).train(tower.training)


@torch.no_grad()
def outlier_embeddings(tower: ViTWithRegistersModel, batches: Iterable[Tensor], outliers: Outliers) -> Tensor:
    """Embeddings (M, D) of the patches that become outliers, positions included."""
    found = []
    for images, mask in zip(batches, outliers.masks):
        patches = tower.embeddings(images)[:, tower.config.token_slices["patches"]]
        found.append(patches[mask.to(images.device)])
    return torch.cat(found)


def cluster_means(points: Tensor, number: int) -> Tensor:
    """Means (number, D) of clusters of points (M, D), by Lloyd's algorithm from spread points on.

    With fewer points than clusters the last means are points with noise, because equal registers stay equal.
    """
    chosen = [0]
    for _ in range(number - 1):
        chosen.append(int(torch.cdist(points, points[chosen]).amin(dim=1).argmax()))
    means = points[chosen].clone()
    for _ in range(NUM_ROUNDS):
        nearest = torch.cdist(points, means).argmin(dim=1)
        for cluster in nearest.unique().tolist():
            means[cluster] = points[nearest == cluster].mean(dim=0)
    is_repeated = torch.cdist(means, means).tril(-1).eq(0).tril(-1).any(dim=1)
    return means + is_repeated[:, None] * 0.02 * torch.randn_like(means)


def replace_tower(model: nn.Module, tower: ViTWithRegistersModel) -> nn.Module:
    """A copy of a model, with any head or text tower, with the weights of another image tower.

    Args:
        model: of this family; not changed. Its projection and mask token are kept.
        tower: with the same sizes, and any number of registers.
    """
    model, tower = copy.deepcopy(model), copy.deepcopy(tower)
    own = image_tower(model)
    tower.embeddings.mask_token = own.embeddings.mask_token
    for name in ("embeddings", "pre_layernorm", "layers", "layernorm"):
        setattr(own, name, getattr(tower, name))
    for name in ("num_register_tokens", "num_gated_registers", "image_size"):
        setattr(own.config, name, getattr(tower.config, name))
    return model.eval()

"""A few steps of a small model in this process, for tests of what is learned."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def fit(objective: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, num_steps: int) -> list:
    """Train on one batch; returns the loss before each step."""
    losses = []
    for step in range(num_steps):
        loss = objective(batch, step=step)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients_without_and_with_checkpointing(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[dict]:
    """Gradients by name, twice with the same random numbers: first as always, then with activations recomputed."""
    calls = []
    layer = model.base_model.layers[0]
    inner = [part for part in layer.modules() if not any(part.children())]
    handles = [part.register_forward_pre_hook(lambda *_: calls.append(1)) for part in inner]
    counts = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        calls.clear()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(images, labels=labels).loss.backward()
        counts.append(len(calls))
        yield {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for handle in handles:
        handle.remove()
    assert counts[1] > counts[0], "no activation was recomputed"

"""Training loop of linear heads on patches, shared by segmentation and depth.

Features are computed once, so there is no augmentation; DINOv2 crops, flips and distorts the images.

Letters: B images of a batch, I images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tqdm
from torch import Tensor, nn

from modeling_vitreg.settings import expect


@dataclass(frozen=True)
class Descent:
    """Settings of AdamW with a warm-up, followed by a linear or cosine decay to 0.

    Args:
        num_steps: number of all steps.
        batch_size: images per step.
        learning_rate: peak learning rate.
        weight_decay: weight decay of AdamW.
        warmup_share: share of the steps with a rising learning rate.
        is_cosine: cosine decay; otherwise linear.
        clip: maximum norm of the gradient; None for no clipping.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    is_cosine: bool = False
    clip: float | None = None

    def __post_init__(self):
        expect(self, "", num_steps="[1, inf)", batch_size="[1, inf)", learning_rate="(0, inf)")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = int(self.warmup_share * self.num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        passed = (step - warmup) / (self.num_steps - warmup)
        return self.learning_rate * ((1 + math.cos(math.pi * passed)) / 2 if self.is_cosine else 1 - passed)


def fit_head(
    head: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    *,
    num_images: int,
    descent: Descent,
    seed: int = 0,
    title: str | None = None,
) -> float:
    """Train a head in place, and leave it in evaluation mode.

    Args:
        head: module to train.
        loss_of: function of image indices (B,) that returns the loss.
        num_images: I, in a new order in each epoch.
        descent: settings of the optimiser.
        seed: random seed of the order.
        title: title of a progress bar; None for no bar.

    Returns:
        The last loss.

    Raises:
        ValueError: no image.
        RuntimeError: the loss is not finite.
    """
    if num_images < 1:
        raise ValueError("expected at least one image to train on, got none")
    optimizer = torch.optim.AdamW(head.parameters(), lr=descent.learning_rate, weight_decay=descent.weight_decay)
    generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    size = min(descent.batch_size, num_images)
    head.train()
    for step in tqdm.trange(descent.num_steps, unit="step", desc=title, disable=title is None):
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(num_images, generator=generator)])
        batch, waiting = waiting[:size], waiting[size:]
        optimizer.param_groups[0]["lr"] = descent.rate(step)
        loss = loss_of(batch)
        if not loss.isfinite():
            raise RuntimeError(f"the loss became {loss.item()} in step {step}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        if descent.clip is not None:
            torch.nn.utils.clip_grad_norm_(head.parameters(), descent.clip)
        optimizer.step()
    head.eval()
    return loss.item()


def initialise(layer: nn.Conv2d, *, seed: int) -> None:
    """Normal weights with standard deviation 0.01, and biases of 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.empty_like(layer.weight, device="cpu").normal_(std=0.01, generator=generator))
        layer.bias.zero_()

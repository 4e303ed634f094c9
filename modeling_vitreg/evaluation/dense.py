"""Training of a linear head on patches, image by image drawn by a seed: the loop of segmentation and depth.

Features are computed once, so there is no augmentation, where DINOv2 crops, flips and distorts.

Letters: B images of a batch, I images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tqdm
from torch import Tensor, nn


@dataclass(frozen=True)
class Descent:
    """AdamW with a warm-up, then a fall to 0 along a line or a cosine.

    Args:
        num_steps: in all.
        batch_size: images a step.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        warmup_share: of the steps, in which the rate rises.
        is_cosine: a cosine, else a line.
        clip: largest norm of the gradient; None: any.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    is_cosine: bool = False
    clip: float | None = None

    def __post_init__(self):
        if self.num_steps < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"expected one or more steps and images a step, and a rate above 0, got {self.num_steps}, "
                f"{self.batch_size} and {self.learning_rate}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
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
    """Train a head in place; it is left in evaluation mode.

    Args:
        head: to be trained.
        loss_of: from numbers of images (B,) to the loss.
        num_images: I, drawn pass after pass in a new order.
        descent: steps and rates.
        seed: of the order.
        title: of a progress bar; None: none.

    Returns:
        The last loss.

    Raises:
        ValueError: no image.
        RuntimeError: a loss that is not finite.
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
    """Weights normal of standard deviation 0.01, and no bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.empty_like(layer.weight, device="cpu").normal_(std=0.01, generator=generator))
        layer.bias.zero_()


__all__ = ["Descent", "fit_head", "initialise"]

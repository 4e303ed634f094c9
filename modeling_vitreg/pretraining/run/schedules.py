"""Schedules as pure functions of the step, without a state."""

from __future__ import annotations

import math


def cosine(step: int, *, base: float, final: float, num_steps: int, num_warmup: int = 0, start: float = 0.0) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine to `final`, then `final`.

    The warm-up is inclusive, as in DINOv2: step num_warmup - 1 already has the base value.
    """
    if step < num_warmup:
        return start + (base - start) * step / max(num_warmup - 1, 1) if num_warmup > 1 else base
    if step >= num_steps:
        return final
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2


DECAY_SHAPES = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def warmup_stable_decay(
    step: int, *, base: float, final: float, num_steps: int, num_warmup: int, num_decay: int, shape: str
) -> float:
    """Linear warm-up from `final` to `base` (WSD), then `base`, and `final` at the end of the last `num_decay` steps.

    Between warm-up and decay no value depends on `num_steps`. As `transformers.get_wsd_schedule`, whose warm-up is
    exclusive: step `num_warmup` is the first with the base value. Source: Hu et al. 2024, arXiv 2404.06395; its shapes
    are those of Haegele et al. 2024, arXiv 2405.18392.
    """
    if step >= num_steps:
        return final
    factor = step / num_warmup if step < num_warmup else 1.0
    if step >= num_steps - num_decay:
        factor = DECAY_SHAPES[shape]((step - num_steps + num_decay) / num_decay)
    return final + (base - final) * factor


def linear(step: int, *, start: float, final: float, num_steps: int) -> float:
    """A straight line from `start`, inclusive at both ends, then `final`."""
    return final if step >= num_steps - 1 else start + (final - start) * step / (num_steps - 1)


def scale_learning_rate(base: float, *, batch_size: int, rule: str) -> float:
    """Learning rate for a batch.

    Args:
        base: for the batch size that the rule names.
        batch_size: images a step, over all processes and accumulations; views do not count.
        rule: "sqrt1024" is base x sqrt(batch / 1024) (DINOv2); "linear256" is base x batch / 256 (DINO, MAE); "none".
    """
    rules = {"sqrt1024": math.sqrt(batch_size / 1024), "linear256": batch_size / 256, "none": 1.0}
    if rule not in rules:
        raise ValueError(f"learning rate: expected the rule to be one of {', '.join(rules)}, got {rule!r}")
    return base * rules[rule]

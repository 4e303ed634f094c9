"""Detector of values that are not finite, which does not wait for the device at every step."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor

from ..state import last_state


class NonFiniteDetector:
    """Remembers, on the device, the first step at which each term was not finite."""

    def __init__(self):
        self._first: dict[str, Tensor] = {}

    def update(self, terms: dict[str, Tensor], *, step: int) -> None:
        """Take the values of a step."""
        for name, value in terms.items():
            value = value.detach()
            first = self._first.setdefault(name, torch.full((), -1, device=value.device))
            is_new = (first < 0) & ~value.isfinite().all()
            self._first[name] = torch.where(is_new, step, first)

    def check(self, states: pathlib.Path) -> None:
        """Stop a run that has seen such a value.

        Args:
            states: folder of states, to name the last good one.

        Raises:
            RuntimeError: names the step, the terms and what to do.
        """
        found = {name: int(first) for name, first in self._first.items() if int(first) >= 0}
        if not found:
            return
        step = min(found.values())
        # `total` breaks with its terms: it is named only if no term is.
        names = [name for name, first in found.items() if first == step]
        names = [name for name in names if name != "total"] or names
        good = last_state(states)
        raise RuntimeError(
            f"step {step}: {', '.join(names)} is not finite. "
            + (f"The last good state, {good}, is kept. " if good else "No state was saved before. ")
            + "The same command would fail again: lower learning_rate, raise warmup_ratio or lower max_grad_norm "
            "(--set ...), or use bf16 or no mixed precision instead of fp16, and start from this run in another "
            "output folder (--init, --output)."
        )

"""A seed for each place where something is drawn."""

from __future__ import annotations

import numpy as np


def derive_seed(*words: int) -> int:
    """The seed in 1 ... 2 ** 63 - 1 that stands for a sequence of integers: 0 or positive, of any size."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1)) or 1


__all__ = ["derive_seed"]

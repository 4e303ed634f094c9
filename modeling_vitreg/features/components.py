"""Principal components of patches as colours, so that similar patches have similar colours.

Letters for shapes: B images, P patches, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def principal_colours(patch_grid: Tensor) -> Tensor:
    """First three principal components of all patches as colours.

    The range of a component from its 1st to its 99th percentile becomes 0 to 1, so that a few outliers do not grey out
    the rest.

    Args:
        patch_grid: (B, rows, columns, D).

    Returns:
        (B, rows, columns, 3) from 0 to 1, on the CPU.
    """
    rows = patch_grid.flatten(0, 2).cpu().double()  # [B, rows, columns, D] -> [B P, D]
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    vectors = vectors[:, -3:].flip(1)
    # The sign of a component is arbitrary; fixed, colours do not flip from one step of a run to the next.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    components = rows @ (vectors * largest.sign())  # [B P, D] -> [B P, 3]
    low, high = np.quantile(components.numpy(), [0.01, 0.99], axis=0)
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    missing = 3 - colours.shape[1]
    colours = nn.functional.pad(colours, (0, missing), value=0.5)
    return colours.unflatten(0, patch_grid.shape[:3]).float()

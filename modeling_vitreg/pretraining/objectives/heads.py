"""Projection heads: from tokens to prototypes (DINO, iBOT, DINOv2), and the norm of projectors (LeJEPA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext


class PrototypeHead(nn.Module):
    """Tokens (..., D) to similarities with K prototypes (..., K).

    Three linear layers with GELU between them, a unit vector, and a linear layer without bias whose rows are
    magnitude x direction, the magnitudes starting at one (weight normalisation).

    Args:
        width: D of the tokens.
        num_prototypes: K.
        hidden_width: width of the two hidden layers.
        bottleneck_width: width of the unit vector.

    Source: Caron et al. 2021, arXiv 2104.14294, section 3.1 and appendix C.
    """

    def __init__(self, width: int, *, num_prototypes: int, hidden_width: int = 2048, bottleneck_width: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, bottleneck_width),
        )
        self.last_layer = PrototypeLayer(bottleneck_width, num_prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mlp(tokens)
        eps = 1e-6 if hidden.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(hidden, dim=-1, eps=eps))


class PrototypeLayer(nn.Module):
    """Unit vectors (..., b) to K products with magnitude x unit direction of each prototype."""

    def __init__(self, width: int, num_prototypes: int):
        super().__init__()
        self.magnitude = nn.Parameter(torch.ones(num_prototypes, 1))
        self.direction = nn.Parameter(torch.empty(num_prototypes, width))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)

    def forward(self, unit_vectors: Tensor) -> Tensor:
        # torch's own weight normalisation, without its wrapper: this module keeps two plain parameters.
        return F.linear(unit_vectors, torch._weight_norm(self.direction, self.magnitude, 0))

    def extra_repr(self) -> str:
        return f"width={self.direction.shape[1]}, num_prototypes={self.direction.shape[0]}"


class SyncedBatchNorm(nn.Module):
    """Rows (N, D) minus their mean, by their deviation, over the rows of all processes; then scale and bias.

    `torch.nn.SyncBatchNorm` needs GPUs. There are no running statistics: projectors are used in training only.

    Args:
        width: D.
        processes: processes that share a batch.
        eps: added to the variance.
    """

    def __init__(self, width: int, *, processes: DistributedContext = SINGLE_PROCESS, eps: float = 1e-5):
        super().__init__()
        self.processes, self.eps = processes, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        mean = self._mean(rows)
        variance = self._mean((rows - mean).square())
        return (rows - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def _mean(self, rows: Tensor) -> Tensor:
        """Over the rows of all processes, each of which has the same number."""
        return self.processes.all_gather(rows.mean(dim=0, keepdim=True)).mean(dim=0)

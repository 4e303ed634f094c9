"""Targets and losses of DINO, iBOT, DINOv2 and LeJEPA, computed in float32 under any autocast.

Letters: B images, G global views, V local views, K prototypes, M masked patches of this process, D width.
Sums over processes come in as `processes`; means of equal parts agree with the mean of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, temperature: float, num_iterations: int = 3, processes: DistributedContext = SINGLE_PROCESS
) -> Tensor:
    """Assign rows to prototypes so that every prototype gets nearly the same mass (Sinkhorn-Knopp).

    Q = exp(logits / temperature), divided by its sum; then, `num_iterations` times:
        divide each column by K times its sum over all rows, each row by the number of rows times its sum
    times the number of rows

    Args:
        logits: (rows, K); the number of rows may differ between processes, and may be 0.
        temperature: temperature of the teacher.
        num_iterations: 3 in SwAV, DINOv2 and DINOv3.
        processes: rows of all of them are assigned together.

    Returns:
        float32 (rows, K), rows sum to one.

    Source: Cuturi 2013; Caron et al. 2020, arXiv 2006.09882, section 3.1.
    """
    scaled = logits.float() / temperature
    num_rows, num_prototypes = scaled.shape
    # The largest value of each column, then of each row, is taken out of exp(): nothing overflows, and neither a
    # prototype nor a row vanishes. What a column loses cancels; what a row loses comes back as its first factor.
    highest = scaled.amax(dim=0) if num_rows else scaled.new_full((num_prototypes,), -torch.inf)
    scaled.sub_(processes.all_reduce_max(highest))
    rest = scaled.amax(dim=1)
    kernel, row = scaled.sub_(rest.unsqueeze(1)).exp_(), rest.exp()
    total_rows = processes.all_reduce_sum(scaled.new_full((), num_rows))
    # Q stays diag(row) kernel diag(column): two products with vectors in place of three passes over the matrix.
    with _without_autocast(kernel):
        for _ in range(num_iterations):
            column = 1 / (num_prototypes * processes.all_reduce_sum(row @ kernel))
            row = 1 / (total_rows * (kernel @ column))
    return kernel.mul_(column).mul_((total_rows * row).unsqueeze(1))


class EmaCenter(nn.Module):
    """Targets as a softmax of logits minus their moving mean over all processes (DINO).

    Args:
        num_prototypes: K.
        momentum: momentum of the mean; 0.9 in DINO.

    Source: Caron et al. 2021, arXiv 2104.14294, equation 4.
    """

    def __init__(self, num_prototypes: int, *, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, *, temperature: float, processes: DistributedContext = SINGLE_PROCESS) -> Tensor:
        """Targets float32 (rows, K) with the centre of the rows before these, which then moves the centre."""
        logits = logits.float()
        targets = (logits - self.center).div_(temperature).softmax(dim=-1)
        total = processes.all_reduce_sum(torch.cat([logits.sum(dim=0), logits.new_full((1,), len(logits))]))
        moved = self.center.lerp(total[:-1] / total[-1], 1 - self.momentum)
        self.center.copy_(torch.where(total[-1] > 0, moved, self.center))  # without waiting for the device
        return targets


def cross_view_loss(
    global_logits: Tensor, local_logits: Tensor | None, targets: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy between views of the same image, never of a view with itself.

    for each student view s (global, then local), teacher view t with s != t, image b:
        add  -sum_k targets[t, b, k] * log softmax(logits[s, b] / temperature)[k]
    divide by the number of pairs of views and by the number of images

    Args:
        global_logits: logits of the student, (G, B, K).
        local_logits: logits of the student, (V, B, K), or None.
        targets: targets of the teacher, (G, B, K), rows sum to one.
        temperature: temperature of the student.

    Source: Caron et al. 2021, arXiv 2104.14294, equation 3.
    """
    num_global, num_images = targets.shape[:2]
    num_local = 0 if local_logits is None else len(local_logits)
    num_pairs = num_global * (num_global - 1 + num_local)
    if num_pairs == 0:
        raise ValueError("cross_view_loss: expected two or more views, got one global view and no local view")
    of_all = targets.sum(dim=0)
    total = _cross_entropy(global_logits, of_all - targets, temperature).sum()
    if local_logits is not None:
        # A local view meets every teacher view: the targets are the same for all, so they are summed once.
        total = total + _cross_entropy(local_logits, of_all, temperature).sum()
    return total / (num_pairs * num_images)


def masked_patch_loss(
    logits: Tensor, targets: Tensor, *, weights: Tensor, num_views: int, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy of masked patches of the student with the same patches as the teacher sees them.

    for each masked patch i:  add  -weights[i] * sum_k targets[i, k] * log softmax(logits[i] / temperature)[k]
    divide by `num_views`

    Args:
        logits: logits of the student, (M, K); M may be 0.
        targets: targets of the teacher, (M, K), rows sum to one.
        weights: one over the number of masked patches in the view of each patch, (M,).
        num_views: views of this process, masked or not.
        temperature: temperature of the student.

    Source: Zhou et al. 2021, arXiv 2111.07832, equation 2; divided as in DINOv2.
    """
    return (_cross_entropy(logits, targets, temperature) * weights).sum() / num_views


def koleo_loss(features: Tensor, *, processes: DistributedContext = SINGLE_PROCESS) -> Tensor:
    """Spread features: minus the mean log of the distance of each to its nearest neighbour (Kozachenko-Leonenko).

    divide each row by its norm
    for each row i:  add  -log(|x_i - x_j + 1e-8| + 1e-8), j the row of all processes nearest to i but not i
    divide by the number of rows

    Args:
        features: (B, D), class tokens of one view.
        processes: neighbours are looked for among the rows of all of them.

    Returns:
        A scalar; zero if there is no other row.

    Source: Sablayrolles et al. 2018, arXiv 1806.03198; Oquab et al. 2023, arXiv 2304.07193.
    """
    rows = F.normalize(features.float(), dim=-1, eps=1e-8)
    everyone = processes.all_gather(rows)
    if len(everyone) == 1:
        return rows.sum() * 0
    with torch.no_grad(), _without_autocast(rows):
        similarities = rows @ everyone.T  # [B, D] -> [B, all]
        similarities.diagonal(processes.rank * len(rows)).fill_(-torch.inf)
        nearest = similarities.argmax(dim=1)
    distances = F.pairwise_distance(rows, everyone[nearest], eps=1e-8)
    return -(distances + 1e-8).log().mean()


def characteristic_function(values: Tensor, num_frequencies: int, max_frequency: float) -> Tensor:
    """Sums of cos(t x) and of sin(t x) over values x, at frequencies t of linspace(0, max_frequency, num_frequencies).

    Args:
        values: (V, B, K), float32; the sum is over B.
        num_frequencies: T, at least 2.
        max_frequency: the last frequency.

    Returns:
        (2, T, V, K). Only `values` are kept for the backward pass, not T times as many cosines.
    """
    return _CharacteristicFunction.apply(values, num_frequencies, max_frequency / (num_frequencies - 1))


class _CharacteristicFunction(torch.autograd.Function):
    # The frequencies are multiples of one: cosines and sines follow from those of the first by rotation.

    @staticmethod
    def forward(ctx, values: Tensor, num_frequencies: int, spacing: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.spacing = spacing
        sums = values.new_zeros(2, num_frequencies, values.shape[0], values.shape[2])
        for number, (cosine, sine) in enumerate(_rotations(values * spacing, num_frequencies)):
            sums[0, number], sums[1, number] = cosine.sum(dim=1), sine.sum(dim=1)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        (values,) = ctx.saved_tensors
        total = torch.zeros_like(values)
        num_frequencies = gradient.shape[1]
        gradient = gradient.unsqueeze(3)  # [2, T, V, K] -> [2, T, V, 1, K]
        for number, (cosine, sine) in enumerate(_rotations(values * ctx.spacing, num_frequencies)):
            frequency = number * ctx.spacing
            total.addcmul_(gradient[1, number], cosine, value=frequency)
            total.addcmul_(gradient[0, number], sine, value=-frequency)
        return total, None, None


def _rotations(angles: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and sines of 0, 1, ... count - 1 times some angles."""
    first_cosine, first_sine = angles.cos(), angles.sin()
    cosine, sine = torch.ones_like(angles), torch.zeros_like(angles)
    for number in range(count):
        if number:
            cosine, sine = cosine * first_cosine - sine * first_sine, sine * first_cosine + cosine * first_sine
        yield cosine, sine


def _without_autocast(values: Tensor):
    """Products in float32: autocast would round them to 8 bits."""
    return torch.autocast(values.device.type, enabled=False)


def _cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k targets * log softmax(logits / temperature), over the last axis, in float32; no gradient to targets."""
    with _without_autocast(logits):
        return _CrossEntropy.apply(logits, targets, temperature)


class _CrossEntropy(torch.autograd.Function):
    # With 65,536 prototypes each pass over the logits counts; autograd's own way makes twice as many.

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logs = (logits.float() / temperature).log_softmax(dim=-1)
        loss = -torch.linalg.vecdot(targets.float(), logs)
        ctx.save_for_backward(logs.exp_(), targets)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        probabilities, targets = ctx.saved_tensors
        mass = targets.sum(dim=-1, keepdim=True)
        # In place: at this size to ask for fresh memory costs as much as the arithmetic.
        difference = probabilities.mul_(mass).sub_(targets)
        return difference.mul_(gradient.unsqueeze(-1) / ctx.temperature).to(ctx.dtype), None, None

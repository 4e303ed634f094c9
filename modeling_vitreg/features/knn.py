"""k-nearest-neighbour accuracy on frozen features, as in DINO and DINOv2.

Letters for shapes: B training rows, M held-out rows of a chunk, k neighbours, C classes, D width.

Source: Wu et al. 2018, arXiv 1805.01978, section 3.4; Oquab et al. 2023, arXiv 2304.07193 (facebookresearch/dinov2,
`dinov2/eval/knn.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    held_out_features: Tensor,
    held_out_labels: Tensor,
    *,
    num_neighbors: int = 20,
    temperature: float = 0.07,
    max_neighbors: int = 200,
    chunk: int = 256,
) -> float:
    """Share of held-out rows whose class wins the weighted vote of their nearest neighbours.

    for each held-out row:
        neighbours = the `max_neighbors` rows of largest cosine, most similar first
        weights = softmax of cosine / `temperature` over all these neighbours
        add the weights of the first `num_neighbors` to the classes of their rows; the largest sum wins

    The softmax over more neighbours than vote scales all votes of a row alike and does not change the winner. Of equal
    votes the smallest label wins. If there are fewer rows than neighbours, all rows are neighbours.

    Args:
        features: (B, D), of any scale, for example normed class tokens; the accuracy is computed on their device.
        labels: (B,) integers, which need not be consecutive.
        held_out_features: (rows, D), on any device.
        held_out_labels: (rows,) integers; a class that does not occur in `labels` is never predicted.
        num_neighbors: number of rows that vote.
        temperature: temperature of the softmax, in units of the cosine.
        max_neighbors: number of rows in the softmax.
        chunk: held-out rows per step; the memory is chunk x B float32 numbers.

    Returns:
        Accuracy from 0 to 1.

    Raises:
        ValueError: shapes do not match, there are no rows, labels are not integers, features are not finite, or a
            number is out of range.
    """
    _check_numbers(num_neighbors, temperature, max_neighbors, chunk)
    _check_rows("features", features, labels)
    _check_rows("held_out_features", held_out_features, held_out_labels)
    if features.shape[1] != held_out_features.shape[1]:
        raise ValueError(
            f"expected features of one width, got {features.shape[1]} and held-out {held_out_features.shape[1]}: take "
            "both from the same encoder"
        )
    classes, positions = labels.to(features.device).unique(return_inverse=True)
    features = F.normalize(features.float(), dim=1)
    depth = min(max_neighbors, len(features))
    num_right = 0
    for rows, truth in zip(held_out_features.split(chunk), held_out_labels.split(chunk)):
        # Under the autocast of a training loop in bfloat16, near neighbours would tie.
        with torch.autocast(features.device.type, enabled=False):
            rows = F.normalize(rows.to(features.device).float(), dim=1)
            similarity, neighbours = (rows @ features.T).topk(depth, dim=1)  # [M, B] -> [M, depth]
        weights = (similarity / temperature).softmax(dim=1)[:, :num_neighbors]
        voted = positions[neighbours[:, :num_neighbors]]
        votes = weights.new_zeros(len(rows), len(classes)).scatter_add(1, voted, weights)  # [M, k] -> [M, C]
        num_right += (classes[votes.argmax(dim=1)] == truth.to(classes.device)).sum().item()
    return num_right / len(held_out_features)


def _check_numbers(num_neighbors: int, temperature: float, max_neighbors: int, chunk: int) -> None:
    if not 1 <= num_neighbors <= max_neighbors:
        raise ValueError(
            f"expected 1 <= num_neighbors <= max_neighbors, got {num_neighbors} and {max_neighbors}: raise "
            "max_neighbors with num_neighbors"
        )
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; the published one is 0.07")
    if chunk < 1:
        raise ValueError(f"expected chunks of 1 or more rows, got {chunk}; chunk only limits the memory")


def _check_rows(name: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"expected {name} (rows, width) with at least one row, got shape {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected one label for each of the {len(features)} rows of {name}, got shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"expected labels of {name} as whole numbers, got {labels.dtype}: convert them by `.long()`")
    if not features.isfinite().all():
        raise ValueError(
            f"expected finite {name}, got NaN or infinity: the encoder may have diverged; check its training loss"
        )

"""The k-NN vote: the protocol as a plain loop, scikit-learn's classifier where they coincide, and its limits."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from modeling_vitreg.evaluation import knn_accuracy


def _blobs(num_rows: int, *, num_classes: int = 5, spread: float = 1.6, width: int = 6):
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(num_classes, (num_rows,))
    return centres[labels] + spread * torch.randn(num_rows, width), labels


def _plain_loop(features, labels, held_out, held_out_labels, *, num_neighbors, temperature, max_neighbors):
    right = 0
    for row, truth in zip(held_out.tolist(), held_out_labels.tolist()):
        cosines = []
        for other, label in zip(features.tolist(), labels.tolist()):
            dot = sum(a * b for a, b in zip(row, other))
            cosines.append((dot / math.hypot(*row) / math.hypot(*other), label))
        cosines = sorted(cosines, reverse=True)[:max_neighbors]
        total = sum(math.exp(cosine / temperature) for cosine, _ in cosines)
        votes = {}
        for cosine, label in cosines[:num_neighbors]:
            votes[label] = votes.get(label, 0) + math.exp(cosine / temperature) / total
        right += max(votes, key=votes.get) == truth
    return right / len(held_out)


@pytest.mark.parametrize("num_neighbors, max_neighbors", [(1, 1), (3, 200), (20, 30), (50, 50)])
def test_accuracy_equals_the_plain_loop(num_neighbors, max_neighbors):
    data = *_blobs(80), *_blobs(60)
    options = {"num_neighbors": num_neighbors, "temperature": 0.2, "max_neighbors": max_neighbors}
    accuracy = knn_accuracy(*data, **options)
    assert accuracy == _plain_loop(*data, **options)
    assert 0.3 < accuracy < 0.95  # neither chance nor certainty, where everything would agree


def test_accuracy_equals_the_weighted_classifier_of_scikit_learn():
    features, labels, held_out, held_out_labels = *_blobs(300), *_blobs(200)
    for temperature in (0.07, 0.5):
        oracle = KNeighborsClassifier(
            20, metric="cosine", weights=lambda distance, t=temperature: torch.tensor((1 - distance) / t).exp().numpy()
        ).fit(features, labels)
        expected = oracle.score(held_out, held_out_labels)
        assert knn_accuracy(features, labels, held_out, held_out_labels, temperature=temperature) == expected


def test_near_neighbours_outvote_more_that_are_farther_only_when_it_is_cold():
    degrees = torch.tensor([0.0, 40, 41]).deg2rad()
    features, labels = torch.stack([degrees.cos(), degrees.sin()], dim=1), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(features, labels, *query, temperature=0.07) == 1
    assert knn_accuracy(features, labels, *query, temperature=10.0) == 0


def test_lengths_of_features_and_the_size_of_chunks_do_not_matter():
    features, labels, held_out, held_out_labels = *_blobs(90), *_blobs(50)
    expected = knn_accuracy(features, labels, held_out, held_out_labels)
    stretched = features * torch.rand(90, 1).add(0.1).mul(100), labels, held_out * 1e-3, held_out_labels
    assert knn_accuracy(*stretched) == expected
    for chunk in (1, 7, 50, 1000):
        assert knn_accuracy(features, labels, held_out, held_out_labels, chunk=chunk) == expected


def test_all_rows_vote_where_there_are_fewer_than_neighbours():
    features, labels = torch.eye(3), torch.tensor([4, 9, 4])
    assert knn_accuracy(features, labels, features, labels, temperature=0.01) == 1
    # Nearly no difference between weights: two rows of class 4 outvote the row of class 9 itself.
    assert knn_accuracy(features, labels, features, labels, temperature=100.0) == pytest.approx(2 / 3)


def test_labels_need_not_be_consecutive_and_unknown_classes_are_never_right():
    features, labels, held_out, held_out_labels = *_blobs(90), *_blobs(50)
    expected = knn_accuracy(features, labels, held_out, held_out_labels)
    assert knn_accuracy(features, labels * 1000 - 7, held_out, held_out_labels * 1000 - 7) == expected
    assert knn_accuracy(features, labels, held_out, held_out_labels + 50) == 0


def test_neighbours_are_found_in_float32_under_autocast():
    # Two directions that bfloat16 cannot tell apart.
    angles = torch.tensor([0.5, 0.501])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([1, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(features, labels, features, labels, num_neighbors=1) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_neighbors": 300}, "num_neighbors <= max_neighbors, got 300 and 200"),
        ({"num_neighbors": 0}, "1 <= num_neighbors"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"chunk": 0}, "chunks of 1 or more rows, got 0"),
        ({"features": torch.ones(4)}, r"features \(rows, width\) with at least one row, got shape \(4,\)"),
        ({"held_out_features": torch.ones(0, 3)}, "held_out_features .* at least one row"),
        ({"held_out_features": torch.ones(2, 5)}, "one width, got 3 and held-out 5"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "each of the 4 rows of features, got shape"),
        ({"held_out_labels": torch.zeros(2)}, "whole numbers, got torch.float32"),
        ({"features": torch.full((4, 3), torch.nan)}, "expected finite features"),
    ],
)
def test_errors_say_what_was_expected(changes, message):
    arguments = {
        "features": torch.ones(4, 3),
        "labels": torch.zeros(4, dtype=torch.long),
        "held_out_features": torch.ones(2, 3),
        "held_out_labels": torch.zeros(2, dtype=torch.long),
    }
    assert knn_accuracy(**arguments) == 1
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **changes})

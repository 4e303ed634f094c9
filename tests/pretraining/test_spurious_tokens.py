"""Filters and losses of the refinement, against slow programs from their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_vitreg.pretraining.objectives.spurious_tokens import (
    absorption_loss,
    alignment_loss,
    clean_threshold,
    consistency_loss,
    hijackee_scores,
    is_no_hijackee,
    match,
    most_similar,
    sample_spurious,
    separation_loss,
)


B, P, N, R, D = 2, 6, 7, 11, 8


def _units(*shape):
    return F.normalize(torch.randn(*shape) + 0.5, dim=-1).requires_grad_()


def _logsumexp(values):
    return math.log(sum(math.exp(value / 0.2) for value in values))


@pytest.fixture
def tokens():
    student, targets, pool, registers, full = (_units(B, n, D) for n in (P, P, N, R, N))
    return student, targets.detach(), pool.detach(), registers, full


def test_the_threshold_is_the_cosine_of_targets_from_both_ends(tokens):
    targets, is_clean = tokens[1], torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    a, b, c, d = targets[0, 0], targets[0, 2], targets[0, 3], targets[1, 3]
    torch.testing.assert_close(clean_threshold(targets, is_clean), (2 * a @ d + 2 * b @ c) / 4)


def test_alignment_is_the_contrast_of_clean_tokens(tokens):
    student, targets, pool, *_ = tokens
    is_clean, threshold = torch.rand(B, P) < 0.6, torch.tensor(0.4)
    loss = alignment_loss(student, targets, is_clean, pool, threshold=threshold, uniformity=0.3)
    terms = []
    for b, p in is_clean.nonzero().tolist():
        spread = _logsumexp([(student[b, p] @ other).item() for other in pool[b]])
        terms.append(-(student[b, p] @ targets[b, p]).item() / 0.2 + 0.3 * spread)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_no_gradient_pushes_apart_what_is_below_the_threshold(tokens):
    student, targets, pool, *_ = tokens
    is_clean = torch.ones(B, P, dtype=torch.bool)
    low, high = (
        torch.autograd.grad(
            alignment_loss(student, targets, is_clean, pool, threshold=torch.tensor(limit), uniformity=1.0), student
        )[0]
        for limit in (-1.0, 1.1)
    )
    torch.testing.assert_close(high, -targets / 0.2 / (B * P))  # only the pull is left
    assert (low - high).abs().max() > 0.01


def test_separation_counts_registers_that_are_near(tokens):
    *_, registers, full = tokens
    loss = separation_loss(full, registers)
    slow = [_logsumexp([(token @ other).item() for other in registers[b]]) for b in range(B) for token in full[b]]
    assert loss.item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)
    loss.backward()
    assert ((registers.grad.abs().amax(-1) > 0) == ((full @ registers.mT) >= 0.55).any(dim=1)).all()


def test_absorption_follows_its_program(tokens):
    student, _, pool, registers, _ = tokens
    threshold = torch.tensor(0.35)
    loss = absorption_loss(registers, student, pool, threshold=threshold)
    pull, crowd, weak = [], [], []
    for b in range(B):
        cosines = registers[b] @ pool[b].T
        nearest = [int(row.argmax()) for row in cosines]
        pull += [row.max().item() for row in cosines]
        near = sorted((max((r @ s).item() for s in student[b]) for r in registers[b]), reverse=True)[
            :2
        ]  # a tenth of 11
        weak += [value for value in near if value > 0.35]
        for row in cosines:
            values = [row[j].item() for j in nearest]
            crowd.append(_logsumexp([value if value >= 0.35 else 0.45 for value in values]))
    expected = -sum(pull) / len(pull) / 0.2 - 0.2 * (sum(weak) / len(weak) if weak else 0.0) / 0.2
    assert loss.item() == pytest.approx(expected + sum(crowd) / len(crowd), rel=1e-5)
    loss.backward()
    assert student.grad is None  # registers come to the crop, not the other way round


def test_consistency_is_a_cross_entropy_of_similarities(tokens):
    student, cleaner, *_ = tokens
    slow = []
    for b in range(B):
        for p in range(P):
            rows = [[(each[b, p] @ other).item() for other in each[b]] for each in (student, cleaner)]
            rows = [[(v - min(row)) / (max(row) - min(row) + 1e-10) / 0.2 for v in row] for row in rows]
            shares = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
            slow.append(-sum(q * math.log(p_ + 1e-10) for p_, q in zip(*shares)))
    assert consistency_loss(student, cleaner).item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)


def test_hijackees_are_keys_that_nobody_attends_to():
    query, key = torch.randn(2, B, P, D)
    is_clean = torch.ones(B, P, dtype=torch.bool)
    is_clean[0, 2] = False
    scores = hijackee_scores([query, query.flip(1)], [key, key], is_clean)
    for b in range(B):
        shares = torch.zeros(P)
        for q in (query[b], query[b].flip(0)):
            for row in q:
                cosines = [torch.cosine_similarity(row, k, dim=0) * is_clean[b, j] for j, k in enumerate(key[b])]
                shares += torch.stack(cosines).softmax(0) / 2
        torch.testing.assert_close(scores[b], 1 - shares)
    known = scores[is_clean]
    assert torch.equal(is_no_hijackee(scores, is_clean, sigma=0.5), scores <= known.mean() + known.std() / 2)


def test_spurious_tokens_are_drawn_from_the_most_similar_and_matched(tokens):
    _, targets, pool, *_ = tokens
    similarity = most_similar(targets, pool)
    torch.testing.assert_close(similarity[1, 3], max(targets[1, 3] @ other for other in pool[1]))
    drawn = sample_spurious(targets, similarity, 50)
    for b in range(B):
        best = targets[b, similarity[b].topk(2).indices]  # 0.4 of 6, rounded down
        assert all(any(torch.equal(token, other) for other in best) for token in drawn[b])
    nearest = match(drawn, pool)
    assert all(any(torch.equal(token, other) for other in pool[0]) for token in nearest[0])
    torch.testing.assert_close((drawn * nearest).sum(-1), most_similar(drawn, pool))

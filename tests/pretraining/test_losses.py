"""Targets and losses against slow programs written from their formulas, in plain loops and in float64."""

import decimal
import math

import pytest
import torch
from torch import Tensor

from modeling_vitreg.pretraining.objectives.losses import (
    EmaCenter,
    cross_view_loss,
    koleo_loss,
    masked_patch_loss,
    sinkhorn,
)


def _close(found: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> bool:
    scale = expected.abs().max().clamp(min=1e-12)
    return bool((found.double() - expected.double()).abs().max() <= tolerance * scale)


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


# Sinkhorn ----------------------------------------------------------------------------------------------------------


def _slow_sinkhorn(logits: Tensor, *, temperature: float, num_iterations: int = 3) -> Tensor:
    """The formula with 40 digits, whose exponentials neither overflow nor vanish."""
    decimal.getcontext().prec = 40
    rows, columns = range(logits.shape[0]), range(logits.shape[1])
    scaled = (logits.double() / temperature).tolist()
    q = [[decimal.Decimal(scaled[b][k]).exp() for k in columns] for b in rows]
    total = sum(sum(row) for row in q)
    q = [[value / total for value in row] for row in q]
    for _ in range(num_iterations):
        masses = [sum(q[b][k] for b in rows) for k in columns]
        q = [[q[b][k] / masses[k] / len(columns) for k in columns] for b in rows]
        q = [[value / sum(row) / len(rows) for value in row] for row in q]
    return torch.tensor([[float(value * len(rows)) for value in row] for row in q], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_sinkhorn_equals_the_plain_program(shape, num_iterations):
    logits = torch.randn(shape) / 4
    found = sinkhorn(logits, temperature=0.05, num_iterations=num_iterations)
    assert found.dtype == torch.float32
    assert _close(found, _slow_sinkhorn(logits, temperature=0.05, num_iterations=num_iterations))
    assert torch.allclose(found.sum(dim=1), torch.ones(shape[0]), atol=1e-5)


def test_sinkhorn_gives_every_prototype_the_same_mass():
    as_many = torch.eye(8)[torch.randperm(8)] + torch.randn(8, 8) / 20
    assert torch.allclose(sinkhorn(as_many, temperature=0.04).sum(dim=0), torch.ones(8), atol=1e-3)
    crowded = torch.randn(12, 3) / 10
    crowded[:, 0] += 1  # without the assignment all rows would choose the first prototype
    assert torch.allclose(sinkhorn(crowded, temperature=0.1).sum(dim=0), torch.full((3,), 4.0), rtol=0.05)


@pytest.mark.parametrize("size", [50, 1000])
def test_sinkhorn_stays_exact_for_logits_of_any_size(size):
    # Integers and a power of two: the division by the temperature is exact, so both programs see the same numbers.
    logits = torch.randint(-size, size, (6, 5)).float()
    found = sinkhorn(logits, temperature=0.0625)
    assert found.isfinite().all()
    assert _close(found, _slow_sinkhorn(logits, temperature=0.0625))


def test_sinkhorn_neither_overflows_nor_loses_a_row_or_a_prototype_far_below_the_others():
    logits = torch.randn(6, 5) / 4
    logits[2] -= 30
    logits[:, 3] -= 30
    logits[4] += 30
    found = sinkhorn(logits, temperature=0.0625)
    assert _close(found, _slow_sinkhorn(logits, temperature=0.0625), tolerance=1e-4)


def test_sinkhorn_of_no_rows_is_no_rows():
    assert sinkhorn(torch.zeros(0, 4), temperature=0.05).shape == (0, 4)


def test_sinkhorn_leaves_its_logits_as_they_were():
    logits = torch.randn(4, 3)
    before = logits.clone()
    sinkhorn(logits, temperature=0.05)
    assert torch.equal(logits, before)


# Moving centre -----------------------------------------------------------------------------------------------------


def test_the_moving_centre_equals_the_plain_program_over_several_steps():
    centre, expected = EmaCenter(5, momentum=0.9), [0.0] * 5
    for temperature, num_rows in ((0.04, 3), (0.05, 7), (0.07, 2), (0.07, 4)):
        logits = torch.randn(num_rows, 5)
        found = centre(logits, temperature=temperature)
        for b, row in enumerate(logits.double().tolist()):
            powers = [math.exp((value - middle) / temperature) for value, middle in zip(row, expected)]
            assert found[b].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-4, abs=1e-7)
        means = [sum(column) / num_rows for column in zip(*logits.double().tolist())]
        expected = [0.9 * middle + 0.1 * mean for middle, mean in zip(expected, means)]
        assert centre.center.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_centre_stays_where_there_are_no_rows():
    centre = EmaCenter(3)
    centre(torch.ones(2, 3), temperature=0.1)
    before = centre.center.clone()
    assert centre(torch.zeros(0, 3), temperature=0.1).shape == (0, 3)
    assert torch.equal(centre.center, before)


# Class tokens ------------------------------------------------------------------------------------------------------


def _slow_log_softmax(logits: Tensor) -> list[Tensor]:
    total = sum(logit.exp() for logit in logits)
    return [logit - total.log() for logit in logits]


def _slow_cross_view(
    global_logits: Tensor, local_logits: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    students = list(global_logits) + ([] if local_logits is None else list(local_logits))
    loss, num_terms = 0.0, 0
    for s, student in enumerate(students):
        for t, teacher in enumerate(targets):
            if s == t:
                continue
            for row, target in zip(student, teacher):
                loss = loss - sum(p * q for p, q in zip(target, _slow_log_softmax(row / temperature)))
                num_terms += 1
    return loss / num_terms


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 3), (2, None), (1, 2), (3, 1)])
def test_the_loss_of_class_tokens_equals_the_plain_loop_over_view_pairs(num_global, num_local):
    wide = {"dtype": torch.float64, "requires_grad": True}
    global_logits = torch.randn(num_global, 3, 4, **wide)
    local_logits = None if num_local is None else torch.randn(num_local, 3, 4, **wide)
    targets = (torch.randn(num_global, 3, 4, dtype=torch.float64) * 3).softmax(dim=-1)
    inputs = [logits for logits in (global_logits, local_logits) if logits is not None]
    found = cross_view_loss(global_logits, local_logits, targets, temperature=0.2)
    expected = _slow_cross_view(global_logits, local_logits, targets, 0.2)
    assert _close(found, expected)
    for gradient, slow in zip(_gradients(found, inputs), _gradients(expected, inputs)):
        assert _close(gradient, slow)


def test_a_view_is_never_compared_with_itself():
    logits, targets = torch.randn(2, 3, 4), torch.randn(2, 3, 4).softmax(dim=-1)
    blind = logits.clone().requires_grad_()
    only_first = targets.clone()
    only_first[1] = 0  # the second teacher view says nothing
    cross_view_loss(blind, None, only_first).backward()
    assert blind.grad[0].abs().max() < 1e-6
    assert blind.grad[1].abs().max() > 1e-3


def test_without_preference_the_loss_is_the_logarithm_of_the_number_of_prototypes():
    uniform = torch.full((2, 3, 16), 1 / 16)
    assert cross_view_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), uniform).item() == pytest.approx(math.log(16))


def test_one_view_alone_is_refused():
    with pytest.raises(ValueError, match="two or more views"):
        cross_view_loss(torch.zeros(1, 2, 3), None, torch.full((1, 2, 3), 1 / 3))


# Patches -----------------------------------------------------------------------------------------------------------


def test_the_loss_of_masked_patches_equals_the_plain_loop():
    # Views with 3, 0, 1 and 2 masked patches.
    weights = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 2] * 2, dtype=torch.float64)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(6, 5, dtype=torch.float64).softmax(dim=-1)
    expected = 0.0
    for row, target, weight in zip(logits, targets, weights):
        expected = expected - weight * sum(p * q for p, q in zip(target, _slow_log_softmax(row / 0.1)))
    expected = expected / 4
    found = masked_patch_loss(logits, targets, weights=weights, num_views=4, temperature=0.1)
    assert _close(found, expected)
    assert _close(*_gradients(found, [logits]), *_gradients(expected, [logits]))


def test_without_masked_patches_the_loss_is_zero_and_keeps_its_graph():
    weight = torch.randn(4, 5, requires_grad=True)
    loss = masked_patch_loss(
        torch.zeros(0, 4) @ weight, torch.zeros(0, 5), weights=torch.zeros(0), num_views=2, temperature=0.1
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros(4, 5))


# KoLeo -------------------------------------------------------------------------------------------------------------


def _slow_koleo(features: Tensor) -> Tensor:
    rows = [row / row.square().sum().sqrt() for row in features]
    loss = 0.0
    for i, row in enumerate(rows):
        distances = [(row - other + 1e-8).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
        loss = loss - (min(distances) + 1e-8).log()
    return loss / len(rows)


def test_koleo_equals_the_plain_loop():
    features = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    found, expected = koleo_loss(features), _slow_koleo(features)
    assert _close(found, expected)
    assert _close(*_gradients(found, [features]), *_gradients(expected, [features]))
    assert koleo_loss(5 * features).item() == pytest.approx(found.item(), rel=1e-5)


def test_koleo_of_equally_near_neighbours_is_minus_the_logarithm_of_their_distance():
    assert koleo_loss(torch.eye(6)).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)


def test_koleo_of_equal_rows_is_large_and_finite():
    features = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(math.sqrt(4) * 1e-8 + 1e-8), rel=1e-5)
    assert features.grad.isfinite().all()


def test_koleo_of_a_single_row_is_zero_and_keeps_its_graph():
    features = torch.randn(1, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(1, 4))


# Precision ---------------------------------------------------------------------------------------------------------


def test_targets_and_losses_are_computed_in_float32_whatever_the_precision_around_them():
    logits, targets = torch.randn(2, 6, 64), torch.randn(2, 6, 64).softmax(dim=-1)
    # Nearly parallel rows, as at the start of a run: bfloat16 cannot tell their neighbours apart.
    features = 1 + torch.randn(32, 16) / 50

    def compute() -> dict[str, Tensor]:
        return {
            "sinkhorn": sinkhorn(logits[0] / 4, temperature=0.05),
            "centre": EmaCenter(64)(logits[0], temperature=0.05),
            "dino": cross_view_loss(logits, None, targets),
            "ibot": masked_patch_loss(logits[0], targets[0], weights=torch.ones(6), num_views=6),
            "koleo": koleo_loss(features),
        }

    expected = compute()
    with torch.autocast("cpu", torch.bfloat16):
        found = compute()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(2, 6, 8).bfloat16()
    assert torch.equal(sinkhorn(logits[0], temperature=0.05), sinkhorn(logits[0].float(), temperature=0.05))
    targets = torch.randn(2, 6, 8).softmax(dim=-1)
    assert torch.equal(cross_view_loss(logits, None, targets), cross_view_loss(logits.float(), None, targets))

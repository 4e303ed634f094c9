"""The instruments of a pretraining run: both ends of every measure, every alarm, and silence on a healthy run."""

import json
import math
import random
import re

import pytest
import torch

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.distributed import DistributedContext
from modeling_vitreg.pretraining.monitoring.diagnosis import diagnose, read_series
from modeling_vitreg.pretraining.monitoring.instruments import (
    collapse_line,
    effective_rank,
    entropy,
    entropy_of_mean,
    register_similarity,
)


K = 1024


# Measures ----------------------------------------------------------------------------------------------------------


def test_entropy_equals_the_plain_sum():
    rows = torch.rand(5, 7).softmax(dim=1)
    expected = sum(-p * math.log(p) for row in rows.tolist() for p in row) / 5
    assert entropy(rows).item() == pytest.approx(expected, rel=1e-6)
    mean = [sum(column) / 5 for column in zip(*rows.tolist())]
    assert entropy_of_mean(rows).item() == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-6)


def test_both_ends_of_collapse_are_seen():
    uniform = torch.full((64, K), 1 / K)
    constant = torch.zeros(64, K).index_fill(1, torch.tensor(5), 1.0)
    spread = torch.eye(K)[torch.randperm(K)[:64]]
    line = collapse_line(K)
    assert line == math.log(1024)
    for rows, each, mean in ((uniform, line, line), (constant, 0, 0), (spread, 0, math.log(64))):
        assert entropy(rows).item() == pytest.approx(each, abs=1e-5)
        assert entropy_of_mean(rows).item() == pytest.approx(mean, abs=1e-5)


def test_the_entropy_of_the_mean_lies_between_its_bounds():
    rows = (4 * torch.randn(16, 40)).softmax(dim=1)
    each, mean = entropy(rows), entropy_of_mean(rows)
    assert each < mean < each + math.log(16)


def test_entropies_are_computed_in_float32_from_half_precision():
    rows = torch.full((4, 2**14), 2.0**-14, dtype=torch.bfloat16)
    assert entropy(rows).dtype == entropy_of_mean(rows).dtype == torch.float32
    assert entropy(rows).item() == pytest.approx(collapse_line(2**14), rel=1e-6)
    assert entropy_of_mean(rows).item() == pytest.approx(collapse_line(2**14), rel=1e-6)


def test_the_mean_is_over_the_rows_of_all_processes():
    rows = torch.rand(12, 9).softmax(dim=1)
    parts = rows[:8], rows[8:]  # one process has twice the images of the other
    others = [(parts[1].sum(dim=0), 4.0), (parts[0].sum(dim=0), 8.0)]
    for own, (other_sum, other_count) in zip(parts, others):
        total = lambda values, s=other_sum, n=other_count: values + (s if values.ndim else n)  # noqa: E731
        found = entropy_of_mean(own, processes=DistributedContext(size=2, all_reduce_sum=total))
        torch.testing.assert_close(found, entropy_of_mean(rows))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank):
    basis = torch.linalg.qr(torch.randn(100, rank))[0]
    directions = torch.linalg.qr(torch.randn(8, rank))[0]
    features = basis @ directions.T  # [100, 8], `rank` singular values of 1
    for scale in (1.0, 1e-20, 1e20):
        assert effective_rank(features * scale) == pytest.approx(rank, rel=1e-4)
    assert effective_rank(features.T) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_equals_its_formula():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1.0, 2, 4, 8, 16, 32])
    singular = torch.linalg.eigvalsh(features.T @ features).sqrt()
    shares = (singular / singular.sum()).tolist()
    assert effective_rank(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)


def test_effective_rank_sees_features_that_share_one_large_mean():
    spread = torch.randn(200, 16)
    assert effective_rank(spread) > 14
    assert effective_rank(spread * 0.001 + 1) < 1.2
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert effective_rank(spread.bfloat16()) == pytest.approx(effective_rank(spread), rel=0.01)


def test_register_similarity_is_the_largest_cosine_of_a_pair(tiny):
    model = ViTWithRegistersForImageClassification(tiny(num_register_tokens=3))
    weight = model.vitreg.embeddings.register_tokens.weight
    with torch.no_grad():
        weight.zero_()
        weight[0, 0], weight[1, 1] = 1.0, 5.0
        weight[2, :2] = torch.tensor([3.0, 4.0])
    assert register_similarity(model) == pytest.approx(0.8)
    with torch.no_grad():
        weight[2] = -weight[0]
    assert register_similarity(model) == pytest.approx(0)


@pytest.mark.parametrize("num_register_tokens", [0, 1])
def test_register_similarity_needs_a_pair(tiny, num_register_tokens):
    assert register_similarity(ViTWithRegistersModel(tiny(num_register_tokens=num_register_tokens))) is None


def test_errors_of_measures_say_what_was_expected():
    for measure in (entropy, entropy_of_mean, effective_rank):
        with pytest.raises(ValueError, match=r"\(rows, columns\) with at least one row, got shape \(2, 3, 4\)"):
            measure(torch.rand(2, 3, 4))
        with pytest.raises(ValueError, match="at least one row"):
            measure(torch.rand(0, 4))
    with pytest.raises(ValueError, match="finite features"):
        effective_rank(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="2 or more prototypes, got 1"):
        collapse_line(1)


# Reading a log -----------------------------------------------------------------------------------------------------


def _run(num_records=200, *, seed=0, noise=0.02, **changes) -> list:
    """The log of a healthy run, ten steps a record and an evaluation every hundred; `changes` are functions of time
    from 0 to 1 that take the place of a curve."""
    chance = random.Random(seed)
    line = math.log(K)
    curves = {
        # Up from ln K at first, a start that does not move, then down without ever standing still.
        "dino": lambda t: line + 0.4 * math.exp(-60 * t) - 4 * (1 - math.exp(-3 * max(t - 0.03, 0))),
        "ibot": lambda t: line - 3 * (1 - math.exp(-3 * max(t - 0.03, 0))),
        "koleo": lambda t: 0.3 + 1.5 * math.exp(-4 * t),
        "teacher_entropy": lambda t: line * (1 - 0.7 * (1 - math.exp(-8 * t))),
        "mean_entropy": lambda t: line * (1 - 0.2 * (1 - math.exp(-8 * t))),
        "learning_rate": lambda t: 5e-4 * min(t / 0.1, 1) * (1 + math.cos(math.pi * t)) / 2,
        "rank": lambda t: 300 if t == 0 else 12 + 80 * t,  # of random weights, then of learned features
        "knn": lambda t: 0.15 + 0.6 * (1 - math.exp(-3 * t)),
        **changes,
    }
    records = []
    for number in range(num_records):
        t = number / num_records
        values = {name: curve(t) * (1 + noise * chance.gauss(0, 1)) for name, curve in curves.items() if curve}
        if number < 5 and "dino" in values:
            values["dino"] *= 1 + 0.2 * chance.gauss(0, 1)
        evaluation = {key: values.pop(key) for key in ("rank", "knn") if key in values}
        if "dino" in values and "total" not in values:
            values["total"] = values["dino"] + values["ibot"] + 0.1 * values["koleo"]
        records.append({"step": 10 * number, **values})
        if number % 10 == 0 and evaluation:
            records.append({"step": 10 * number, "chance": 0.1, **evaluation})
    return records


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_raises_no_alarm_at_any_length(seed):
    records = _run(seed=seed)
    for length in range(0, len(records) + 1, 5):
        assert diagnose(records[:length], num_prototypes=K) == []
    assert diagnose(records, num_prototypes=None) == []


def test_a_healthy_run_whose_loss_rests_when_the_learning_rate_ends_raises_no_alarm():
    flat_end = {"total": lambda t: 12 - 3 * min(t / 0.6, 1), "knn": None}
    assert diagnose(_run(noise=0.001, **flat_end), num_prototypes=K) == []


def test_a_loss_that_rests_while_knn_rises_raises_no_alarm():
    flat = {"total": lambda t: 5.0, "learning_rate": lambda t: 1e-3}
    assert diagnose(_run(noise=0.001, **flat), num_prototypes=K) == []


def _only(alarms: list) -> str:
    """The only alarm: one sentence of what is seen, with a number, and one of what to do."""
    (alarm,) = alarms
    seen, advice = alarm.split(". ")
    assert any(character.isdigit() for character in seen)
    assert advice.endswith(".")
    return alarm


def test_a_class_token_loss_that_stays_at_ln_k_is_named():
    alarm = _only(diagnose(_run(noise=0.003, dino=lambda t: math.log(K)), num_prototypes=K))
    assert "uniform collapse" in alarm and "ln K = 6.931" in alarm and "Lower the teacher temperature" in alarm
    assert diagnose(_run(noise=0.003, dino=lambda t: math.log(K)), num_prototypes=8 * K) == []
    assert "uniform" in _only(diagnose(_run(noise=0, dino=lambda t: 0.992 * math.log(K)), num_prototypes=K))
    assert diagnose(_run(noise=0, dino=lambda t: 0.98 * math.log(K)), num_prototypes=K) == []


def test_a_very_young_run_is_not_judged():
    records = [record for record in _run(noise=0.003, dino=lambda t: math.log(K)) if "dino" in record]
    assert diagnose(records[:19], num_prototypes=K) == []
    assert len(diagnose(records[:40], num_prototypes=K)) == 1


def test_a_collapse_explains_a_loss_that_does_not_move():
    still = {"total": lambda t: 5.0, "knn": lambda t: 0.3, "dino": lambda t: math.log(K)}
    assert "uniform collapse" in _only(diagnose(_run(noise=0.001, **still), num_prototypes=K))


def test_a_loss_that_comes_back_to_ln_k_is_named():
    back = {"dino": lambda t: math.log(K) - 3 * max(0, 1 - abs(t - 0.3) / 0.3)}
    assert "uniform collapse" in _only(diagnose(_run(noise=0.003, **back), num_prototypes=K))


def test_uniform_targets_are_named():
    uniform = {"teacher_entropy": lambda t: 0.998 * math.log(K), "mean_entropy": None}
    alarm = _only(diagnose(_run(noise=0.001, **uniform), num_prototypes=K))
    assert "and uniform targets have ln K = 6.931: the student cannot learn from them" in alarm and "KoLeo" in alarm
    assert diagnose(_run(noise=0.001, **uniform), num_prototypes=None) == []


@pytest.mark.parametrize("each, mean", [(0.02, 0.3), (0.001, 0.002), (3.0, 3.02)])
def test_targets_that_are_the_same_for_every_image_are_named(each, mean):
    records = _run(noise=0.001, teacher_entropy=lambda t: each, mean_entropy=lambda t: mean)
    alarm = _only(diagnose(records, num_prototypes=K))
    assert "constant collapse" in alarm and "Raise the momentum" in alarm
    if mean - each < 0.1:
        assert "constant collapse" in _only(diagnose(records, num_prototypes=None))


@pytest.mark.parametrize("each, mean", [(0.02, 3.0), (3.0, 4.0), (5.0, 6.9)])
def test_sharp_targets_that_differ_between_images_are_healthy(each, mean):
    records = _run(noise=0.001, teacher_entropy=lambda t: each, mean_entropy=lambda t: mean)
    assert diagnose(records, num_prototypes=K) == []


def test_sharp_targets_without_the_entropy_of_their_mean_are_not_judged():
    records = _run(noise=0.001, teacher_entropy=lambda t: 0.001, mean_entropy=None)
    assert diagnose(records, num_prototypes=K) == []


def test_a_falling_rank_is_named_with_the_step_of_its_best():
    alarm = _only(diagnose(_run(noise=0, rank=lambda t: 60 - 50 * abs(t - 0.4) / 0.6), num_prototypes=K))
    assert "from 60 at step 800 to" in alarm and "KoLeo" in alarm
    assert diagnose(_run(noise=0, rank=lambda t: 60 - 25 * abs(t - 0.4) / 0.6), num_prototypes=K) == []


def test_advice_names_only_what_the_objective_has():
    def falling(t):
        return 60 - 50 * abs(t - 0.4) / 0.6

    def forgotten(t):
        return 0.5 - 0.4 * abs(t - 0.4) / 0.6

    def advice(records):
        return _only(diagnose(records, num_prototypes=None)).split(". ")[1]

    without = [
        {key: value for key, value in record.items() if key not in ("koleo", "momentum")}
        for record in _run(noise=0, rank=falling)
    ]
    assert advice(without).startswith("Lower the learning rate")
    supervised = [record | {"classes": 1.0} for record in without]
    assert diagnose(supervised, num_prototypes=None) == []
    records = _run(noise=0, knn=forgotten, momentum=lambda t: 0.99)
    assert "momentum of the teacher" in advice(records)
    assert "teacher" not in advice([{k: v for k, v in record.items() if k != "momentum"} for record in records])


def test_one_odd_evaluation_is_no_fall():
    odd = {"rank": lambda t: 60 if t < 0.95 else 5, "knn": lambda t: 0.6 if t < 0.95 else 0.1}
    assert diagnose(_run(noise=0, **odd), num_prototypes=K) == []


def test_a_loss_that_does_not_move_is_named():
    stuck = {"total": lambda t: 5.0, "knn": lambda t: 0.3}
    for rate in (lambda t: 1e-3, None, lambda t: 1e-3 if t < 0.5 else 1e-6):
        alarm = _only(diagnose(_run(noise=0.005, learning_rate=rate, **stuck), num_prototypes=K))
        assert re.search(r"around (4\.99|5)", alarm) and "stuck" in alarm and "learning rate" in alarm


def test_a_loss_that_fell_and_rests_at_a_high_learning_rate_is_named():
    resting = {"total": lambda t: 9 - 4 * min(t / 0.5, 1), "learning_rate": lambda t: 1e-3, "knn": lambda t: 0.3}
    assert "stuck" in _only(diagnose(_run(noise=0.003, **resting), num_prototypes=K))


def test_noise_that_hides_a_movement_is_not_called_stuck():
    for seed in range(10):
        records = _run(noise=0.1, seed=seed, total=lambda t: 5.0, knn=None, rank=None, teacher_entropy=None)
        assert diagnose(records, num_prototypes=K) == []


def test_a_falling_accuracy_is_named_with_the_step_of_its_best():
    alarm = _only(diagnose(_run(noise=0, knn=lambda t: 0.5 - 0.2 * abs(t - 0.5) / 0.5), num_prototypes=K))
    assert "from 50.0% at step 1000 to 3" in alarm and "Keep the checkpoint of step 1000" in alarm
    assert diagnose(_run(noise=0, knn=lambda t: 0.5 - 0.03 * abs(t - 0.5) / 0.5), num_prototypes=K) == []


def _looks(*, probe=(0.4, 0.5, 0.4, 0.4), moved=(0.9, 1.0, 0.9, 0.9), knn=(0.2, 0.3, 0.4, 0.4), **terms) -> list:
    looks = zip(probe, moved, knn or [None] * len(probe))
    names = ("segmentation", "patch_consistency", "knn")
    records = [{name: value for name, value in zip(names, look) if value is not None} for look in looks]
    best_steps = [10 * max(range(number + 1), key=lambda each: probe[each]) for number in range(len(probe))]
    return [
        {"step": 10 * number, "patch_best_step": best, **record, **terms}
        for number, (record, best) in enumerate(zip(records, best_steps))
    ]


def test_dense_features_that_fall_while_knn_rises_are_named():
    alarm = _only(diagnose(_looks(ibot=1.0), num_prototypes=None))
    assert alarm.startswith("Dense features fall since step 10 while k-NN rises: switch on gram.weight. ")
    assert "fell from 50.0% to 40.0% mean IoU, k-NN rose from 30.0% to 40.0%, and the similarities" in alarm
    assert "correlate by 0.90 with those of that step; train again" in alarm
    assert "raise gram.weight" in _only(diagnose(_looks(gram=0.1, ibot=1.0), num_prototypes=None))
    assert "train with dinov2 and gram.weight" in _only(diagnose(_looks(), num_prototypes=None))
    without = _only(diagnose(_looks(knn=None, ibot=1.0), num_prototypes=None))
    assert without.startswith("Dense features fall since step 10: switch on gram.weight. ") and "k-NN" not in without


@pytest.mark.parametrize(
    ("healthy", "falling"),
    [
        ({"probe": (0.4, 0.5, 0.4, 0.45)}, {"probe": (0.4, 0.5, 0.4, 0.449)}),  # a tenth of the best
        ({"probe": (0.04, 0.1, 0.04, 0.081)}, {"probe": (0.04, 0.1, 0.04, 0.079)}),  # and 0.02
        ({"probe": (0.4, 0.5, 0.5, 0.1)}, {"probe": (0.4, 0.5, 0.1, 0.1)}),  # one look is no fall
        ({"probe": (0.4, 0.5, 0.1, 0.5)}, {"probe": (0.4, 0.5, 0.1, 0.1)}),
        ({"moved": (0.9, 1.0, 0.9, 0.95)}, {"moved": (0.9, 1.0, 0.9, 0.949)}),
        ({"moved": (0.9, 1.0, 0.96, 0.9)}, {"moved": (0.9, 1.0, 0.94, 0.9)}),
        ({"knn": (0.2, 0.3, 0.4, 0.31)}, {"knn": (0.2, 0.3, 0.4, 0.311)}),
        ({"knn": (0.2, 0.3, 0.31, 0.4)}, {"knn": (0.2, 0.3, 0.311, 0.4)}),
        (
            {"probe": (0.5, 0.4, 0.4), "moved": (1, 0.9, 0.9)},
            {"probe": (0.5, 0.4, 0.4, 0.4), "moved": (1, 0.9, 0.9, 0.9)},
        ),
    ],
)
def test_the_borders_of_falling_dense_features(healthy, falling):
    assert diagnose(_looks(**healthy), num_prototypes=None) == []
    assert "Dense features fall" in _only(diagnose(_looks(**falling), num_prototypes=None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_value_that_is_not_finite_is_named_with_its_step_and_term(value):
    records = _run()
    spoiled = [record for record in records if record["step"] >= 600 and "dino" in record]
    for record in spoiled[:4]:
        record["ibot"] = record["total"] = value
    records = [json.loads(json.dumps(record)) for record in records]  # as a log of JSON lines gives them back
    alarm = _only(diagnose(records, num_prototypes=K))
    assert f"At step 600 ibot = {value}, total = {value}, and 6 later values" in alarm


def test_a_term_of_any_name_is_checked_for_being_finite():
    assert "gradient_norm = nan" in _only(diagnose([{"step": 3, "gradient_norm": math.nan}], num_prototypes=None))


def test_missing_keys_and_empty_values_are_no_evidence():
    records = [{"step": step, "knn": None, "note": "x", "is_last": True, "norms": {}} for step in range(100)]
    assert diagnose(records, num_prototypes=K) == diagnose([], num_prototypes=K) == []


def test_a_resumed_run_is_read_as_one():
    first = [{"step": step, "total": math.nan if step > 6 else float(step)} for step in range(1, 10)]
    second = [{"step": step, "total": -float(step)} for step in range(5, 8)]
    assert read_series(first + second, key="total") == ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, -5, -6, -7])
    assert diagnose(first + second, num_prototypes=None) == []  # what diverged was thrown away


def test_lines_of_one_step_are_read_together():
    records = [{"step": 1, "total": 2.0}, {"step": 1, "knn": 0.5}, {"step": 2, "total": math.inf, "knn": True}]
    assert read_series(records, key="total") == ([1], [2.0])
    assert read_series(records, key="knn") == ([1], [0.5])
    assert read_series(records, key="rank") == ([], [])


def test_a_record_without_a_step_is_refused():
    with pytest.raises(ValueError, match="expected a step in every record, got none in record 1 with total"):
        diagnose([{"step": 1}, {"total": 1.0}], num_prototypes=None)

"""Linear probe, logistic regression, zero-shot: the same heads one by one, scikit-learn, and a plain loop."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from torch import nn

from modeling_vitreg.evaluation.linear import (
    LinearSettings,
    draw_batches,
    fit_linear,
    initial_heads,
    train_heads,
)
from modeling_vitreg.evaluation.logistic import LogisticSettings, fit_logistic
from modeling_vitreg.evaluation.top_k import rank_classes
from modeling_vitreg.evaluation.zero_shot import ZeroShotSettings
from modeling_vitreg.hf_metrics import Accuracy
from modeling_vitreg.images.splits import hold_out
from modeling_vitreg.metrics import average_precisions


RATES = (0.01, 0.1, 0.5)


def _accuracy(scores, labels, *, classes, num_best=1):
    ranked = rank_classes(scores, classes=classes, num_best=num_best)
    metric = Accuracy(keep_in_memory=True)
    found = metric.compute(predictions=ranked.tolist(), references=labels.tolist(), top_k=(num_best,))
    return found[f"top{num_best}"]


def _blobs(num_rows, *, num_classes=4, width=6, spread=1.0):
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(num_classes, (num_rows,))
    return centres[labels] + spread * torch.randn(num_rows, width), labels


def test_heads_trained_at_once_equal_heads_trained_one_by_one_by_torch():
    features, labels = _blobs(90)
    inputs = {"narrow": features.double()[:, :3], "wide": features.double()}
    settings = LinearSettings(learning_rates=RATES, num_steps=30, batch_size=32)
    batches = draw_batches(90, settings=settings, seed=3)
    heads = train_heads(inputs, labels, batches, settings=settings, num_classes=4, seed=5)
    initial = initial_heads({"narrow": 3, "wide": 6}, num_heads=3, num_classes=4, seed=5)
    for name, rows in inputs.items():
        for number, rate in enumerate(RATES):
            layer = nn.Linear(rows.shape[1], 4).double()
            with torch.no_grad():
                layer.weight.copy_(initial[name][number].T)
                layer.bias.zero_()
            optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 32 / 256, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0)
            for batch in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(rows[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(heads[name][0][number], layer.weight.T, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(heads[name][1][number], layer.bias, rtol=1e-9, atol=1e-12)


def test_batches_show_every_image_once_a_pass_and_none_is_short():
    batches = draw_batches(10, settings=LinearSettings(num_steps=7, batch_size=4), seed=0)
    assert [len(batch) for batch in batches] == [4] * 7
    for first, second in zip(batches[::2], batches[1::2]):
        assert len(torch.cat([first, second]).unique()) == 8


def test_the_head_is_chosen_on_the_validation_part_and_good_inputs_win():
    features, labels = _blobs(300, spread=0.3)
    inputs = {"noise": torch.randn(300, 6), "features": features}
    settings = LinearSettings(learning_rates=(1e-5, 1.0), num_steps=60, batch_size=64)
    head = fit_linear(inputs, labels * 10 + 3, settings=settings)
    assert (head.input, head.learning_rate) == ("features", 1.0)
    _, held_out = hold_out(300, share=0.1, seed=0)
    scores = head.scores(inputs)
    accuracy = _accuracy(scores[held_out], labels[held_out] * 10 + 3, classes=head.classes)
    assert accuracy == pytest.approx(head.validation_accuracy) and accuracy > 0.8


def test_logistic_regression_equals_scikit_learn_with_the_same_sweep():
    features, labels = _blobs(200, spread=1.5)
    test, truth = _blobs(100, spread=1.5)
    settings = LogisticSettings(num_strengths=6, lowest=-4, highest=1, max_steps=200)
    fit = fit_logistic(features, labels, settings=settings, seed=1)
    kept, held_out = hold_out(200, share=0.1, seed=1)
    rows = features.double().numpy()
    scores = {}
    for exponent in (-4, -3, -2, -1, 0, 1):
        model = LogisticRegression(C=10.0**exponent, max_iter=1000, tol=1e-10).fit(rows[kept], labels[kept])
        scores[exponent] = model.score(rows[held_out], labels[held_out])
    best = max(scores, key=scores.get)
    assert fit.strength == pytest.approx(10.0**best) and fit.validation_accuracy == scores[best]
    oracle = LogisticRegression(C=10.0**best, max_iter=1000, tol=1e-10).fit(rows, labels)
    ours = fit.model.predict_proba(test.double().numpy())
    assert ours == pytest.approx(oracle.predict_proba(test.double().numpy()), abs=1e-5)
    top1 = _accuracy(torch.from_numpy(ours), truth, classes=torch.arange(4))
    assert top1 == oracle.score(test.double(), truth)


@pytest.mark.parametrize("num_best", [1, 2, 3])
def test_top_k_equals_scikit_learn(num_best):
    scores, labels = torch.randn(50, 4), torch.randint(4, (50,))
    expected = top_k_accuracy_score(labels, scores, k=num_best, labels=range(4))
    assert _accuracy(scores, labels * 3, classes=torch.arange(4) * 3, num_best=num_best) == expected


def test_a_label_that_is_no_class_is_never_right_and_the_first_of_equals_wins():
    scores = torch.zeros(2, 3)
    assert rank_classes(scores, classes=torch.arange(3), num_best=3).tolist() == [[0, 1, 2]] * 2
    assert _accuracy(scores, torch.tensor([0, 1]), classes=torch.arange(3)) == 0.5
    assert _accuracy(scores, torch.tensor([7, -1]), classes=torch.arange(3), num_best=3) == 0


@pytest.mark.parametrize("fit, settings", [(fit_linear, LinearSettings()), (fit_logistic, LogisticSettings())])
def test_one_class_is_refused(fit, settings):
    features = torch.randn(9, 3)
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        fit({"x": features} if fit is fit_linear else features, torch.ones(9).long(), settings=settings)


def test_a_head_that_diverged_is_neither_chosen_nor_measured():
    features, labels = _blobs(60)
    settings = LinearSettings(learning_rates=(1e30, 0.1), num_steps=20)
    assert fit_linear({"x": 1e12 * features, "y": features}, labels, settings=settings).learning_rate == 0.1
    with pytest.raises(ValueError, match="all heads diverged: use learning rates below"):
        fit_linear({"x": 1e12 * features}, labels, settings=LinearSettings(learning_rates=(1e30,), num_steps=20))
    with pytest.raises(ValueError, match="expected finite scores"):
        rank_classes(torch.full((2, 3), torch.nan), classes=torch.arange(3), num_best=1)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="one learning rate or more"):
        LinearSettings(learning_rates=())
    with pytest.raises(ValueError, match="expected num_strengths of 1 or more"):
        LogisticSettings(num_strengths=0)
    with pytest.raises(ValueError, match=r"one \{\} each"):
        ZeroShotSettings(templates=("a photo",))
    with pytest.raises(ValueError, match="share between 0 and 1"):
        hold_out(10, share=1.0, seed=0)


# Lists of labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 8])  # with and without equal scores
def test_average_precision_is_that_of_scikit_learn_for_weighted_images_too(digits):
    scores, truth = torch.randn(60, 7).mul(10**digits).round() / 10**digits, (torch.rand(60, 7) < 0.3).long()
    truth[:, 3], weights = 0, torch.randint(4, (5, 60))
    found = average_precisions(scores, truth, weights)
    assert found.isnan().all(dim=0).tolist() == [number == 3 for number in range(7)]
    for number in (0, 1, 2, 4, 5, 6):
        for draw in range(5):
            expected = average_precision_score(truth[:, number], scores[:, number], sample_weight=weights[draw])
            assert found[draw, number].item() == pytest.approx(expected, rel=1e-12)
    plain = average_precisions(scores, truth)
    assert plain.nanmean().item() == pytest.approx(
        average_precision_score(truth[:, [0, 1, 2, 4, 5, 6]], scores[:, [0, 1, 2, 4, 5, 6]], average="macro")
    )


def test_heads_of_lists_of_labels_equal_a_layer_trained_by_torch_and_are_chosen_by_their_map():
    inputs, labels = {"all": torch.randn(80, 6).double()}, (torch.rand(80, 3) < 0.4).long()
    settings = LinearSettings(learning_rates=RATES, num_steps=25, batch_size=16)
    head = fit_linear(inputs, labels, settings=settings, seed=2)
    kept, held_out = hold_out(80, share=settings.validation_share, seed=2)
    initial, found = initial_heads({"all": 6}, num_heads=3, num_classes=3, seed=2)["all"], []
    for number, rate in enumerate(RATES):
        layer = nn.Linear(6, 3).double()
        with torch.no_grad():
            layer.weight.copy_(initial[number].T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25, eta_min=0)
        for batch in draw_batches(len(kept), settings=settings, seed=2):
            rows = kept[batch]
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                layer(inputs["all"][rows]), labels[rows].double(), reduction="sum"
            )
            (loss / len(rows)).backward()
            optimizer.step()
            schedule.step()
        scores = layer(inputs["all"][held_out]).detach()
        found.append((average_precision_score(labels[held_out], scores, average="macro"), layer))
    best, layer = max(found, key=lambda pair: pair[0])
    assert head.validation_accuracy == pytest.approx(best)
    torch.testing.assert_close(head.weight, layer.weight.T, rtol=1e-9, atol=1e-12)

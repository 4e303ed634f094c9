"""Metrics of the library `evaluate`: the same numbers as scikit-learn's and as the plain formulas, without network."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

from modeling_vitreg.hf_metrics import Accuracy, CorLoc, DepthErrors, MeanIoU


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_accuracy_is_that_of_scikit_learn(random):
    truth, found = random.integers(0, 5, (2, 100))
    expected = accuracy_score(truth, found)
    assert Accuracy().compute(predictions=found, references=truth) == {"accuracy": pytest.approx(expected)}


def test_mean_iouis_that_of_scikit_learn_over_all_pixels_of_images_of_any_size(random):
    truths = [random.integers(0, 4, shape) for shape in ((6, 8), (5, 9), (7, 3))]  # class 4 is nowhere
    found = [np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, 4, truth.shape)) for truth in truths]
    flat_truth, flat_found = (np.concatenate([part.ravel() for part in parts]) for parts in (truths, found))
    metric = MeanIoU()
    for own, truth in zip(found, truths):
        hidden = truth.copy()
        metric.add(prediction=np.vstack([own, own[:1]]), reference=np.vstack([hidden, np.full_like(own[:1], 255)]))
    numbers = metric.compute(num_labels=5)
    each = jaccard_score(flat_truth, flat_found, labels=range(4), average=None)
    assert numbers["per_category_iou"][:4] == pytest.approx(each) and np.isnan(numbers["per_category_iou"][4])
    assert numbers["mean_iou"] == pytest.approx(each.mean())
    assert numbers["overall_accuracy"] == pytest.approx((flat_truth == flat_found).mean())
    with pytest.raises(ValueError, match=r"expected classes 0 \.\.\. 1 in a mask"):
        MeanIoU().compute(predictions=found, references=truths, num_labels=2)


def test_errors_of_depth_are_means_over_images(random):
    truths = [random.uniform(0.5, 12, shape).astype(np.float32) for shape in ((6, 8), (5, 9))]
    found = [(truth * random.uniform(0.8, 1.3, truth.shape)).astype(np.float32) for truth in truths]
    numbers = DepthErrors().compute(predictions=found, references=truths)
    known = [(own[truth < 10], truth[truth < 10]) for own, truth in zip(found, truths)]
    rmse = np.mean([np.sqrt(np.mean((own - truth) ** 2)) for own, truth in known])
    d1 = np.mean([np.mean(np.maximum(own / truth, truth / own) < 1.25) for own, truth in known])
    assert (numbers["rmse"], numbers["d1"]) == (pytest.approx(rmse, rel=1e-5), pytest.approx(d1))


def test_corloc_is_a_metric_of_the_library_evaluate(tmp_path):
    metric = CorLoc(cache_dir=str(tmp_path))
    truth = [[[0, 0, 10, 10], [20, 20, 30, 30]], [[0, 0, 4, 4]], []]
    predicted = [[20, 20, 30, 25], [2, 2, 6, 6], [0, 0, 1, 1]]
    assert metric.compute(predictions=predicted, references=truth) == {"corloc": 1 / 3}
    assert metric.compute(predictions=predicted, references=truth, iou_threshold=0.1) == {"corloc": 2 / 3}

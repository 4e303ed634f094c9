"""Segmentation and depth: metrics by plain programs and by other libraries, heads by the models that have them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from modeling_vitreg import ViTWithRegistersForDepthEstimation, ViTWithRegistersForSemanticSegmentation
from modeling_vitreg.evaluation.dense import Descent, fit_head
from modeling_vitreg.evaluation.depth import (
    DepthSettings,
    fit_depth,
    join_class_token,
    measure_depth,
)
from modeling_vitreg.evaluation.segmentation import (
    SegmentationSettings,
    fit_segmentation,
    measure_segmentation,
)
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.metrics import DEPTH_ERRORS, depth_errors, measure_areas
from modeling_vitreg.modeling_vitreg import LinearDepthHead, LinearSegmentationHead


def _maps(*, num_images=6, num_classes=5):
    masks = torch.randint(num_classes - 1, (num_images, 8, 9))  # the last class is nowhere true
    predicted = torch.where(torch.rand(masks.shape) < 0.6, masks, torch.randint(num_classes - 1, masks.shape))
    masks[torch.rand(masks.shape) < 0.1] = 255
    return predicted, masks


def _values(measured):
    return {number.metric: number.value for number in measured}


def test_segmentation_equals_a_plain_program_over_all_pixels():
    predicted, masks = _maps()
    found = _values(measure_segmentation(measure_areas(predicted, masks, num_classes=5)))
    matrix = [[0] * 5 for _ in range(5)]
    for own, truth in zip(predicted.flatten().tolist(), masks.flatten().tolist()):
        if truth != 255:
            matrix[truth][own] += 1
    ious, accuracies = [], []
    for c in range(5):
        union = sum(matrix[c]) + sum(row[c] for row in matrix) - matrix[c][c]
        if union:
            ious.append(matrix[c][c] / union)
        if sum(matrix[c]):
            accuracies.append(matrix[c][c] / sum(matrix[c]))
    assert len(ious) == 4  # what neither shows does not count
    assert found["mean_iou"] == pytest.approx(sum(ious) / len(ious))
    assert found["mean_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    total = sum(map(sum, matrix))
    assert found["pixel_accuracy"] == pytest.approx(sum(matrix[c][c] for c in range(5)) / total)


def test_mean_intersection_over_union_equals_those_of_other_libraries():
    predicted, masks = _maps()
    (found, *_) = measure_segmentation(measure_areas(predicted, masks, num_classes=5))
    is_valid = masks != 255
    oracle = jaccard_score(masks[is_valid], predicted[is_valid], average="macro", labels=range(4))
    assert found.value == pytest.approx(oracle)
    index = MulticlassJaccardIndex(num_classes=4, ignore_index=255)
    assert found.value == pytest.approx(index(predicted, masks).item(), abs=1e-6)
    assert found.interval[0] < found.value < found.interval[1] and found.n == 6


def test_a_class_that_is_predicted_and_nowhere_true_counts_as_zero():
    predicted, masks = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]])
    assert _values(measure_segmentation(measure_areas(predicted, masks, num_classes=2)))["mean_iou"] == 0.25


def test_the_segmentation_head_equals_the_one_of_the_model(tiny, randomise):
    model = randomise(ViTWithRegistersForSemanticSegmentation(tiny(num_labels=4, num_register_tokens=2)))
    model.segmentation_norm.running_mean.normal_()
    head = LinearSegmentationHead(32, 4).eval()
    head.norm.load_state_dict(model.segmentation_norm.state_dict())
    head.classifier.load_state_dict(model.segmentation_classifier.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    (tokens,) = extract_features(load_encoder(model), pixels, is_normed=True)
    with torch.no_grad():
        expected = F.interpolate(model(pixels).logits, size=(32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(head(tokens.patch_grid, (32, 32)), expected, rtol=1e-4, atol=1e-5)


def test_a_trained_segmentation_head_finds_what_patches_hold():
    masks = torch.randint(3, (20, 4, 4)).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    masks[:, :2] = 255
    patches = F.one_hot(masks[:, 2::4, 2::4], 256)[..., [0, 1, 2, 255]].float()
    settings = SegmentationSettings(num_steps=150, batch_size=8, learning_rate=0.1)
    head = fit_segmentation(lambda rows: (patches[rows], masks[rows]), num_images=20, num_classes=3, settings=settings)
    with torch.no_grad():
        own = head(patches, (16, 16)).argmax(dim=1)
    assert _values(measure_segmentation(measure_areas(own, masks, num_classes=3)))["mean_iou"] > 0.8
    assert not head.training


def test_masks_with_unknown_classes_and_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"classes 0 \.\.\. 4 in a mask, or 255 for pixels to ignore, got 7"):
        measure_areas(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 7), num_classes=5)
    with pytest.raises(ValueError, match="maps of one shape"):
        measure_areas(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), num_classes=5)


def _depths(num_images=5):
    depths = torch.rand(num_images, 6, 7) * 9.5 + 0.2
    predicted = depths * (0.3 * torch.randn(depths.shape)).exp()
    depths[:, 0], depths[0, 1], depths[1, 2] = 0.0, 10.0, 80.0  # unknown, at the limit, too far
    return predicted.clamp(max=10), depths


def _plain_errors(predicted, depths):
    pairs = [(p, d) for p, d in zip(predicted.flatten().tolist(), depths.flatten().tolist()) if 1e-3 < d < 10]
    mean = lambda values: math.fsum(values) / len(pairs)  # noqa: E731
    logs = [math.log(p) - math.log(d) for p, d in pairs]
    return {
        "rmse": math.sqrt(mean((p - d) ** 2 for p, d in pairs)),
        "abs_rel": mean(abs(p - d) / d for p, d in pairs),
        "d1": mean(max(p / d, d / p) < 1.25 for p, d in pairs),
        "d2": mean(max(p / d, d / p) < 1.25**2 for p, d in pairs),
        "d3": mean(max(p / d, d / p) < 1.25**3 for p, d in pairs),
        "log10": mean(abs(math.log10(p) - math.log10(d)) for p, d in pairs),
        "rmse_log": math.sqrt(mean(e**2 for e in logs)),
        "silog": 100 * math.sqrt(mean(e**2 for e in logs) - mean(logs) ** 2),
        "sq_rel": mean((p - d) ** 2 / d for p, d in pairs),
    }


def test_depth_errors_equal_the_formulas_image_by_image():
    predicted, depths = _depths()
    errors = depth_errors(predicted, depths, min_depth=1e-3, max_depth=10.0)
    plain = [_plain_errors(*pair) for pair in zip(predicted, depths)]
    for row, expected in zip(errors, plain):
        assert dict(zip(DEPTH_ERRORS, row.tolist())) == pytest.approx(expected, rel=1e-6)
    for measured in measure_depth(errors):
        assert measured.value == pytest.approx(np.mean([image[measured.metric] for image in plain]))
        assert measured.interval[0] <= measured.value <= measured.interval[1]


def test_images_without_a_valid_depth_do_not_count_and_none_at_all_is_refused():
    predicted, depths = _depths()
    expected = _values(measure_depth(depth_errors(predicted[1:], depths[1:], min_depth=1e-3, max_depth=10.0)))
    depths[0] = 0
    errors = depth_errors(predicted, depths, min_depth=1e-3, max_depth=10.0)
    assert _values(measure_depth(errors)) == expected and measure_depth(errors)[0].n == 4
    with pytest.raises(ValueError, match="valid range, got none in any image"):
        measure_depth(errors[:1])
    with pytest.raises(ValueError, match="depths above 0"):
        depth_errors(predicted - 20, depths, min_depth=1e-3, max_depth=10.0)


def test_the_depth_head_equals_the_one_of_the_model(tiny, randomise):
    model = randomise(ViTWithRegistersForDepthEstimation(tiny(num_depth_bins=16, num_register_tokens=2)))
    head = LinearDepthHead(64, num_bins=16, min_depth=model.config.min_depth, max_depth=model.config.max_depth)
    head.classifier.load_state_dict(model.depth_classifier.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    (tokens,) = extract_features(load_encoder(model), pixels)
    with torch.no_grad():
        found = head(join_class_token(tokens.patch_grid, tokens.cls_token), (32, 32))
        torch.testing.assert_close(found, model(pixels).predicted_depth, rtol=1e-4, atol=1e-5)


def test_a_trained_depth_head_finds_what_patches_hold():
    depths = (torch.rand(20, 4, 4) * 8 + 1).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    patches = torch.stack([depths[:, 2::4, 2::4], torch.rand(20, 4, 4)], dim=-1)
    settings = DepthSettings(num_steps=200, batch_size=8, num_bins=32, learning_rate=0.02)
    head = fit_depth(lambda rows: (patches[rows], depths[rows]), num_images=20, max_depth=10.0, settings=settings)

    def measure(features):
        with torch.no_grad():
            errors = depth_errors(head(features, (16, 16)), depths, min_depth=1e-3, max_depth=10.0)
        return _values(measure_depth(errors))["rmse"]

    assert measure(patches) < 0.75 * measure(patches.flip(0))


def test_the_rate_rises_and_falls_along_a_line_or_a_cosine():
    line = Descent(100, 4, 1.0, weight_decay=0, warmup_share=0.1)
    rates = [line.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10] == 1 and rates[55] == pytest.approx(0.5)
    cosine = Descent(100, 4, 1.0, weight_decay=0, warmup_share=0.0, is_cosine=True)
    assert cosine.rate(0) == 1 and cosine.rate(50) == pytest.approx(0.5) and cosine.rate(99) < 0.001
    with pytest.raises(ValueError, match="expected num_steps of 1 or more, got 0"):
        Descent(0, 4, 1.0, weight_decay=0, warmup_share=0)


def test_a_loss_that_is_not_finite_ends_the_training():
    head, descent = torch.nn.Linear(1, 1), Descent(3, 2, 0.1, weight_decay=0, warmup_share=0)
    with pytest.raises(RuntimeError, match="became nan in step 0"):
        fit_head(head, lambda rows: head.weight.sum() * torch.nan, num_images=2, descent=descent)

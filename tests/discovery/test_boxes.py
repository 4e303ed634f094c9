"""Boxes, ious, components and annotations, against loops and known truth."""

import numpy as np
import pytest
import torch

from modeling_vitreg.discovery.boxes import component_boxes, largest_components, seed_components
from modeling_vitreg.metrics import best_iou, box_iou, corloc


def flood(mask, start):
    """Places that can be reached from one by steps over shared sides."""
    reached, waiting = set(), [start]
    while waiting:
        row, column = waiting.pop()
        inside = 0 <= row < len(mask) and 0 <= column < len(mask[0])
        if inside and mask[row][column] and (row, column) not in reached:
            reached.add((row, column))
            waiting += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return reached


def places(component):
    return set(zip(*(axis.tolist() for axis in np.nonzero(component))))


def test_components_are_those_of_a_flood_and_never_cross_from_one_image_to_the_next():
    masks = torch.rand(20, 5 * 7) > 0.45
    seeds = torch.stack([mask.nonzero()[number % int(mask.sum()), 0] for number, mask in enumerate(masks)])
    found = seed_components(masks, seeds, grid=(5, 7))
    largest = largest_components(masks, grid=(5, 7))
    for mask, seed, component, large in zip(masks.reshape(-1, 5, 7).tolist(), seeds.tolist(), found, largest):
        assert places(component) == flood(mask, divmod(seed, 7))
        all_components = [flood(mask, place) for place in np.ndindex(5, 7) if mask[place[0]][place[1]]]
        assert places(large) == max(all_components, key=len)


def test_a_seed_outside_its_mask_stands_alone_and_an_empty_mask_has_no_largest_component():
    empty = torch.zeros(2, 6, dtype=torch.bool)
    assert [places(part) for part in seed_components(empty, torch.tensor([4, 0]), grid=(2, 3))] == [{(1, 1)}, {(0, 0)}]
    assert not largest_components(empty, grid=(2, 3)).any()
    with pytest.raises(ValueError, match="one patch in each component"):
        component_boxes(largest_components(empty, grid=(2, 3)), patch_shape=(8, 8))


def test_boxes_lie_around_components_and_inside_the_image_before_padding():
    components = np.zeros((2, 4, 5), dtype=bool)
    components[0, 1:3, 2:5] = True
    components[1, 3, 0] = True
    assert component_boxes(components, patch_shape=(8, 16)).tolist() == [[32, 8, 80, 24], [0, 24, 16, 32]]
    cut = component_boxes(components, patch_shape=(8, 16), image_sizes=[(30, 70), (27, 80)])
    assert cut.tolist() == [[32, 8, 70, 24], [0, 24, 16, 27]]


def test_overlap_equals_the_count_of_shared_pixels():
    corners = torch.randint(0, 12, (30, 4)).numpy()
    boxes = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4).astype(float)
    pixels = np.zeros((30, 12, 12), dtype=bool)
    for picture, (left, top, right, bottom) in zip(pixels, boxes.astype(int)):
        picture[top:bottom, left:right] = True
    common = (pixels[:, None] & pixels[None]).sum(axis=(2, 3))
    union = (pixels[:, None] | pixels[None]).sum(axis=(2, 3))
    np.testing.assert_allclose(box_iou(boxes, boxes), common / np.maximum(union, 1))
    assert best_iou(boxes[0], np.zeros((0, 4))) == 0


def test_corloc_counts_images_whose_box_overlaps_one_of_the_true_boxes_by_half():
    truth = [np.array([[0, 0, 10, 10], [20, 20, 30, 30]])] * 3 + [np.zeros((0, 4))]
    predicted = [[20, 20, 30, 25], [0, 0, 10, 10], [0, 0, 10, 4.9], [0, 0, 1, 1]]
    assert corloc(predicted, truth) == 0.5  # exactly half counts, an image without objects is a miss
    assert corloc(predicted, truth, iou_threshold=0.6) == 0.25
    assert corloc(predicted[1:2] * 3 + predicted[3:], truth) == 0.75
    with pytest.raises(ValueError, match="got 4 for 0"):
        corloc(predicted, [])

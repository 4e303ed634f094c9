"""Attention of class token and registers: entropy, overlap, duplicates, and what falls on which tokens."""

import math

import numpy as np
import pytest
import torch

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.analysis.attention import (
    AttentionMeans,
    attention_entropy,
    find_duplicates,
    map_overlap,
    register_similarity,
)


KINDS = {"cls": 1, "distillation": 0, "registers": 2, "patches": 6}


def test_entropy_is_one_for_an_even_map_and_zero_for_a_point():
    point = torch.zeros(8)
    point[3] = 0.2
    maps = torch.stack([torch.full((8,), 0.05), point, torch.tensor([0.1, 0.1, 0, 0, 0, 0, 0, 0])])
    assert attention_entropy(maps).tolist() == pytest.approx([1, 0, math.log(2) / math.log(8)])


def test_overlap_is_one_for_like_maps_and_zero_for_disjoint_ones():
    maps = torch.tensor([[0.1, 0.1, 0, 0], [0.4, 0.4, 0, 0], [0, 0, 0.5, 0], [0, 0.1, 0.1, 0]])
    expected = [[1, 1, 0, 0.5], [1, 1, 0, 0.5], [0, 0, 1, 0.5], [0.5, 0.5, 0.5, 1]]
    torch.testing.assert_close(map_overlap(maps), torch.tensor(expected))


def test_equal_registers_are_found_in_groups():
    registers = torch.randn(3, 5, 16)
    registers[:, 3] = registers[:, 0]
    registers[:, 4] = registers[:, 1] * 2  # the length does not make them different
    similarity = register_similarity(registers)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(5))
    assert find_duplicates(similarity) == [[1, 4], [2, 5]]
    assert find_duplicates(register_similarity(torch.randn(3, 4, 16))) == []


def test_registers_that_start_equal_are_reported_and_random_ones_are_not(tiny, randomise):
    for is_equal in (True, False):
        model = randomise(ViTWithRegistersModel(tiny(num_register_tokens=3)))
        if is_equal:
            weight = model.embeddings.register_tokens.weight
            weight.data[:] = weight.data[0]
        output = model(torch.randn(2, 3, 32, 32), output_pre_norm=True)
        found = find_duplicates(register_similarity(output.pre_norm.register_tokens))
        assert found == ([[1, 2, 3]] if is_equal else [])


def test_means_equal_those_of_all_images_together():
    probabilities = torch.rand(2, 7, 4, 3, 9).softmax(dim=-1)  # [layers, B, H, Q, N]
    places = torch.arange(7) % 6
    means = AttentionMeans(2, kinds=KINDS)
    for part in (slice(0, 3), slice(3, 7)):
        means.add(list(probabilities[:, part]), places[part])
    report = means.summarise([1, 2])
    assert report["queries"] == ["cls", "register 1", "register 2"] and report["num_images"] == 7
    values = probabilities[1]
    layer = report["layers"][1]
    assert layer["layer"] == 2
    mass = values.mean(dim=(0, 1))  # [Q, N]
    for query in range(3):
        expected = {"cls": mass[query, 0], "distillation": 0, "registers": mass[query, 1:3].sum()}
        expected["patches"] = mass[query, 3:].sum()
        assert layer["attention_share"][query] == pytest.approx({key: float(value) for key, value in expected.items()})
    top = torch.stack([values[image, :, :, 3 + place].mean(dim=0) for image, place in enumerate(places)]).mean(dim=0)
    assert layer["top_patch_share"] == pytest.approx(top.tolist())
    even = mass[:, 3:].sum(dim=1) / 6
    assert layer["top_patch_ratio"] == pytest.approx((top / even).tolist())
    assert layer["entropy"] == pytest.approx(attention_entropy(values[..., 3:]).mean(dim=(0, 1)).tolist())
    assert np.array(layer["head_attention_share"]).shape == (3, 4)
    np.testing.assert_allclose(means.mean_maps(1), mass[:, 3:], rtol=1e-5)

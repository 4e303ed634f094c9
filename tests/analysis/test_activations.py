"""Massive activations: exactly the entries that were put there."""

import numpy as np
import pytest
import torch

from modeling_vitreg.analysis.activations import MassiveActivations, sample_medians


KINDS = {"cls": 1, "distillation": 0, "registers": 2, "patches": 30}


def _parts(num_images=4, width=16, seed=0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_images, count, width, generator=generator) for count in KINDS.values()]


def _measure(*batches) -> dict:
    peaks = MassiveActivations(1, width=16, kinds=KINDS)
    for parts in batches:
        peaks.add(0, parts)
        peaks.count(len(parts[0]))
    return peaks.summarise()


def test_planted_entries_are_counted_by_kind_and_criterion():
    parts = _parts()
    parts[3][1, 7, 3] = 900.0  # above 1000 x the median of 0.67
    parts[2][2, 1, 3] = -300.0  # above 100 x
    parts[0][3, 0, 5] = 90.0  # below 100, above 100 x
    report = _measure(parts)
    massive = report["layers"][0]["massive"]
    assert massive["language models"] == {"cls": 0, "distillation": 0, "registers": 0, "patches": 0.25}
    assert massive["vision"] == {"cls": 0, "distillation": 0, "registers": 0.25, "patches": 0.25}
    assert massive["ratio"] == {"cls": 0.25, "distillation": 0, "registers": 0.25, "patches": 0.25}
    layer = report["layers"][0]
    assert layer["top_channels"][:2] == [[3, 900.0], [5, 90.0]] and layer["largest"] == 900
    assert layer["carriers"] == {"cls": 0.25, "distillation": 0, "registers": 0.25, "patches": 0.5}
    assert report["channels"] == [[3, 1]] and report["num_images"] == 4


def test_numbers_equal_those_of_all_tokens_together():
    first, second = _parts(3), _parts(2, seed=1)
    layer = _measure(first, second)["layers"][0]
    tokens = [torch.cat(parts, dim=1).abs() for parts in (first, second)]
    energy = sum(part.double().square().sum(dim=(0, 1)) for part in tokens)
    energy = (energy / energy.sum()).sort(descending=True).values
    assert layer["largest"] == pytest.approx(max(part.max().item() for part in tokens))
    assert layer["top_shares"] == pytest.approx([energy[0].item(), energy[:3].sum().item()])
    medians = torch.cat([part[-1].abs().flatten(1).median(dim=1).values for part in (first, second)])
    assert layer["median"] == pytest.approx(medians.mean().item())
    peaks = torch.cat([part.amax(dim=(1, 2)) for part in tokens])
    assert layer["largest_over_median"] == pytest.approx((peaks / medians).max().item())


def test_nothing_is_massive_in_noise():
    layer = _measure(_parts())["layers"][0]
    assert not any(count for counts in layer["massive"].values() for count in counts.values())
    assert layer["top_shares"][0] < 0.15


def test_the_sampled_median_is_near_the_exact_one():
    sizes = torch.randn(3, 201, 384).abs() * torch.linspace(0.1, 3, 384)  # channels of different sizes
    exact = sizes.flatten(1).median(dim=1).values
    np.testing.assert_allclose(sample_medians(sizes), exact, rtol=0.1)

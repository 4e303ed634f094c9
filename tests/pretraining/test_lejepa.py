"""LeJEPA against slow programs of its formulas, and against what is known of Gaussians.

The same losses and gradients come from lightly 1.6.0 with the same directions; see docs/reference/proofs.md.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.objectives.heads import SyncedBatchNorm
from modeling_vitreg.pretraining.objectives.lejepa import (
    LeJEPA,
    LeJEPASettings,
    draw_directions,
    invariance_loss,
    sigreg_loss,
    sigreg_of_gaussian,
)
from modeling_vitreg.pretraining.objectives.losses import characteristic_function
from modeling_vitreg.pretraining.views.crops import CropSettings


SETTINGS = LeJEPASettings(num_directions=24, hidden_width=32, projection_width=8)
CROPS = CropSettings(num_global=2, num_local=2, global_size=32, local_size=16)


@pytest.fixture
def make(tiny):
    def make(crops: CropSettings = CROPS, settings: LeJEPASettings = SETTINGS, **fields) -> LeJEPA:
        torch.manual_seed(0)
        backbone = ViTWithRegistersModel(tiny(initializer_range=0.3, **fields))
        return LeJEPA(backbone, crops=crops, settings=settings, num_steps=10).train()

    return make


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(num_images: int = 6) -> dict[str, Tensor]:
    return {
        "global_views": random(2, num_images, 3, 32, 32),
        "local_views": random(2, num_images, 3, 16, 16, seed=1),
    }


def slow_sigreg(embeddings: Tensor, directions: Tensor, num_frequencies: int, max_frequency: float) -> float:
    values, total = embeddings.double().numpy(), 0.0
    frequencies = np.linspace(0, max_frequency, num_frequencies)
    for view in values:
        for direction in directions.double().numpy().T:
            projected = view @ direction
            errors = [
                ((np.cos(t * projected).mean() - math.exp(-t * t / 2)) ** 2 + np.sin(t * projected).mean() ** 2)
                * math.exp(-t * t / 2)
                for t in frequencies
            ]
            total += 2 * np.trapezoid(errors, frequencies) * len(view)  # the integrand is even
    return total / (len(values) * directions.shape[1])


@pytest.mark.parametrize(("num_frequencies", "max_frequency"), [(17, 3.0), (2, 1.0), (9, 5.0)])
def test_sigreg_is_the_integral_of_its_formula(num_frequencies, max_frequency):
    embeddings = 0.5 * random(3, 7, 5) + 0.2
    directions = torch.nn.functional.normalize(random(5, 4, seed=1), dim=0)
    found = sigreg_loss(
        embeddings, directions=directions, num_frequencies=num_frequencies, max_frequency=max_frequency
    )
    assert float(found) == pytest.approx(slow_sigreg(embeddings, directions, num_frequencies, max_frequency), rel=1e-5)


def test_gradients_of_the_characteristic_function_are_those_of_finite_differences():
    values = random(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: characteristic_function(x, 5, 2.0), values)


def test_sigreg_of_gaussian_embeddings_is_near_its_expected_value_and_of_collapsed_ones_far_above():
    directions = draw_directions(LeJEPASettings(projection_width=16), step=0, device=torch.device("cpu"))
    options = {"directions": directions, "num_frequencies": 17, "max_frequency": 3.0}
    expected = sigreg_of_gaussian(17, 3.0)
    assert float(sigreg_loss(random(8, 64, 16), **options)) == pytest.approx(expected, rel=0.15)
    assert float(sigreg_loss(torch.zeros(8, 64, 16), **options)) > 20 * expected
    assert float(sigreg_loss(4 * random(8, 64, 16), **options)) > 10 * expected


def test_the_invariance_is_the_mean_distance_to_the_centre_of_the_global_views():
    embeddings = random(4, 3, 5)
    total = 0.0
    for image in range(3):
        centre = (embeddings[0, image] + embeddings[1, image]) / 2
        total += sum(float((embeddings[view, image] - centre).square().sum()) for view in range(4))
    assert float(invariance_loss(embeddings, num_global=2)) == pytest.approx(total / (4 * 3 * 5), rel=1e-6)


def test_directions_are_unit_columns_and_differ_between_steps():
    first, again, next_one = (draw_directions(SETTINGS, step=step, device=torch.device("cpu")) for step in (5, 5, 6))
    assert first.shape == (8, 24)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(24))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_one)


def test_the_norm_is_that_of_torch_in_training():
    ours, theirs, rows = SyncedBatchNorm(6), torch.nn.BatchNorm1d(6).train(), 3 * random(10, 6) + 1
    torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_objective_weighs_its_terms_and_trains_backbone_and_projector(make, is_packed):
    objective = make(settings=LeJEPASettings(**{**vars(SETTINGS), "is_packed": is_packed}))
    losses = objective(make_batch(), step=0)
    mean = 0.05 * losses["sigreg"] + 0.95 * losses["invariance"]
    torch.testing.assert_close(losses["total"], mean)
    losses["total"].backward()
    unused = {name for name, p in objective.named_parameters() if p.grad is None}
    assert not unused
    assert objective.encoder is objective.backbone


def test_views_of_an_image_that_are_the_same_agree(make):
    objective, views = make(), make_batch()["global_views"]
    same = {"global_views": views[:1].expand(2, -1, -1, -1, -1)}
    assert float(objective(same, step=0)["invariance"]) < 1e-10
    assert float(objective({"global_views": views}, step=0)["invariance"]) > 1e-3


def test_a_single_view_is_refused(make):
    with pytest.raises(ValueError, match="compares views of an image: expected two or more"):
        make(crops=CropSettings(num_global=1, num_local=0, global_size=32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigreg_weight": 1.5}, r"expected sigreg_weight in \[0, 1\], got 1.5"),
        ({"num_directions": 0}, "expected num_directions above 0, got 0"),
        ({"num_frequencies": 1}, "expected num_frequencies of 2 or more, got 1"),
    ],
)
def test_contradictory_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LeJEPASettings(**values)

"""Compiled training: one graph for each branch and mode, none after the first steps, and the numbers of eager."""

import functools

import pytest
import torch
from test_golden_losses import GOLDEN, make_batch, make_optimizer, make_recipe, take_steps
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_vitreg.modes import eval_mode
from modeling_vitreg.pretraining.build import make_objective


@pytest.fixture
def counter(monkeypatch):
    """Graphs that are compiled, by a back end that runs them as they are; a limit that is hit is an error."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counter
    torch._dynamo.reset()


def _make(name):
    recipe = GOLDEN["runs"][name]["recipe"]
    return make_objective(make_recipe(recipe)).train()


@pytest.mark.parametrize(
    ("name", "num_graphs"),
    [
        ("dinov2 sinkhorn", 4),
        ("dinov2 moving mean, two heads, packed", 4),  # stochastic depth on a subset
        ("mae", 4),  # encoder and decoder
        ("simmim", 2),
        ("lejepa", 2),
        ("classify binary", 2),
    ],
)
def test_nothing_is_compiled_after_the_first_steps(name, num_graphs, counter):
    eager, compiled = _make(name), _make(name)
    expected = take_steps(eager, make_optimizer(eager), range(5))
    compiled.compile_layers()
    optimizer = make_optimizer(compiled)
    found = take_steps(compiled, optimizer, range(2))
    compiled_first = counter.frame_count
    with eval_mode(compiled.encoder):  # an evaluation in the middle of a run, at another size
        compiled.encoder(torch.randn(3, 3, 48, 32))
    for term, values in take_steps(compiled, optimizer, range(2, 5)).items():
        found[term] += values
    assert counter.frame_count == compiled_first <= num_graphs
    for term, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[term]), torch.tensor(values), rtol=1e-5, atol=1e-6)


def test_the_number_of_masked_patches_changes_between_these_steps():
    objective = _make("dinov2 sinkhorn")
    assert len({len(make_batch(objective, step)["masked_patches"]) for step in range(5)}) > 2

"""A training step never waits for the device: nothing in it reads a value on the host or copies one from there.

Counted on a CPU, where the same operations run as on a GPU: `item`, `nonzero`, masks as indices, `torch.tensor(...)`.
"""

import collections
import json
import pathlib
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_vitreg import modes
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.monitoring.non_finite import NonFiniteDetector
from modeling_vitreg.pretraining.run.recipe import make_recipe


ROOT = pathlib.Path(__file__).parents[2]
RUNS = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())["runs"]
# Methods that give registers to a finished model choose tokens by their values: they do wait.
RUNS = {name: run for name, run in RUNS.items() if "_registers" not in name}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "lift_fresh"}
# What other libraries read: random numbers drawn on the host, labels as one-hot vectors (on CPUs only), the mask of
# texts, and the norm of a part without gradients, which is a constant on the host.
EXEMPT = ("torchvision/transforms/v2/_augment.py", "torchvision/transforms/v2/_container.py", "masking_utils.py")
EXEMPT += ("modeling_attn_mask_utils.py", "nn/utils/clip_grad.py")  # the first is the mask of texts in 4.57


class _Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.places = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name.startswith("index") else []
        if name in WAITING or masks:
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            if not any(place in frame for frame in frames for place in EXEMPT):
                self.places[name, [frame for frame in frames if str(ROOT) in frame][-1]] += 1
        return function(*args, **(kwargs or {}))


def _golden(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "golden"))
    import test_golden_losses

    return test_golden_losses


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device(name, tmp_path, monkeypatch):
    golden = _golden(monkeypatch)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain

    golden.ViTWithRegistersModel(
        golden.ViTWithRegistersConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
        )
    ).save_pretrained(tmp_path / "teacher")
    values = json.loads(json.dumps(RUNS[name]["recipe"]).replace("TEACHER", str(tmp_path / "teacher")))
    recipe = make_recipe(values)
    objective = make_objective(recipe).train()
    optimizer, detector = pretrain.make_optimizer(objective, recipe), NonFiniteDetector()
    for step in range(2):
        batch = golden.make_batch(objective, step)
        with _Waits() as waits:
            terms = objective(batch, step=step)
            terms["total"].backward()
            norms = pretrain.update(objective, optimizer, None, max_grad_norm=1.0)
            objective.after_step(step=step)
            detector.update(terms | norms, step=step)
    assert not waits.places


def test_what_waits_is_counted():
    values = torch.arange(3.0)
    with _Waits() as waits:
        values.sum().item()
        values[values > 1]
        torch.tensor(2.0)
    assert [name for name, _ in waits.places] == ["_local_scalar_dense", "index", "lift_fresh"]
    assert all(__file__ in place for _, place in waits.places)


def test_attention_on_a_gpu_is_that_of_cudnn_then_flash_then_efficient(monkeypatch):
    asked = []
    monkeypatch.setattr(modes, "sdpa_kernel", lambda backends, **options: asked.append((backends, options)))
    modes.fast_attention("cuda")
    names = [backend.name for backend in asked[0][0]]
    assert names == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert asked[0][1] == {"set_priority": True}
    monkeypatch.undo()
    query = torch.rand(1, 2, 5, 8)
    with modes.fast_attention("cpu"):
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    with modes.fast_attention("cuda"):  # the context of torch itself, which a CPU enters too
        found = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert torch.equal(found, expected)

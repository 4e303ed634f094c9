"""The planner, held against what it plans: real objectives, real steps, real files."""

import dataclasses
import importlib
import json
import pathlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.build import make_config, make_objective
from modeling_vitreg.pretraining.estimate import estimate
from modeling_vitreg.pretraining.objectives.heads import PrototypeHead
from modeling_vitreg.pretraining.objectives.objective import TARGETS
from modeling_vitreg.pretraining.run.recipe import Recipe, make_recipe
from modeling_vitreg.pretraining.state import save_state
from modeling_vitreg.pretraining.views.masking import draw_masks


MODEL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
DINOV2 = {
    "objective": "dinov2",
    "model": MODEL,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 3},
    "settings": {"num_prototypes": 48, "hidden_width": 24, "bottleneck_width": 16, "is_packed": True},
    "num_steps": 10,
    "batch_size": 8,
}
ONE_VIEW = {"num_global": 1, "num_local": 0, "global_size": 32}
RECIPES = {
    "dinov2": DINOV2,
    "dinov2, two heads, stochastic depth": DINOV2
    | {
        "model": MODEL | {"drop_path_rate": 0.4, "drop_path_mode": "batch_subset", "hidden_act": "swiglu"},
        "settings": DINOV2["settings"] | {"num_patch_prototypes": 40},
    },
    "dinov2, moving mean": DINOV2 | {"settings": DINOV2["settings"] | {"centering": "moving_mean"}},
    "mae": DINOV2
    | {
        "objective": "mae",
        "crops": ONE_VIEW,
        "masks": {"kind": "random", "ratio": [0.75, 0.75], "share": 1.0},
        "settings": {"decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2},
    },
    "simmim": DINOV2
    | {
        "objective": "simmim",
        "crops": ONE_VIEW,
        "masks": {"kind": "random", "ratio": [0.5, 0.5], "share": 1.0},
        "settings": {},
    },
    "lejepa": DINOV2
    | {
        "objective": "lejepa",
        "masks": {},
        "settings": {"num_directions": 16, "hidden_width": 32, "projection_width": 8},
    },
    "segment": DINOV2 | {"objective": "segment", "crops": ONE_VIEW, "settings": {"num_classes": 5}},
    "depth, a probe": DINOV2 | {"objective": "depth", "crops": ONE_VIEW, "settings": {"freeze_backbone": True}},
}


@pytest.fixture(params=RECIPES, ids=lambda name: name)
def recipe(request) -> Recipe:
    return make_recipe(RECIPES[request.param])


def _batch(recipe: Recipe, objective: torch.nn.Module, num_images: int) -> dict:
    """A real batch, with as many masked patches as the mean of many, which is what the planner takes."""
    crops = recipe.crops
    batch = {"global_views": torch.randn(crops.num_global, num_images, 3, crops.global_size, crops.global_size)}
    if crops.num_local:
        batch["local_views"] = torch.randn(crops.num_local, num_images, 3, crops.local_size, crops.local_size)
    if objective.annotation in ("mask", "depth"):
        maps = torch.randint(1, 5, (1, num_images, crops.global_size, crops.global_size))
        return batch | {TARGETS[objective.annotation]: maps.to(objective.target_dtype)}
    if objective.masks is None:
        return batch
    grid = (crops.global_size // 8,) * 2
    draw = {"num_views": crops.num_global, "grid": grid, "settings": objective.masks}
    generator = torch.Generator().manual_seed(0)
    mean = round(int(draw_masks(1024, **draw, generator=generator).sum()) / (1024 / num_images))
    for _ in range(1000):
        masks = draw_masks(num_images, **draw, generator=generator).flatten(0, 1)
        if int(masks.sum()) == mean:
            return batch | {"masks": masks, "masked_patches": masks.flatten().nonzero().squeeze(1)}
    raise AssertionError(f"no draw of masks has the mean of {mean} patches")


def test_parameters_and_their_bytes_are_those_of_the_real_objective(recipe):
    made, objective = estimate(recipe, num_processes=1, micro_batch=8), make_objective(recipe)
    for name, part in objective.trained.items():
        assert made.parameters[name] == sum(parameter.numel() for parameter in part.parameters()), name
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert made.memory["weights"] == made.memory["gradients"] == sum(value.nbytes for value in learned)
    assert made.memory["moments"] == sum(value.nbytes for value in moments)
    everything = [*objective.parameters(), *objective.buffers()]
    assert made.memory["weights"] + made.memory["teacher"] == sum(value.nbytes for value in everything)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_operations_are_those_of_a_real_step(recipe, is_checkpointed):
    objective = make_objective(recipe).train()
    if is_checkpointed:
        objective.trained["backbone"].gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        objective(_batch(recipe, objective, 4), step=0)["total"].backward()
    made = estimate(recipe, num_processes=1, micro_batch=4, precision="no", checkpoints_activations=is_checkpointed)
    assert made.num_accumulations == 2
    assert made.flops_per_step == 2 * counter.get_total_flops()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves_in_a_real_step(recipe, precision):
    objective, saved = make_objective(recipe).train(), {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = _batch(recipe, objective, 8)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        losses = objective(batch, step=0)
    for other in [*objective.parameters(), *objective.buffers(), *batch.values()]:
        saved.pop(other.untyped_storage().data_ptr(), None)
    assert losses["total"].requires_grad
    memory = estimate(recipe, num_processes=1, micro_batch=8, precision=precision).memory
    kept = memory["copies"] + memory["logits"] + memory["activations"]
    # Scalars and what Python still holds are alive too, but are not saved.
    assert sum(saved.values()) <= kept <= 1.05 * sum(saved.values())


def test_checkpoints_keep_less_and_compute_more():
    recipe = make_recipe(DINOV2 | {"model": MODEL | {"num_hidden_layers": 8}})
    plain = estimate(recipe, num_processes=1, micro_batch=8)
    checkpointed = estimate(recipe, num_processes=1, micro_batch=8, checkpoints_activations=True)
    assert checkpointed.memory["activations"] < plain.memory["activations"] / 3
    assert plain.flops_per_step < checkpointed.flops_per_step < 4 / 3 * plain.flops_per_step


def test_sharding_divides_what_every_process_would_hold():
    recipe = make_recipe(DINOV2)
    whole = estimate(recipe, num_processes=4, micro_batch=2)
    parts = estimate(recipe, num_processes=4, micro_batch=2, is_sharded=True)
    for name in ("weights", "gradients", "moments", "teacher"):
        assert parts.memory[name] == -(-whole.memory[name] // 4), name
    assert whole.memory["gathered"] == 0 < parts.memory["gathered"]
    assert parts.flops_per_step == whole.flops_per_step
    assert parts.state_bytes == whole.state_bytes
    # A ring sends every byte of the gradients twice, but for the share that is at home; alone nothing is sent.
    assert whole.reduced_bytes == 2 * whole.memory["gradients"] * 3 // 4
    assert estimate(recipe, num_processes=1, micro_batch=8).reduced_bytes == 0


def test_a_state_on_disk_has_the_planned_size(recipe, tmp_path):
    made, objective = estimate(recipe, num_processes=1, micro_batch=8), make_objective(recipe)
    optimizer = torch.optim.AdamW([parameter for parameter in objective.parameters() if parameter.requires_grad])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_state(tmp_path, objective=objective, optimizer=optimizer, metadata={"step": 0})
    files = list((tmp_path / "step-00000000").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert made.state_bytes == sum(path.stat().st_size for path in files) - headers


@pytest.mark.parametrize(
    ("width", "bottleneck", "prototypes", "count"),
    [
        (1024, 256, 65536, 23_662_848),
        (1024, 384, 131072, 57_545_088),
        (1024, 256, 131072, 40_505_600),
        (384, 256, 65536, 22_352_128),
    ],
)
def test_heads_have_the_published_sizes(width, bottleneck, prototypes, count):
    with torch.device("meta"):
        head = PrototypeHead(width, num_prototypes=prototypes, bottleneck_width=bottleneck)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_the_giant_has_the_size_of_the_published_one():
    # 1,136,483,840 parameters with 4 registers in timm, at 518 pixels, with the class position folded into the token.
    model = {"preset": "giant/14", "layer_scale_init_value": 1e-5, "image_size": 518, "has_mask_token": False}
    with torch.device("meta"):
        giant = ViTWithRegistersModel(make_config(make_recipe({"model": model | {"has_prefix_positions": False}})))
    assert giant.num_parameters() == 1_136_483_840


def test_an_estimate_is_json_and_a_table(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "examples")
    made = estimate(make_recipe(DINOV2), num_processes=2, micro_batch=4)
    assert json.loads(json.dumps(dataclasses.asdict(made))) == dataclasses.asdict(made)
    text = importlib.import_module("plan").write_table(made)
    for word in ("class_head", "activations", "total", "operations", "on disk", "an assumption"):
        assert word in text
    slow = made.hours(flops_per_second=1e12, utilisation=0.5)
    assert slow == pytest.approx(made.total_flops / 1e12 / 0.5 / 2 / 3600)
    assert made.tokens_per_step == 8 * (2 * (5 + 16) + 3 * (5 + 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_steps = 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_processes": 3, "micro_batch": 1}, "is not a multiple of 3 processes x 1"),
        ({"num_processes": 0, "micro_batch": 1}, "one or more processes"),
        ({"num_processes": 1, "micro_batch": 1, "precision": "int8"}, "one of no, bf16, fp16"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_remedy(asked, message):
    with pytest.raises(ValueError, match=message):
        estimate(make_recipe(DINOV2), **asked)

"""The recipes, as they lie in examples/recipes, and the configurations of accelerate beside them."""

import pathlib

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from modeling_vitreg.pretraining.build import backbone_class, make_config
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2Settings
from modeling_vitreg.pretraining.run.recipe import read_recipe
from modeling_vitreg.settings import make_settings


EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PATHS = sorted((EXAMPLES / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_backbone_builds(path):
    recipe = read_recipe(path)
    with torch.device("meta"):
        backbone = backbone_class(make_config(recipe).model_type)(make_config(recipe))
    assert backbone.config.num_register_tokens == recipe.num_register_tokens
    sizes = {recipe.crops.global_size} | ({recipe.crops.local_size} if recipe.crops.num_local else set())
    assert not any(size % side for size in sizes for side in backbone.config.patch_shape)


@pytest.mark.parametrize(
    "path", [path for path in PATHS if not path.stem.endswith("-cpu")], ids=lambda path: path.stem
)
def test_a_recipe_opens_with_command_hardware_cost_and_expectation(path):
    lines = path.read_text().splitlines()
    opening = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    for part in ("accelerate launch", f"--recipe {path.stem}", "Hardware:", "Cost:", "Expected:"):
        assert part in opening, f"{path.name} does not say {part}"


# The table of the released configurations; shares of the steps as the steps that they come to.
PUBLISHED = {
    "dinov2-vitl16-short": {
        "peak learning rate": 4e-3 * 2**0.5,
        "steps": 125_000,
        "warm-up": 12_500,
        "temperature warm-up": 37_500,
        "frozen": 1_250,
        "decay": (0.04, 0.4),
        "layer decay": 0.9,
        "momentum": (0.992, 1.0),
        "drop path": 0.3,
        "prototypes": (65536, None),
        "bottlenecks": (256, 256),
        "centering": "moving_mean",
        "local views": (8, 96),
        "width, depth, patch": (1024, 24, 16),
        "act": "gelu",
    },
    "dinov2-vitg14": {
        "peak learning rate": 2e-4 * 3**0.5,
        "steps": 625_000,
        "warm-up": 100_000,
        "temperature warm-up": 37_500,
        "frozen": 1_250,
        "decay": (0.04, 0.2),
        "layer decay": 1.0,
        "momentum": (0.994, 1.0),
        "drop path": 0.4,
        "prototypes": (131072, 131072),
        "bottlenecks": (384, 256),
        "centering": "sinkhorn",
        "local views": (8, 98),
        "width, depth, patch": (1536, 40, 14),
        "act": "swiglu",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_of_dinov2_have_the_published_values(name):
    recipe = read_recipe(EXAMPLES / "recipes" / f"{name}.yaml")
    config, settings = make_config(recipe), make_settings(DINOv2Settings, recipe.settings, of="settings")
    found = {
        "peak learning rate": pytest.approx(recipe.peak_learning_rate),
        "steps": recipe.num_steps,
        "warm-up": int(recipe.warmup_ratio * recipe.num_steps),
        "temperature warm-up": int(settings.temperature_warmup * recipe.num_steps),
        "frozen": sum(step < recipe.freeze_last_layer * recipe.num_steps for step in range(2000)),
        "decay": (recipe.weight_decay, recipe.weight_decay_end),
        "layer decay": recipe.layer_decay,
        "momentum": settings.momentum,
        "drop path": config.drop_path_rate,
        "prototypes": (settings.num_prototypes, settings.num_patch_prototypes),
        "bottlenecks": (settings.bottleneck_width, settings.patch_bottleneck_width),
        "centering": settings.centering,
        "local views": (recipe.crops.num_local, recipe.crops.local_size),
        "width, depth, patch": (config.hidden_size, config.num_hidden_layers, config.patch_size),
        "act": config.hidden_act,
    }
    assert found == PUBLISHED[name]
    # What all of them share.
    assert (recipe.patch_multiplier, recipe.min_learning_rate, recipe.max_grad_norm) == (0.2, 1e-6, 3.0)
    assert (settings.student_temperature, settings.teacher_temperature) == (0.1, (0.04, 0.07))
    assert (settings.dino_weight, settings.ibot_weight, settings.koleo_weight) == (1.0, 1.0, 0.1)
    assert (recipe.masks.ratio, recipe.masks.share, recipe.crops.global_size) == ((0.1, 0.5), 0.5, 224)
    assert (recipe.crops.global_scale, recipe.crops.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (config.layer_scale_init_value, config.drop_path_mode) == (1e-5, "batch_subset")
    assert config.drop_path_rates == [config.drop_path_rate] * config.num_hidden_layers
    assert (config.num_register_tokens, config.interpolate_antialias, config.interpolate_offset) == (4, True, 0.0)


def test_the_last_phase_differs_from_the_first_in_size_length_and_learning_rate_alone():
    first, last = (read_recipe(EXAMPLES / "recipes" / f"dinov2-vitl16-{name}.yaml") for name in ("short", "highres"))
    before, after = first.as_dict(), last.as_dict()
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {"crops", "num_steps", "learning_rate"}
    assert last.crops.global_size == 416 and last.num_steps == 10_000
    assert last.peak_learning_rate < first.peak_learning_rate


@pytest.mark.parametrize(("name", "num_processes"), [("one-gpu", 1), ("many-gpus", 8), ("many-nodes", 64)])
def test_accelerate_reads_its_configurations(name, num_processes):
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == num_processes
    assert config.mixed_precision == "bf16"
    # FSDP is torch's own, behind --shard.
    assert config.fsdp_config == {} and config.distributed_type.value in ("NO", "MULTI_GPU")
    assert config.num_processes % config.num_machines == 0

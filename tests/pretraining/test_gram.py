"""Gram anchoring: the formula, its form without P x P, aligned views, teachers and their refresh, killed runs."""

import re

import pytest
import torch
import torch.nn.functional as F
import training_program
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.objectives.gram import GramSettings, gram_loss
from modeling_vitreg.pretraining.run.recipe import make_recipe
from modeling_vitreg.pretraining.state import load_objective
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop
from modeling_vitreg.pretraining.views.masking import MaskSettings
from modeling_vitreg.scenes import SceneSettings, render_scene


SETTINGS = {"num_prototypes": 24, "hidden_width": 32, "bottleneck_width": 16}
RECIPE = {
    "objective": "dinov2",
    "model": {**training_program.MODEL, "initializer_range": 0.2},
    "num_register_tokens": 2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 1},
    "settings": SETTINGS,
    "num_steps": 8,
    "batch_size": 4,
}


@pytest.fixture
def make(tiny):
    def build(gram: dict, *, teacher: ViTWithRegistersModel | None = None, num_steps: int = 100) -> DINOv2:
        torch.manual_seed(0)
        backbone = ViTWithRegistersModel(tiny(has_mask_token=True, initializer_range=0.2))
        return DINOv2(
            backbone,
            settings=DINOv2Settings(**SETTINGS, gram=GramSettings(**gram)),
            crops=CropSettings(num_local=1, global_size=32, local_size=16),
            masks=MaskSettings(),
            num_steps=num_steps,
            gram_teacher=teacher,
        ).train()

    return build


def _batch(*, is_masked: bool = True, resolution: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = {"global_views": torch.randn(2, 3, 3, 32, 32, generator=generator)}
    views["local_views"] = torch.randn(1, 3, 3, 16, 16, generator=generator)
    large = torch.randn(2, 3, 3, 64, 64, generator=generator)
    masks = (torch.rand(6, 16, generator=generator) < 0.4) & is_masked
    views["gram_views"] = views["global_views"] if resolution == 1 else large
    return views | {"masks": masks, "masked_patches": masks.flatten().nonzero().squeeze(1)}


def _slow_loss(student: Tensor, teacher: Tensor, settings: GramSettings) -> Tensor:
    if not settings.is_per_image:
        student, teacher = student.reshape(1, -1, student.shape[2]), teacher.reshape(1, -1, teacher.shape[2])
    squares = []
    for own, other in zip(student.double(), teacher.double()):
        for x, g in zip(own, other):
            for y, h in zip(own, other):
                scale = (x.norm() * y.norm(), g.norm() * h.norm()) if settings.is_normalized else (1, 1)
                similar, expected = x @ y / scale[0], g @ h / scale[1]
                if settings.negatives == "clip":
                    similar, expected = similar.clamp(min=0), expected.clamp(min=0)
                if settings.negatives == "clip_with_teacher" and expected < 0:
                    similar, expected = similar.clamp(min=0), expected * 0
                squares.append((similar - expected) ** 2)
    return torch.stack(squares).mean()


@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_with_teacher"])
@pytest.mark.parametrize("is_per_image", [True, False])
@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize(("num_patches", "width", "other"), [(12, 4, 4), (9, 4, 6), (5, 8, 8)])
def test_loss_and_gradient_are_those_of_a_loop_over_pairs_of_patches(
    negatives, is_per_image, is_normalized, num_patches, width, other
):
    settings = GramSettings(negatives=negatives, is_per_image=is_per_image, is_normalized=is_normalized)
    student, teacher = torch.randn(2, num_patches, width, requires_grad=True), torch.randn(2, num_patches, other)
    losses = gram_loss(student, teacher, settings=settings), _slow_loss(student, teacher, settings)
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-9


def test_the_form_without_a_matrix_of_patches_builds_none_and_is_exact_for_small_differences(monkeypatch):
    teacher = torch.randn(1, 200, 8)
    student = (teacher + 1e-4 * torch.randn(1, 200, 8)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.shape) or part, lambda part: part):
        loss = gram_loss(student, teacher, settings=GramSettings())
    assert max(shape.numel() for shape in kept) <= 200 * 8
    own, other = F.normalize(student.double(), dim=-1), F.normalize(teacher.double(), dim=-1)
    expected = F.mse_loss(own @ own.mT, other @ other.mT)
    assert expected < 1e-7 and loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_a_mask_the_start_as_teacher_gives_no_loss(make):
    losses = make({"weight": 2.0})(_batch(is_masked=False), step=0)
    assert losses["gram"].item() < 1e-12
    assert make({"weight": 2.0})(_batch(), step=0)["gram"].item() > 1e-4  # masked patches count


def test_the_term_of_a_run_is_the_loss_of_both_models_with_views_of_twice_the_size(make):
    objective, batch = make({"weight": 2.0, "resolution": 2.0}), _batch(resolution=2)
    with torch.no_grad():
        for parameter in objective.gram_teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    losses = objective(batch, step=0)
    own, seen = [], []
    for view, large, mask in zip(batch["global_views"], batch["gram_views"], batch["masks"].chunk(2)):
        own.append(objective.student["backbone"](view, bool_masked_pos=mask).patch_tokens)
        grid = objective.gram_teacher(large).patch_grid.permute(0, 3, 1, 2)
        seen.append(F.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2).mT)
    expected = _slow_loss(torch.cat(own), torch.cat(seen), GramSettings())
    assert losses["gram"].item() == pytest.approx(expected.item(), rel=1e-5)
    rest = sum(losses[name] * weight for name, weight in (("dino", 1), ("ibot", 1), ("koleo", 0.1), ("gram", 2)))
    torch.testing.assert_close(losses["total"], rest)
    losses["total"].backward()
    assert all(parameter.grad is None for parameter in objective.gram_teacher.parameters())


def test_masked_or_unmasked_patches_alone_are_compared_over_the_batch(make):
    batch = _batch()
    found = []
    for tokens in ("masked", "unmasked"):
        objective = make({"weight": 1.0, "tokens": tokens, "is_per_image": False})
        chosen = batch["masks"] if tokens == "masked" else ~batch["masks"]
        views = batch["global_views"].flatten(0, 1)
        own = objective.student["backbone"](views, bool_masked_pos=batch["masks"]).patch_tokens[chosen]
        seen = objective.gram_teacher(views).patch_tokens[chosen]
        expected = _slow_loss(own[None], seen[None], GramSettings()).item()
        found.append(objective(batch, step=0)["gram"].item())
        assert found[-1] == pytest.approx(expected, rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=0.01)


def test_before_it_begins_and_without_a_weight_a_run_is_the_same_bit_for_bit(make):
    plain, later, batch = make({}), make({"weight": 1.0, "begin": 3, "teacher": "ema"}), _batch()
    expected, found = plain(batch, step=2), later(batch, step=2)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert "gram" in later(batch, step=3) and plain.gram_teacher is None
    assert not [name for name in plain.state_dict() if "gram" in name]


def test_views_of_the_teacher_show_the_same_part_and_leave_the_views_of_the_student_as_they_are():
    scene = Image.fromarray(render_scene(3, settings=SceneSettings(image_size=96)).image)
    settings = CropSettings(num_local=1, global_size=32, local_size=16)
    made = []
    for size in (None, 64):
        torch.manual_seed(0)
        made.append(MultiCrop(settings, gram_size=size)(scene))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0]) and "gram_views" not in made[0]
    large = made[1]["gram_views"]
    assert large.shape == (2, 3, 64, 64)
    small = v2.functional.resize(large, [32, 32], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert (small.float() - made[1]["global_views"].float()).abs().mean() < 4  # of 255
    assert (small.flip(-1).float() - made[1]["global_views"].float()).abs().mean() > 8


def test_the_average_is_kept_as_it_is_at_the_first_step_and_taken_again_as_often_as_asked(make):
    objective = make({"weight": 1.0, "teacher": "ema", "begin": 4, "ramp": 4, "refresh": 2, "max_refreshes": 2})
    taken = []
    for step in range(12):
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(0.01)
        objective.after_step(step=step)
        pairs = zip(objective.gram_teacher.parameters(), objective.encoder.parameters())
        taken += [step] if all(torch.equal(*pair) for pair in pairs) else []
    assert taken == [3, 5, 7]
    weights = [objective.settings.gram.weight_at(step) for step in range(3, 10)]
    assert weights == pytest.approx([0, 0, 0.1464466, 0.5, 0.8535534, 1, 1])


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        ({"teacher": "ema"}, "gram has teacher 'ema' and weight 0: set gram.weight"),
        ({"weight": 1.0, "teacher": "ema"}, "teacher 'ema' and begin 0: the average is kept as it is at step"),
        ({"begin": 5}, "gram has begin 5 and weight 0: set gram.weight, or leave out gram.begin (settings.gram={}"),
        ({"ramp": 5}, "gram has ramp 5 and weight 0"),
        ({"refresh": 5}, "gram has refresh 5 and weight 0"),
        ({"resolution": 2.0}, "gram has resolution 2 and weight 0"),
        ({"weight": 1.0, "refresh": 5, "max_refreshes": 0}, "refresh 5 and max_refreshes 0: set gram.refresh=0"),
        ({"weight": 1.0, "tokens": "masked"}, "tokens 'masked' and is_per_image true: images have different numbers"),
        ({"weight": 1.0, "resolution": 1.5}, "gram has resolution 1.5: expected 1 or 2"),
        ({"weight": 1.0, "negatives": "drop"}, "settings: gram: expected negatives to be one of keep, clip"),
        (
            {"weight": 1.0, "begin": 100},
            "gram.begin 100 and num_steps 100 contradict each other: the term would never",
        ),
        ({"weigth": 1.0}, "settings: gram: there is no value 'weigth'; did you mean 'weight'"),
        ({"weight": 1.0, "teacher": "nowhere/at-all"}, "settings: gram.teacher nowhere/at-all is neither a folder"),
    ],
)
def test_contradictions_name_both_values_and_what_to_set(gram, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_objective(make_recipe(RECIPE | {"settings": SETTINGS | {"gram": gram}, "num_steps": 100}))


def test_other_contradictions_are_those_with_the_crops_and_with_a_teacher_of_another_architecture(make, tiny):
    recipe = make_recipe(RECIPE).with_changes({"settings.gram.weight": 1.0, "crops.cut": "simple"})
    with pytest.raises(ValueError, match=r"gram.weight 1 and crops.cut 'simple' contradict each other"):
        make_objective(recipe)
    deeper = ViTWithRegistersModel(tiny(hidden_size=64, patch_size=16))
    with pytest.raises(ValueError, match=r"gram.refresh 5 and gram.teacher 'folder' contradict each other"):
        make({"weight": 1.0, "teacher": "folder", "refresh": 5}, teacher=deeper)
    losses = make({"weight": 1.0, "teacher": "folder", "resolution": 2.0}, teacher=deeper)(
        _batch(resolution=2), step=0
    )
    assert losses["gram"] > 0


def test_the_start_is_the_teacher_of_a_run_that_goes_on_from_a_model_with_other_registers(tiny, tmp_path):
    torch.manual_seed(3)
    ViTWithRegistersModel(tiny(num_register_tokens=0)).save_pretrained(tmp_path)
    objective = make_objective(make_recipe(RECIPE).with_changes({"settings.gram.weight": 1.0}), init=tmp_path)
    own, start = objective.gram_teacher.state_dict(), objective.encoder.state_dict()
    assert own.keys() == start.keys() and all(torch.equal(own[name], start[name]) for name in own)
    assert objective.gram_teacher.config.num_register_tokens == 2
    assert not any(parameter.requires_grad for parameter in objective.gram_teacher.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return training_program.make_run_folder(tmp_path_factory.mktemp("gram"), RECIPE)


GRAM = (
    "--data",
    "photos",
    "--set",
    "settings.gram={weight: 2.0, begin: 2, teacher: ema, refresh: 2, resolution: 2.0}",
)


def test_the_start_is_no_teacher_of_a_run_from_random_weights(folder):
    found = training_program.refuse(
        "pretrain.py", folder, "--data", "photos", "--set", "settings.gram.weight=1", output="random"
    )
    assert "gram.teacher 'init' and a start from random weights contradict each other: start from a model" in found


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_gram_teacher_and_two_processes_sharded_or_not_follow_one(folder):
    training_program.run("pretrain.py", folder, *GRAM, output="whole")
    training_program.assert_a_killed_run_goes_on("pretrain.py", folder, *GRAM, num_steps=8)
    states = [load_objective(next((folder / name / "state").glob("step-*7"))) for name in ("whole", "killed")]
    names = [name for name in states[0] if name.startswith("gram_teacher.")]
    assert names and all(torch.equal(states[0][name], states[1][name]) for name in names)
    for name, options in (("two", ()), ("sharded", ("--shard",))):
        training_program.run("pretrain.py", folder, *GRAM, *options, output=name, processes=2)
        losses = [torch.tensor(training_program.losses_of(folder / run)) for run in (name, "whole")]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)

"""Distillation from a frozen teacher: against a plain loop, and what becomes of the teacher."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.distill import (
    Distillation,
    DistillationSettings,
    class_distance,
    patch_distance,
    resize_patches,
)
from modeling_vitreg.pretraining.objectives.registry import OBJECTIVES
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.pretraining.state import load_state, save_state
from modeling_vitreg.pretraining.views.crops import CropSettings


CROPS = CropSettings(num_global=2, num_local=2, global_size=32, local_size=16)
TEACHER = {"hidden_size": 48, "num_hidden_layers": 2, "num_register_tokens": 2}


@pytest.fixture
def make(tiny, randomise):
    def make(settings: dict | None = None, *, teacher: dict | None = None, **fields) -> Distillation:
        return Distillation(
            ViTWithRegistersModel(tiny(**fields)),
            teacher=randomise(ViTWithRegistersModel(tiny(**{**TEACHER, **(teacher or {})}))),
            settings=DistillationSettings(**(settings or {})),
            crops=CROPS,
            num_steps=10,
        )

    return make


def make_batch(num_images: int = 3, *, has_local: bool = True) -> dict:
    batch = {"global_views": torch.randn(2, num_images, 3, 32, 32)}
    return batch | ({"local_views": torch.randn(2, num_images, 3, 16, 16)} if has_local else {})


def teacher_of(objective: Distillation) -> ViTWithRegistersModel:
    return objective._teacher[0]


# Distances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_local", [0, 3])
def test_class_distance_equals_the_plain_loop_over_views(num_local):
    student, targets = torch.randn(2 + num_local, 4, 6), torch.randn(2, 4, 6)
    total = 0
    for view in range(2 + num_local):
        for image in range(4):
            partners = [view] if view < 2 else [0, 1]
            distances = [
                1
                - (student[view, image] @ targets[t, image]) / (student[view, image].norm() * targets[t, image].norm())
                for t in partners
            ]
            total += sum(distances) / len(distances)
    torch.testing.assert_close(class_distance(student, targets), total / (4 * (2 + num_local)))


def test_patch_distance_equals_the_plain_loop_over_patches():
    student, targets = 2 * torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    total = 0
    for ours, theirs in zip(student.flatten(0, 1), targets.flatten(0, 1)):
        errors = [abs(a - b) for a, b in zip(ours.tolist(), theirs.tolist())]
        smooth = [error**2 / 2 if error < 1 else error - 0.5 for error in errors]
        cosine = (ours @ theirs / (ours.norm() * theirs.norm())).item()
        total += 0.9 * (1 - cosine) + 0.1 * sum(smooth) / 6
    assert patch_distance(student, targets).item() == pytest.approx(total / 15, rel=1e-5)
    assert patch_distance(targets, targets).item() == pytest.approx(0, abs=1e-6)
    assert patch_distance(2 * targets, targets) > 1e-2  # norms count


def test_loss_equals_the_plain_loop_over_views(make, randomise):
    objective, batch = make({"class_weight": 0.7, "patch_weight": 1.3}), make_batch()
    randomise(objective.student)
    student, teacher = objective.student, teacher_of(objective)
    seen = [student["backbone"](view) for view in (*batch["global_views"], *batch["local_views"])]
    taught = [teacher(view) for view in batch["global_views"]]
    cls_terms, patch_terms = [], []
    for view, tokens in enumerate(seen):
        own = student["class_head"](tokens.cls_token)
        partners = [taught[view]] if view < 2 else taught
        distances = [1 - F.cosine_similarity(own, partner.cls_token) for partner in partners]
        cls_terms.append(torch.stack(distances).mean())
        if view < 2:
            own = student["patch_head"](tokens.patch_tokens)
            patch_terms.append(patch_distance(own, taught[view].patch_tokens))
    losses = objective(batch, step=0)
    torch.testing.assert_close(losses["class_distance"], torch.stack(cls_terms).mean())
    torch.testing.assert_close(losses["patch_distance"], torch.stack(patch_terms).mean())
    torch.testing.assert_close(losses["total"], 0.7 * losses["class_distance"] + 1.3 * losses["patch_distance"])


def test_views_packed_in_one_sequence_give_the_same_loss(make):
    objective, batch = make({"is_packed": False}), make_batch()
    packed = make({"is_packed": True})
    packed.load_state_dict(objective.state_dict())
    teacher_of(packed).load_state_dict(teacher_of(objective).state_dict())
    torch.testing.assert_close(packed(batch, step=0)["total"], objective(batch, step=0)["total"])


def test_patches_of_another_size_are_resized_to_the_grid_of_the_student(make):
    # A plane stays a plane, but for the border; values between patches of the teacher are blends of them.
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=-1)[None]
    found = resize_patches(plane, grid=(4, 4))[0, 1:-1, 1:-1]
    centres = torch.tensor([2.5, 4.5])
    expected = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1)
    torch.testing.assert_close(found, expected)
    assert resize_patches(plane, grid=(8, 8)) is plane

    objective, batch = make(teacher={"patch_size": 4}), make_batch(has_local=False)
    patches = teacher_of(objective)(batch["global_views"].flatten(0, 1)).patch_grid
    assert patches.shape == (6, 8, 8, 48)
    taught = F.interpolate(patches.permute(0, 3, 1, 2), size=(4, 4), mode="bilinear", antialias=True)
    own = objective.student["backbone"](batch["global_views"].flatten(0, 1)).patch_tokens
    expected = patch_distance(objective.student["patch_head"](own), taught.flatten(2).transpose(1, 2))
    torch.testing.assert_close(objective(batch, step=0)["patch_distance"], expected)


# The teacher -------------------------------------------------------------------------------------------------------


def test_the_teacher_is_in_no_state_and_in_no_optimiser(make):
    objective = make(teacher={"hidden_size": 64})
    assert {name.split(".")[0] for name in objective.state_dict()} == {"student", "ema_model"}
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"student", "ema_model"}
    assert all(module is not teacher_of(objective) for module in objective.modules())
    assert list(objective.trained) == ["backbone", "class_head", "patch_head"]


def test_the_teacher_does_not_learn_and_always_evaluates(make):
    objective, batch = (
        make(teacher={"hidden_dropout_prob": 0.5, "drop_path_rate": 0.5}, drop_path_rate=0.5),
        make_batch(),
    )
    before = copy.deepcopy(teacher_of(objective).state_dict())
    objective.train()
    assert objective.student.training
    assert not objective.ema_model.training and not teacher_of(objective).training
    objective(batch, step=0)["total"].backward()
    assert all(weight.grad is None for weight in teacher_of(objective).parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher_of(objective).state_dict().items())
    # Every other parameter learns, or distributed data parallel training would stop.
    learning = {name for name, weight in objective.named_parameters() if weight.requires_grad}
    assert learning == {name for name, weight in objective.named_parameters() if weight.grad is not None}
    assert learning == {f"student.{name}" for name, _ in objective.student.named_parameters()}


def test_the_teacher_moves_to_the_device_of_the_images(make, monkeypatch):
    objective, batch = make(), make_batch()
    moved = []
    monkeypatch.setattr(type(teacher_of(objective)), "device", torch.device("meta"))
    monkeypatch.setattr(teacher_of(objective), "to", moved.append)
    objective(batch, step=0)
    assert moved == [torch.device("cpu")]


def test_registers_of_the_student_learn_and_enter_no_loss(make, randomise):
    objective, batch = make(), make_batch()
    randomise(objective.student)
    objective(batch, step=0)["total"].backward()
    backbone = objective.student["backbone"]
    assert backbone.embeddings.register_tokens.weight.grad.abs().max() > 1e-6
    tokens = backbone(batch["global_views"][0])
    assert tokens.register_tokens.shape == (3, 4, 32)
    # The last layer finishes class tokens and patches of global views, class tokens of local ones, and no register.
    seen = []
    hook = backbone.layers[-1].register_full_backward_hook(lambda layer, inputs, outputs: seen.append(outputs[0]))
    objective(batch, step=0)["total"].backward()
    hook.remove()
    num_global, num_local = (batch[name].shape[0] * batch[name].shape[1] for name in ("global_views", "local_views"))
    num_patches = tokens.patch_tokens.shape[1]
    assert sorted(map(len, seen)) == sorted([num_global * (1 + num_patches), num_local])
    assert all((gradient.abs().amax(dim=1) > 0).all() for gradient in seen)


# The average -------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_student_and_is_what_is_kept(make, randomise):
    objective = make({"momentum": (0.9, 1.0)})
    assert objective.encoder is objective.ema_model
    before = objective.encoder.layernorm.weight.clone()
    randomise(objective.student)
    objective.after_step(step=0)
    expected = 0.9 * before + 0.1 * objective.student["backbone"].layernorm.weight
    torch.testing.assert_close(objective.encoder.layernorm.weight, expected)
    assert objective.rates(step=0) == {"momentum": 0.9}
    assert objective.rates(step=10) == {"momentum": 1.0}


def test_a_few_steps_lower_the_loss_of_a_fixed_batch(make):
    objective, batch = make(), make_batch()
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        terms = objective(batch, step=step)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append({name: term.item() for name, term in terms.items()})
    assert losses[0]["class_distance"] == pytest.approx(1, abs=0.4)  # cosines of vectors that know nothing
    for name in ("class_distance", "patch_distance", "total"):
        assert losses[-1][name] < 0.7 * losses[0][name]


def test_a_run_goes_on_with_the_same_numbers_from_a_state_without_the_teacher(make, tmp_path):
    objective, batch = make(), make_batch()
    other = make()
    teacher_of(other).load_state_dict(teacher_of(objective).state_dict())
    optimizers = [torch.optim.AdamW(one.student.parameters(), lr=1e-3) for one in (objective, other)]

    def take_step(one, optimizer, step):
        loss = one(batch, step=step)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        one.after_step(step=step)
        return loss.item()

    take_step(objective, optimizers[0], 0)
    save_state(tmp_path, objective=objective, optimizer=optimizers[0], metadata={"step": 0})
    load_state(tmp_path / "step-00000000", objective=other, optimizer=optimizers[1])
    assert take_step(other, optimizers[1], 1) == take_step(objective, optimizers[0], 1)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in objective.state_dict().items())


# Contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"has_mask_token": True}, {}, "has_mask_token=False"),
        ({"has_cls_token": False, "pooling": "mean"}, {}, "has_cls_token=True in the student"),
        ({}, {"has_cls_token": False, "pooling": "mean"}, "has_cls_token=True in the teacher"),
        ({}, {"has_pooled_norm": True, "pooling": "mean"}, "has_pooled_norm=False in the teacher"),
        (
            {},
            {"patch_size": 14, "image_size": 56},
            "global_size to be a multiple of the patches of the teacher, (14, 14)",
        ),
    ],
)
def test_contradictory_networks_are_refused(make, student, teacher, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(teacher=teacher, **student)


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="expected momentum in"):
        DistillationSettings(momentum=(0.9, 1.1))
    with pytest.raises(ValueError, match="expected class_weight above 0, got 0"):
        DistillationSettings(class_weight=0)


# From a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe():
    return Recipe(
        objective="distill",
        model={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
        crops=CROPS,
    )


def test_every_objective_of_a_recipe_is_listed():
    names = "dinov2, mae, lejepa, simmim, distill, classify, clip, segment, depth, append_registers, "
    names += "distill_registers, refine_registers"
    assert ", ".join(OBJECTIVES) == names
    with pytest.raises(ValueError, match=f"one of {names}, got 'dino'"):
        make_objective(Recipe(objective="dino", model={"hidden_size": 32, "num_attention_heads": 2}))


def test_a_recipe_names_the_teacher_by_its_folder_or_that_of_its_run(recipe, tiny, tmp_path):
    teacher = ViTWithRegistersModel(tiny(has_mask_token=True, **TEACHER))
    teacher.save_pretrained(tmp_path / "run" / "model")
    for folder in ("run", "run/model"):
        objective = make_objective(recipe.with_changes({"settings.teacher": str(tmp_path / folder)}))
        assert isinstance(objective, Distillation)
        assert objective.masks is None
        assert torch.equal(teacher_of(objective).layers[1].mlp.fc1.weight, teacher.layers[1].mlp.fc1.weight)
        objective(make_batch(), step=0)["total"].backward()


def test_what_starts_from_a_model_without_registers_gets_an_average_that_does_not_learn(recipe, tiny, tmp_path):
    ViTWithRegistersModel(tiny(**TEACHER)).save_pretrained(tmp_path / "teacher")
    ViTWithRegistersModel(tiny(num_register_tokens=0)).save_pretrained(tmp_path / "student")
    recipe = recipe.with_changes({"settings.teacher": str(tmp_path / "teacher")})
    objective = make_objective(recipe, init=tmp_path / "student")
    assert objective.encoder.config.num_register_tokens == 4
    assert not any(weight.requires_grad for weight in objective.encoder.parameters())
    objective(make_batch(), step=0)["total"].backward()
    assert objective.student["backbone"].embeddings.register_tokens.weight.grad is not None


def test_a_teacher_that_does_not_fit_is_refused(recipe, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"teacher is the folder or Hub name .* got none"):
        make_objective(recipe)
    with pytest.raises(ValueError, match="neither a folder of a model nor on the Hub"):
        make_objective(recipe.with_changes({"settings.teacher": str(tmp_path / "nowhere")}))
    with pytest.raises(ValueError, match="masks: expected none for the objective"):
        make_objective(recipe.with_changes({"masks.kind": "random", "masks.ratio": [0.5, 0.5], "masks.share": 1}))

    folder = tmp_path / "teacher"
    ViTWithRegistersModel(tiny(**TEACHER)).save_pretrained(folder)
    recipe = recipe.with_changes({"settings.teacher": str(folder)})
    make_objective(recipe)
    with pytest.raises(ValueError, match=re.escape("give the recipe the mean and std of the teacher")):
        make_objective(recipe.with_changes({"mean": [0.5, 0.5, 0.5]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors, for example layers\.2"):
        make_objective(recipe)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "dinov2"}))
    with pytest.raises(ValueError, match="expected a teacher of model_type 'vitreg', got 'dinov2'"):
        make_objective(recipe)

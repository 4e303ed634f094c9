"""The DINOv2 objective on a tiny model, and the road to it: from a recipe, a model folder or another run."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import ViTWithRegistersDropPath
from modeling_vitreg.pretraining.build import make_config, make_objective
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.objectives.losses import (
    EmaCenter,
    cross_view_loss,
    koleo_loss,
    masked_patch_loss,
    sinkhorn,
)
from modeling_vitreg.pretraining.run.recipe import Recipe, make_recipe, read_recipe
from modeling_vitreg.pretraining.state import save_state
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.masking import MaskSettings, draw_masks


NUM_IMAGES, NUM_GLOBAL, NUM_LOCAL = 4, 2, 3
SETTINGS = {"num_prototypes": 24, "hidden_width": 32, "bottleneck_width": 16}
LOSSES = ("dino", "ibot", "koleo")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On matrices as small as these, threads only wait for each other."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def make(tiny):
    """Make an objective on a tiny model with a mask token, from settings of the objective and of the model."""

    def build(model: dict | None = None, num_local: int = NUM_LOCAL, **settings) -> DINOv2:
        torch.manual_seed(0)
        backbone = ViTWithRegistersModel(tiny(**{"has_mask_token": True, **(model or {})}))
        return DINOv2(
            backbone,
            settings=DINOv2Settings(**{**SETTINGS, **settings}),
            crops=CropSettings(num_local=num_local, global_size=32, local_size=16),
            masks=MaskSettings(),
            num_steps=100,
        ).train()

    return build


def _batch(*, num_local: int = NUM_LOCAL, is_masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    settings = MaskSettings(share=0.5 if is_masked else 0.0)
    masks = draw_masks(NUM_IMAGES, num_views=NUM_GLOBAL, grid=(4, 4), settings=settings, generator=generator)
    masks = masks.flatten(0, 1)
    batch = {
        "global_views": torch.randn(NUM_GLOBAL, NUM_IMAGES, 3, 32, 32, generator=generator),
        "masks": masks,
        "masked_patches": masks.flatten().nonzero().squeeze(1),
    }
    if num_local:
        batch["local_views"] = torch.randn(num_local, NUM_IMAGES, 3, 16, 16, generator=generator)
    return batch


def _gradients(objective: DINOv2, batch: dict, *, step: int = 0) -> tuple[dict, dict]:
    """Losses and gradients of the student."""
    objective.zero_grad()
    losses = objective(batch, step=step)
    losses["total"].backward()
    gradients = {name: p.grad.clone() for name, p in objective.student.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def _assert_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for ours, theirs in zip(found, expected):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
            )


# Losses ------------------------------------------------------------------------------------------------------------


def _one_view_at_a_time(objective: DINOv2, batch: dict, temperature: float) -> dict[str, Tensor]:
    """The losses from the models' own forward, each view alone, and from loops over views."""
    student, teacher, weights = objective.student, objective.teacher, []
    masks = batch["masks"].unflatten(0, (NUM_GLOBAL, NUM_IMAGES))
    head = {
        name: network["patch_head" if "patch_head" in network else "class_head"]
        for name, network in (("student", student), ("teacher", teacher))
    }
    cls_targets, patch_targets, cls_logits, patch_logits, koleo = [], [], [], [], 0.0
    for view, mask in zip(batch["global_views"], masks):
        with torch.no_grad():
            seen = teacher["backbone"](view)
            cls_targets.append(teacher["class_head"](seen.cls_token))
            patch_targets.append(head["teacher"](seen.patch_tokens[mask]))
        hidden = student["backbone"](view, bool_masked_pos=mask)
        cls_logits.append(student["class_head"](hidden.cls_token))
        patch_logits.append(head["student"](hidden.patch_tokens[mask]))
        koleo = koleo + koleo_loss(hidden.cls_token)
        weights += [1 / int(row.sum()) for row in mask for _ in range(int(row.sum()))]
    local = [student["class_head"](student["backbone"](view).cls_token) for view in batch.get("local_views", [])]
    targets = [torch.cat(cls_targets), torch.cat(patch_targets)]
    if objective.settings.centering == "sinkhorn":
        targets = [sinkhorn(part, temperature=temperature) for part in targets]
    else:
        targets = [EmaCenter(part.shape[1])(part, temperature=temperature) for part in targets]
    return {
        "dino": cross_view_loss(
            torch.stack(cls_logits),
            torch.stack(local) if local else None,
            targets[0].unflatten(0, (NUM_GLOBAL, NUM_IMAGES)),
        ),
        "ibot": masked_patch_loss(
            torch.cat(patch_logits),
            targets[1],
            weights=torch.tensor(weights),
            num_views=NUM_GLOBAL * NUM_IMAGES,
        ),
        "koleo": koleo,
    }


@pytest.mark.parametrize("centering", ["sinkhorn", "moving_mean"])
@pytest.mark.parametrize("num_patch_prototypes", [None, 16])
@pytest.mark.parametrize("num_local", [0, NUM_LOCAL])
def test_losses_are_those_of_each_view_on_its_own(make, randomise, centering, num_patch_prototypes, num_local):
    settings = {
        "centering": centering,
        "num_patch_prototypes": num_patch_prototypes,
        "teacher_temperature": (0.05, 0.09),
    }
    objective, batch = make(num_local=num_local, **settings), _batch(num_local=num_local)
    randomise(objective.student)
    randomise(objective.teacher)
    expected = _one_view_at_a_time(objective.train(), batch, 0.05 + 0.04 * 10 / 29)
    losses = objective(batch, step=10)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_total_is_the_weighted_sum_of_the_terms(make):
    losses = make(dino_weight=0.5, ibot_weight=2.0, koleo_weight=0.25)(_batch(), step=0)
    total = 0.5 * losses["dino"] + 2 * losses["ibot"] + 0.25 * losses["koleo"]
    torch.testing.assert_close(losses["total"], total)


@pytest.mark.parametrize("centering", ["sinkhorn", "moving_mean"])
def test_a_new_run_starts_near_the_logarithm_of_the_number_of_prototypes(make, centering):
    # In many dimensions no new prototype is near to anything.
    widths = {"bottleneck_width": 2048, "patch_bottleneck_width": 2048}
    losses = make(centering=centering, num_prototypes=512, num_patch_prototypes=64, **widths)(_batch(), step=0)
    assert losses["dino"].item() == pytest.approx(math.log(512), rel=0.05)
    assert losses["ibot"].item() == pytest.approx(math.log(64) / 2, rel=0.05)  # half of the views are masked
    assert 0 <= losses["teacher_entropy"] <= losses["mean_entropy"] + 1e-5 <= math.log(512) + 2e-5


def test_without_masked_patches_only_their_loss_is_zero_and_every_parameter_keeps_a_gradient(make):
    losses, gradients = _gradients(make(num_patch_prototypes=16), _batch(is_masked=False))
    assert losses["ibot"] == 0
    assert losses["dino"] > 0
    assert gradients["patch_head.mlp.0.weight"].abs().max() == 0
    assert gradients["backbone.embeddings.mask_token"].abs().max() == 0


def test_one_head_serves_class_tokens_and_patches_unless_patches_have_their_own(make):
    assert set(make().trained) == {"backbone", "class_head"}
    objective = make(num_patch_prototypes=16, patch_bottleneck_width=8)
    assert set(objective.trained) == {"backbone", "class_head", "patch_head"}
    assert objective.student["patch_head"].last_layer.direction.shape == (16, 8)
    assert objective.student["class_head"].last_layer.direction.shape == (24, 16)
    assert set(objective.teacher) == set(objective.student)
    _, only_patches = _gradients(make(num_patch_prototypes=16, dino_weight=0.0), _batch())
    assert only_patches["class_head.mlp.0.weight"].abs().max() == 0
    assert only_patches["patch_head.mlp.0.weight"].abs().max() > 0


# Registers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_registers_put_out_enters_no_loss(make, is_packed):
    objective, batch = make(is_packed=is_packed), _batch()
    expected = _gradients(objective, batch)
    for network in (objective.student, objective.teacher):
        split = network["backbone"].split_tokens

        def without_registers(hidden_state, grid, split=split):
            assert split(hidden_state, grid).register_tokens.shape[1] == 4
            hidden_state = hidden_state.clone()
            hidden_state[:, 1:5] = 1e6 * torch.randn_like(hidden_state[:, 1:5])  # behind class token, before patches
            return split(hidden_state, grid)

        network["backbone"].split_tokens = without_registers
    _assert_same(_gradients(objective, batch), expected)


def test_registers_learn_through_the_attention_of_the_others(make):
    objective, batch = make(), _batch()
    losses, gradients = _gradients(objective, batch)
    registers = gradients["backbone.embeddings.register_tokens.weight"]
    assert (registers.abs().amax(dim=1) > 0).all()
    assert not torch.equal(registers[0], registers[1])
    with torch.no_grad():
        objective.student["backbone"].embeddings.register_tokens.weight.normal_()
    changed, _ = _gradients(objective, batch)
    assert all(changed[name] != losses[name] for name in LOSSES)


def test_a_model_without_registers_learns_too(make):
    losses, gradients = _gradients(make({"num_register_tokens": 0}), _batch())
    assert losses["total"].isfinite()
    assert gradients["backbone.embeddings.cls_token"].abs().max() > 0


# Teacher -----------------------------------------------------------------------------------------------------------


def _pairs(objective: DINOv2) -> list[tuple[Tensor, Tensor]]:
    return list(zip(objective.teacher.parameters(), objective.student.parameters()))


def test_the_teacher_starts_as_its_student_and_has_no_gradient(make):
    objective = make({"drop_path_rate": 0.5})
    assert all(torch.equal(own, other) and own is not other for own, other in _pairs(objective))
    objective(_batch(), step=0)["total"].backward()
    assert all(not own.requires_grad and own.grad is None for own, _ in _pairs(objective))
    assert objective.student.training and not objective.teacher.training
    assert not any(module.training for module in objective.teacher.modules())
    assert not set(objective.teacher.parameters()) & {
        parameter for part in objective.trained.values() for parameter in part.parameters()
    }


def test_the_teacher_follows_by_the_formula_and_is_the_encoder(make, randomise):
    objective = make(momentum=(0.9, 1.0))
    randomise(objective.student)
    before = [own.clone() for own, _ in _pairs(objective)]
    objective.after_step(step=50)
    momentum = 1 + (0.9 - 1) * (1 + math.cos(math.pi / 2)) / 2
    assert objective.rates(step=50)["momentum"] == pytest.approx(momentum)
    for (own, other), old in zip(_pairs(objective), before):
        torch.testing.assert_close(own, momentum * old + (1 - momentum) * other)
    assert objective.encoder is objective.teacher["backbone"]


def test_the_teacher_stays_put_with_momentum_1_and_copies_with_momentum_0(make, randomise):
    objective = make(momentum=(1.0, 0.0))
    randomise(objective.student)
    before = [own.clone() for own, _ in _pairs(objective)]
    objective.after_step(step=0)
    assert all(torch.equal(own, old) for (own, _), old in zip(_pairs(objective), before))
    objective.after_step(step=100)
    assert all(torch.allclose(own, other) for own, other in _pairs(objective))


def test_the_teacher_sees_whole_views(make):
    objective, batch = make(koleo_weight=0.0), _batch()
    seen = []
    objective.teacher["backbone"].embeddings.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    objective(batch, step=0)
    ((images, masks),) = seen
    assert torch.equal(images, batch["global_views"].flatten(0, 1)) and masks is None


def test_a_moving_centre_moves_once_a_step_and_is_saved(make):
    objective = make(centering="moving_mean", num_patch_prototypes=16)
    objective(_batch(), step=0)
    assert objective.class_center.center.shape == (24,)
    assert objective.patch_center.center.shape == (16,)
    assert objective.class_center.center.abs().max() > 0
    assert {"class_center.center", "patch_center.center"} <= objective.state_dict().keys()
    assert make().class_center is None


# Views of all sizes at once ----------------------------------------------------------------------------------------


@pytest.fixture
def same_draws(monkeypatch):
    """Tie what stochastic depth draws to the layer, the size of the view and the branch, not to the order of calls."""
    draw, counts = ViTWithRegistersDropPath.choose, {}

    def choose(self, hidden_states, **keywords):
        key = (round(1000 * self.rate), hidden_states.shape[1])
        counts[key] = counts.get(key, 0) + 1
        with torch.random.fork_rng():
            torch.manual_seed(hash((*key, counts[key])) % 2**31)
            return draw(self, hidden_states, **keywords)

    monkeypatch.setattr(ViTWithRegistersDropPath, "choose", choose)
    return counts


MODELS = {
    "learned positions": {},
    "rope": {"position_embedding_type": "rope"},
    "layer scale": {"layer_scale_init_value": 0.5, "hidden_act": "swiglu"},
    "pre norm": {"has_pre_norm": True},
    "images left out": {"drop_path_rate": 0.5, "drop_path_mode": "sample"},
    "subsets of images": {"drop_path_rate": 0.5, "drop_path_mode": "batch_subset", "layer_scale_init_value": 0.5},
}


@pytest.mark.parametrize("model", MODELS)
def test_packed_views_give_the_losses_and_gradients_of_one_group_after_the_other(make, randomise, same_draws, model):
    objective, batch = make({**MODELS[model], "initializer_range": 0.2}), _batch()
    randomise(objective.student["backbone"])
    objective.train()
    results = []
    for is_packed in (False, True):
        objective.settings = dataclasses.replace(objective.settings, is_packed=is_packed)
        same_draws.clear()
        results.append(_gradients(objective, batch))
    _assert_same(results[1], results[0])


def test_stochastic_depth_draws_for_each_group_on_its_own(make, same_draws):
    objective = make({"drop_path_rate": 0.5, "drop_path_schedule": "constant"}, is_packed=True)
    objective(_batch(), step=0)
    # 3 layers with 2 branches; global views have 1 + 4 + 16 tokens, local views 1 + 4 + 4.
    student = {tokens: count for (_, tokens), count in same_draws.items()}
    assert student[9] == 6
    assert student[21] == 12  # the teacher is asked too, and leaves nothing out


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("drop_path_mode", ["sample", "batch_subset"])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(make, is_packed, drop_path_mode):
    objective = make({"drop_path_rate": 0.5, "drop_path_mode": drop_path_mode}, is_packed=is_packed)
    torch.manual_seed(7)
    expected = _gradients(objective, _batch())
    objective.student["backbone"].gradient_checkpointing_enable()
    calls = []
    objective.student["backbone"].layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(7)
    found = _gradients(objective, _batch())
    _assert_same(found, expected)
    assert len(calls) == (1 if is_packed else 2) * 2  # once forward and once more backward


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"has_mask_token": False}, "has_mask_token=True"),
        ({"has_cls_token": False, "pooling": "mean"}, "has_cls_token=True"),
        ({"pooling": "mean", "has_pooled_norm": True}, "has_pooled_norm=False"),
    ],
)
def test_a_model_that_lacks_what_the_objective_reads_is_refused(make, model, message):
    with pytest.raises(ValueError, match=message):
        make(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centering": "centering"}, "one of sinkhorn, moving_mean"),
        ({"num_prototypes": 0}, "expected num_prototypes above 0"),
        ({"num_patch_prototypes": 0}, "expected num_patch_prototypes above 0"),
        ({"student_temperature": 0.0}, "expected student_temperature above 0"),
        ({"teacher_temperature": (0.04, 0.0)}, "teacher_temperature"),
        ({"momentum": (0.9, 1.1)}, "momentum"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DINOv2Settings(**settings)


# From a recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
        crops=CropSettings(num_local=2, global_size=32, local_size=16),
        settings=SETTINGS,
        num_steps=50,
        batch_size=8,
    )


def _save_model(recipe: Recipe, folder, **changes) -> ViTWithRegistersModel:
    torch.manual_seed(5)
    config = make_config(recipe)
    for name, value in changes.items():
        setattr(config, name, value)
    model = ViTWithRegistersModel(config)
    model.save_pretrained(folder)
    return model


def _save_run(recipe: Recipe, folder) -> DINOv2:
    """A run of which student and teacher have gone different ways."""
    objective = make_objective(recipe)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(objective.student.parameters())
    objective.encoder.save_pretrained(folder / "model")
    save_state(folder / "state", objective=objective, optimizer=optimizer, metadata={"step": 3})
    return objective


def test_the_same_recipe_makes_the_same_objective_and_another_seed_another(recipe):
    first, again = make_objective(recipe), make_objective(recipe)
    other = make_objective(recipe.with_changes({"seed": 1}))
    name = "student.backbone.layers.0.mlp.fc1.weight"
    states = [objective.state_dict() for objective in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    assert first.encoder.config.num_register_tokens == 4
    assert first.num_steps == 50


def test_a_preset_is_changed_by_what_stands_beside_it(recipe):
    config = make_config(recipe.with_changes({"model": {"preset": "tiny/8", "drop_path_rate": 0.1}}))
    assert (config.hidden_size, config.patch_size, config.image_size) == (192, 8, 32)
    assert (config.drop_path_rate, config.has_mask_token, config.num_register_tokens) == (0.1, True, 4)


def test_a_model_folder_gives_student_and_teacher_its_weights(recipe, tmp_path):
    model = _save_model(recipe, tmp_path / "model")
    objective = make_objective(recipe, init=tmp_path / "model")
    for network in (objective.student["backbone"], objective.encoder):
        for name, value in model.state_dict().items():
            assert torch.equal(network.state_dict()[name], value), name


def test_registers_and_positions_of_a_model_folder_are_resized_alike_in_student_and_teacher(recipe, tmp_path):
    model = _save_model(recipe.with_changes({"num_register_tokens": 1}), tmp_path)
    changes = {"num_register_tokens": 3, "crops.global_size": 48, "model.drop_path_rate": 0.2}
    objective = make_objective(recipe.with_changes(changes), init=str(tmp_path))
    student, teacher = objective.student["backbone"].embeddings, objective.encoder.embeddings
    assert student.register_tokens.weight.shape == (3, 32)
    assert torch.equal(student.register_tokens.weight[:1], model.embeddings.register_tokens.weight)
    assert len(student.register_tokens.weight.unique(dim=0)) == 3
    assert student.position_embeddings.weight.shape == (1, 1 + 6 * 6, 32)
    assert torch.equal(student.register_tokens.weight, teacher.register_tokens.weight)
    assert torch.equal(student.position_embeddings.weight, teacher.position_embeddings.weight)
    assert objective.encoder.config.image_size == 48
    assert objective.student["backbone"].config.drop_path_rate == 0.2


@pytest.mark.parametrize("before", [0, 2])
def test_a_teacher_that_gets_new_registers_still_has_no_gradient(recipe, tmp_path, before):
    _save_model(recipe.with_changes({"num_register_tokens": before}), tmp_path)
    objective = make_objective(recipe, init=tmp_path)
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())
    assert all(parameter.requires_grad for parameter in objective.student.parameters())


def test_a_model_without_mask_token_gets_a_new_one(recipe, tmp_path):
    _save_model(recipe, tmp_path, has_mask_token=False)
    objective = make_objective(recipe, init=tmp_path)
    assert objective.student["backbone"].embeddings.mask_token.abs().max() == 0
    assert objective(_batch(num_local=2), step=0)["total"].isfinite()


def test_a_run_folder_gives_student_teacher_and_heads(recipe, tmp_path):
    run = _save_run(recipe, tmp_path)
    weights = make_objective(recipe.with_changes({"seed": 9}), init=tmp_path).state_dict()
    assert weights.keys() == run.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in run.state_dict().items())
    assert any(not torch.equal(own, other) for own, other in _pairs(run))


def test_registers_and_positions_of_a_run_are_resized_too(recipe, tmp_path):
    run = _save_run(recipe, tmp_path)
    objective = make_objective(recipe.with_changes({"num_register_tokens": 6, "crops.global_size": 64}), init=tmp_path)
    for network, old in (
        (objective.student["backbone"], run.student["backbone"]),
        (objective.encoder, run.encoder),
    ):
        registers, positions = network.embeddings.register_tokens.weight, network.embeddings.position_embeddings.weight
        assert torch.equal(registers[:4], old.embeddings.register_tokens.weight)
        assert positions.shape == (1, 1 + 8 * 8, 32)
        assert torch.equal(positions[:, 0], old.embeddings.position_embeddings.weight[:, 0])
    new = [
        network.embeddings.register_tokens.weight[4:] for network in (objective.student["backbone"], objective.encoder)
    ]
    assert torch.equal(*new)


def test_a_run_with_other_heads_is_refused_and_its_model_folder_is_not(recipe, tmp_path):
    _save_run(recipe, tmp_path)
    other = recipe.with_changes({"settings.num_prototypes": 48})
    with pytest.raises(ValueError, match=r"other sizes of heads; 4 tensors do not fit.*its model alone"):
        make_objective(other, init=tmp_path)
    with pytest.raises(ValueError, match="another objective"):
        make_objective(recipe.with_changes({"settings.centering": "moving_mean"}), init=tmp_path)
    assert make_objective(other, init=tmp_path / "model").num_prototypes == 48


def test_a_state_that_is_not_whole_is_not_started_from(recipe, tmp_path):
    _save_run(recipe, tmp_path)
    next((tmp_path / "state").glob("step-*/objective.safetensors")).unlink()
    with pytest.raises(RuntimeError, match=r"objective.safetensors is missing"):
        make_objective(recipe, init=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dino"}, "one of dinov2.*'dino'"),
        ({"settings.num_prototype": 8}, "did you mean 'num_prototypes'"),
        ({"settings.koleo_weight": "much"}, "settings: koleo_weight: expected a number"),
        ({"model.has_cls_token": False, "model.pooling": "mean"}, "has_cls_token=True"),
        ({"model.hidden_sise": 64}, "model: .*'hidden_sise'.*did you mean 'hidden_size'"),
        ({"model.layer_scale_init_value": "tiny"}, "layer_scale_init_value: expected a number"),
        ({"model.num_register_tokens": 8}, "top level of the recipe"),
    ],
)
def test_an_objective_that_contradicts_its_recipe_is_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        make_objective(recipe.with_changes(changes))


# Recipes -----------------------------------------------------------------------------------------------------------


def test_changes_reach_inner_values_and_leave_the_recipe_as_it_was(recipe):
    changes = {"crops.num_local": 7, "masks.ratio": [0.2, 0.3], "settings.koleo_weight": 0, "model.patch_size": 4}
    changed = recipe.with_changes({**changes, "learning_rate": "1e-4", "num_steps": 6.0})
    assert (changed.crops.num_local, changed.masks.ratio) == (7, (0.2, 0.3))
    assert (changed.settings["koleo_weight"], changed.model["patch_size"]) == (0, 4)
    assert (changed.learning_rate, changed.num_steps) == (1e-4, 6)
    assert isinstance(changed.num_steps, int)
    assert (recipe.crops.num_local, recipe.model["patch_size"], "koleo_weight" in recipe.settings) == (2, 8, False)
    assert recipe.with_changes({}) == recipe
    assert make_recipe(changed.as_dict()) == changed
    assert changed != recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_step": 5}, "'num_step'; did you mean 'num_steps'"),
        ({"crops.num_lokal": 5}, "crops: .*did you mean 'num_local'"),
        ({"crop.num_local": 5}, "did you mean 'crops'"),
        ({"seed.value": 5}, "seed is a single value"),
        ({"zzz": 5}, "expected one of"),
        ({"num_steps": "many"}, "num_steps: expected a number"),
        ({"num_steps": 1.5}, "num_steps: expected int"),
        ({"num_steps": None}, "num_steps: expected int"),
        ({"num_steps": 0}, "expected num_steps of 1 or more"),
        ({"decays_tokens": "yes"}, "decays_tokens: expected bool"),
        ({"decays_tokens": 1}, "decays_tokens: expected bool"),
        ({"learning_rate": True}, "learning_rate: expected float"),
        ({"learning_rate": ".inf"}, "learning_rate: expected a number"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"weight_decay": [0.4]}, "weight_decay: expected float"),
        ({"weight_decay": [0.4, "x"]}, "weight_decay_end: expected a number"),
        ({"crops": 3}, "crops: expected"),
        ({"model": "small/16"}, "model: expected dict"),
        ({"learning_rate_rule": "cubic"}, "expected the rule"),
        ({"warmup_ratio": 2}, r"warmup_ratio in \[0, 1\]"),
        ({"num_register_tokens": -1}, "expected num_register_tokens of 0 or more"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_with_what_would(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe.with_changes(changes)


def test_older_names_in_a_recipe_are_read_and_told(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "clip: 2.0\nwarmup: 0.25\nweight_decay: [0.1, 0.3]\ncrops: {colours: none}\nsettings: {centring: sinkhorn}\n"
    )
    recipe = read_recipe(path).with_changes({"num_repeats": 3})
    assert (recipe.max_grad_norm, recipe.warmup_ratio, recipe.repeated_augmentation) == (2.0, 0.25, 3)
    assert (recipe.weight_decay, recipe.weight_decay_end) == (0.1, 0.3)
    assert (recipe.crops.color_augmentation, recipe.settings) == ("none", {"centering": "sinkhorn"})
    assert "recipe: clip was renamed to max_grad_norm" in capsys.readouterr().err
    make_recipe({"clip": 1.0})  # of a state: nothing to tell
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="clip is the old name of max_grad_norm"):
        make_recipe({"clip": 1.0, "max_grad_norm": 2.0})


def test_a_weight_decay_without_an_end_is_constant():
    recipe = make_recipe({"weight_decay": 0.1})
    assert recipe.rates(0)["weight_decay"] == recipe.rates(1000)["weight_decay"] == 0.1
    changed = recipe.with_changes({"weight_decay": 0.2})
    assert (changed.weight_decay, changed.weight_decay_end) == (0.2, 0.2)
    assert make_recipe({}).rates(0)["weight_decay"] == pytest.approx(0.04)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "learning_rate: 1e-4\nlast_learning_rate: 1e-6\nweight_decay: [4e-2, 0.4]\nnum_steps: 1e3\n"
        "model: {hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, layer_scale_init_value: 1e-5}\n"
        "settings: {koleo_weight: 1e-1, num_patch_prototypes: 1e2}\ncrops: {num_local: 3, global_size: 32}\n"
    )
    recipe = read_recipe(path)
    assert (recipe.learning_rate, recipe.min_learning_rate) == (1e-4, 1e-6)
    assert (recipe.weight_decay, recipe.weight_decay_end) == (0.04, 0.4)
    assert (recipe.num_steps, recipe.crops.num_local) == (1000, 3)
    config = make_config(recipe)
    assert config.layer_scale_init_value == 1e-5
    recipe = recipe.with_changes({"settings.num_prototypes": 8, "settings.hidden_width": 8})
    objective = make_objective(recipe)
    assert objective.settings.koleo_weight == 0.1
    assert objective.settings.num_patch_prototypes == 100
    assert objective.student["backbone"].layers[0].layer_scale1.weight[0].item() == pytest.approx(1e-5)


def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"recipe.yaml holds no mapping"):
        read_recipe(path)
    path.write_text("num_stepz: 1\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: recipe: .*did you mean 'num_steps'"):
        read_recipe(path)
    for content in (b"a: [", b"a: \xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"recipe.yaml cannot be read"):
            read_recipe(path)
    with pytest.raises(ValueError, match=r"cannot be read: .*Is a directory"):
        read_recipe(tmp_path)

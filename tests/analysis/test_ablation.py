"""Registers are replaced where it says, by what it says, and the model is left as it was."""

import pytest
import torch
import torch.nn.functional as F

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.analysis.ablation import MODES, ablate_class_token, ablate_registers


IMAGES = 4


def _slow(model, images, mode, from_layer):
    """Normed tokens with registers replaced at the input of each layer, layer by layer."""
    states, (state, rotary, _) = [], model.embed(images)
    for layer in model.layers:
        states.append(state[:, 1:3])
        state = layer(state, rotary)
    state = model.embed(images)[0]
    for number, layer in enumerate(model.layers, start=1):
        if number >= from_layer:
            clean = states[number - 1]
            if mode == "zeroed":
                new = torch.zeros_like(clean)
            elif mode == "mean":
                new = clean.mean(dim=0, keepdim=True).expand_as(clean)
            else:
                new = torch.stack([clean[(image - 1) % len(clean)] for image in range(len(clean))])
            state = torch.cat([state[:, :1], new, state[:, 3:]], dim=1)
        state = layer(state, rotary)
    return model.layernorm(state)


def _load(model, weights, token="register_tokens"):
    """All weights but those of a token that the model lacks."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = (f"embeddings.{token}", "register_gates")
    assert not missing and not [name for name in unexpected if not any(part in name for part in own)]


@pytest.fixture
def model(tiny, randomise):
    return randomise(ViTWithRegistersModel(tiny(num_register_tokens=2)))


@pytest.mark.parametrize("mode", ["zeroed", "mean", "shuffled"])
@pytest.mark.parametrize("from_layer", [1, 3])
@torch.no_grad()
def test_effects_equal_those_of_a_plain_loop_over_layers(model, mode, from_layer):
    images = torch.randn(IMAGES, 3, 32, 32)
    report = ablate_registers(model, images, from_layer=from_layer)["modes"][mode]
    changed, whole = _slow(model, images, mode, from_layer), model(images).last_hidden_state
    for name, place in (("cls", slice(0, 1)), ("patches", slice(3, None))):
        one, two = changed[:, place], whole[:, place]
        distance = (one - two).norm(dim=-1) / two.norm(dim=-1)
        assert report[name]["cosine"] == pytest.approx(F.cosine_similarity(one, two, dim=-1).mean().item(), abs=1e-5)
        assert report[name]["distance"] == pytest.approx(distance.mean().item(), rel=1e-4)
        error = distance.mean(dim=1).std() / IMAGES**0.5
        assert report[name]["distance_error"] == pytest.approx(error.item(), rel=1e-3)


@torch.no_grad()
def test_removed_registers_are_those_of_a_model_without(model, tiny):
    images = torch.randn(IMAGES, 3, 32, 32)
    report = ablate_registers(model, images)["modes"]["removed"]
    without = ViTWithRegistersModel(tiny(num_register_tokens=0)).eval()
    _load(without, model.state_dict())
    expected = F.cosine_similarity(without(images).patch_tokens, model(images).patch_tokens, dim=-1).mean()
    assert report["patches"]["cosine"] == pytest.approx(expected.item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("added", [{"num_test_time_registers": 2}, {"num_gated_registers": 2}], ids=str)
def test_with_registers_that_were_added_what_only_they_read_is_removed_too(tiny, randomise, added):
    units = {"1": [0, 5], "3": [7]} if "num_test_time_registers" in added else {}
    model = randomise(ViTWithRegistersModel(tiny(num_register_tokens=3, register_neurons=units, **added)))
    without = ViTWithRegistersModel(tiny(num_register_tokens=0)).eval()
    _load(without, model.state_dict())
    for number, zeroed in units.items():  # their activation goes to no token
        without.layers[int(number) - 1].mlp.fc2.weight[:, zeroed] = 0
    for side in (16, 32):  # fewer patches than registers, and more
        images = torch.randn(IMAGES, 3, side, side)
        before = model(images).last_hidden_state
        report = ablate_registers(model, images)["modes"]["removed"]
        expected = F.cosine_similarity(without(images).patch_tokens, model(images).patch_tokens, dim=-1).mean()
        assert report["patches"]["cosine"] == pytest.approx(expected.item(), abs=1e-5)
        assert torch.equal(model(images).last_hidden_state, before)


@torch.no_grad()
def test_noise_has_the_mean_and_deviation_of_the_registers_and_a_seed(model):
    images = torch.randn(IMAGES, 3, 32, 32)
    one, two, other = (ablate_registers(model, images, seed=seed)["modes"]["noise"] for seed in (0, 0, 1))
    assert one == two != other


@torch.no_grad()
def test_registers_that_nothing_reads_change_nothing(model):
    for layer in model.layers:
        layer.attention.proj.weight.zero_()
    report = ablate_registers(model, torch.randn(IMAGES, 3, 32, 32))
    for mode in MODES:
        assert report["modes"][mode]["patches"]["distance"] == 0
        assert report["modes"][mode]["meaning"] == MODES[mode]
        assert report["modes"][mode]["cls"]["cosine"] == pytest.approx(1)


@torch.no_grad()
def test_the_model_is_left_as_it_was(tiny, randomise):
    model = randomise(ViTWithRegistersForImageClassification(tiny(num_register_tokens=2, num_labels=3))).train()
    images = torch.randn(IMAGES, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, state = model(images).logits, torch.get_rng_state()
    report = ablate_registers(model, images, score=lambda cls, patches: float(len(cls) + patches.shape[1]))
    assert report["score"] == IMAGES + 16 == report["modes"]["removed"]["score"]
    assert model.training and model.config.num_register_tokens == 2
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before)
    torch.testing.assert_close(model(images).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_left_as_it_was_after_an_error(model):
    def fail(_, __):
        raise RuntimeError("score")

    with pytest.raises(RuntimeError, match="score"):
        ablate_registers(model, torch.randn(2, 3, 32, 32), score=fail)
    assert model.config.num_register_tokens == 2 and model.embeddings.register_tokens is not None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_ablated_is_refused(model, tiny):
    images = torch.randn(2, 3, 32, 32)
    without = ViTWithRegistersModel(tiny(num_register_tokens=0))
    for arguments, changes, words in (
        ((torch.nn.Linear(2, 2), images), {}, "a model of this package, got Linear"),
        ((without, images), {}, "a model with registers, got a model without"),
        ((model, images[:1]), {}, "two images or more, got 1"),
        ((model, images), {"from_layer": 4}, r"from_layer in 1 ... 3, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            ablate_registers(*arguments, **changes)


@torch.no_grad()
def test_a_class_token_is_replaced_and_removed_like_registers(model, tiny):
    images = torch.randn(IMAGES, 3, 32, 32)
    report = ablate_class_token(model, images)["modes"]
    whole, (state, rotary, _) = model(images), model.embed(images)
    states, moved = [], state.clone()
    for layer in model.layers:
        states.append(state[:, :1])
        state = layer(state, rotary)
    for clean, layer in zip(states, model.layers):
        moved = layer(torch.cat([clean.roll(1, dims=0), moved[:, 1:]], dim=1), rotary)
    without = ViTWithRegistersModel(tiny(num_register_tokens=2, has_cls_token=False, pooling="mean")).eval()
    table = model.state_dict()
    _load(without, {**table, **_patch_positions(without, table)}, "cls_token")
    expected = {"shuffled": model.layernorm(moved)[:, 3:], "removed": without(images).patch_tokens}
    for mode, patches in expected.items():
        cosine = F.cosine_similarity(patches, whole.patch_tokens, dim=-1).mean().item()
        assert report[mode]["patches"]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert set(report) == set(MODES) and report["zeroed"]["patches"]["distance"] > 0
    with pytest.raises(ValueError, match="a model with a class token, got a model without"):
        ablate_class_token(without, images)


ROPE = {"position_embedding_type": "rope", "hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize("axes", [{"rope_style": style} for style in ("dinov3", "axial", "mixed")])
@torch.no_grad()
def test_positions_of_a_rotation_stay_with_their_patches_without_the_class_token(axes, tiny, randomise):
    config = tiny(num_register_tokens=2, **{**ROPE, **axes})
    model, images = randomise(ViTWithRegistersModel(config)), torch.randn(IMAGES, 3, 32, 48)
    config = tiny(num_register_tokens=2, has_cls_token=False, pooling="mean", **{**ROPE, **axes})
    without = ViTWithRegistersModel(config).eval()
    _load(without, model.state_dict(), "cls_token")
    cosine = F.cosine_similarity(without(images).patch_tokens, model(images).patch_tokens, dim=-1).mean().item()
    assert ablate_class_token(model, images)["modes"]["removed"]["patches"]["cosine"] == pytest.approx(
        cosine, abs=1e-5
    )


def test_no_class_token_is_removed_where_the_model_counts_places_from_it(tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(token_reduction={"kind": "merge", "per_layer": 2})))
    modes = ablate_class_token(model, torch.randn(IMAGES, 3, 32, 32))["modes"]
    assert set(modes) == set(MODES) - {"removed"}


def _patch_positions(model, table):
    """The position table without the rows of the prefix."""
    name = "embeddings.position_embeddings.weight"
    return {name: table[name][..., -model.state_dict()[name].shape[-2] :, :]} if name in table else {}

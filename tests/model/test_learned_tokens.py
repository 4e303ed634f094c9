"""Learned tokens (TokenLearner 1 and 1.1, TokenFuser), beside programs of the formulas and a loop over layers."""

import copy
import math

import numpy as np
import pytest
import torch
from shorter_sequences import assert_compiled_and_exported_agree
from small_training import gradients_without_and_with_checkpointing
from test_remote_code import run_without_the_package

from modeling_vitreg import (
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.positions_vitreg import rotary_angles, turn
from modeling_vitreg.pretraining.views.packing import encode_views
from modeling_vitreg.token_reduction_vitreg import TokenFuser, TokenLearner


ROPE = {"position_embedding_type": "rope", "has_key_bias": False}
FAMILIES = {
    "1.1": {"num_register_tokens": 3},
    "1, no registers": {"version": "1", "num_register_tokens": 0, "layer_scale_init_value": 1.0},
    "from the first layer": {"layer": 0, "num_tokens": 1},
    "rope": {**ROPE, "layer": 1, "num_register_tokens": 3},
    "capi": {**ROPE, "rope_style": "capi", "norm_type": "rmsnorm", "version": "1"},
    "fuser": {"has_fuser": True, "layer": 1, "num_register_tokens": 2},
    "fuser, 1, rope, mean": {**ROPE, "has_fuser": True, "version": "1", "pooling": "mean", "has_cls_token": False},
    "distilled": {"has_distillation_token": True, "pooling": "cls_distillation", "layer": 3},
}
FIELDS = ("layer", "num_tokens", "version", "has_fuser")
GRID = (3, 7)
IMAGES = torch.randn(2, 3, 24, 56, generator=torch.Generator().manual_seed(0))


def make(tiny, randomise, kind=ViTWithRegistersModel, **fields):
    """A model with learned tokens, all of whose parameters are random."""
    reduction = {"kind": "learn", "num_tokens": 5} | {name: fields.pop(name) for name in FIELDS if name in fields}
    return randomise(kind(tiny(num_hidden_layers=4, token_reduction=reduction, **fields)))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x, module):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * module.weight.detach().numpy() + module.bias.detach().numpy()


def linear(x, module):
    return x @ module.weight.detach().numpy().T + module.bias.detach().numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_learner(learner, patches, grid=GRID):
    """Tokens (S, D) and weights (S, P) of the patches (P, D) of one image."""
    rows, columns = grid
    if learner.convolutions is None:
        logits = linear(gelu(linear(norm(patches, learner.norm), learner.hidden)), learner.out).T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    else:
        maps = norm(patches, learner.norm).reshape(rows, columns, -1)
        for number, convolution in enumerate(learner.convolutions):
            padded = np.pad(gelu(maps) if number else maps, ((1, 1), (1, 1), (0, 0)))
            kernel = convolution.weight.detach().numpy()  # (S, C, 3, 3)
            maps = np.zeros((rows, columns, len(kernel)))
            for y in range(rows):
                for x in range(columns):
                    window = padded[y : y + 3, x : x + 3]
                    maps[y, x] = [sum((window * kernel[s].transpose(1, 2, 0)).flatten()) for s in range(len(kernel))]
        weights = sigmoid(maps.reshape(rows * columns, -1).T)
    return np.stack([sum(weight[:, None] * patches) for weight in weights]), weights


def slow_fuser(fuser, tokens, patches):
    mixed = norm(linear(norm(tokens, fuser.norm1).T, fuser.mix).T, fuser.norm2)
    weights = sigmoid(linear(gelu(linear(norm(patches, fuser.norm3), fuser.hidden)), fuser.out))  # (P, S)
    return weights @ mixed


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
@pytest.mark.parametrize("version", ["1", "1.1"])
def test_learner_and_fuser_are_the_formulas(version, grid, tiny, randomise):
    reduction = {"kind": "learn", "num_tokens": 5, "version": version, "has_fuser": True}
    config = tiny(token_reduction=reduction)
    learner, fuser = randomise(TokenLearner(config)), randomise(TokenFuser(config))
    patches = torch.randn(2, grid[0] * grid[1], 32)
    with torch.no_grad():
        tokens, weights = learner(patches, grid)
        update = fuser(tokens, patches)
    for image in range(2):
        expected, maps = slow_learner(learner, patches[image].numpy(), grid)
        np.testing.assert_allclose(tokens[image], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights[image], maps, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            update[image], slow_fuser(fuser, expected, patches[image].numpy()), rtol=1e-4, atol=1e-5
        )
    # As the table of parameters in the original has them.
    counts = {"1": 9 * 32 * 5 + 27 * 25 + 64, "1.1": 64 * 32 + 64 + 64 * 5 + 5 + 64}
    assert sum(parameter.numel() for parameter in learner.parameters()) == counts[version]
    expected = 25 + 5 + 3 * 64 + 64 * 32 + 64 + 64 * 5 + 5
    assert sum(parameter.numel() for parameter in fuser.parameters()) == expected


def plain_layers(model, tiny):
    """The layers of a plain model with the same weights."""
    fields = {**model.config.to_dict(), "token_reduction": None}
    plain = ViTWithRegistersModel(type(model.config).from_dict(fields)).eval()
    unused = plain.load_state_dict(model.state_dict(), strict=False)
    assert not unused.missing_keys and all("token_" in name for name in unused.unexpected_keys)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_the_plain_one_on_learned_tokens(family, tiny, randomise):
    model = make(tiny, randomise, **FAMILIES[family])
    plain, config, prefix = plain_layers(model, tiny), model.config, model.config.num_prefix_tokens
    first, number = config.reduction["layer"], config.reduction["num_tokens"]
    state, _, _ = plain.embed(IMAGES)
    whole = short = None
    if config.has_rope:
        angles = rotary_angles(config, GRID, training=False, device="cpu")
        whole, short = turn(angles), turn(torch.cat([angles[:prefix], torch.zeros(number, angles.shape[1])]))
    output, states, maps = model(IMAGES, output_hidden_states=True), [state], None
    for layer, ours in zip(plain.layers[:first], model.layers):
        assert ours.token_learner is None
        states.append(layer(states[-1], whole))
    tokens, patches = states[-1][:, prefix:], states[-1][:, prefix:]
    head = states[-1][:, :prefix]
    for layer, ours in zip(plain.layers[first:], model.layers[first:]):
        if ours.token_learner is not None:
            learned = [slow_learner(ours.token_learner, image.numpy()) for image in patches]
            tokens, maps = (torch.tensor(np.stack(part)).float() for part in zip(*learned))
        after = layer(torch.cat([head, tokens], dim=1), short)
        head, tokens = after[:, :prefix], after[:, prefix:]
        if ours.token_fuser is None:
            shares = maps / maps.sum(dim=1, keepdim=True)  # of the tokens in each patch
            patches = torch.einsum("bsp,bsd->bpd", shares, tokens)
        else:
            pairs = zip(tokens.numpy(), patches.numpy())
            patches = patches + torch.tensor(np.stack([slow_fuser(ours.token_fuser, *pair) for pair in pairs])).float()
        states.append(torch.cat([head, patches], dim=1))
    for expected, found in zip(states, output.hidden_states):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.reduction.token_maps, maps.unflatten(2, GRID), rtol=1e-4, atol=1e-5)
    if config.reduction["has_fuser"]:
        assert output.reduction.learned_tokens is None
    else:
        torch.testing.assert_close(output.reduction.learned_tokens, tokens, rtol=1e-4, atol=1e-5)
    assert output.patch_grid.shape == (2, *GRID, 32)


@torch.no_grad()
def test_limits(tiny, randomise):
    config = tiny(token_reduction={"kind": "learn", "num_tokens": 2})
    learner, patches = randomise(TokenLearner(config)), torch.randn(1, 21, 32)
    learner.out.weight.zero_()
    tokens, _ = learner(patches, GRID)
    torch.testing.assert_close(tokens[0, 1], patches[0].mean(dim=0))  # equal logits: the mean
    learner.hidden.weight.zero_()[0] = 1e4 * learner.norm(patches)[0, 3]
    learner.hidden.bias.zero_()
    learner.out.weight[0, 0] = 1.0
    tokens, _ = learner(patches, GRID)
    torch.testing.assert_close(tokens[0, 0], patches[0, 3])  # one large logit: that patch
    fresh = ViTWithRegistersModel(tiny(token_reduction={"kind": "learn", "has_fuser": True, "layer": 0})).eval()
    states = fresh(IMAGES, output_hidden_states=True).hidden_states
    assert torch.equal(states[3][:, -21:], states[0][:, -21:])  # an initial fuser gives nothing back
    assert 0.9 < fresh.layers[0].token_learner.hidden.weight.std() * 48**0.5 < 1.1  # Xavier's, of 32 and 64


@torch.no_grad()
@pytest.mark.parametrize("family", ["rope", "fuser"])
def test_back_ends_attentions_maps_and_features_agree(family, tiny, randomise):
    model = make(tiny, randomise, **FAMILIES[family])
    expected, shown = model(IMAGES), model(IMAGES, output_attentions=True)
    torch.testing.assert_close(shown.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    maps, prefix = model.attention_maps(IMAGES, layers=(1, 2, 3, 4)), model.config.num_prefix_tokens
    for number, probabilities in enumerate(shown.attentions):
        assert probabilities.shape == (2, 2, prefix + 21, prefix + 21)
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, prefix + 21))
        torch.testing.assert_close(maps.cls[:, number], probabilities[:, :, 0, prefix:].unflatten(-1, GRID))
    encoder = load_encoder(model)
    recorded = encoder.prefix_attention(IMAGES, layers=[4])[0]
    torch.testing.assert_close(recorded, shown.attentions[3][:, :, :prefix])
    (keys,) = extract_features(encoder, IMAGES, layers=3, feature="key")
    assert keys.patch_tokens.shape == (2, 21, 32)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IMAGES).last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(model).bfloat16()(IMAGES.bfloat16())
    assert half.patch_grid.dtype == torch.bfloat16 and half.patch_grid.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGES).cls_token.isfinite().all()


@pytest.mark.parametrize("family", ["1, no registers", "rope", "fuser"])
def test_all_parameters_learn_and_gradients_under_checkpointing_are_those_without(family, tiny, randomise):
    fields = {"drop_path_rate": 0.3, "drop_path_mode": "batch_subset", "num_labels": 3, **FAMILIES[family]}
    model = make(tiny, randomise, kind=ViTWithRegistersForImageClassification, **fields).train()
    plain, checkpointed = gradients_without_and_with_checkpointing(model, IMAGES, torch.tensor([0, 2]))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        # The classifier reads the class token, and the last fuser gives to patches only.
        assert gradient.any() or name.startswith("vitreg.layers.3.token_fuser"), name


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["rope", "fuser, 1, rope, mean"])
def test_compiled_and_exported_models_give_the_same_tokens(family, tiny, randomise):
    assert_compiled_and_exported_agree(make(tiny, randomise, **FAMILIES[family]), IMAGES)


@torch.no_grad()
def test_a_saved_model_loads_anywhere_and_heads_get_whole_grids(tiny, randomise, tmp_path):
    model = make(tiny, randomise, **FAMILIES["rope"])
    model.save_pretrained(tmp_path / "model")
    torch.save({"images": IMAGES, "expected": model(IMAGES).last_hidden_state}, tmp_path / "tensors.pt")
    run = run_without_the_package(
        """
        from transformers import AutoModel
        saved = torch.load("tensors.pt")
        model = AutoModel.from_pretrained("model", trust_remote_code=True)
        with torch.no_grad():
            output = model(saved["images"])
        assert torch.equal(output.last_hidden_state, saved["expected"])
        assert output.reduction.learned_tokens.shape == (2, 5, 32)
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    fields = {**FAMILIES["fuser"], "num_labels": 3}
    segmentation = make(tiny, randomise, kind=ViTWithRegistersForSemanticSegmentation, **fields)
    assert segmentation(IMAGES).logits.shape == (2, 3, *GRID)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"layer": 3}, "layer is the last one with all patches, from 0 to 2, got 3"),
        ({"layer": 1.5}, "from 0 to 2, got 1.5"),
        ({"num_tokens": 16}, "num_tokens is from 1 to 15, fewer than the patches, got 16"),
        ({"num_tokens": 0}, "from 1 to 15"),
        ({"version": 1.1}, 'version is "1" or "1.1", in quotes, got 1.1'),
        ({"has_fuser": "yes"}, "has_fuser is true or false"),
        ({"per_layer": 3}, r"of kind 'learn' has layer, num_tokens, version, has_fuser, got \['per_layer'\]"),
    ],
)
def test_a_reduction_that_makes_no_sense_is_refused(reduction, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(token_reduction={"kind": "learn", **reduction})


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_a_pooling_of_patches_needs_the_fuser(pooling, tiny):
    with pytest.raises(ValueError, match="leaves no patches to pool: expected has_fuser=True or a pooling of class"):
        tiny(token_reduction={"kind": "learn"}, pooling=pooling)
    assert tiny(token_reduction={"kind": "learn", "has_fuser": True}, pooling=pooling).reduction["layer"] == 1


def test_objectives_that_read_single_patches_are_refused(tiny):
    model = ViTWithRegistersModel(tiny(token_reduction={"kind": "learn"}))
    with pytest.raises(ValueError, match="takes whole images"):
        encode_views(model, [(torch.randn(2, 3, 32, 32), None)], patches=[None])

"""Tokens that halt (A-ViT), beside a slow program that runs each image alone on a list of tokens."""

import copy

import pytest
import torch
from shorter_sequences import assert_compiled_and_exported_agree, assert_features_and_back_ends_agree
from small_training import gradients_without_and_with_checkpointing
from test_remote_code import run_without_the_package

from modeling_vitreg import (
    ViTWithRegistersBackbone,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.positions_vitreg import rotary_angles
from modeling_vitreg.pretraining.views.packing import encode_views


HALT = {"kind": "halt", "scale": 2.0, "center": 1.0, "eps": 0.05, "ponder_weight": 0.3, "distribution_weight": 0.2}
ROPE = {"position_embedding_type": "rope", "has_key_bias": False}
FAMILIES = {
    "class token only": {"num_register_tokens": 0},
    "registers, LayerScale": {"num_register_tokens": 4, "layer_scale_init_value": 1.0, "has_mlp_layer_scale": False},
    "the class token halts": {"num_register_tokens": 2, "has_halting_cls_token": True},
    "nothing is fixed": {"num_register_tokens": 0, "has_halting_cls_token": True},
    "distilled": {"has_distillation_token": True, "pooling": "cls_distillation", "has_halting_cls_token": True},
    "no prefix": {"num_register_tokens": 0, "has_cls_token": False, "pooling": "mean", "has_pooled_norm": True},
    "rope": {**ROPE, "num_register_tokens": 3, "hidden_act": "swiglu"},
    "axial": {**ROPE, "rope_style": "axial", "has_query_key_norm": True, "num_key_value_heads": 1},
    "gated registers": {"num_register_tokens": 3, "num_gated_registers": 2},
}
GRID = (3, 7)
IMAGES = torch.randn(3, 3, 24, 56, generator=torch.Generator().manual_seed(0))


def pair(tiny, randomise, kind=ViTWithRegistersModel, **fields):
    """A plain model, and the same whose tokens halt; all parameters are random."""
    reduction = HALT | {name: fields.pop(name) for name in ("has_halting_cls_token", "has_removal") if name in fields}
    plain = randomise(kind(tiny(num_hidden_layers=4, **fields)))
    halting = kind(tiny(num_hidden_layers=4, token_reduction=reduction, **fields)).eval()
    halting.load_state_dict(plain.state_dict())
    return plain, halting


def slow_forward(model, pixels, reduction):
    """Outputs before the final norm (B, N, D), depths (B, N) and losses, with a plain model, image by image."""
    config, prefix, depth = model.config, model.config.num_prefix_tokens, model.config.num_hidden_layers
    outputs, depths, costs, scores = [], [], [], [[] for _ in range(depth)]
    for image in pixels.split(1):
        states, _, grid = model.embed(image)
        states = list(states[0])
        angles = rotary_angles(config, grid, training=False, device="cpu") if config.has_rope else None
        registers = config.token_slices["registers"]
        fixed = set(range(registers.start if reduction.get("has_halting_cls_token") else 0, prefix))
        running, sums, found = list(range(len(states))), [0.0] * len(states), [0.0] * len(states)
        layers_run = [0] * len(states)
        for number, layer in enumerate(model.layers):
            if running:
                rotary = None if angles is None else (angles[running].cos(), angles[running].sin())
                for token, state in zip(running, layer(torch.stack([states[i] for i in running])[None], rotary)[0]):
                    states[token] = state
            still = []
            for token in running:
                layers_run[token] += 1
                score = torch.sigmoid(reduction["scale"] * states[token][0] - reduction["center"])
                score = torch.zeros(()) if token in fixed else score
                scores[number].append(score)
                if number == depth - 1 or sums[token] + score >= 1 - reduction["eps"]:
                    found[token] = found[token] + (1 - sums[token]) * states[token]
                    if token not in fixed:
                        costs.append(layers_run[token] + 1 - sums[token])
                else:
                    found[token] = found[token] + score * states[token]
                    sums[token] = sums[token] + score
                    still.append(token)
            running = still
        outputs.append(torch.stack(found))
        depths.append(layers_run)
    means = torch.stack([torch.stack(layer).sum() if layer else torch.zeros(()) for layer in scores])
    shares = (means / means.sum()).clamp(0.01, 0.99)
    gauss = torch.distributions.Normal(3.0, 1.0).log_prob(torch.arange(1.0, 5.0)).exp()  # layer 3 of 4
    prior = gauss * 0.98 / gauss[:2].sum()
    divergence = sum(p * (p.log() - q.log()) for p, q in zip(prior, shares)) / 4
    return torch.stack(outputs), torch.tensor(depths), sum(costs) / len(costs), divergence


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_depths_losses_and_gradients_are_those_of_the_slow_program(family, tiny, randomise):
    plain, halting = pair(tiny, randomise, **FAMILIES[family])
    reduction = halting.config.reduction
    expected, depths, ponder, divergence = slow_forward(plain, IMAGES, reduction)
    prefix = plain.config.num_prefix_tokens
    assert len(depths[:, prefix:].unique()) == 4 and not torch.equal(depths[0], depths[1])
    assert (depths[:, :prefix] < 4).any() == reduction["has_halting_cls_token"]
    for has_removal in (True, False):
        halting.config.token_reduction["has_removal"] = has_removal
        halting.zero_grad()
        output = halting(IMAGES, output_pre_norm=True)
        torch.testing.assert_close(output.pre_norm.hidden_state, expected, rtol=1e-5, atol=1e-5)
        found = output.reduction
        assert torch.equal(torch.cat([found.prefix_depth, found.halting_depth.flatten(1)], dim=1), depths)
        torch.testing.assert_close(found.ponder_loss, ponder)
        torch.testing.assert_close(found.distribution_loss, divergence)
        torch.testing.assert_close(found.loss, 0.3 * ponder + 0.2 * divergence)
        if has_removal:
            plain.zero_grad()
            (plain.norm_tokens(expected).square().sum() + 0.3 * ponder + 0.2 * divergence).backward()
        (output.last_hidden_state.square().sum() + found.loss).backward()
        for (name, own), other in zip(halting.named_parameters(), plain.parameters()):
            if other.grad is not None:
                error = (own.grad - other.grad).abs().max() / other.grad.abs().max().clamp(min=1e-3)
                assert error < 1e-5, (name, error)


@torch.no_grad()
def test_images_that_halt_differently_have_in_a_batch_the_logits_that_they_have_alone(tiny, randomise):
    fields = {**FAMILIES["rope"], "num_labels": 3}
    removing = pair(tiny, randomise, ViTWithRegistersForImageClassification, **fields)[1]
    logits = removing(IMAGES).logits
    for number, image in enumerate(IMAGES.split(1)):
        torch.testing.assert_close(removing(image).logits[0], logits[number], rtol=1e-5, atol=1e-5)
    counts = []
    layer = removing.vitreg.layers[3]
    handle = layer.mlp.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[:2]))
    depths = removing(IMAGES).reduction.halting_depth
    assert counts == [(1, 3 * 4 + (depths == 4).sum())]  # class token, three registers, and the patches that are left
    handle.remove()
    removing.config.token_reduction["has_removal"] = False
    torch.testing.assert_close(removing(IMAGES).logits, logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_in_which_nothing_halts_is_the_plain_one(tiny, randomise):
    plain, halting = pair(tiny, randomise)
    halting.config.token_reduction["center"] = 1e4
    expected, output = plain(IMAGES), halting(IMAGES)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.reduction.halting_depth, torch.full((3, *GRID), 4))
    assert output.reduction.ponder_loss == 5 and output.reduction.loss.isfinite()


@torch.no_grad()
def test_states_between_layers_are_outputs_for_what_has_halted(tiny, randomise):
    halting = pair(tiny, randomise)[1]
    output = halting(IMAGES, output_hidden_states=True, output_pre_norm=True)
    is_done, prefix = output.reduction.halting_depth.flatten(1) <= 2, halting.config.num_prefix_tokens
    state, last = output.hidden_states[2][:, prefix:], output.pre_norm.patch_tokens
    assert is_done.any() and torch.equal(state[is_done], last[is_done])
    early = halting(IMAGES, num_layers=2).reduction
    assert torch.equal(early.halting_depth, output.reduction.halting_depth.clamp(max=2)) and early.loss is None


@torch.no_grad()
@pytest.mark.parametrize("has_removal", [True, False])
@pytest.mark.parametrize("family", ["registers, LayerScale", "rope", "the class token halts"])
def test_back_ends_attentions_maps_and_features_agree(family, has_removal, tiny, randomise):
    halting = pair(tiny, randomise, **FAMILIES[family], has_removal=has_removal)[1]
    expected = halting(IMAGES)
    shown = halting(IMAGES, output_attentions=True)
    torch.testing.assert_close(shown.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    maps, prefix = halting.attention_maps(IMAGES, layers=(1, 2, 3, 4)), halting.config.num_prefix_tokens
    depth = torch.cat([expected.reduction.prefix_depth, expected.reduction.halting_depth.flatten(1)], dim=1)
    for number, probabilities in enumerate(shown.attentions):
        runs = depth > number
        torch.testing.assert_close(probabilities.sum(dim=-1), runs[:, None].float().expand(-1, 2, -1))
        assert not probabilities.permute(0, 3, 1, 2)[~runs].any()
        torch.testing.assert_close(maps.cls[:, number], probabilities[:, :, 0, prefix:].unflatten(-1, GRID))
    runs = (depth > 3)[:, prefix:, None]
    assert_features_and_back_ends_agree(halting, IMAGES, shown=shown, runs=runs)


@pytest.mark.parametrize("family", ["rope", "nothing is fixed"])
def test_gradients_under_checkpointing_are_those_without(family, tiny, randomise):
    fields = {"drop_path_rate": 0.3, "drop_path_mode": "batch_subset", "num_labels": 3, **FAMILIES[family]}
    model = pair(tiny, randomise, ViTWithRegistersForImageClassification, **fields)[1].train()
    plain, checkpointed = gradients_without_and_with_checkpointing(model, IMAGES, torch.tensor([0, 2, 1]))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
@pytest.mark.slow
def test_compiled_and_exported_models_mask_and_give_the_same_tokens(tiny, randomise):
    halting = pair(tiny, randomise, **FAMILIES["rope"])[1]
    expected, compiled = assert_compiled_and_exported_agree(halting, IMAGES)
    assert torch.equal(compiled.reduction.halting_depth, expected.reduction.halting_depth)


def test_half_precision_halts_and_learns(tiny, randomise):
    model = pair(tiny, randomise, ViTWithRegistersForImageClassification, **FAMILIES["rope"], num_labels=3)[1]
    half = copy.deepcopy(model).bfloat16()
    output = half.vitreg(IMAGES.bfloat16())
    assert output.patch_grid.dtype == torch.bfloat16 and output.patch_grid.isfinite().all()
    for each in (half, model):
        each.train()
        with torch.autocast("cpu", torch.bfloat16):
            output = each(IMAGES, labels=torch.tensor([0, 2, 1]))
        output.loss.backward()
        assert len(output.reduction.halting_depth.unique()) > 1
        assert all(parameter.grad.isfinite().all() for parameter in each.parameters())


def test_the_loss_of_a_head_includes_what_halting_costs(tiny, randomise):
    model = pair(tiny, randomise, ViTWithRegistersForImageClassification, num_labels=3)[1]
    labels = torch.tensor([0, 2, 1])
    output = model(IMAGES, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits, labels) + output.reduction.loss
    torch.testing.assert_close(output.loss, expected)
    fields = {"num_labels": 3, "out_indices": [2, 4]}
    dense = pair(tiny, randomise, ViTWithRegistersForSemanticSegmentation, **fields)[1]
    labels = torch.zeros(3, 24, 56, dtype=torch.long)
    output = dense(IMAGES, labels=labels)
    scores = torch.nn.functional.interpolate(output.logits, size=(24, 56), mode="bilinear")
    expected = torch.nn.functional.cross_entropy(scores, labels) + output.reduction.loss
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (3, 3, *GRID)


@torch.no_grad()
def test_a_saved_model_halts_anywhere_and_a_plain_one_by_a_word_at_loading(tiny, randomise, tmp_path):
    plain, halting = pair(tiny, randomise, ViTWithRegistersForImageClassification, num_labels=3)
    plain.save_pretrained(tmp_path / "plain")
    halting.save_pretrained(tmp_path / "halting")
    torch.save({"images": IMAGES, "expected": halting(IMAGES).logits, "halt": HALT}, tmp_path / "tensors.pt")
    run = run_without_the_package(
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        saved = torch.load("tensors.pt")
        for folder, options in (("halting", {}), ("plain", {"token_reduction": saved["halt"]})):
            model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **options)
            with torch.no_grad():
                output = model(saved["images"])
            assert torch.equal(output.logits, saved["expected"]), folder
            assert len(output.reduction.halting_depth.unique()) == 4
        assert AutoImageProcessor.from_pretrained("halting").size == AutoImageProcessor.from_pretrained("plain").size
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    backbone = ViTWithRegistersBackbone.from_pretrained(tmp_path / "halting", out_indices=[2, 4])
    assert [each.shape for each in backbone(IMAGES).feature_maps] == [(3, 32, *GRID)] * 2


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"scale": 0}, "scale is a number above 0, got 0"),
        ({"center": "high"}, "center is a number that is finite, got 'high'"),
        ({"eps": 1.0}, "eps is a number between 0 and 1, got 1.0"),
        ({"ponder_weight": -1}, "ponder_weight is a number of 0 or more, got -1"),
        ({"has_removal": 1}, "has_removal is true or false, got 1"),
        ({"target_layer": 1}, "target_layer is a layer from 2 to 3, got 1"),
        ({"per_layer": 3}, r"of kind 'halt' has scale, center, .*got \['per_layer'\]"),
    ],
)
def test_a_reduction_that_makes_no_sense_is_refused(reduction, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(token_reduction={"kind": "halt", **reduction})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, "needs two layers or more"),
        ({"relative_position_bias": "layer"}, "positions that move with a token"),
        ({"num_test_time_registers": 1, "register_neurons": {2: [3]}}, "registers with rules of their own"),
        ({"num_gated_registers": 1, "has_halting_cls_token": True}, "registers with rules of their own"),
    ],
)
def test_models_whose_tokens_cannot_be_taken_out_are_refused(fields, message, tiny):
    reduction = {"kind": "halt", "has_halting_cls_token": fields.pop("has_halting_cls_token", False)}
    with pytest.raises(ValueError, match=message):
        tiny(token_reduction=reduction, **fields)


def test_objectives_that_read_single_patches_are_refused(tiny):
    model = ViTWithRegistersModel(tiny(token_reduction={"kind": "halt"}))
    with pytest.raises(ValueError, match="takes whole images"):
        encode_views(model, [(torch.randn(2, 3, 32, 32), None)], patches=[None])

"""Merging of similar patches (ToMe), beside a slow program in which tokens are lists of patches."""

import copy

import pytest
import torch
from shorter_sequences import assert_compiled_and_exported_agree, assert_features_and_back_ends_agree
from small_training import gradients_without_and_with_checkpointing
from test_remote_code import run_without_the_package

from modeling_vitreg import (
    ViTWithRegistersBackbone,
    ViTWithRegistersConfig,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.positions_vitreg import rotary_angles
from modeling_vitreg.pretraining.views.packing import encode_views
from modeling_vitreg.token_reduction_vitreg import match


COUNTS = [3, 0, 4, 2]
MERGE = {"kind": "merge", "per_layer": COUNTS}
ROPE = {"position_embedding_type": "rope", "has_key_bias": False}
FAMILIES = {
    "class token only": {"num_register_tokens": 0},
    "registers, LayerScale": {"num_register_tokens": 4, "layer_scale_init_value": 1.0, "has_mlp_layer_scale": False},
    "even prefix": {"num_register_tokens": 2, "has_distillation_token": True, "pooling": "cls_distillation"},
    "no prefix": {"num_register_tokens": 0, "has_cls_token": False, "pooling": "mean", "has_pooled_norm": True},
    "rope": {**ROPE, "num_register_tokens": 3, "hidden_act": "swiglu"},
    "axial": {**ROPE, "rope_style": "axial", "has_query_key_norm": True, "num_key_value_heads": 1},
    "capi": {**ROPE, "rope_style": "capi", "norm_type": "rmsnorm"},
    "gated registers": {"num_register_tokens": 3, "num_gated_registers": 2},
    "test-time register": {"num_test_time_registers": 1, "register_neurons": {2: [3, 5]}},
}
IMAGES = torch.randn(2, 3, 24, 56, generator=torch.Generator().manual_seed(0))


def pair(tiny, randomise, reduction=None, kind=ViTWithRegistersModel, **fields):
    """A plain model, and the same that merges; all parameters are random."""
    plain = randomise(kind(tiny(num_hidden_layers=4, **fields)))
    merging = kind(tiny(num_hidden_layers=4, token_reduction=reduction or MERGE, **fields)).eval()
    merging.load_state_dict(plain.state_dict())
    return plain, merging


def slow_matching(keys, count, first_place):
    """Tokens that move and their new homes, by the words of the paper. Keys are a list; places count the prefix."""
    unit = [key / key.norm() for key in keys]
    even = [i for i in range(len(keys)) if (first_place + i) % 2 == 0]
    odd = [i for i in range(len(keys)) if i not in even]
    best = {a: max(odd, key=lambda b: float(unit[a] @ unit[b])) for a in even}
    moved = sorted(even, key=lambda a: -float(unit[a] @ unit[best[a]]))[:count]
    return {a: best[a] for a in moved}, [a for a in even if a not in moved] + odd


@torch.no_grad()
def slow_forward(model, pixels):
    """Hidden states, with a plain model, image by image. A token is a list of patches; all its patches are equal, take
    part in attention, and are replaced by their mean when lists are joined."""
    config, prefix = model.config, model.config.num_prefix_tokens
    results = []
    for image in pixels.split(1):
        state, _, grid = model.embed(image)
        num_patches = grid[0] * grid[1]
        angles = rotary_angles(config, grid, training=False, device="cpu") if config.has_rope else None
        tokens, states = [[patch] for patch in range(num_patches)], [state]
        for layer, count in zip(model.layers, COUNTS):
            rotary = None if angles is None else (angles.cos(), angles.sin())
            attention = layer.attention
            packed = attention.qkv(layer.norm1(state))
            keys = packed.split(attention.sizes, dim=-1)[1].unflatten(-1, (-1, config.hidden_size // 2))
            keys = attention.key_norm(keys)[0].mean(dim=1)
            state = state + layer.attention_branch(state, rotary)
            moves, kept = {}, range(len(tokens))
            if count:
                moves, kept = slow_matching([keys[prefix + token[0]] for token in tokens], count, prefix)
            joined = {place: list(tokens[place]) for place in kept}
            for source, target in moves.items():
                joined[target] += tokens[source]
            tokens = [joined[place] for place in kept]
            for token in tokens:
                places = [prefix + patch for patch in token]
                state[:, places] = state[:, places].mean(dim=1, keepdim=True)
                if angles is not None:
                    angles[places] = angles[places].mean(dim=0)
            state = state + layer.mlp_branch(state)
            states.append(state.clone())
        results.append((states, tokens))
    return [torch.cat(states) for states in zip(*(states for states, _ in results))], [tokens for _, tokens in results]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_that_of_the_slow_program(family, tiny, randomise):
    plain, merging = pair(tiny, randomise, **FAMILIES[family])
    expected, tokens = slow_forward(plain, IMAGES)
    output = merging(IMAGES, output_hidden_states=True)
    for number, state in enumerate(expected):
        torch.testing.assert_close(output.hidden_states[number], state, rtol=1e-5, atol=1e-5)
    assert output.reduction.token_sizes.tolist() == [[len(token) for token in image] for image in tokens]
    for image, assignment in zip(tokens, output.reduction.token_assignment.flatten(1).tolist()):
        assert assignment == [next(i for i, token in enumerate(image) if patch in token) for patch in range(21)]


@torch.no_grad()
def test_a_layer_that_merges_leaves_the_prefix_as_it_was_after_attention(tiny, randomise):
    plain, merging = pair(tiny, randomise, {"kind": "merge", "per_layer": [5, 0, 0, 0]})
    before, after = (model(IMAGES, num_layers=1, output_pre_norm=True).pre_norm for model in (plain, merging))
    torch.testing.assert_close(after.cls_token, before.cls_token, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.register_tokens, before.register_tokens, rtol=0, atol=1e-6)
    assert not torch.allclose(after.patch_tokens, before.patch_tokens)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, ROPE])
def test_a_model_that_merges_nothing_is_the_plain_one_bit_for_bit(fields, tiny, randomise):
    plain, merging = pair(tiny, randomise, {"kind": "merge", "per_layer": 0}, **fields)
    expected, output = plain(IMAGES), merging(IMAGES)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert output.reduction is None


def test_matching_is_that_of_the_loop_for_many_random_keys():
    generator = torch.Generator().manual_seed(1)
    for case in range(200):
        num_patches = 2 + case % 13
        keys = torch.randn(1, num_patches, 4, generator=generator)
        count, prefix = case % (num_patches // 2) + 1, case % 3
        plan = match(keys, count, is_first_even=prefix % 2 == 0)
        moves, kept = slow_matching(list(keys[0]), count, prefix)
        assert plan.kept[0].tolist() == kept
        found = {source: kept[target] for source, target in zip(plan.moved[0].tolist(), plan.target[0].tolist())}
        assert found == moves


@torch.no_grad()
def test_without_proportional_attention_a_token_counts_once(tiny, randomise):
    reduction = {**MERGE, "is_proportional": False}
    plain, merging = pair(tiny, randomise, reduction)
    counted = pair(tiny, randomise)[1]
    counted.load_state_dict(plain.state_dict())
    states = merging(IMAGES, output_hidden_states=True).hidden_states
    record = copy.deepcopy(merging(IMAGES, num_layers=1).reduction)
    tokens = torch.cat([states[1][:, :5], record.merge(states[1][:, 5:])], dim=1)
    layer = plain.layers[1]  # which merges nothing, as its count is 0
    expected = record.unmerge(layer(tokens)[:, 5:])
    torch.testing.assert_close(states[2][:, 5:].unflatten(1, (3, 7)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states[2], counted(IMAGES, output_hidden_states=True).hidden_states[2], atol=1e-4)


@torch.no_grad()
def test_merging_and_unmerging_a_constant_field_gives_it_back(tiny, randomise):
    reduction = pair(tiny, randomise)[1](IMAGES).reduction
    field = torch.full((2, 3, 7, 5), 2.5)
    assert torch.equal(reduction.unmerge(reduction.merge(field)), field)
    assert reduction.token_sizes.sum(dim=1).tolist() == [21, 21]
    assert reduction.token_sizes.shape == (2, 21 - sum(COUNTS))
    values = torch.randn(2, 3, 7, 5)
    means = reduction.merge(values)
    members = reduction.token_assignment[1] == 4
    torch.testing.assert_close(means[1, 4], values[1][members].mean(dim=0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["registers, LayerScale", "rope"])
def test_back_ends_attentions_maps_and_features_agree(family, tiny, randomise):
    merging = pair(tiny, randomise, **FAMILIES[family])[1]
    expected = merging(IMAGES)
    shown = merging(IMAGES, output_attentions=True)
    torch.testing.assert_close(shown.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    maps = merging.attention_maps(IMAGES, layers=(1, 2, 3, 4))
    prefix = merging.config.num_prefix_tokens
    for number, probabilities in enumerate(shown.attentions):
        assert probabilities.shape == (2, 2, prefix + 21, prefix + 21)
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, prefix + 21))
        torch.testing.assert_close(maps.cls[:, number], probabilities[:, :, 0, prefix:].unflatten(-1, (3, 7)))
    assert_features_and_back_ends_agree(merging, IMAGES, shown=shown)


def test_gradients_under_checkpointing_are_those_without(tiny, randomise):
    fields = {"drop_path_rate": 0.3, "drop_path_mode": "batch_subset", "num_labels": 3, **FAMILIES["rope"]}
    model = pair(tiny, randomise, kind=ViTWithRegistersForImageClassification, **fields)[1].train()
    plain, checkpointed = gradients_without_and_with_checkpointing(model, IMAGES, torch.tensor([0, 2]))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert all(gradient.any() for gradient in plain.values())


@torch.no_grad()
@pytest.mark.slow
def test_compiled_and_exported_models_give_the_same_tokens(tiny, randomise):
    assert_compiled_and_exported_agree(pair(tiny, randomise, **FAMILIES["rope"])[1], IMAGES)


@torch.no_grad()
def test_half_precision_merges_all_patches(tiny, randomise):
    merging = pair(tiny, randomise, **FAMILIES["rope"])[1]
    half = copy.deepcopy(merging).bfloat16()(IMAGES.bfloat16())
    assert half.patch_grid.dtype == torch.bfloat16 and half.patch_grid.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merging(IMAGES).reduction.token_sizes.sum(dim=1), torch.tensor([21, 21]))


@torch.no_grad()
def test_heads_and_backbones_get_whole_grids(tiny, randomise):
    fields = {"out_indices": [2, 4], "num_labels": 3}
    segmentation = pair(tiny, randomise, kind=ViTWithRegistersForSemanticSegmentation, **fields)[1]
    assert segmentation(IMAGES).logits.shape == (2, 3, 3, 7)
    backbone = pair(tiny, randomise, kind=ViTWithRegistersBackbone, **fields)[1]
    record = backbone.vitreg(IMAGES).reduction
    last = backbone(IMAGES).feature_maps[1].permute(0, 2, 3, 1)
    torch.testing.assert_close(record.unmerge(record.merge(last)), last)


@torch.no_grad()
def test_a_saved_model_merges_anywhere_and_a_plain_one_by_a_word_at_loading(tiny, randomise, tmp_path):
    plain, merging = pair(tiny, randomise)
    plain.save_pretrained(tmp_path / "plain")
    merging.save_pretrained(tmp_path / "merging")
    torch.save({"images": IMAGES, "expected": merging(IMAGES).last_hidden_state}, tmp_path / "tensors.pt")
    run = run_without_the_package(
        """
        from transformers import AutoModel
        saved = torch.load("tensors.pt")
        reduction = {"kind": "merge", "per_layer": [3, 0, 4, 2]}
        for folder, options in (("merging", {}), ("plain", {"token_reduction": reduction})):
            model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
            with torch.no_grad():
                output = model(saved["images"])
            assert torch.equal(output.last_hidden_state, saved["expected"]), folder
            assert output.reduction.token_sizes.shape == (2, 12)
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert ViTWithRegistersModel.from_pretrained(tmp_path / "merging", token_reduction=None).config.reduction is None


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ("merge", "a dictionary whose kind is"),
        ({"kind": "prune"}, "a dictionary whose kind is"),
        ({"kind": "merge"}, "per_layer is a number of patches, 0 or more, or a list of num_hidden_layers"),
        ({"kind": "merge", "per_layer": [1, 2]}, r"got \[1, 2\]"),
        ({"kind": "merge", "per_layer": -1}, "0 or more"),
        ({"kind": "merge", "per_layer": 6}, "would join 18 of 16 patches, which leaves none: .* is at most 5"),
        ({"kind": "merge", "per_layer": 2, "inflection": 2.0}, "inflection lies in"),
        ({"kind": "merge", "per_layer": 2, "is_proportional": "yes"}, "is_proportional is true or false"),
        ({"kind": "merge", "per_layer": 2, "r": 2}, r"got \['r'\]"),
    ],
)
def test_a_reduction_that_makes_no_sense_is_refused(reduction, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(token_reduction=reduction)


@pytest.mark.parametrize(
    "fields", [{"relative_position_bias": "layer"}, {**ROPE, "rope_style": "mixed"}], ids=["bias", "mixed"]
)
def test_positions_that_do_not_move_with_a_token_are_refused(fields, tiny):
    with pytest.raises(ValueError, match="positions that move with a token"):
        tiny(token_reduction={"kind": "merge", "per_layer": 2}, **fields)


def test_objectives_that_read_single_patches_are_refused(tiny):
    merging = ViTWithRegistersModel(tiny(token_reduction={"kind": "merge", "per_layer": 2}))
    with pytest.raises(ValueError, match="takes whole images"):
        encode_views(merging, [(torch.randn(2, 3, 32, 32), None)], patches=[None])


def test_the_schedule_falls_and_rises_with_the_inflection():
    def schedule(**fields):
        reduction = {"kind": "merge", "per_layer": 8, **fields}
        return ViTWithRegistersConfig(token_reduction=reduction).merges_per_layer

    assert schedule() == [8] * 12
    assert schedule(inflection=-1.0) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert schedule(inflection=1.0) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]

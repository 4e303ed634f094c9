"""HAT-Net: blocks equal a slow program, at sizes that are no multiples of the windows too."""

import math

import pytest
import torch
import torch.nn.functional as F
from other_backbones import assert_loads_through_the_auto_classes, assert_runs_and_learns_without_the_package
from small_training import gradients_without_and_with_checkpointing

from modeling_vitreg import HATNetConfig, HATNetForImageClassification, HATNetModel
from modeling_vitreg.analysis import summarise_norms, token_norms
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.pretraining.monitoring.pictures import draw_attention


TINY = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 2, 1, 1], "head_size": 8, "window_sizes": [4, 3, 2, 1]}
TINY |= {"pool_sizes": [4, 3, 2, 1], "expansions": [2, 3, 2, 1], "kernel_sizes": [3, 5, 3, 3], "image_size": 64}
SIZES = [(192, 96), (64, 64), (70, 41), (5, 133)]  # multiples of all windows and squares, then not


def make_model(kind=HATNetForImageClassification, *, attention="sdpa", **changes):
    """A tiny model in evaluation mode with all parameters random, those that start at a constant too."""
    torch.manual_seed(0)
    model = kind(HATNetConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_attn_implementation(attention)
    return model


# The slow program ---------------------------------------------------------------------------------------------------


def norm(maps, module):
    """Every image over channels and positions."""
    mean, variance = maps.mean((1, 2, 3), keepdim=True), maps.var((1, 2, 3), keepdim=True, correction=0)
    normed = (maps - mean) / (variance + 1e-6).sqrt()
    return normed * module.weight[:, None, None] + module.bias[:, None, None]


def linear(maps, module):
    """A convolution of one pixel."""
    mapped = torch.einsum("bchw,oc->bohw", maps, module.weight[:, :, 0, 0])
    return mapped if module.bias is None else mapped + module.bias[:, None, None]


def attend(queries, keys, values, size):
    """Of each query (C, N) to the keys and values (C, M), head by head; also the probabilities (H, N, M)."""
    outputs, maps = [], []
    for head in range(len(queries) // size):
        query, key, value = (part[head * size : (head + 1) * size] for part in (queries, keys, values))
        maps.append((query.T @ key / math.sqrt(size)).softmax(dim=-1))
        outputs.append(value @ maps[-1].T)
    return torch.cat(outputs), torch.stack(maps)


def cells(rows, columns, side):
    """Slices of the squares of a grid, the last ones cut."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield slice(top, min(top + side, rows)), slice(left, min(left + side, columns))


def attention(maps, module, *, window, pool, size):
    """The update by hierarchical attention, and the probabilities of its global step."""
    packed, (rows, columns) = linear(norm(maps, module.norm), module.qkv), maps.shape[2:]
    query, key, value = packed.chunk(3, dim=1)
    added = torch.zeros_like(maps)
    if window > 1:
        inside = torch.zeros_like(maps)
        for image in range(len(maps)):
            for row, column in cells(rows, columns, window):
                parts = (part[image, :, row, column].flatten(1) for part in (query, key, value))
                shape = inside[image, :, row, column].shape
                inside[image, :, row, column] = attend(*parts, size)[0].view(shape)
        added = norm(maps + inside, module.local_norm)
        means = [added[:, :, row, column].mean((2, 3)) for row, column in cells(rows, columns, pool)]
        pooled = torch.stack(means, dim=-1).unflatten(2, (-(-rows // pool), -1))
        query = linear(added, module.query)
        key, value = linear(norm(pooled, module.pool_norm), module.key_value).chunk(2, dim=1)
    found = [attend(*(part[image].flatten(1) for part in (query, key, value)), size) for image in range(len(maps))]
    attended = torch.stack([output for output, _ in found]).view(maps.shape)
    return linear(attended + added, module.proj), torch.stack([probabilities for _, probabilities in found])


def convolutions(maps, module):
    hidden = F.silu(linear(norm(maps, module.norm1), module.expand))
    kernel = module.depthwise.weight
    hidden = F.silu(F.conv2d(hidden, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel)))
    return norm(linear(hidden, module.reduce), module.norm2)


def slowly(model, images):
    """Maps in front of and behind every stage, probabilities of every block, logits."""
    base, config = model.vitreg, model.config
    stem = base.embeddings
    maps = F.silu(norm(F.conv2d(images, *stem.patch_embeddings.parameters(), stride=2, padding=1), stem.norm))
    states, probabilities, layers = [F.conv2d(maps, *stem.projection.parameters(), stride=2, padding=1)], [], []
    layers = iter(base.layers)
    for stage, depth in enumerate(config.depths):
        maps = states[-1]
        if stage:
            down = base.downsamplings[stage - 1]
            maps = norm(F.conv2d(maps, *down.projection.parameters(), stride=2, padding=1), down.norm)
        for _ in range(depth):
            layer = next(layers)
            sizes = {"window": config.window_sizes[stage], "pool": config.pool_sizes[stage], "size": config.head_size}
            added, found = attention(maps, layer.attention, **sizes)
            probabilities.append(found)
            maps = maps + added
            maps = maps + convolutions(maps, layer.convolutions)
        states.append(maps)
    return states, probabilities, model.classifier.weight @ states[-1].mean((2, 3)).T + model.classifier.bias[:, None]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_every_stage_equals_the_slow_program(size, kind):
    model, images = make_model(attention=kind), torch.randn(2, 3, *size)
    with torch.no_grad():
        states, probabilities, logits = slowly(model, images)
        output = model(images, output_hidden_states=True)
        for ours, theirs in zip(output.hidden_states, states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.logits, logits.T, rtol=1e-5, atol=1e-5)
        output = model(images, output_attentions=True)
        torch.testing.assert_close(output.logits, logits.T, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(output.attentions, probabilities, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_an_oblong_grid_changes_nothing():
    """Windows larger than the grid are the grid: padding is neither key, nor part of a mean or a norm."""
    images = torch.randn(1, 3, 40, 24)
    large = make_model(window_sizes=[16, 16, 16, 1], pool_sizes=[16, 16, 16, 1])
    larger = make_model(window_sizes=[64, 50, 31, 1], pool_sizes=[64, 50, 31, 1])
    torch.testing.assert_close(larger(images).logits, large(images).logits, rtol=1e-5, atol=1e-5)


# The model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, count, unused",
    [
        ("tiny", 12_655_912, 5_760),
        ("small", 25_747_784, 9_216),
        ("medium", 42_942_472, 16_512),
        ("large", 63_132_488, 23_552),
    ],
)
def test_sizes_of_the_paper(size, count, unused):
    """The official file has one more norm in each block, which it never calls."""
    with torch.device("meta"):
        model = HATNetForImageClassification(HATNetConfig.from_preset(size, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == count - unused


def test_positions_of_the_last_grid_are_the_patches():
    model, images = make_model(HATNetModel), torch.randn(2, 3, 64, 96)
    output = model(images, output_hidden_states=[-1, 2], output_pre_norm=True)
    assert [state is None for state in output.hidden_states] == [True, True, False, True, False]
    last = output.hidden_states[-1]
    assert torch.equal(output.patch_grid, last.permute(0, 2, 3, 1)) and output.patch_grid.shape == (2, 2, 3, 32)
    assert torch.equal(output.patch_tokens, output.last_hidden_state) and output.register_tokens.shape == (2, 0, 32)
    assert torch.equal(output.pre_norm.patch_grid, output.patch_grid)
    torch.testing.assert_close(output.pooler_output, last.mean((2, 3)))
    assert model.no_weight_decay() == set()
    assert isinstance(model(images, return_dict=False), tuple)


def test_the_classifier_has_dropout_while_training_only():
    model, images = make_model(classifier_dropout=0.5), torch.randn(4, 3, 64, 64)
    pooled, logits = model.vitreg(images).pooler_output, model(images).logits
    torch.testing.assert_close(logits, F.linear(pooled, model.classifier.weight, model.classifier.bias))
    model.train()
    torch.manual_seed(3)
    trained = model(images).logits
    torch.manual_seed(3)
    kept = F.dropout(pooled, 0.5)
    torch.testing.assert_close(trained, F.linear(kept, model.classifier.weight, model.classifier.bias))
    assert not torch.equal(trained, logits)


def test_stochastic_depth_leaves_branches_of_whole_images_out():
    model = make_model(HATNetModel, drop_path_rate=0.9, drop_path_schedule="constant").train()
    layer, maps = model.layers[0], torch.randn(32, 8, 4, 4)
    torch.manual_seed(0)
    kept = torch.empty(32, 1, 1, 1).bernoulli_(0.1) / 0.1
    torch.manual_seed(0)
    choice = layer.drop_path.choose(maps)
    assert torch.equal(choice[1], kept)
    added = layer.drop_path.add(maps, layer.attention, choice) - maps
    torch.testing.assert_close(added, layer.attention(maps) * kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["sample", "batch_subset"])
def test_gradients_are_the_same_with_checkpointing_and_reach_every_parameter(mode):
    model = make_model(drop_path_rate=0.3, drop_path_mode=mode).train()
    images = torch.randn(4, 3, 40, 56)
    plain, checkpointed = gradients_without_and_with_checkpointing(model, images, torch.tensor([0, 1, 0, 1]))
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_half_precision_and_autocast():
    images = torch.randn(2, 3, 40, 56)
    expected = make_model()(images).logits
    half = make_model().bfloat16()(images, output_hidden_states=True)
    assert {state.dtype for state in half.hidden_states} == {torch.bfloat16}
    torch.testing.assert_close(half.logits.float(), expected, rtol=0.1, atol=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(make_model()(images).logits.float(), expected, rtol=0.1, atol=0.2)


def test_initial_values_are_those_of_the_official_code():
    torch.manual_seed(0)
    model = HATNetForImageClassification(HATNetConfig(depths=[1, 1, 1, 1]))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert 0.017 < parameter.std() < 0.023, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and name.endswith("weight"))), name


def test_a_saved_folder_loads_through_the_auto_classes(tmp_path):
    assert_loads_through_the_auto_classes(
        make_model(), torch.randn(1, 3, 64, 80), file="hat_vitreg.py", folder=tmp_path
    )


def test_a_bare_folder_loads_runs_and_learns_without_the_package(photograph, tmp_path):
    model, images = make_model(num_labels=3), torch.randn(2, 3, 64, 80)
    assert_runs_and_learns_without_the_package(model, images, photograph=photograph, folder=tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 4}, "got hidden_size, which only the Vision Transformer has"),
        ({"depths": [1, 2, 3]}, r"depths are four positive integers, one for each stage, got \[1, 2, 3\]"),
        ({"window_sizes": [8, 7, 0, 1]}, "window_sizes are four positive integers"),
        ({"hidden_sizes": [8, 16, 20, 32]}, r"head_size divides all hidden_sizes \[8, 16, 20, 32\], got 8"),
        ({"kernel_sizes": [3, 4, 3, 3]}, r"kernel_sizes are odd, got \[3, 4, 3, 3\]"),
        ({"head_size": 0}, "head_size is a positive integer, got 0"),
        ({"classifier_dropout": 1}, r"classifier_dropout lies in \[0, 1\), got 1"),
        ({"num_register_tokens": 4}, "there are no registers, got num_register_tokens=4"),
        ({"image_size": 100}, "image_size 100 is not a multiple of patch_size 32"),
    ],
)
def test_wrong_values_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        HATNetConfig(**{**TINY, **changes})


def test_an_unknown_size_and_wrong_images_are_refused():
    with pytest.raises(ValueError, match="a size of tiny, small, medium, large, got 'huge'"):
        HATNetConfig.from_preset("huge")
    model = make_model()
    for images, words in (
        (torch.zeros(1, 4, 64, 64), r"expected images \(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "normalised to floating-point numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            model(images)
    with pytest.raises(ValueError, match="because of interpolate_pos_encoding=False"):
        model(torch.zeros(1, 3, 64, 96), interpolate_pos_encoding=False)


def test_what_needs_a_prefix_or_a_mask_says_that_there_is_none():
    model, images = make_model(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="no class token and no registers, so there are no attention maps"):
        model.attention_maps(images)
    with pytest.raises(ValueError, match="no mask token"):
        model.vitreg(images, torch.ones(1, 4))
    with pytest.raises(ValueError, match="there are no registers, got num_register_tokens=2"):
        model.resize_register_tokens(2)
    model.resize_register_tokens(0)


# Features -----------------------------------------------------------------------------------------------------------


def test_the_blocks_of_the_last_stage_are_its_layers_for_analysis():
    model, images = make_model(depths=[1, 1, 1, 3]), torch.randn(2, 3, 64, 96)
    encoder = load_encoder(model)
    assert (encoder.num_layers, encoder.num_heads, encoder.patch_shape, encoder.hidden_size) == (3, 4, (32, 32), 32)
    assert encoder.is_partial and encoder.num_prefix_tokens == 0
    (tokens,) = extract_features(encoder, images)
    torch.testing.assert_close(tokens.patch_tokens, model.vitreg(images).patch_tokens)
    (keys,) = extract_features(encoder, images, feature="key")
    (before,) = extract_features(encoder, images, layers=-2)
    attention = encoder.layers[-1].attention
    expected = linear(norm(before.patch_grid.permute(0, 3, 1, 2), attention.norm), attention.qkv).chunk(3, dim=1)[1]
    torch.testing.assert_close(keys.patch_grid, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_a_survey_measures_the_last_grid_and_says_what_it_leaves_out():
    from planted_models import pictures

    settings = SurveySettings(batch_size=4, num_ablation_images=4, has_progress_bar=False)
    encoder = load_encoder(make_model(depths=[1, 1, 1, 3], image_size=128))
    report, _ = survey(encoder, pictures(8)[0], settings=settings)
    assert report.architecture["layers"] == "the 3 blocks of the last of several grids" and len(report.layers) == 3
    assert report.attention["skipped"] == "the model has no class token and no registers"
    assert "blocks of class HATNetLayer have heads of maps, which are not read" in report.sinks["skipped"]


def test_a_training_run_reads_norms_on_the_last_grid_and_draws_no_attention(tmp_path):
    model, images = make_model(), torch.rand(2, 3, 64, 96)
    norms = token_norms(model, images)
    last = model.base_model(images, output_hidden_states=True).hidden_states[-1]  # [B, D, rows, columns]
    torch.testing.assert_close(norms.patches, last.norm(dim=1).flatten(1)[None])
    assert [layer["layer"] for layer in summarise_norms(norms)["layers"]] == [4]
    assert draw_attention(model, images, tmp_path / "attention.png", mean=[0.5] * 3, std=[0.5] * 3).stat().st_size

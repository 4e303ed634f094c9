"""The configuration: what it derives, what it refuses, and that it survives JSON."""

import contextlib
import inspect

import pytest

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersDualEncoderConfig
from modeling_vitreg.configuration_vitreg import SIZES


def test_prefix_is_class_token_then_distillation_token_then_registers(tiny):
    config = tiny(num_register_tokens=3, has_distillation_token=True)
    assert config.num_prefix_tokens == 5
    assert config.token_slices == {
        "cls": slice(0, 1),
        "distillation": slice(1, 2),
        "registers": slice(2, 5),
        "patches": slice(5, None),
    }


def test_presets_have_the_parameter_counts_of_the_field():
    # Widths, depths and heads as published; the giant is DINOv2's with a SwiGLU of width 4096.
    published = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
    published |= {"large": (1024, 24, 16), "huge": (1280, 32, 16), "giant": (1536, 40, 24)}
    for name in SIZES:
        config = ViTWithRegistersConfig.from_preset(f"{name}/14", num_register_tokens=1)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == published[name]
        assert (config.patch_size, config.num_register_tokens) == (14, 1)
    assert config.intermediate_size == 4096
    assert ViTWithRegistersConfig.from_preset("base").patch_size == 16


@pytest.mark.parametrize("name", ["medium", "base/x", "vit-base/16"])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"such as 'base/14' with a size of tiny, small, base, large, huge, giant"):
        ViTWithRegistersConfig.from_preset(name)


def test_sizes_may_be_pairs_of_rows_and_columns(tiny):
    config = tiny(image_size=(32, 48), patch_size=(8, 16))
    assert config.grid_shape == (4, 3)
    assert ViTWithRegistersConfig.from_dict(config.to_dict()).grid_shape == (4, 3)


def test_stochastic_depth_grows_with_depth_or_is_constant(tiny):
    assert tiny(drop_path_rate=0.2).drop_path_rates == pytest.approx([0.0, 0.1, 0.2])
    assert tiny(drop_path_rate=0.2, drop_path_schedule="constant").drop_path_rates == [0.2] * 3
    assert tiny(drop_path_rate=0.2, num_hidden_layers=1).drop_path_rates == [0.0]


def test_a_configuration_survives_json(tiny, tmp_path):
    config = tiny(
        position_embedding_type="rope",
        rope_rescale=2.0,
        hidden_act="swiglu",
        has_key_bias=False,
        out_indices=[1, -1],
        num_labels=7,
        layer_scale_init_value=1e-5,
    )
    config.save_pretrained(tmp_path)
    loaded = ViTWithRegistersConfig.from_pretrained(tmp_path)
    skipped = {"auto_map", "transformers_version", "_name_or_path"}
    before, after = ({k: v for k, v in c.to_dict().items() if k not in skipped} for c in (config, loaded))
    assert before == after
    assert loaded.out_features == ["stage1", "stage3"]
    assert loaded.out_indices == [1, 3]
    assert loaded.num_labels == 7


def test_a_stale_list_of_stages_in_a_file_does_not_win(tiny):
    settings = tiny().to_dict() | {"num_hidden_layers": 2, "out_features": None, "out_indices": None}
    assert ViTWithRegistersConfig.from_dict(settings).stage_names == ["stem", "stage1", "stage2"]


CONTRADICTIONS = [
    ({"rope_style": "capi"}, "rope_style='capi' needs position_embedding_type='rope'"),
    (
        {"rope_style": "capi", "position_embedding_type": "rope", "num_register_tokens": 6},
        "num_register_tokens to be a multiple of 4, got 6",
    ),
    (
        {"rope_style": "capi", "position_embedding_type": "rope", "rope_shift": 0.1},
        "rope_shift=0.1 needs rope_style='dinov3'",
    ),
    ({"norm_type": "batchnorm"}, "norm_type to be one of layernorm, rmsnorm, got 'batchnorm'"),
    ({"projection_size": 0}, "projection_size to be None or a positive integer, got 0"),
    ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
    ({"hidden_size": "32"}, "hidden_size to be a positive integer, got '32'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers to be a positive integer, got 0"),
    ({"num_register_tokens": -1}, "num_register_tokens to be 0 or a positive integer, got -1"),
    ({"num_register_tokens": True}, "num_register_tokens to be 0 or a positive integer, got True"),
    ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 8"),
    ({"patch_size": (8, 8, 8)}, "patch_size to be a positive integer or a pair"),
    ({"hidden_act": "relu"}, "hidden_act to be one of gelu, gelu_pytorch_tanh, quick_gelu, swiglu, got 'relu'"),
    (
        {"pooling": "max"},
        "pooling .* one of cls, mean, cls_mean, cls_distillation, cls_average, cls_concat, attention, prr, got 'max'",
    ),
    ({"has_cls_token": False}, "pooling='cls' reads the class token, but has_cls_token=False: use pooling='mean'"),
    (
        {"has_cls_token": False, "pooling": "mean", "has_distillation_token": True},
        "has_distillation_token=True needs has_cls_token=True",
    ),
    (
        {"has_cls_token": False, "pooling": "mean", "has_prefix_positions": True},
        "has_prefix_positions=True needs position_embedding_type='learned' and has_cls_token=True",
    ),
    ({"pooling": "cls_distillation"}, "pooling='cls_distillation' needs has_distillation_token=True"),
    ({"has_pooled_norm": True}, "has_pooled_norm=True needs pooling='mean', got 'cls'"),
    ({"num_classifier_layers": 4}, r"num_classifier_layers in 1 ... num_hidden_layers \(3\), got 4"),
    ({"num_classifier_layers": 2, "pooling": "mean"}, "num_classifier_layers=2 concatenates class tokens"),
    (
        {"position_embedding_type": "alibi"},
        "position_embedding_type to be one of learned, sincos, rope, learned_rope, none",
    ),
    ({"position_embedding_type": "rope", "has_prefix_positions": True}, "has_prefix_positions=True needs"),
    ({"position_embedding_type": "rope", "hidden_size": 12}, "'rope' needs a width per head divisible by 4"),
    ({"position_embedding_type": "sincos", "hidden_size": 6}, "'sincos' needs a hidden_size divisible by 4, got 6"),
    ({"rope_rescale": 2.0}, "rope_rescale=2.0 needs position_embedding_type='rope'"),
    ({"rope_jitter": 0.5, "position_embedding_type": "rope"}, "rope_jitter to be None or at least 1, got 0.5"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate in \[0, 1\), got 1.0"),
    ({"drop_path_schedule": "cosine"}, "drop_path_schedule to be one of linear, constant"),
    ({"drop_path_mode": "batch"}, "drop_path_mode to be one of sample, batch_subset"),
    ({"masked_target": "codes"}, "masked_target to be one of pixels, features"),
    ({"min_depth": 10.0}, "expected 0 < min_depth < max_depth, got min_depth 10.0 and max_depth 10.0"),
    ({"out_features": ["stage1"], "out_indices": [2]}, "name different stages: pass one of them"),
    ({"image_size": 32.0}, "image_size to be a positive integer or a pair .* got 32.0"),
    ({"image_size": True}, "image_size to be a positive integer or a pair"),
    ({"patch_size": "8"}, "patch_size to be a positive integer or a pair .* got '8'"),
    ({"num_hidden_layers": 99999999999}, "num_hidden_layers to be at most 1000, got 99999999999"),
    ({"hidden_size": None}, "hidden_size to be a positive integer, got None"),
    ({"num_depth_bins": 0}, "num_depth_bins to be a positive integer, got 0"),
    ({"masked_target_size": "wide"}, "masked_target_size to be a positive integer, got 'wide'"),
    ({"drop_path_rate": "0.1"}, "drop_path_rate to be a finite number, 0 or more, got '0.1'"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps to be a finite number, 0 or more, got nan"),
    ({"initializer_range": -1}, "initializer_range to be a finite number, 0 or more, got -1"),
    ({"max_depth": [10]}, r"max_depth to be a finite number, 0 or more, got \[10\]"),
    ({"layer_scale_init_value": "small"}, "layer_scale_init_value to be None or a finite number, got 'small'"),
    ({"register_neurons": [1]}, r"register_neurons to be a dictionary of lists of units, got \[1\]"),
    ({"out_indices": 3}, "out_indices to be None or a list of stages, got 3"),
    ({"out_indices": [1, "a"]}, "out_indices to be None or a list of stages"),
    ({"out_features": "stage1"}, "out_features to be None or a list of stages, got 'stage1'"),
    ({"num_labels": "3"}, "num_labels to be an integer, 0 or more, got '3'"),
    ({"id2label": ["a"]}, r"id2label to be a dictionary, got \['a'\]"),
    ({"has_cls_token": "yes"}, "has_cls_token to be true or false, got 'yes'"),
    ({"apply_layernorm": None}, "apply_layernorm to be true or false, got None"),
]


WRONG = [None, "x", 1.5, -1, [], [1, "a"], {}, {"a": 1}, True, float("nan"), 10**12]


@pytest.mark.parametrize("name", list(inspect.signature(ViTWithRegistersConfig).parameters)[:-1])
def test_a_value_of_any_type_is_taken_or_refused_in_words(tiny, name):
    for value in WRONG:
        with contextlib.suppress(ValueError):
            tiny(**{name: value})


@pytest.mark.parametrize("name", list(inspect.signature(ViTWithRegistersDualEncoderConfig).parameters)[:-1])
def test_a_value_of_a_dual_encoder_of_any_type_is_taken_or_refused_in_words(tiny, name):
    for value in WRONG:
        with contextlib.suppress(ValueError):
            ViTWithRegistersDualEncoderConfig(**{"vision_config": tiny(), name: value})
    with pytest.raises(ValueError, match="projection_dim to be a positive integer, got 0"):
        ViTWithRegistersDualEncoderConfig(tiny(), projection_dim=0)


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused_at_construction(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)

"""Every official layout in, and out again: the ledger balances, tokens are those of the reference, bytes return."""

import json
import math
import pathlib
import subprocess
import sys

import official_layouts as official
import pytest
import timm
import torch
import transformers
from reference_models import randomise
from safetensors.torch import load_file, save_file
from test_equal_to_transformers import build_mae
from test_remote_code import run_without_the_package
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.cli import app
from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert, export
from modeling_vitreg.conversion.layouts import describe_checkpoint, recognise
from modeling_vitreg.conversion.ledger import balance_to_target
from modeling_vitreg.conversion.plan import make_empty, short
from modeling_vitreg.conversion.sources import Source, open_source
from modeling_vitreg.conversion.verify import probe_images, probe_sizes
from modeling_vitreg.reports import ConversionReport, read_report


LIMIT = 1e-5
TWO_HEADS = {"num_attention_heads": 2}


def settle(**settings) -> ConversionSettings:
    return ConversionSettings(is_quiet=True, **settings)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def mae_state() -> dict:
    state = official.fill(official.mae(32, 2, patch=8, side=4))
    table = build_mae(
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    )
    return state | {"pos_embed": table.embeddings.position_embeddings.detach().clone()}


# File name, tensors as the official code saves them, the layout that it is, the reference.
OFFICIAL = {
    "dinov2": ("dinov2_vits14_pretrain.pth", lambda: official.fill(official.dinov2(32, 2, side=4)), "dinov2", "timm"),
    "dinov2 with registers": (
        "dinov2_vits14_reg4_pretrain.pth",
        lambda: official.fill(official.dinov2(32, 2, side=4, num_registers=4)),
        "dinov2",
        "timm",
    ),
    "dinov2 with swiglu": (
        "dinov2_vitg14_reg4_pretrain.pth",
        lambda: official.fill(official.dinov2(32, 2, side=4, num_registers=4, gated_hidden=88)),
        "dinov2",
        "timm",
    ),
    "dinov2 while training": (
        "teacher_checkpoint.pth",
        lambda: {
            "teacher": {
                # Chunks of one layer; the number of the layer stays.
                **{
                    f"module.backbone.{name}".replace("blocks.", "_fsdp_wrapped_module.blocks.")
                    .replace("blocks.1.", "blocks.1.1.")
                    .replace("blocks.0.", "blocks.0.0."): tensor
                    for name, tensor in official.fill(official.dinov2(32, 2, side=4, num_registers=4)).items()
                },
                "dino_head.mlp.0.weight": torch.ones(3),
                "ibot_head.last_layer.weight_g": torch.ones(3),
            }
        },
        "dinov2",
        "timm",
    ),
    "dino": (
        "dino_deitsmall8_pretrain.pth",
        lambda: official.fill(official.dino(32, 2, patch=8, side=4)),
        "dino",
        "timm",
    ),
    "dino while training": (
        "checkpoint.pth",
        lambda: {
            "student": {"module.backbone.cls_token": torch.ones(1)},
            "teacher": {
                **{f"backbone.{k}": v for k, v in official.fill(official.dino(32, 2, patch=8, side=4)).items()},
                "head.mlp.0.weight": torch.ones(2, 2),
            },
            "epoch": 3,
        },
        "dino",
        "timm",
    ),
    "deit": (
        "deit_small_patch16_224.pth",
        lambda: {"model": official.fill(official.deit(32, 2, patch=8, side=4, num_classes=5))},
        "deit",
        "timm",
    ),
    "deit distilled": (
        "deit_small_distilled_patch16_224.pth",
        lambda: {"model": official.fill(official.deit(32, 2, patch=8, side=4, num_classes=5, is_distilled=True))},
        "deit",
        "timm",
    ),
    "deit-iii": (
        "deit_3_small_224_1k.pth",
        lambda: {"model": official.fill(official.deit3(32, 2, patch=8, side=4, num_classes=5))},
        "deit",
        "timm",
    ),
    "mae": ("mae_pretrain_vit_base.pth", lambda: {"model": mae_state()}, "mae", "timm"),
    "dinov3": (
        "dinov3_vits16_pretrain_lvd1689m.pth",
        lambda: official.fill(official.dinov3(32, 2, heads=2, patch=8)),
        "dinov3",
        "timm",
    ),
    "dinov3 with gated mlp": (
        "dinov3_vits16plus_pretrain_lvd1689m.pth",
        lambda: official.fill(official.dinov3(32, 2, heads=2, patch=8, gated_hidden=64)),
        "dinov3",
        "timm",
    ),
    "dinov3 7b": (
        "dinov3_vit7b16_pretrain_sat493m.pth",
        lambda: official.fill(
            official.dinov3(32, 2, heads=2, patch=8, gated_hidden=64, has_bias=False, is_untied=True)
        ),
        "dinov3",
        "timm",
    ),
    "capi": ("capi_vitl14_lvd.pth", lambda: official.fill(official.capi(32, 2, heads=2)), "capi", None),
    "open_clip": (
        "open_clip_pytorch_model.bin",
        lambda: official.fill(official.clip(32, 2, patch=8, side=4)),
        "clip",
        "open_clip",
    ),
    "open_clip with quick gelu": (
        "vit-b-16-quickgelu.pt",
        lambda: official.fill(official.clip(32, 2, patch=8, side=4, has_text=False)),
        "clip",
        "open_clip",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_file_becomes_a_folder_with_the_tokens_of_the_reference(name, tmp_path, record_property):
    file_name, make, layout, reference = OFFICIAL[name]
    torch.save(make(), tmp_path / file_name)
    report = convert(tmp_path / file_name, tmp_path / "out", settings=settle(config_overrides=TWO_HEADS))
    assert report.source["layout"] == layout
    assert read_report(tmp_path / "out" / "conversion.json", kind=ConversionReport) == report
    if reference is None:
        assert not report.verification["is_verified"] and "--code" in report.verification["why"]
    else:
        assert report.verification["is_verified"] and report.verification["reference"].startswith(reference)
        assert len(report.verification["sizes"]) >= 2 and any(
            rows != columns for rows, columns in report.verification["sizes"]
        )
        assert report.verification["largest_relative_error"] <= LIMIT
        record_property("largest_relative_error", report.verification["largest_relative_error"])
    assert {"num_attention_heads", "layer_norm_eps"} & set(report.source["assumed"]) <= {
        "layer_norm_eps",
        "num_attention_heads",
    }


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
TIMM = [
    "vit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_medium_patch16_reg4_gap_256",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
]


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_comes_in_from_memory_and_from_a_file_and_goes_out_with_the_same_bytes(name, tmp_path):
    theirs = randomise(timm.create_model(name, **SMALL, dynamic_img_size=True))
    from_memory = convert(theirs, tmp_path / "in", settings=settle())
    assert from_memory.verification["is_verified"] and "logits" in next(
        iter(from_memory.verification["errors"].values())
    )
    save_file(theirs.state_dict(), tmp_path / f"{name}.safetensors")
    from_file = convert(
        tmp_path / f"{name}.safetensors", tmp_path / "file", settings=settle(config_overrides=TWO_HEADS)
    )
    assert from_file.source["layout"] == "timm" and from_file.verification["is_verified"]

    report = export(tmp_path / "in", tmp_path / "out", to="timm", settings=settle())
    assert report.verification["is_verified"]
    written, original = load_file(tmp_path / "out" / "model.safetensors"), theirs.state_dict()
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    again = timm.create_model(settings["architecture"], num_classes=5, **settings["model_args"]).eval()
    again.load_state_dict(written, strict=True)
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert_bytes_return(tmp_path / "in", tmp_path / "out", tmp_path / "again")


def assert_bytes_return(first, written, again, **settings) -> None:
    """What went out comes in again, tensor by tensor."""
    convert(written, again, settings=settle(**settings))
    before, after = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 80}
TRANSFORMERS = {
    "ViTModel": {**MLP},
    "ViTForImageClassification": {**MLP, "num_labels": 5},
    "DeiTModel": {**MLP},
    "DeiTForImageClassification": {**MLP, "num_labels": 5},
    "DeiTForImageClassificationWithTeacher": {**MLP, "num_labels": 5},
    "Dinov2Model": {"use_swiglu_ffn": True},
    "Dinov2ForImageClassification": {"num_labels": 5},
    "Dinov2WithRegistersModel": {},
    "Dinov2WithRegistersForImageClassification": {"num_labels": 5, "use_swiglu_ffn": True},
    "DINOv3ViTModel": {**MLP, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    "CLIPVisionModel": {**MLP},
    "CLIPVisionModelWithProjection": {**MLP, "projection_dim": 6},
    "ViTMAEModel": {**MLP},
    "ViTMAEForPreTraining": {**MLP},
    "IJepaModel": {**MLP},
    "IJepaForImageClassification": {**MLP, "num_labels": 5},
}
ONE_WAY = ("ViTMAEModel", "ViTMAEForPreTraining")


def make_transformers(name: str) -> torch.nn.Module:
    kind = getattr(transformers, name)
    model = randomise(kind(kind.config_class(**SIZES, **TRANSFORMERS[name])))
    if name in ONE_WAY:
        embeddings = getattr(model, "vit", model).embeddings
        embeddings.patch_embeddings.projection._is_hf_initialized = False
        embeddings.initialize_weights()
    return model


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_folder_of_transformers_comes_in_with_both_sets_of_names_and_goes_out_with_the_same_bytes(name, tmp_path):
    model = make_transformers(name)
    model.save_pretrained(tmp_path / "disk")
    report = convert(tmp_path / "disk", tmp_path / "in", settings=settle())
    assert report.verification["is_verified"] and report.verification["largest_relative_error"] <= LIMIT

    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "config.json").write_text((tmp_path / "disk" / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    assert_bytes_return(tmp_path / "in", tmp_path / "memory", tmp_path / "again")
    if name in ONE_WAY:
        return
    if name == "CLIPVisionModel" and transformers.__version__.startswith("4."):
        with pytest.raises(ConversionError, match="another version of transformers may use other names"):
            export(tmp_path / "in", tmp_path / "out", to="transformers", settings=settle())
        return
    report = export(tmp_path / "in", tmp_path / "out", to="transformers", settings=settle())
    assert report.verification["is_verified"]
    written, original = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "disk" / "model.safetensors"),
    )
    left = {key for key in original if "pooler" in key or (key.endswith("mask_token") and "For" in name)}
    assert written.keys() == original.keys() - left
    for key in written:
        # DINOv3 has no bias on its keys, CLIP and tokens other shapes: names, shapes and bytes are theirs.
        assert torch.equal(written[key], original[key]), key
    assert_bytes_return(tmp_path / "in", tmp_path / "out", tmp_path / "back")


def test_the_image_tower_of_a_whole_clip_comes_in_and_the_text_tower_stays(tmp_path):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPConfig(vision_config={**SIZES, **MLP}, text_config=text, projection_dim=6)
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "clip")
    report = convert(tmp_path / "clip", tmp_path / "in", settings=settle())
    assert set(report.ledger["dropped"].values()) == {"not part of the image tower"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = ViTWithRegistersModel.from_pretrained(tmp_path / "in")(images).image_embeds
        vision = model.vision_model(images)
        theirs = model.visual_projection(vision.pooler_output)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_names_of_classes_and_the_image_processor_come_along(tmp_path):
    config = transformers.ViTConfig(**SIZES, **MLP, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2}
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    convert(tmp_path / "vit", tmp_path / "in", settings=settle())
    assert ViTWithRegistersConfig.from_pretrained(tmp_path / "in").id2label == {0: "cat", 1: "dog"}
    saved = json.loads((tmp_path / "in" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "BitImageProcessor"
    assert (saved["image_mean"], saved["resample"], saved["do_center_crop"]) == ([0.1, 0.2, 0.3], 2, False)


@pytest.mark.parametrize(
    ("name", "mean", "crop"),
    [
        ("dinov2", 0.485, {"shortest_edge": 256}),
        ("deit-iii", 0.485, {"shortest_edge": 32}),
        ("open_clip", 0.48145466, {"shortest_edge": 32}),
        ("dinov3 7b", 0.430, {"height": 224, "width": 224}),
    ],
)
def test_images_are_prepared_as_the_family_does(name, mean, crop, tmp_path):
    file_name, make, _, _ = OFFICIAL[name]
    torch.save(make(), tmp_path / file_name)
    convert(
        tmp_path / file_name, tmp_path / "out", settings=settle(config_overrides=TWO_HEADS, skip_verification=True)
    )
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert saved["image_mean"][0] == mean and saved["size"] == crop and saved["resample"] == 3


def test_merging_is_set_after_the_tokens_were_compared(tmp_path):
    file_name, make, _, _ = OFFICIAL["dinov2 with registers"]
    torch.save(make(), tmp_path / file_name)
    chosen = TWO_HEADS | {"token_reduction": {"kind": "merge", "per_layer": 3}}
    report = convert(tmp_path / file_name, tmp_path / "out", settings=settle(config_overrides=chosen))
    assert report.verification["is_verified"]
    assert report.verification["notes"] == ["compared without token_reduction, which was set afterwards"]
    merging = ViTWithRegistersModel.from_pretrained(tmp_path / "out").eval()
    assert merging(torch.randn(1, 3, 28, 56)).reduction.token_sizes.shape[1] < 8
    with pytest.raises(ConversionError, match="cannot represent token_reduction"):
        export(tmp_path / "out", tmp_path / "timm", to="timm", settings=settle())
    chosen["token_reduction"] = {"kind": "merge", "per_layer": 10_000}
    with pytest.raises(ConversionError, match="which leaves none"):
        convert(tmp_path / file_name, tmp_path / "none", settings=settle(config_overrides=chosen))
    assert not (tmp_path / "none").exists()


# Out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2", "dinov2 with registers", "dinov2 with swiglu"])
def test_dinov2_goes_out_with_the_bytes_of_the_official_file(name, tmp_path):
    file_name, make, _, _ = OFFICIAL[name]
    state = make()
    torch.save(state, tmp_path / file_name)
    convert(tmp_path / file_name, tmp_path / "in", settings=settle(config_overrides=TWO_HEADS))
    report = export(tmp_path / "in", tmp_path / "model.pth", to="dinov2", settings=settle())
    assert report.verification["is_verified"] and report.verification["reference"].startswith("timm")
    assert read_report(tmp_path / "model.conversion.json", kind=ConversionReport) == report
    written = torch.load(tmp_path / "model.pth", weights_only=True)
    assert written.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(written[key], tensor), key


def test_registers_with_the_positions_of_a_class_token_go_out_to_timm_folded(tmp_path):
    torch.save(official.fill(official.dinov2(32, 2, side=4, num_registers=4)), tmp_path / "dinov2_reg.pth")
    convert(tmp_path / "dinov2_reg.pth", tmp_path / "in", settings=settle(config_overrides=TWO_HEADS))
    report = export(tmp_path / "in", tmp_path / "out", to="timm", settings=settle())
    assert report.verification["is_verified"] and report.ledger["dropped"] == {
        "embeddings.mask_token": "the layout has no mask token"
    }
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["pos_embed"].shape == (1, 16, 32)


def test_our_own_model_goes_out_to_every_layout_that_has_its_architecture(tiny, tmp_path):
    model = randomise(ViTWithRegistersModel(tiny(layer_scale_init_value=1.0, num_register_tokens=3)))
    model.save_pretrained(tmp_path / "ours")
    for to in ("dinov2.pth", "timm", "transformers"):
        assert export(tmp_path / "ours", tmp_path / to, to=to.split(".")[0], settings=settle()).verification[
            "is_verified"
        ]


@pytest.mark.parametrize(
    ("fields", "to", "field"),
    [
        ({"position_embedding_type": "rope"}, "dinov2", "position_embedding_type='rope'"),
        ({}, "dinov2", "layer_scale_init_value=None"),
        ({"layer_norm_eps": 1e-5, "layer_scale_init_value": 1.0}, "dinov2", "layer_norm_eps=1e-05"),
        ({"hidden_act": "quick_gelu", "layer_scale_init_value": 1.0}, "dinov2", "hidden_act='quick_gelu'"),
        ({"has_pre_norm": True, "has_patch_bias": False, "layer_scale_init_value": 1.0}, "dinov2", "has_pre_norm"),
        ({"norm_type": "rmsnorm"}, "timm", "norm_type='rmsnorm'"),
        ({"position_embedding_type": "none"}, "timm", "position_embedding_type='none'"),
        ({}, "transformers", "num_register_tokens=4"),
        ({"projection_size": 7}, "timm", "projection_size"),
        ({"num_register_tokens": 0, "norm_type": "rmsnorm"}, "transformers", "norm_type='rmsnorm'"),
    ],
)
def test_an_architecture_that_a_layout_lacks_is_refused_by_the_name_of_the_field(tiny, tmp_path, fields, to, field):
    ViTWithRegistersModel(tiny(**fields)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=field.replace("(", r"\(")):
        export(tmp_path / "ours", tmp_path / ("out.pth" if to == "dinov2" else "out"), to=to, settings=settle())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_linear_classifier_of_dinov2_reads_class_tokens_and_the_mean_of_patches(num_layers, tmp_path):
    state = official.fill(official.dinov2(32, 4, side=4, num_registers=4))
    head = {"weight": torch.randn(7, 32 * (1 + num_layers)), "bias": torch.randn(7)}
    torch.save(state, tmp_path / "dinov2.pth")
    torch.save(head, tmp_path / "head.pth")
    convert(
        tmp_path / "dinov2.pth",
        tmp_path / "in",
        settings=settle(config_overrides=TWO_HEADS, head=tmp_path / "head.pth"),
    )
    convert(tmp_path / "dinov2.pth", tmp_path / "base", settings=settle(config_overrides=TWO_HEADS))
    images = torch.randn(2, 3, 56, 70)
    base = ViTWithRegistersModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "in")(images).logits
        output = base(images, output_hidden_states=True)
        read = [base.layernorm(state)[:, 0] for state in output.hidden_states[-num_layers:]]
        expected = torch.cat([*read, output.patch_tokens.mean(dim=1)], dim=1) @ head["weight"].T + head["bias"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dense_heads_of_dinov2_come_in(tmp_path):
    torch.save(official.fill(official.dinov2(32, 12, side=4)), tmp_path / "dinov2.pth")
    depth = {
        "decode_head.conv_depth.weight": torch.randn(256, 256, 1, 1),
        "decode_head.conv_depth.bias": torch.randn(256),
    }
    norm = {f"decode_head.bn.{name}": torch.rand(128) for name in ("weight", "bias", "running_mean", "running_var")}
    norm["decode_head.bn.num_batches_tracked"] = torch.tensor(3)
    segments = {"decode_head.conv_seg.weight": torch.randn(5, 128, 1, 1), "decode_head.conv_seg.bias": torch.randn(5)}
    found = {}
    for name, head in {"depth": depth, "segments": segments | norm}.items():
        torch.save({"state_dict": head, "meta": {"CLASSES": ["a"]}}, tmp_path / f"{name}.pth")
        settings = settle(config_overrides=TWO_HEADS, head=tmp_path / f"{name}.pth", skip_verification=True)
        found[name] = convert(tmp_path / "dinov2.pth", tmp_path / name, settings=settings).target["class"]
    assert found == {
        "depth": "ViTWithRegistersForDepthEstimation",
        "segments": "ViTWithRegistersForSemanticSegmentation",
    }
    config = ViTWithRegistersConfig.from_pretrained(tmp_path / "depth")
    assert config.out_indices == [3, 6, 9, 12] and config.max_depth == 80.0
    assert ViTWithRegistersConfig.from_pretrained(tmp_path / "segments").out_indices == [9, 10, 11, 12]


def test_a_head_of_another_backbone_is_refused(tmp_path):
    torch.save(official.fill(official.dinov2(32, 2, side=4)), tmp_path / "dinov2.pth")
    torch.save({"weight": torch.randn(7, 100), "bias": torch.randn(7)}, tmp_path / "head.pth")
    with pytest.raises(ConversionError, match=r"no linear head of a backbone of width 32"):
        convert(
            tmp_path / "dinov2.pth",
            tmp_path / "in",
            settings=settle(config_overrides=TWO_HEADS, head=tmp_path / "head.pth"),
        )


# Official sizes ------------------------------------------------------------------------------------------------------

# Shapes, settings of ours that they must give, and the published number of parameters where one is.
PUBLISHED = {
    "dinov2_vits14": (official.dinov2(384, 12), {"num_attention_heads": 6}, 22_056_576),
    "dinov2_vitb14_reg4": (official.dinov2(768, 12, num_registers=4), {"num_attention_heads": 12}, None),
    "dinov2_vitl14": (official.dinov2(1024, 24), {"num_attention_heads": 16}, None),
    "dinov2_vitg14_reg4": (
        official.dinov2(1536, 40, num_registers=4, gated_hidden=4096),
        {"num_attention_heads": 24, "hidden_act": "swiglu"},
        1_136_486_912,
    ),
    "dino_vitbase8": (official.dino(768, 12, patch=8, side=28), {"num_attention_heads": 12, "patch_size": 8}, None),
    "deit_base_distilled": (official.deit(768, 12, is_distilled=True), {"num_labels": 1000}, 87_338_192),
    "deit_3_base": (official.deit3(768, 12), {"has_prefix_positions": False}, 86_585_320),
    "deit_3_huge": (official.deit3(1280, 32, patch=14, side=16), {"num_attention_heads": 16}, None),
    "dinov3_vits16plus": (
        official.dinov3(384, 12, heads=6, gated_hidden=1536),
        {"num_attention_heads": 6, "hidden_act": "swiglu"},
        None,
    ),
    "dinov3_vith16plus": (official.dinov3(1280, 32, heads=20, gated_hidden=5120), {"num_attention_heads": 20}, None),
    "dinov3_vit7b16": (
        official.dinov3(4096, 40, heads=32, gated_hidden=8192, has_bias=False, is_untied=True),
        {"num_attention_heads": 32, "has_query_bias": False},
        None,
    ),
    "capi_vitl14": (official.capi(1024, 24, heads=16), {"num_attention_heads": 16, "norm_type": "rmsnorm"}, None),
    "clip_vitb16": (official.clip(768, 12), {"num_attention_heads": 12, "projection_size": 512}, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ledger_of_an_official_size_balances(name):
    shapes, fields, num_parameters = PUBLISHED[name]
    small = official.fill({key: shape for key, shape in shapes.items() if math.prod(shape) < 50_000})
    source = Source(
        path=pathlib.Path(f"{name}_pretrain.pth"),
        shapes=shapes,
        read=lambda key: small.get(key, torch.ones(shapes[key])),
        num_bytes=0,
        files=[pathlib.Path("x.pth")],
        checkpoint_key="model" if name.startswith("deit") else None,
    )
    layout = recognise(source)
    info = describe_checkpoint(source, layout)
    config = ViTWithRegistersConfig(**layout.configure(info))
    assert {key: getattr(config, key) for key in fields} == fields
    kind = transformers.AutoModelForImageClassification if config.num_labels == 1000 else transformers.AutoModel
    with torch.device("meta"):
        model = kind.from_config(config)
    targets = {short(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ledger = balance_to_target(layout.rules(config), info.shapes, targets, title=name)
    assert ledger.num_used + len(ledger.dropped) == len(shapes)
    if num_parameters is not None:
        assert sum(map(math.prod, shapes.values())) == num_parameters


# In use --------------------------------------------------------------------------------------------------------------


def test_a_converted_folder_gives_the_reference_in_a_process_without_the_package(tmp_path):
    theirs = make_transformers("Dinov2WithRegistersModel")
    theirs.save_pretrained(tmp_path / "disk")
    convert(tmp_path / "disk", tmp_path / "in", settings=settle())
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    save_file({"images": images, "expected": expected}, tmp_path / "pair.safetensors")
    run = run_without_the_package(
        """
        from safetensors.torch import load_file
        pair = load_file("pair.safetensors")
        model = transformers.AutoModel.from_pretrained("in", trust_remote_code=True)
        with torch.no_grad():
            found = model(pair["images"]).last_hidden_state
        print((found - pair["expected"]).abs().max().item() / pair["expected"].abs().max().item())
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= LIMIT


def test_the_command_tells_what_it_did_and_what_to_type_next(tmp_path, monkeypatch):
    torch.save(official.fill(official.dinov3(32, 2, heads=2, patch=8)), tmp_path / "dinov3.pth")
    command = [sys.executable, "-m", "modeling_vitreg", "convert", "dinov3.pth", "out"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "source tensors accounted for" in first.stdout and "verified against timm" in first.stdout
    assert 'AutoModel.from_pretrained("out", trust_remote_code=True)' in first.stdout
    assert "verification" in first.stderr  # a bar
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(app, ["convert", *arguments])

    second = run("dinov3.pth", "out")
    assert second.exit_code == 1 and "exists and is not empty" in second.output and "Traceback" not in second.output
    third = run("out", "theirs", "--to", "transformers")
    assert third.exit_code == 0 and "verified against transformers" in third.output
    assert "NOT VERIFIED" in run("dinov3.pth", "skipped", "--no-verify").output
    assert run("missing.pth", "x").exit_code == 1


def test_a_verification_that_fails_saves_nothing(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, **MLP))
    randomise(model).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConversionError, match=r"differs from transformers .* by more than 1e-05(.|\n)*patch_tokens"):
        convert(tmp_path / "vit", tmp_path / "in", settings=settle(config_overrides={"hidden_act": "quick_gelu"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit"]


def test_probe_images_are_photographs_at_the_size_of_the_table_and_at_oblong_ones(tiny):
    config = tiny()
    sizes = probe_sizes(config)
    assert sizes[0] == (32, 32) and all(rows != columns for rows, columns in sizes[1:])
    images = probe_images(config, sizes[1])
    assert images.shape == (3, 3, *sizes[1]) and torch.equal(images, probe_images(config, sizes[1]))


def test_what_a_file_claims_to_be_may_be_stated(tmp_path):
    torch.save(official.fill(official.dino(32, 2, patch=8, side=4)), tmp_path / "model.pth")
    assert recognise(open_source(tmp_path / "model.pth")).name == "dino"
    report = convert(
        tmp_path / "model.pth", tmp_path / "in", settings=settle(config_overrides=TWO_HEADS, family="timm")
    )
    assert report.source["layout"] == "timm"
    assert ViTWithRegistersConfig.from_pretrained(tmp_path / "in").interpolate_antialias
    with pytest.raises(ConversionError, match=r"expected a family out of dinov2, .*, got 'dinov9'"):
        convert(tmp_path / "model.pth", tmp_path / "x", settings=settle(family="dinov9"))


def test_heads_that_no_shape_shows_are_asked_for(tmp_path):
    torch.save(official.fill(official.dino(48, 2, patch=8, side=4)), tmp_path / "dino.pth")
    with pytest.raises(ConversionError, match=r"no well-known model has width 48.*--set num_attention_heads="):
        convert(tmp_path / "dino.pth", tmp_path / "in", settings=settle())


def test_make_empty_takes_no_memory(tiny):
    model = make_empty(ViTWithRegistersModel, tiny(hidden_size=4096, num_hidden_layers=40, num_attention_heads=32))
    assert all(parameter.is_meta for parameter in model.parameters())

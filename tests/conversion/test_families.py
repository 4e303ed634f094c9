"""Families with architectures of their own: every token of every layer is the reference's, and bytes go in and out.

Models are small and have random values in every parameter. A model goes in from memory, ours is compared with it layer
by layer at three image sizes, goes out again, and every tensor has the bytes that it had.
"""

import dataclasses
import inspect
import json
import types

import pytest
import timm
import torch
import transformers
from reference_models import assert_small, randomise, relative_error
from safetensors.torch import load_file

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert, export


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
IMAGES = ((32, 32), (24, 40), (56, 40))
QUIET = ConversionSettings(is_quiet=True)


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of transformers.

    Args:
        name: name of the class.
        fields: its settings beside the sizes.
        back: class that the model goes out as; None for the same.
        images: sizes of images.
        lost: beginnings of names of tensors that do not come back.
    """

    name: str
    fields: dict = dataclasses.field(default_factory=dict)
    back: str | None = None
    images: tuple = IMAGES
    lost: tuple = ()


MLP = {"intermediate_size": 80}
FAMILIES = {
    "SigLIP": Family("SiglipVisionModel", {**MLP, "hidden_act": "gelu_pytorch_tanh"}),
    "DINOv3 without registers": Family("DINOv3ViTModel", {**MLP, "num_register_tokens": 0}),
    "SigLIP without head": Family("SiglipVisionModel", {**MLP, "vision_use_head": False}, back="IJepaModel"),
    "MetaCLIP 2": Family("MetaClip2VisionModel", MLP, back="CLIPVisionModel"),
    "MetaCLIP 2 with projection": Family(
        "MetaClip2VisionModelWithProjection", {**MLP, "projection_dim": 6}, back="CLIPVisionModelWithProjection"
    ),
    "AltCLIP": Family("AltCLIPVisionModel", MLP, back="CLIPVisionModel"),
    "Chinese CLIP": Family("ChineseCLIPVisionModel", MLP, back="CLIPVisionModel"),
    "ViT-MSN": Family("ViTMSNModel", MLP, back="ViTModel"),
    "ViT-MSN classifier": Family(
        "ViTMSNForImageClassification", {**MLP, "num_labels": 5}, back="ViTForImageClassification"
    ),
    "AIMv2": Family("Aimv2VisionModel", MLP, images=((32, 32),)),
    "AIMv2 without head": Family("Aimv2VisionModel", {**MLP, "use_head": False}, images=((32, 32),)),
    "BEiT": Family("BeitModel", {**MLP, "use_relative_position_bias": True, "layer_norm_eps": 1e-6}),
    "BEiT classifier": Family(
        "BeitForImageClassification", {**MLP, "use_relative_position_bias": True, "num_labels": 5}
    ),
    "BEiT with a shared bias": Family(
        "BeitModel",
        {**MLP, "use_shared_relative_position_bias": True, "use_mean_pooling": False, "use_mask_token": True},
    ),
    "BEiT with positions": Family(
        "BeitModel", {**MLP, "use_relative_position_bias": True, "use_absolute_position_embeddings": True}
    ),
    "data2vec": Family("Data2VecVisionModel", {**MLP, "use_relative_position_bias": True}),
    "TIPSv2": Family("Tipsv2VisionModel"),
    "TIPSv2 with SwiGLU": Family("Tipsv2VisionModel", {"use_swiglu_ffn": True}),
    "Pixio": Family("PixioModel", {"n_cls_tokens": 3}),
    "RADIO": Family("RadioModel", {"max_img_size": 64}),
    "Sapiens2": Family("Sapiens2Model", {**MLP, "num_key_value_heads_per_layer": [2, 1]}),
    "Sapiens2 without key bias": Family("Sapiens2Model", {**MLP, "key_bias": False, "use_mask_token": True}),
}


def make(family: Family) -> torch.nn.Module:
    if not hasattr(transformers, family.name):
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    kind = getattr(transformers, family.name)
    return randomise(kind(kind.config_class(**SIZES, **family.fields)))


def layers_of(module: torch.nn.Module) -> list:
    """Layers of a model of transformers or timm."""
    return next(
        list(part)
        for name, part in module.named_modules()
        if isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential))
        and name.rpartition(".")[2] in ("layers", "layer", "blocks")
    )


def states_of(module: torch.nn.Module, images: torch.Tensor) -> tuple[list, object]:
    """The input of the first layer, the output of every layer, and the output of the model."""
    layers, states = layers_of(module), []
    handles = [layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))]
    first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    handles += [layer.register_forward_hook(lambda _, __, value: states.append(first(value))) for layer in layers]
    if type(module).__name__ == "RadioModel":  # it norms the images itself
        images = images * module.input_conditioner.norm_std + module.input_conditioner.norm_mean
    takes = inspect.signature(module.forward).parameters
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    try:
        output = module(images, **options)
    finally:
        for handle in handles:
            handle.remove()
    return states, output


def load(folder) -> torch.nn.Module:
    is_classifier = "Classification" in json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = ViTWithRegistersForImageClassification if is_classifier else ViTWithRegistersModel
    return kind.from_pretrained(folder).eval()


def compare(ours, theirs, sizes: tuple, record_property) -> None:
    errors = {}
    with torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
            states, output = states_of(theirs, images)
            own = ours(images, output_hidden_states=True)
            assert len(own.hidden_states) == len(states)
            for number, (mine, state) in enumerate(zip(own.hidden_states, states)):
                errors[f"hidden state {number} at {size}"] = relative_error(mine, state)
            if isinstance(output, torch.Tensor):
                name = "logits" if "logits" in own else "pooler_output"
                output = types.SimpleNamespace(**{name: output})
            pooled = getattr(output, "summary", getattr(output, "pooler_output", None))
            if getattr(output, "logits", None) is not None:
                errors[f"logits at {size}"] = relative_error(own.logits, output.logits)
            elif pooled is not None and not hasattr(theirs, "pooler"):
                errors[f"pooled at {size}"] = relative_error(own.pooler_output, pooled)
    assert_small(errors, record_property)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_transformers_goes_in_from_memory_and_out_with_its_bytes(name, tmp_path, record_property):
    family = FAMILIES[name]
    theirs = make(family)
    report = convert(theirs, tmp_path / "in", settings=QUIET)
    assert report.verification["is_verified"] and report.source["path"] == family.name
    assert len(report.verification["sizes"]) == (3 if len(family.images) == 3 else 1)
    ours = load(tmp_path / "in")
    compare(ours, theirs, family.images, record_property)

    if transformers.__version__.startswith("4.") and (family.back or family.name).endswith(
        ("IPVisionModel", "SiglipVisionModel")
    ):
        with pytest.raises(ConversionError, match="another version of transformers may use other names"):
            export(tmp_path / "in", tmp_path / "out", to="transformers", settings=QUIET)
        return
    report = export(tmp_path / "in", tmp_path / "out", to="transformers", settings=QUIET)
    assert report.verification["is_verified"]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == [family.back or family.name]
    theirs.save_pretrained(tmp_path / "theirs")
    written, original = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    if family.back is None:
        assert written.keys() == {key for key in original if not key.startswith(family.lost)}
        assert all(torch.equal(written[key], original[key]) for key in written)
    convert(tmp_path / "out", tmp_path / "back", settings=QUIET)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "back"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
WHOLE = {"Siglip": {}, "MetaClip2": {"eos_token_id": 2}, "Aimv2": {}, "AltCLIP": {}, "Tipsv2": {}}


@pytest.mark.parametrize("name", WHOLE)
def test_the_image_tower_of_a_model_with_text_comes_in_without_the_name_of_a_class(name, tmp_path):
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    vision = SIZES if name == "Tipsv2" else {**SIZES, **MLP}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config={**TEXT, **WHOLE[name]})
    randomise(getattr(transformers, f"{name}Model")(config)).save_pretrained(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    del settings["architectures"]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(settings))
    report = convert(tmp_path / "whole", tmp_path / "in", settings=QUIET)
    assert report.verification["is_verified"]
    assert set(report.ledger["dropped"].values()) == {"not part of the image tower"}


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
GRID = {"ref_feat_shape": (3, 3)}
# Names of timm with the arguments that make them small.
TIMM = {
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_so400m_patch16_siglip_256": {"mlp_ratio": 2.5},
    "vit_base_patch16_radio_v3": {},
    "vit_base_patch14_reg1_tipsv2": {},
    "vit_base_patch14_reg4_dinov2": {"global_pool": "prr"},
    "aimv2_large_patch14_224": {},
    "vit_base_patch16_224": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "vit_base_patch16_sapiens2": {"num_kv_heads": (2, 1)},
    "vit_pe_core_tiny_patch16_384": {**GRID, "attn_pool_num_heads": 4},
    "vit_pe_spatial_small_patch16_512": GRID,
    "vit_pe_spatial_gigantic_patch14_448": {**GRID, "mlp_ratio": 3.0},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_base_patch16_rope_reg1_gap_256": GRID,
    "eva02_tiny_patch14_224": GRID,
    "eva02_large_patch14_224": GRID,
    "eva02_base_patch16_clip_224": GRID,
    "eva_giant_patch14_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
}


def make_timm(name: str) -> torch.nn.Module:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    options = {} if name.startswith("beit") else {"dynamic_img_size": True}
    if TIMM[name].get("global_pool") == "prr" and not hasattr(timm.layers, "AttentionPoolPrr"):
        pytest.skip(f"timm {timm.__version__} has no pooling prr")
    theirs = randomise(timm.create_model(name, **SMALL, **options, **TIMM[name]))
    if any("relative_position_index" in key for key in theirs.state_dict()):
        pytest.skip("this version of timm saves the numbers of the offsets")
    return theirs


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_goes_in_from_memory_and_out_with_its_bytes(name, tmp_path, record_property):
    theirs, is_fixed = make_timm(name), name.startswith("beit")
    report = convert(theirs, tmp_path / "in", settings=QUIET)
    assert report.verification["is_verified"] and len(report.verification["sizes"]) == (1 if is_fixed else 3)
    ours = load(tmp_path / "in")
    if ours.config.has_position_table:  # timm resizes them so, whatever RADIO and TIPSv2 do
        ours.config.interpolate_mode, ours.config.interpolate_antialias = "bicubic", True
    compare(ours, theirs, ((32, 32),) if is_fixed else IMAGES, record_property)

    report = export(tmp_path / "in", tmp_path / "out", to="timm", settings=QUIET)
    assert report.verification["is_verified"]
    written, original = load_file(tmp_path / "out" / "model.safetensors"), theirs.state_dict()
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in written)
    convert(tmp_path / "out", tmp_path / "back", settings=QUIET)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "back"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_a_converted_model_gives_the_tokens_of_the_original_under_every_attention(name, tmp_path, record_property):
    theirs = make(FAMILIES[name]) if name in FAMILIES else make_timm(name)
    convert(theirs, tmp_path / "in", settings=QUIET)
    ours = load(tmp_path / "in")
    for implementation in ("eager", "sdpa", "flex_attention"):
        ours.set_attn_implementation(implementation)
        if implementation == "flex_attention" and ours.config.relative_position_bias:
            with pytest.raises(ValueError, match="needs attention 'eager' or 'sdpa', got 'flex_attention'"):
                ours(torch.zeros(1, 3, 32, 32))
            continue
        torch._dynamo.reset()
        for run in (ours, torch.compile(ours, fullgraph=True)):
            compare(run, theirs, ((32, 32),), record_property)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_small_patch16_18x2_224", "blocks of class ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "blocks of class ParallelScalingBlock"),
        ("eva02_enormous_patch14_clip_224", "blocks of class EvaBlockPostNorm"),
    ],
)
def test_a_model_of_timm_that_cannot_be_represented_names_the_part_in_the_way(name, part, tmp_path):
    try:
        theirs = timm.create_model(name, **SMALL)
    except TypeError as error:  # timm 1.0.20 passes its EVA-CLIP E an argument that it does not take
        pytest.skip(f"timm {timm.__version__} cannot make {name}: {error}")
    with pytest.raises(ConversionError, match=part):
        convert(theirs, tmp_path / "in", settings=QUIET)


@pytest.mark.parametrize(
    ("name", "sizes", "part"),
    [
        ("SwinTransformer", {"embed_dim": 8, "depths": [1], "num_heads": [1]}, r"several grids \(layers\)"),
        ("ConvNeXt", {"depths": [1] * 4, "dims": [8] * 4}, r"several grids \(stages\)"),
        ("Hiera", {"embed_dim": 8, "num_heads": 1, "stages": [1] * 4}, "blocks of class HieraBlock"),
        ("VisionTransformerSAM", {"embed_dim": 16, "depth": 1, "num_heads": 1}, "Block in vision_transformer_sam"),
        ("VisionTransformerRelPos", {"embed_dim": 16, "depth": 1, "num_heads": 1}, "blocks of class RelPosBlock"),
        ("ResNet", {"block": timm.models.resnet.BasicBlock, "layers": [1] * 4}, r"several grids \(layer1\)"),
    ],
)
def test_a_class_of_timm_of_another_kind_is_refused_in_one_line(name, sizes, part, tmp_path):
    kind = getattr(timm.models, name, None) or timm.models.vision_transformer_sam.VisionTransformerSAM
    with pytest.raises(ConversionError, match=f"^timm's {name} with .*{part} cannot be represented$"):
        convert(kind(**sizes), tmp_path / "in", settings=QUIET)


def test_patches_of_timm_of_another_kind_are_refused_in_one_line(tmp_path):
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", embed_dim=16, depth=1, num_heads=1)
    with pytest.raises(ConversionError, match="with patches of class HybridEmbed cannot be represented"):
        convert(hybrid, tmp_path / "in", settings=QUIET)
    naflex = timm.models.naflexvit
    model = naflex.NaFlexVit(naflex.NaFlexVitCfg(embed_dim=16, depth=1, num_heads=1))
    with pytest.raises(ConversionError, match="NaFlexVit with patches of class NaFlexEmbeds cannot be represented"):
        convert(model, tmp_path / "in", settings=QUIET)


@pytest.mark.parametrize(
    ("name", "fields", "part"),
    [
        ("Swin", {"embed_dim": 8, "depths": [1], "num_heads": [1]}, r"several grids \(depths=\[1\]\)"),
        ("ConvNext", {"depths": [1, 1], "hidden_sizes": [8, 8], "num_stages": 2}, "several grids"),
        ("SamVision", {**MLP, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}, "on windows"),
        ("Yolos", {**SIZES, **MLP, "image_size": [32, 32]}, "tokens for detection"),
        ("Siglip2Vision", {**SIZES, **MLP, "num_patches": 16}, r"fixed image size \(num_patches=16\)"),
    ],
)
def test_a_model_type_of_another_kind_names_the_setting_in_the_way(name, fields, part, tmp_path):
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields))
    with pytest.raises(ConversionError, match=f"model type .* cannot be represented, because it has .*{part}"):
        convert(model, tmp_path / "in", settings=QUIET)

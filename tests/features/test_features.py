"""Tokens of any supported encoder: each family against its own outputs, on tiny random models."""

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.features import TokenFeatures, extract_features, extract_many, load_encoder


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SHAPE = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}
# Pixels of an oblong image, with as many patches as the square one that the models are made for, and of another one.
OBLONG, LARGER = (64, 16), (40, 48)


def _transformers(name, **settings):
    config = getattr(transformers, name.replace("Model", "Config"))
    sizes = {**SIZES, **settings} if "Dinov2" in name else {**SIZES, "intermediate_size": 48, **settings}
    return getattr(transformers, name)(config(**sizes, attn_implementation="eager"))


def _eva(**settings):
    from timm.models.eva import Eva

    common = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "num_reg_tokens": 4}
    return Eva(**{**SHAPE, **common, "rope_rotate_half": True, "init_values": 0.1, "num_classes": 0, **settings})


# Name -> how to make it, and (class tokens, distillation tokens, registers).
TRANSFORMERS = {
    "vit": (lambda: _transformers("ViTModel"), (1, 0, 0)),
    "deit": (lambda: _transformers("DeiTModel"), (1, 1, 0)),
    "dinov2": (lambda: _transformers("Dinov2Model"), (1, 0, 0)),
    "dinov2 swiglu": (lambda: _transformers("Dinov2Model", use_swiglu_ffn=True), (1, 0, 0)),
    "dinov2 registers": (lambda: _transformers("Dinov2WithRegistersModel", num_register_tokens=3), (1, 0, 3)),
    "dinov3": (lambda: _transformers("DINOv3ViTModel", num_register_tokens=4), (1, 0, 4)),
    "dinov3 gated": (lambda: _transformers("DINOv3ViTModel", num_register_tokens=0, use_gated_mlp=True), (1, 0, 0)),
    "clip": (lambda: _transformers("CLIPVisionModel"), (1, 0, 0)),
    "siglip": (lambda: _transformers("SiglipVisionModel"), (0, 0, 0)),
    "mae": (lambda: _transformers("ViTMAEModel"), (1, 0, 0)),
    "ijepa": (lambda: _transformers("IJepaModel"), (0, 0, 0)),
}
TIMM = {
    "vit": (lambda **more: timm.models.VisionTransformer(**SHAPE, **more), (1, 0, 0)),
    "registers": (
        lambda **more: timm.models.VisionTransformer(**SHAPE, reg_tokens=4, no_embed_class=True, **more),
        (1, 0, 4),
    ),
    "gap": (
        lambda **more: timm.models.VisionTransformer(
            **SHAPE, reg_tokens=2, class_token=False, no_embed_class=True, global_pool="avg", fc_norm=False, **more
        ),
        (0, 0, 2),
    ),
    "qk norm": (lambda **more: timm.models.VisionTransformer(**SHAPE, qk_norm=True, **more), (1, 0, 0)),
    "pre norm": (lambda **more: timm.models.VisionTransformer(**SHAPE, pre_norm=True, **more), (1, 0, 0)),
    "distilled": (lambda **more: timm.models.deit.VisionTransformerDistilled(**SHAPE, **more), (1, 1, 0)),
    "dinov3": (lambda **more: _eva(qkv_bias=False, **more), (1, 0, 4)),
    "dinov3 biases": (lambda **more: _eva(qkv_bias=True, **more), (1, 0, 4)),
    "eva unfused": (lambda **more: _eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, **more), (1, 0, 4)),
    "eva02": (lambda **more: _eva(rope_type="cat", rope_rotate_half=False, num_reg_tokens=0, **more), (1, 0, 0)),
    "eva rope": (lambda **more: _eva(attn_type="rope", **more), (1, 0, 4)),
}
OURS = {
    "registers": ({"num_register_tokens": 3}, (1, 0, 3)),
    "plain": ({"num_register_tokens": 0, "layer_scale_init_value": None}, (1, 0, 0)),
    "distilled": ({"has_distillation_token": True, "num_register_tokens": 2}, (1, 1, 2)),
    "no cls": ({"has_cls_token": False, "pooling": "mean", "num_register_tokens": 2}, (0, 0, 2)),
    "pooled norm": ({"has_cls_token": False, "pooling": "mean", "has_pooled_norm": True}, (0, 0, 4)),
    "rope": ({"position_embedding_type": "rope", "num_register_tokens": 4}, (1, 0, 4)),
    "capi": ({"position_embedding_type": "rope", "rope_style": "capi", "num_register_tokens": 4}, (1, 0, 4)),
    "swiglu": ({"hidden_act": "swiglu", "has_pre_norm": True, "has_key_bias": False}, (1, 0, 4)),
}


def _pixels(sides=OBLONG, num_images=2):
    return torch.rand(num_images, 3, *sides)


def _sequence(tokens: TokenFeatures) -> torch.Tensor:
    parts = [part[:, None] for part in (tokens.cls_token, tokens.distillation_token) if part is not None]
    return torch.cat([*parts, tokens.register_tokens, tokens.patch_tokens], dim=1)


def _assert_counts(encoder, tokens, counts):
    has_cls, has_distillation, num_registers = counts
    assert (encoder.has_cls_token, encoder.has_distillation_token) == (bool(has_cls), bool(has_distillation))
    assert encoder.num_register_tokens == num_registers == tokens.register_tokens.shape[1]
    assert (tokens.cls_token is not None, tokens.distillation_token is not None) == (has_cls, has_distillation)
    assert (encoder.num_layers, encoder.num_heads, encoder.hidden_size) == (3, 2, 32)
    assert (encoder.patch_shape, encoder.image_size) == ((8, 8), (32, 32))


def _interpolated(name):
    return {} if name.startswith("dinov") else {"interpolate_pos_encoding": True}


@pytest.mark.parametrize("sides", [(32, 32), OBLONG, LARGER], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_of_transformers_are_its_hidden_states(name, sides, randomise):
    make, counts = TRANSFORMERS[name]
    model, images = randomise(make()), _pixels(sides)
    encoder = load_encoder(model)
    keywords = _interpolated(name)
    if name == "mae":
        model.config.mask_ratio = 0.0
        num_patches = sides[0] * sides[1] // 64
        keywords["noise"] = torch.arange(float(num_patches)).expand(2, -1)
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True, output_attentions=True, **keywords)
    if name == "mae":
        model.config.mask_ratio = 0.75
    ours = extract_features(encoder, images, layers=[0, 1, 2])
    for tokens, expected in zip(ours, theirs.hidden_states[:3]):
        torch.testing.assert_close(_sequence(tokens), expected)
    is_normed = name not in ("clip",)  # it norms the class token only
    (last,) = extract_features(encoder, images, is_normed=is_normed)
    torch.testing.assert_close(_sequence(last), theirs.last_hidden_state)
    assert (last.grid, last.layer, last.is_normed) == ((sides[0] // 8, sides[1] // 8), 3, is_normed)
    assert last.patch_grid.shape == (2, sides[0] // 8, sides[1] // 8, 32)
    _assert_counts(encoder, last, counts)
    maps = encoder.prefix_attention(images, layers=[3, 1])
    for probabilities, layer in zip(maps, (2, 0)):
        expected = theirs.attentions[layer][:, :, : sum(counts)]
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)
    if name == "mae":
        assert model.config.mask_ratio == 0.75


@pytest.mark.parametrize("sides", [(32, 32), OBLONG, LARGER], ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_tokens_of_timm_are_its_intermediates_at_any_size(name, sides, randomise):
    make, counts = TIMM[name]
    model, dynamic, images = randomise(make()), make(dynamic_img_size=True).eval(), _pixels(sides)
    dynamic.load_state_dict(model.state_dict())
    probabilities = {}
    for number, block in enumerate(dynamic.blocks, start=1):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(
            lambda _, arguments, __, number=number: probabilities.update({number: arguments[0]})
        )
    with torch.no_grad():
        final, layers = dynamic.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    encoder = load_encoder(model)
    ours = extract_features(encoder, images, layers=[1, 2, 3])
    for tokens, (patches, prefix) in zip(ours, layers):
        torch.testing.assert_close(tokens.patch_tokens, patches)
        torch.testing.assert_close(_sequence(tokens)[:, : sum(counts)], prefix)
    (normed,) = extract_features(encoder, images, is_normed=True)
    torch.testing.assert_close(_sequence(normed), final)
    _assert_counts(encoder, normed, counts)
    for found, number in zip(encoder.prefix_attention(images, layers=[-1, 1]), (3, 1)):
        expected = probabilities[number][:, :, : sum(counts)]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not model.dynamic_img_size and model.patch_embed.strict_img_size  # as it was
    with torch.no_grad():
        images = _pixels((32, 32))
        torch.testing.assert_close(_sequence(extract_features(encoder, images)[0]), _before_norm(model, images))


def _before_norm(model, images):
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    model.forward_features(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", OURS)
def test_tokens_of_ours_are_those_of_the_model(name, tiny, randomise):
    settings, counts = OURS[name]
    model, images = randomise(ViTWithRegistersModel(tiny(**settings))), _pixels()
    encoder = load_encoder(model, name="ours")
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True, output_attentions=True)
    for tokens, expected in zip(extract_features(encoder, images, layers=range(4)), theirs.hidden_states):
        torch.testing.assert_close(_sequence(tokens), expected)
    (last,) = extract_features(encoder, images, is_normed=True)
    torch.testing.assert_close(last.patch_grid, theirs.patch_grid)
    torch.testing.assert_close(last.register_tokens, theirs.register_tokens)
    _assert_counts(encoder, last, counts)
    (probabilities,) = encoder.prefix_attention(images, layers=-1)
    torch.testing.assert_close(probabilities, theirs.attentions[-1][:, :, : sum(counts)], atol=1e-5, rtol=1e-4)
    assert (encoder.name, encoder.family) == ("ours", "vitreg")


def _linear_inputs(layer, tokens):
    """What enters attention and MLP of a layer, computed by its own norms."""
    names = [("norm1", "norm2"), ("layernorm_before", "layernorm_after"), ("layer_norm1", "layer_norm2")]
    first, _ = next(pair for pair in names if hasattr(layer, pair[0]))
    return getattr(layer, first)(tokens)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_queries_keys_and_values_are_products_of_the_normed_tokens(name, randomise):
    model, images = randomise(TRANSFORMERS[name][0]()), _pixels()
    encoder = load_encoder(model)
    wanted = [(2, "value"), (1, "token"), (2, "query"), (2, "key")]
    value, before, query, key = extract_many(encoder, images, wanted=wanted)
    layer = encoder.layers[1]
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    attention = getattr(attention, "attention", attention)  # up to transformers 4.57
    with torch.no_grad():
        inputs = _linear_inputs(layer, _sequence(before))
        for found, names in ((query, ("q_proj", "query")), (key, ("k_proj", "key")), (value, ("v_proj", "value"))):
            linear = next(getattr(attention, name) for name in names if hasattr(attention, name))
            expected = inputs @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            torch.testing.assert_close(_sequence(found), expected, atol=1e-5, rtol=1e-4)
    assert [tokens.feature for tokens in (value, query, key)] == ["value", "query", "key"]


@pytest.mark.parametrize("name", TIMM)
def test_packed_projections_are_taken_apart_in_order(name, randomise):
    model, images = randomise(TIMM[name][0]()), _pixels((32, 32))
    wanted = [(2, "token"), (3, "query"), (3, "key"), (3, "value")]
    before, *found = extract_many(load_encoder(model), images, wanted=wanted)
    attention = model.blocks[2].attn
    if attention.qkv is None:
        weights = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
        biases = [getattr(attention, f"{part}_proj").bias for part in "qkv"]
    else:
        weights = attention.qkv.weight.chunk(3)
        has_own = getattr(attention, "q_bias", None) is not None
        packed = attention.qkv.bias
        biases = [None] * 3 if packed is None else packed.chunk(3)
        biases = [attention.q_bias, attention.k_bias, attention.v_bias] if has_own else biases
    with torch.no_grad():
        inputs = model.blocks[2].norm1(_sequence(before))
        for tokens, weight, bias in zip(found, weights, biases):
            expected = inputs @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(_sequence(tokens), expected, atol=1e-5, rtol=1e-4)


def test_our_queries_keys_and_values_are_parts_of_one_product(tiny, randomise):
    model, images = randomise(ViTWithRegistersModel(tiny(has_key_bias=False))), _pixels()
    wanted = [(1, "query"), (1, "key"), (1, "value"), (0, "token")]
    *found, before = extract_many(load_encoder(model), images, wanted=wanted)
    layer = model.layers[0]
    with torch.no_grad():
        packed = layer.attention.qkv(layer.norm1(_sequence(before)))
    torch.testing.assert_close(torch.cat([_sequence(tokens) for tokens in found], dim=-1), packed)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *(f"timm {name}" for name in TIMM), "ours", "ours swiglu"])
def test_mlp_activations_are_what_the_second_linear_layer_reads(name, tiny, randomise):
    if name.startswith("ours"):
        model = ViTWithRegistersModel(tiny(hidden_act="swiglu" if "swiglu" in name else "gelu"))
    else:
        table = TIMM if name.startswith("timm") else TRANSFORMERS
        model = table[name.removeprefix("timm ")][0]()
    encoder, images = load_encoder(randomise(model)), _pixels((32, 32))
    (activations,) = extract_features(encoder, images, layers=2, feature="mlp")
    layer = encoder.layers[1]
    if hasattr(layer, "mlp"):
        module = layer.mlp
        last = next(getattr(module, part) for part in ("fc2", "down_proj", "weights_out") if hasattr(module, part))
    else:  # up to transformers 4.57
        module, last = layer.intermediate, torch.nn.Identity()
    seen = []
    hook = module.register_forward_hook(lambda _, __, output: seen.append(output))
    extract_features(encoder, images, layers=2)
    hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(last(_sequence(activations)), seen[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)),
        lambda: transformers.Dinov2Backbone(transformers.Dinov2Config(**SIZES)),
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=SIZES,
                text_config={
                    **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
                    "vocab_size": 9,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
            )
        ),
        lambda: transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**SIZES, decoder_hidden_size=32, decoder_num_hidden_layers=1)
        ),
        lambda: torch.nn.Sequential(timm.models.VisionTransformer(**SHAPE), torch.nn.Linear(1000, 2)),
    ],
    ids=["classifier", "backbone", "both towers", "with decoder", "inside another module"],
)
def test_the_encoder_is_found_inside_a_larger_model(make):
    encoder = load_encoder(make().eval())
    (tokens,) = extract_features(encoder, _pixels((32, 32)), is_normed=True)
    assert tokens.patch_tokens.shape == (2, 16, 32) and tokens.cls_token.shape == (2, 32)


def test_our_models_with_a_head_and_from_a_folder_without_code(tiny, tmp_path):
    model = ViTWithRegistersForImageClassification(tiny(num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    images = _pixels()
    expected = extract_features(load_encoder(model), images)[0]
    encoder = load_encoder(str(tmp_path))
    torch.testing.assert_close(extract_features(encoder, images)[0].patch_tokens, expected.patch_tokens)
    assert encoder.name == str(tmp_path)
    assert encoder.image_mean == (0.485, 0.456, 0.406)


def test_statistics_are_those_saved_with_a_checkpoint(tmp_path):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
    model.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).image_mean == (0.485, 0.456, 0.406)  # where nothing is said
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    assert load_encoder(tmp_path).image_mean == (0.1, 0.2, 0.3)
    module = transformers.Dinov2Model.from_pretrained(tmp_path)
    assert load_encoder(module).image_std == (1, 2, 3)
    clip = timm.create_model("vit_base_patch32_clip_224", img_size=32, depth=1)
    assert load_encoder(clip).image_mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)


def test_images_are_resized_to_the_short_side_cut_and_normalised(tiny):
    encoder = load_encoder(ViTWithRegistersModel(tiny(image_size=(16, 32))))
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 32, 3))  # 64 rows, 32 columns
    (pixels,) = encoder.prepare([Image.fromarray(ramp)])
    assert pixels.shape == (3, 16, 32) and pixels.dtype == torch.float32
    expected = (ramp[24:40].astype(np.float32) / 255 - encoder.image_mean) / encoder.image_std
    torch.testing.assert_close(pixels, torch.tensor(expected).permute(2, 0, 1).float())
    mixed = [Image.new("L", (50, 90)), Image.new("RGBA", (9, 7))]
    assert encoder.prepare(mixed, size=24).shape == (2, 3, 24, 24)


def test_patches_are_embedded_without_positions(tiny, randomise):
    model, images = randomise(ViTWithRegistersModel(tiny())), _pixels()
    patches = load_encoder(model).embed_patches(images)
    weight, bias = model.embeddings.patch_embeddings.weight, model.embeddings.patch_embeddings.bias
    windows = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
    torch.testing.assert_close(patches, (windows @ weight.detach().flatten(1).T) + bias.detach())


def test_layers_behind_the_last_one_asked_for_do_not_run(tiny):
    model = ViTWithRegistersModel(tiny())
    runs = []
    for number, layer in enumerate(model.layers, start=1):
        layer.register_forward_pre_hook(lambda _, __, number=number: runs.append(number))
    encoder, images = load_encoder(model), _pixels()
    extract_many(encoder, images, wanted=[(1, "token"), (2, "key"), (1, "token")])
    assert runs == [1, 2]
    runs.clear()
    extract_features(encoder, images, layers=0)
    assert runs == [1] or runs == []
    runs.clear()
    encoder.prefix_attention(images, layers=2)
    assert runs == [1, 2]


@pytest.mark.parametrize("name", ["ours", *TIMM])
def test_nothing_of_a_look_stays_in_the_model(name, tiny):
    model = ViTWithRegistersModel(tiny(hidden_dropout_prob=0.5)) if name == "ours" else TIMM[name][0]()
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)).eval()
    modes = [module.training for module in model.modules()]
    encoder, images = load_encoder(model), _pixels()
    first, second = (extract_features(encoder, images, layers=2)[0].patch_tokens for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not first.requires_grad
    with pytest.raises(RuntimeError, match="broken"):
        broken = model.layers[1] if name == "ours" else model.blocks[1]
        handle = broken.register_forward_pre_hook(_break)
        extract_many(encoder, images, wanted=[(3, "key"), (3, "token"), (0, "token"), (3, "mlp")])
    handle.remove()
    assert [module.training for module in model.modules()] == modes and not frozen.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def _break(*_):
    raise RuntimeError("broken")


def test_half_precision_and_double_stay_what_they_are(tiny):
    encoder = load_encoder(ViTWithRegistersModel(tiny()), dtype=torch.bfloat16)
    assert (encoder.dtype, encoder.device) == (torch.bfloat16, torch.device("cpu"))
    (tokens,) = extract_features(encoder, _pixels())
    assert tokens.patch_tokens.dtype == torch.bfloat16
    assert encoder.prefix_attention(_pixels(), layers=1)[0].dtype == torch.float32


def test_errors_say_what_was_expected(tiny, tmp_path):
    encoder = load_encoder(ViTWithRegistersModel(tiny()))
    with pytest.raises(ValueError, match=r"height of 33 pixels does not fit .* nearest sizes that fit are 32 and 40"):
        extract_features(encoder, _pixels((33, 32)))
    with pytest.raises(ValueError, match=r"width of 4 pixels .* are 8 and 16"):
        encoder.embed_patches(_pixels((32, 4)))
    with pytest.raises(ValueError, match="nearest sizes"):
        encoder.prepare([Image.new("RGB", (9, 9))], size=30)
    with pytest.raises(ValueError, match="one image or more"):
        encoder.prepare([])
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, height, width\), got .* \(3, 32, 32\)"):
        extract_features(encoder, torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"layers from 0 to 3, or from -4 to -1 counted from the end, got \[4\]"):
        extract_features(encoder, _pixels(), layers=4)
    with pytest.raises(ValueError, match=r"layers from 1 to 3, or from -3 to -1"):
        extract_features(encoder, _pixels(), layers=[0], feature="key")
    with pytest.raises(ValueError, match=r"layers from 1 to 3"):
        encoder.prefix_attention(_pixels(), layers=-4)
    with pytest.raises(ValueError, match="feature out of token, query, key, value, mlp, got 'keys'"):
        extract_features(encoder, _pixels(), feature="keys")
    with pytest.raises(ValueError, match="final norm applies to tokens only"):
        extract_features(encoder, _pixels(), feature="key", is_normed=True)
    with pytest.raises(ValueError, match="one pair"):
        extract_many(encoder, _pixels(), wanted=[])
    with pytest.raises(ValueError, match=r"expected a model of this package; ViT, .*got torch\.nn.*Linear"):
        load_encoder(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="could not open"):
        load_encoder(str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="timm could not create 'no_such_model'"):
        load_encoder("timm/no_such_model")

"""MAE against the implementation of transformers on the same weights and masks, and what is ours: registers."""

import math
import re

import pytest
import torch
from reference_models import LIMIT, concatenate, randomise, relative_error, rename
from small_training import fit
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.positions_vitreg import sincos_position_table
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.objectives.mae import (
    MAE,
    MAESettings,
    patchify,
    standardise,
)
from modeling_vitreg.pretraining.run.recipe import Recipe
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.masking import MaskMaker, MaskSettings


ONE_VIEW = CropSettings(num_global=1, num_local=0, global_size=32)
MASKS = MaskSettings(kind="random", ratio=(0.75, 0.75), share=1)
SMALL = {"decoder_width": 24, "decoder_layers": 2, "decoder_heads": 3}

# From the names of transformers, before 5 and from 5 on, to ours.
ENCODER = {
    r"^vit\.": "",
    r"patch_embeddings\.projection": "patch_embeddings",
    r"position_embeddings": "position_embeddings.weight",
    r"encoder\.layer\.": "layers.",
}
DECODER = {
    r"^decoder\.decoder_embed": "embed",
    r"^decoder\.decoder_layers": "layers",
    r"^decoder\.decoder_norm": "norm",
    r"^decoder\.decoder_pred": "predict",
    r"^decoder\.": "",
}
LAYERS = {
    r"attention\.attention\.": "attention.",
    r"attention\.(output\.dense|o_proj)": "attention.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
    r"q_proj": "query",
    r"k_proj": "key",
    r"v_proj": "value",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
}


@pytest.fixture
def make(tiny):
    def make(settings: dict | None = None, **fields) -> MAE:
        fields = {"position_embedding_type": "sincos", **fields}
        backbone = ViTWithRegistersModel(tiny(**fields))
        settings = MAESettings(**{**SMALL, **(settings or {})})
        return MAE(backbone, settings=settings, crops=ONE_VIEW, masks=MASKS, num_steps=10)

    return make


def make_batch(num_images: int = 3, grid: tuple = (4, 4), masks: MaskSettings = MASKS) -> dict:
    """A batch as `to_device` makes it, of patches of 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    hidden = MaskMaker(num_views=1, grid=grid, settings=masks)(num_images, generator=generator).flatten(0, 1)
    images = torch.randn(1, num_images, 3, 8 * grid[0], 8 * grid[1], generator=generator)
    return {"global_views": images, "masks": hidden, "masked_patches": hidden.flatten().nonzero().squeeze(1)}


def waves(num_images: int) -> torch.Tensor:
    """Images (1, B, 3, 32, 32) that can be guessed from a part: waves of other directions."""
    directions = torch.randn(num_images, 2, 1, 1)
    rows, columns = torch.meshgrid(torch.linspace(-2, 2, 32), torch.linspace(-2, 2, 32), indexing="ij")
    images = (directions[:, 0] * rows + directions[:, 1] * columns).sin()
    return images[None, :, None].expand(1, -1, 3, -1, -1)


def num_masked(batch: dict) -> int:
    return int(batch["masks"][0].sum())


# The same numbers as transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_normed_pixels", [True, False])
def test_loss_reconstruction_and_gradients_are_those_of_transformers(make, has_normed_pixels, record_property):
    theirs = make_reference(has_normed_pixels)
    ours = make({"has_normed_pixels": has_normed_pixels}, num_register_tokens=0)
    take_weights(ours, theirs.state_dict())
    batch = make_batch()
    images, masks = batch["global_views"][0], batch["masks"]
    noise = masks + 0.5 * torch.rand(masks.shape)  # sorted, visible patches come first, in an order of chance

    expected = theirs(images, noise=noise)
    assert torch.equal(expected.mask.bool(), masks)
    expected.loss.backward()
    losses = ours(batch, step=0)
    losses["total"].backward()
    with torch.no_grad():
        reconstruction = ours.reconstruct(images, masks, num_masked=num_masked(batch))
    errors = {
        "loss": relative_error(losses["total"], expected.loss),
        "reconstruction": relative_error(reconstruction, expected.logits),
    }
    gradients = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    learned = our_weights(gradients)
    own = {name: weight.grad for name, weight in ours.named_parameters()}
    assert own.keys() == learned.keys()
    for name, gradient in learned.items():
        # The gradient of the bias of keys is zero, but for rounding: softmax does not see a shift of all scores.
        if name.endswith("qkv.bias"):
            width = len(gradient) // 3
            own[name][width : 2 * width] = gradient[width : 2 * width] = 0
        errors[name] = relative_error(own[name], gradient)
    worst = max(errors, key=errors.get)
    record_property("largest_relative_error", errors[worst])
    print(f"largest relative error of {len(errors)} comparisons: {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= LIMIT, {name: error for name, error in errors.items() if error > LIMIT}


def make_reference(has_normed_pixels: bool) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        mask_ratio=0.75,
        norm_pix_loss=has_normed_pixels,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=96,
    )
    model = randomise(ViTMAEForPreTraining(config))
    # A new model has tables of zeros in some versions of the library.
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        positions = sincos_position_table((4, 4), table.shape[-1]).flatten(0, 1)
        table.data = torch.cat([torch.zeros(1, table.shape[-1]), positions])[None]
    return model


def our_weights(theirs: dict) -> dict:
    """Tensors by our names, of the whole objective; the fixed positions of class tokens, which are zero, go."""
    parts = {"backbone": {}, "decoder": {}}
    for name, tensor in theirs.items():
        part = "decoder" if name.startswith("decoder.") else "backbone"
        if name.endswith("decoder_pos_embed"):
            continue
        if name.endswith("position_embeddings"):
            tensor = tensor[:, 1:]
        parts[part][name] = tensor
    result = {}
    for part, names in (("backbone", ENCODER), ("decoder", DECODER)):
        weights = concatenate(rename(parts[part], {**names, **LAYERS}), ("query", "key", "value"), "qkv")
        result |= {f"{part}.{name}": weight for name, weight in weights.items()}
    return result


def take_weights(objective: MAE, theirs: dict) -> None:
    objective.load_state_dict(our_weights(theirs))


def test_pixels_lie_in_the_order_rows_columns_channels():
    images = torch.arange(2 * 3 * 4 * 9).reshape(2, 3, 4, 9).float()
    patches = patchify(images, patch_shape=(2, 3))
    assert patches.shape == (2, 6, 18)
    for patch, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        pixels = [
            images[1, channel, 2 * row + i, 3 * column + j] for i in range(2) for j in range(3) for channel in range(3)
        ]
        assert patches[1, patch].tolist() == pixels


def test_standardised_patches_divide_by_the_unbiased_variance():
    patch = [1.0, 2.0, 4.0, 9.0]
    mean = sum(patch) / 4
    variance = sum((value - mean) ** 2 for value in patch) / 3
    expected = [(value - mean) / math.sqrt(variance + 1e-6) for value in patch]
    assert standardise(torch.tensor([patch]))[0].tolist() == pytest.approx(expected)
    assert (standardise(torch.full((1, 4), 7.0)) == 0).all()


# The encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "sincos", "rope"])
def test_hidden_patches_do_not_influence_the_encoder(make, randomise, kind):
    objective = randomise(make(position_embedding_type=kind))
    batch = make_batch(grid=(4, 6))  # positions are resized, where there is a table
    images, masks = batch["global_views"][0], batch["masks"]
    tokens, visible = objective.encode_visible(images, masks, num_masked=num_masked(batch))
    assert tokens.shape == (3, 5 + 6, 32)

    hidden = masks.reshape(3, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed, _ = objective.encode_visible(
        torch.where(hidden, torch.randn_like(images), images), masks, num_masked=num_masked(batch)
    )
    assert torch.equal(changed, tokens)
    assert not masks.gather(1, visible).any()
    changed, _ = objective.encode_visible(
        torch.where(hidden, images, images + 0.1), masks, num_masked=num_masked(batch)
    )
    assert (changed - tokens).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["learned", "sincos", "rope"])
def test_the_encoder_is_the_model_with_hidden_patches_taken_out_one_image_at_a_time(make, randomise, kind):
    objective = randomise(make(position_embedding_type=kind))
    batch = make_batch(grid=(4, 6))
    tokens, _ = objective.encode_visible(batch["global_views"][0], batch["masks"], num_masked=num_masked(batch))
    model = objective.encoder
    for image, mask, found in zip(batch["global_views"][0], batch["masks"], tokens):
        states, rotary, _ = model.embed(image[None])
        kept = torch.cat([torch.arange(5), 5 + (~mask).nonzero().squeeze(1)])
        states = states[:, kept]
        rotary = None if rotary is None else tuple(table[kept] for table in rotary)
        for layer in model.layers:
            states = layer(states, rotary)
        torch.testing.assert_close(found, model.norm_tokens(states)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["learned", "sincos", "rope"])
def test_without_hidden_patches_the_encoder_is_the_model(make, randomise, kind):
    objective = randomise(make(position_embedding_type=kind))
    images = torch.randn(2, 3, 32, 32)
    tokens, _ = objective.encode_visible(images, torch.zeros(2, 16, dtype=torch.bool), num_masked=0)
    torch.testing.assert_close(tokens, objective.encoder(images).last_hidden_state)


# Registers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees_registers", [False, True])
def test_registers_take_part_but_reach_the_decoder_only_if_it_sees_them(make, randomise, sees_registers):
    objective, batch = randomise(make({"sees_registers": sees_registers})), make_batch()
    objective(batch, step=0)["total"].backward()
    assert objective.backbone.embeddings.register_tokens.weight.grad.abs().max() > 1e-6
    # What the last layer writes into registers has a gradient if the decoder reads it.
    seen = []
    objective.backbone.layers[-1].register_full_backward_hook(lambda layer, inputs, outputs: seen.append(outputs[0]))
    objective(batch, step=0)["total"].backward()
    assert (seen[0][:, 0] != 0).any() and (seen[0][:, 5:] != 0).any()
    assert (seen[0][:, 1:5] != 0).any() == sees_registers


def test_every_trained_parameter_gets_a_gradient(make):
    # Distributed data parallel training stops otherwise.
    for fields in ({}, {"has_cls_token": False, "pooling": "mean"}, {"num_register_tokens": 0}):
        objective = make(position_embedding_type="learned", **fields)
        objective(make_batch(), step=0)["total"].backward()
        assert [name for name, weight in objective.named_parameters() if weight.grad is None] == []


# Learning ----------------------------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_of_a_fixed_batch(make):
    objective, batch = make(), make_batch()
    batch["global_views"] = waves(3)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    # Initial weights differ between versions, and so do the first steps.
    losses = fit(objective, batch, optimizer, num_steps=60)
    assert 0.9 < losses[0] < 2  # standardised pixels, and a decoder that knows nothing
    assert losses[-1] < 0.5 * losses[0]


def test_loss_counts_masked_patches_only(make, randomise):
    objective, batch = randomise(make()), make_batch()
    images, masks = batch["global_views"][0], batch["masks"]
    painted = objective.reconstruct(images, masks, num_masked=num_masked(batch))
    targets = standardise(patchify(images, patch_shape=(8, 8)))
    errors = [
        (painted[image, patch] - targets[image, patch]).square().mean()
        for image in range(3)
        for patch in range(16)
        if masks[image, patch]
    ]
    assert len(errors) == 36
    torch.testing.assert_close(objective(batch, step=0)["total"], torch.stack(errors).mean())


def test_under_bfloat16_the_loss_is_nearly_the_same(make):
    objective, batch = make(position_embedding_type="rope"), make_batch()
    exact = objective(batch, step=0)["total"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(batch, step=0)["total"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)


def test_state_round_trip_holds_no_table_of_the_decoder(make, randomise):
    objective, batch = randomise(make()), make_batch()
    state = objective.state_dict()
    assert not [name for name in state if "positions" in name]
    other = make()
    other.load_state_dict(state)
    assert torch.equal(other(batch, step=0)["total"], objective(batch, step=0)["total"])
    assert other.encoder is other.trained["backbone"]
    assert list(other.trained) == ["backbone", "decoder"]


def test_uneven_masks_are_refused_on_their_way_to_the_device(make):
    objective = make()
    views = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    masks = torch.zeros(1, 2, 16, dtype=torch.bool)
    masks[0, 0, :4] = masks[0, 1, :6] = True
    loaded = {"global_views": views, "masks": masks}
    place = {"device": torch.device("cpu"), "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match=r"as many hidden patches in every image .*, got 4 to 6"):
        objective.to_device(loaded, **place)
    masks[0, 0, 4:6] = True
    assert objective.to_device(loaded, **place)["masked_patches"].tolist() == [*range(6), *range(16, 22)]


# Contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"has_mask_token": True}, {}, "has_mask_token=False"),
        ({"has_pooled_norm": True, "pooling": "mean"}, {}, "has_pooled_norm=False"),
        ({"position_embedding_type": "none"}, {}, "position_embedding_type"),
        (
            {"position_embedding_type": "rope", "drop_path_mode": "batch_subset", "drop_path_rate": 0.2},
            {},
            "drop_path_mode='sample'",
        ),
        ({}, {"crops": CropSettings(num_global=2, num_local=0)}, "num_global=1 and num_local=0 in crops, got 2 and 0"),
        ({}, {"crops": CropSettings(num_global=1)}, "got 1 and 8"),
        ({}, {"masks": MaskSettings()}, "kind='random', ratio=(0.75, 0.75), share=1, got kind='block'"),
    ],
)
def test_contradictory_settings_are_refused(tiny, fields, arguments, message):
    backbone = ViTWithRegistersModel(tiny(**fields))
    arguments = {"crops": ONE_VIEW, "masks": MASKS, "settings": MAESettings(**SMALL), **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        MAE(backbone, num_steps=10, **arguments)


def test_a_decoder_that_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="expected decoder_width to be a multiple of decoder_heads"):
        MAESettings(decoder_width=20, decoder_heads=3)
    with pytest.raises(ValueError, match="expected decoder_layers of 1 or more, got 0"):
        MAESettings(decoder_layers=0)


def test_a_recipe_builds_it_without_a_mask_token_and_from_a_model_that_has_one(tiny, tmp_path):
    model = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    recipe = Recipe(
        objective="mae",
        model={**model, "position_embedding_type": "sincos"},
        num_register_tokens=3,
        crops=ONE_VIEW,
        masks=MASKS,
        settings=SMALL,
    )
    objective = make_objective(recipe)
    assert isinstance(objective, MAE)
    assert objective.encoder.config.position_embedding_type == "sincos"
    assert objective.encoder.config.num_register_tokens == 3
    objective(make_batch(), step=0)["total"].backward()

    ViTWithRegistersModel(tiny(has_mask_token=True, num_register_tokens=0)).save_pretrained(tmp_path)
    objective = make_objective(recipe, init=tmp_path)
    assert objective.encoder.embeddings.mask_token is None
    assert objective.encoder.config.num_register_tokens == 3
    objective(make_batch(), step=0)["total"].backward()

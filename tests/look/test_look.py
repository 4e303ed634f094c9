"""A look at one photograph: what is drawn is what the tools of analysis and discovery measure."""

import numpy as np
import pytest
import torch
from PIL import Image
from planted_models import PATCH, SIDE, pictures, plain_model, planted_model
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from modeling_vitreg.cli import app
from modeling_vitreg.discovery import lost
from modeling_vitreg.features import extract_features, load_encoder, register_share
from modeling_vitreg.look import LEAST_ROWS, draw_looks, look


(IMAGE,), _ = pictures(1)
ROWS = SIDE // PATCH * -(-LEAST_ROWS // (SIDE // PATCH))


def test_maps_are_those_of_the_model_at_a_multiple_of_its_size():
    model = planted_model(layer=2, magnitude=60.0)
    encoder = load_encoder(model, name="planted")
    found = look(encoder, IMAGE)
    pixels = encoder.prepare([IMAGE], size=ROWS * PATCH)
    maps = model.attention_maps(pixels, average_heads=True)
    (state,) = extract_features(encoder, pixels)
    (keys,) = extract_features(encoder, pixels, feature="key")
    assert found.norms.shape == found.mask.shape == (ROWS, ROWS) and found.colours.shape == (ROWS, ROWS, 3)
    np.testing.assert_allclose(found.norms, state.patch_grid[0].norm(dim=-1).detach(), rtol=1e-5)
    np.testing.assert_allclose(found.attention["class token"], maps.cls[0, 0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.attention["register 2"], maps.registers[0, 0, 1], rtol=1e-4, atol=1e-7)
    inside = lost(keys, is_centered=True).mask[0].reshape(ROWS, ROWS).numpy()
    assert not (found.mask & ~inside).any()  # the component of the seed
    assert found.register_share == pytest.approx(register_share(encoder, pixels).item())


def test_patches_that_halt_have_a_map_of_their_depth(tmp_path, randomise):
    reduction = {"kind": "halt", "scale": 2.0, "center": 1.0}
    model = randomise(plain_model(token_reduction=reduction))
    encoder = load_encoder(model, name="halting")
    found = look(encoder, IMAGE)
    depth = model(encoder.prepare([IMAGE], size=ROWS * PATCH)).reduction.halting_depth[0]
    assert np.array_equal(found.depth, depth) and len(np.unique(depth)) > 1
    assert found.register_share is not None
    plain = look(load_encoder(plain_model(), name="plain"), IMAGE)
    pairs = {"with": [plain, found], "without": [plain, plain]}
    sizes = {name: Image.open(draw_looks(pair, tmp_path / f"{name}.png")).size for name, pair in pairs.items()}
    assert sizes["with"][0] > sizes["without"][0]  # one column more


def test_the_sentence_has_the_verdict_and_the_share_of_registers():
    with_registers = look(load_encoder(planted_model(layer=2, magnitude=60.0), name="planted"), IMAGE).sentence
    without = look(load_encoder(plain_model(num_register_tokens=0), name="plain"), IMAGE).sentence
    assert with_registers.startswith("planted: 12 % of the patches of layer 4 are outliers")
    assert with_registers.endswith("of its last update comes through registers.") and with_registers.count(". ") == 0
    assert "plain: 0 % of the patches" in without and "through registers" not in without


def test_models_of_other_libraries_and_without_class_token_are_drawn_together(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    models = {
        "theirs": Dinov2Model(Dinov2Config(**sizes)).eval(),
        "no class token": plain_model(has_cls_token=False, pooling="mean", num_register_tokens=0),
        "planted": planted_model(layer=2, magnitude=60.0),
    }
    looks = [look(load_encoder(model, name=name), IMAGE) for name, model in models.items()]
    assert [len(each.attention) for each in looks] == [1, 0, 3]
    path = draw_looks(looks, tmp_path / "look.png")
    width, height = Image.open(path).size
    assert width > 1.8 * height  # three rows, and the seven columns of the model with most queries


def test_features_that_are_not_finite_are_refused():
    model = plain_model()
    model.layers[0].mlp.fc2.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="broken: expected finite features"):
        look(load_encoder(model, name="broken"), IMAGE)


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one look or more"):
        draw_looks([], tmp_path / "look.png")


def test_the_verb_draws_models_below_each_other(tmp_path, monkeypatch):
    planted_model(layer=2, magnitude=60.0).save_pretrained(tmp_path / "planted")
    plain_model().save_pretrained(tmp_path / "plain")
    IMAGE.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["look", "photo.png", "--model", "planted", "--model", "plain"])
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["planted", "plain", "wrote look.png"]
    assert Image.open("look.png").size[0] > 500


@pytest.mark.parametrize(
    ("photo", "content", "message"),
    [
        ("photto.png", None, "expected the file of a photograph, and there is none. Did you mean 'photo.png'?"),
        ("folder", "", "It is a folder: use vitreg analyze"),
        ("photo.txt", "no pixels", "photo.txt: UnidentifiedImageError"),
    ],
)
def test_a_photograph_that_cannot_be_read_is_told(photo, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_model().save_pretrained("model")
    IMAGE.save("photo.png")
    if content == "":
        (tmp_path / photo).mkdir()
    elif content:
        (tmp_path / photo).write_text(content)
    done = CliRunner().invoke(app, ["look", photo, "--model", "model"])
    assert done.exit_code == 1 and message in done.output, done.output
    assert not (tmp_path / "look.png").exists()

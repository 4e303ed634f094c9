"""The saved image processors read a file as the package does."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.images import decode_image


MODELS = (ViTWithRegistersModel, ViTWithRegistersForSemanticSegmentation, ViTWithRegistersForDepthEstimation)


def _files(folder):
    """One file of each kind that libraries read differently."""
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    exif = colour.getexif()
    exif[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=exif)
    colour.save(folder / "turned.png", exif=exif)
    ramp = np.linspace(0, 1, 32 * 48).reshape(32, 48)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray((ramp * 4095).astype(np.uint16)).save(folder / "twelve.png")
    Image.fromarray(ramp.astype(np.float32)).save(folder / "float.tif")
    colour.quantize(7).save(folder / "palette.png", transparency=0)
    colour.convert("CMYK").save(folder / "inks.jpg")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.convert("LA").save(folder / "grey_alpha.png")
    colour.convert("1").save(folder / "bit.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("model", MODELS)
def test_a_file_is_the_same_picture_for_the_saved_processor_and_the_reader(tmp_path, model, num_channels):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    model(ViTWithRegistersConfig(**sizes, num_channels=num_channels)).save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    (tmp_path / "files").mkdir()
    for path in _files(tmp_path / "files"):
        raw = {"bytes": None, "path": str(path), "label": None, "name": path.name}
        ours = processor(decode_image(raw, num_channels=num_channels), return_tensors="pt")["pixel_values"]
        theirs = processor([Image.open(path)], return_tensors="pt")["pixel_values"]
        assert ours.shape == theirs.shape and ours.shape[1] == num_channels, path.name
        assert (ours == theirs).all() and ours.std() > 0.1, path.name


def test_a_processor_saves_itself_with_its_code_and_loads_without_trust(tmp_path):
    config = ViTWithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    ViTWithRegistersModel(config).save_pretrained(tmp_path / "model")
    AutoImageProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "image_processing_vitreg.py").is_file()
    settings = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "BitImageProcessor"
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "again")).__module__.startswith("transformers.")


def test_a_processor_refuses_in_words_what_would_turn_black(tmp_path):
    from modeling_vitreg.image_processing_vitreg import ViTWithRegistersImageProcessor

    with pytest.raises(ValueError, match="float pixels from -5 to 3: expected integers of 8 to 16 bits"):
        ViTWithRegistersImageProcessor()(Image.fromarray(np.array([[-5, 3]], np.float32)))

"""Habits of transformers: other image sizes on request, a clear way to resize, and bytes that are no images."""

import pytest
import torch

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.modeling_vitreg import AUTO_MODELS


@pytest.mark.parametrize("kind", AUTO_MODELS)
def test_interpolate_pos_encoding_is_taken_by_every_class(kind, tiny):
    model, images = kind(tiny()).eval(), torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        expected, found = model(images), model(images, interpolate_pos_encoding=True)
    assert all(torch.equal(a, b) for a, b in zip(expected.to_tuple(), found.to_tuple()) if isinstance(a, torch.Tensor))
    with pytest.raises(ValueError, match=r"got images of \(48, 40\) pixels.*interpolate_pos_encoding=False"):
        model(images, interpolate_pos_encoding=False)
    model(torch.randn(1, 3, 32, 32), interpolate_pos_encoding=False)


@pytest.mark.parametrize(
    ("fields", "call"),
    [({"num_register_tokens": 8}, "resize_register_tokens"), ({"image_size": 64}, "resize_position_embeddings")],
)
def test_another_number_of_registers_or_image_size_at_loading_names_the_call_that_resizes(
    fields, call, tiny, tmp_path
):
    ViTWithRegistersModel(tiny()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=call):
        ViTWithRegistersModel.from_pretrained(tmp_path, **fields)
    ViTWithRegistersModel.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)


def test_bytes_are_no_pixel_values(tiny):
    model = ViTWithRegistersForImageClassification(tiny())
    with pytest.raises(ValueError, match=r"normalised to floating-point numbers, got torch.uint8: prepare them"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))

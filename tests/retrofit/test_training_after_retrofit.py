"""A retrofitted model trains on: the tokens that a loss reads are those of the whole network."""

import torch
from planted_models import planted_model

from modeling_vitreg.pretraining.views.packing import encode_views
from modeling_vitreg.retrofit.register_neurons import add_test_time_register


def test_views_of_a_retrofitted_model_are_encoded_whole():
    model = add_test_time_register(planted_model(layer=2, magnitude=60.0), {2: [0, 3]})
    groups = [(torch.randn(2, 3, 32, 32), None), (torch.randn(3, 3, 16, 24), None)]
    wanted = [torch.tensor([0, 5, 31]), None]
    for is_packed in (False, True):
        (cls, patches), (small_cls, none) = encode_views(model, groups, patches=wanted, is_packed=is_packed)
        output, small = model(groups[0][0]), model(groups[1][0])
        torch.testing.assert_close(cls, output.cls_token)
        torch.testing.assert_close(patches, output.patch_tokens.flatten(0, 1)[wanted[0]])
        torch.testing.assert_close(small_cls, small.cls_token)
        assert none.shape == (0, model.config.hidden_size)

"""Edits of sinks: a head changes by exactly what was written into it, planted heads react as their class should."""

import pytest
import torch
import torch.nn.functional as F
from planted_models import pictures, plain_model
from test_sinks import plant_sink

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.analysis.edits import EDITS, edit_sinks, edited_values, final_tokens, measure_change
from modeling_vitreg.analysis.sinks import shift_consistency
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import load_encoder
from modeling_vitreg.features.heads import read_heads


@pytest.mark.parametrize("changes", [{}, {"attention_gate": "element"}, {"has_attention_norm": True}])
@torch.no_grad()
def test_the_layer_changes_by_exactly_what_was_edited(changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = ViTWithRegistersConfig(**sizes, num_register_tokens=2, initializer_range=0.3, **changes)
    encoder, pixels = load_encoder(ViTWithRegistersModel(config)), torch.randn(3, 3, 32, 32)
    heads, sinks = read_heads(encoder, pixels, lambda heads: heads)[1], torch.tensor([0, 1, 7])
    attention, values = heads.attention[:, 2], heads.values[:, 2]
    words = {"mean": torch.ones(8), "num_prefix": 3, "random": torch.Generator().manual_seed(0)}
    added = edited_values(attention, values, sinks, **words)
    assert list(added) == list(EDITS)
    rows = torch.arange(3)
    for name, value in (("zero", 0 * values[rows, sinks]), ("mean", torch.ones(3, 8)),
                        ("donor", values[rows.roll(-1), sinks.roll(-1)])):  # fmt: skip
        new = values.clone()
        new[rows, sinks] = value
        moved = attention.double() @ new.double() - attention.double() @ values.double()
        torch.testing.assert_close(added[name].double(), moved, rtol=0, atol=1e-6)
    cut = attention.clone()
    cut[rows, :, sinks] = 0
    moved = F.normalize(cut, p=1, dim=-1) @ values - attention @ values
    torch.testing.assert_close(added["removed"], moved, rtol=0, atol=1e-6)

    layer = encoder.layers[0]  # the whole model, with the new heads written out
    state, rotary, _ = encoder.model.embed(pixels)
    normed = layer.norm1(state)
    mixed = (heads.attention @ heads.values).transpose(1, 2).flatten(2)
    mixed[..., 16:24] += added["donor"]
    state = state + layer.layer_scale1(layer.attention.mix(mixed, normed))
    state = encoder.layers[1](state + layer.layer_scale2(layer.mlp(layer.norm2(state))), rotary)
    found = final_tokens(encoder, pixels, layer=1, place=slice(16, 24), change=added["donor"])
    torch.testing.assert_close(found, encoder.model.layernorm(state), rtol=1e-4, atol=1e-5)


def test_random_patches_are_never_the_sink():
    generator, attention, values = (
        torch.Generator().manual_seed(0),
        torch.eye(4).expand(64, -1, -1),
        torch.ones(64, 4, 2),
    )
    sinks = torch.full((64,), 3)
    control = edited_values(attention, values, sinks, mean=None, num_prefix=2, random=generator)["control"]
    assert (control[:, 2] == -1).all() and not control[:, [0, 1, 3]].any()  # the one patch that is left


@pytest.mark.parametrize("does", ["no_operation", "broadcast"])
def test_planted_sinks_react_as_their_class_should(does):
    encoder = load_encoder(plant_sink(plain_model(), layer=3, head=1, kind="registers", does=does))
    pixels = encoder.prepare(pictures(8)[0])
    report = edit_sinks(encoder, pixels, [0, 1] * 4)
    (head,) = report["classes"][does]["heads"]
    assert (head["layer"], head["head"], head["num_events"], report["num_images"]) == (3, 2, 4, 4)
    edits = head["edits"]
    assert list(edits) == list(EDITS) and not any(
        found["heads"] for name, found in report["classes"].items() if name != does
    )
    assert edits["control"]["change"] < 1e-3 and all(0 <= edit["knn"] <= 1 for edit in edits.values())
    if does == "no_operation":
        assert 3 * edits["zero"]["change"] < edits["ordinary"]["change"]  # silent, unless it is made to speak
    else:
        assert edits["zero"]["change"] > 0.1 and edits["zero"]["shared"] > 0.5
        assert edits["mean"]["change"] < 1e-3 > edits["donor"]["change"]  # all images have the same register
    assert edit_sinks(encoder, pixels, [None] * 8)["classes"][does]["heads"][0]["edits"]["zero"]["knn"] is None
    with pytest.raises(ValueError, match="four images or more to edit, got 3"):
        edit_sinks(encoder, pixels[:3], [None] * 3)


def test_changes_equal_a_loop_over_patches():
    patches, before, kept = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.rand(3, 5) > 0.3
    found = measure_change(patches, before, kept)
    for image in range(3):
        moves = [patches[image, p] - before[image, p] for p in range(5) if kept[image, p]]
        own = [before[image, p] for p in range(5) if kept[image, p]]
        energy, mean = sum(move @ move for move in moves), sum(moves) / len(moves)
        assert found["change"][image] == pytest.approx((energy / sum(o @ o for o in own)).sqrt().item(), rel=1e-5)
        assert found["shared"][image] == pytest.approx((len(moves) * mean @ mean / energy).item(), rel=1e-5)
        towards = before[(image + 1) % 3].mean(dim=0) - before[image].mean(dim=0)
        cosine = F.cosine_similarity(mean, towards, dim=0).item()
        assert found["donor_cosine"][image].item() == pytest.approx(cosine, abs=1e-5)


def test_edits_are_made_when_asked_for_and_shown():
    from modeling_vitreg.analysis.html import render_page

    model, images = plant_sink(plain_model(), layer=2, head=0, kind="cls", does="broadcast"), pictures(6)[0]
    words = {"has_progress_bar": False, "is_strict": True, "num_ablation_images": 3, "num_edit_images": 6}
    report, _ = survey(load_encoder(model), images, settings=SurveySettings(**words))
    assert report.sinks["edits"]["classes"]["broadcast"]["heads"][0]["num_events"] == 3
    page = render_page(report, {})
    assert "<td>2, 1</td><td>3</td><td>value of the sink: 0</td>" in page and "Class token ablation" in page
    report, _ = survey(load_encoder(model), images, settings=SurveySettings(**{**words, "num_edit_images": 0}))
    assert (
        report.sinks["edits"] == {"skipped": "not requested"} and report.sinks["shift_consistency"]["num_images"] == 3
    )


@torch.no_grad()
def test_patches_that_know_only_their_pixels_follow_the_shift_and_those_that_know_their_place_do_not():
    encoder = load_encoder(plain_model())
    pixels = encoder.prepare(pictures(4)[0])
    encoder.model.embeddings.position_embeddings.weight.zero_()
    found = shift_consistency(encoder, pixels)
    assert found["same_content"] == pytest.approx(1, abs=1e-5) and found["same_place"] < 0.9
    encoder.model.embeddings.position_embeddings.weight.normal_(0, 100)
    found = shift_consistency(encoder, pixels)
    assert found["same_place"] > 0.99 > 0.5 > found["same_content"]

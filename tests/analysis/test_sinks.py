"""Sinks: planted heads come out as planted, each bound belongs to its class, and numbers equal those of slow loops."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted_models import pictures, plain_model

from modeling_vitreg.analysis.html import render_page
from modeling_vitreg.analysis.report_dir import analyze
from modeling_vitreg.analysis.sinks import class_patch_cosine, classify, effective_rank, measure_heads
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import load_encoder, register_share
from modeling_vitreg.reports import read_report, write_report


QUICK = {"is_strict": True, "batch_size": 8, "num_ablation_images": 0, "has_progress_bar": False}
KINDS = ("cls", "registers", "patches")


def _survey(model, images, **changes):
    return survey(load_encoder(model, name="model"), images, settings=SurveySettings(**{**QUICK, **changes}))[0]


@torch.no_grad()
def plant_sink(model, *, layer: int, head: int, kind: str, does: str):
    """Make a head of `plain_model` send all attention to one token, and write nothing or one vector.

    Channel 3 marks the token: its key is large there, and every query asks for it by a bias.
    """
    embeddings, attention, place = model.embeddings, model.layers[layer - 1].attention, 16 * head
    if kind == "patches":
        embeddings.position_embeddings.weight[..., -16, 3] = 30.0
    else:
        (embeddings.cls_token[0, 0] if kind == "cls" else embeddings.register_tokens.weight[0])[3] = 30.0
    query, key, value = attention.qkv.weight.unflatten(0, (3, -1))
    bias = attention.qkv.bias.unflatten(0, (3, -1))
    query[place : place + 16] = key[place : place + 16] = 0
    bias[0, place], key[place, 3] = 40.0, 4.0
    rows = value[place : place + 16]
    if does == "no_operation":
        rows -= rows.mean(dim=1, keepdim=True)  # nor does it read the mean of the channels, which the norm removes
    rows[:, 3] = 0 if does == "no_operation" else 2.0
    attention.proj.weight[:, place : place + 16] = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("does", ["no_operation", "broadcast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_head_is_found_with_its_layer_class_and_token(kind, does):
    model = plant_sink(plain_model(), layer=3, head=1, kind=kind, does=does)
    report = _survey(model, pictures(6)[0]).sinks
    assert report["num_images"] == 6
    for layer in report["layers"]:
        for name, kinds in layer["per_image"].items():
            planted = layer["layer"] == 3 and name == does
            assert kinds == {each: float(planted and each == kind) for each in (*KINDS, "distillation")}
            assert layer["heads"][name] == [0.0, float(planted)]
    assert report["totals"][does] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert "1 sinks in the 6 heads" in report["sentence"] and "100% of them on" in report["sentence"]


def test_a_random_network_has_no_sinks_although_its_updates_have_rank_one():
    report = _survey(plain_model(), pictures(4)[0]).sinks
    assert all(total["mean"] == 0 for total in report["totals"].values())
    assert report["sentence"].startswith("No sinks: none of the 6 heads behind layer 1")


def test_every_bound_belongs_to_its_class():
    def classes(num_routed=10, ratio=1.0, stable_rank=1.0, num_tokens=10):
        numbers = (torch.tensor([ratio], dtype=torch.float64), torch.tensor([stable_rank], dtype=torch.float64))
        return classify(torch.tensor([num_routed]), *numbers, num_tokens=num_tokens).item()

    none, idle, broadcast, other = range(4)
    assert classes(num_routed=9) == broadcast and classes(num_routed=8) == none
    assert classes(num_routed=90, num_tokens=101) == none and classes(num_routed=91, num_tokens=101) == broadcast
    assert classes(ratio=0.2) == idle and classes(ratio=0.2 + 1e-9) == other
    assert classes(ratio=0.5) == broadcast and classes(ratio=0.5 - 1e-9) == other
    assert classes(stable_rank=1.5) == broadcast and classes(stable_rank=1.5 + 1e-9) == other
    assert classes(ratio=0.1, stable_rank=9.0) == idle


def test_statistics_equal_those_of_a_loop_over_images_and_heads():
    generator = torch.Generator().manual_seed(0)
    peaks = 6 * torch.randn(3, 2, 1, 9, generator=generator)
    attention = (peaks + torch.randn(3, 2, 9, 9, generator=generator)).softmax(-1)
    values, weights = torch.randn(3, 2, 9, 4, generator=generator), torch.randn(2, 8, 4, generator=generator)
    found = measure_heads(attention, values, weights)
    for image in range(3):
        for head in range(2):
            scores = attention[image, head].double().numpy()
            vectors = values[image, head].double().numpy() @ weights[head].double().numpy().T
            sink = scores.mean(axis=0).argmax()
            lengths = np.linalg.norm(vectors, axis=1)
            sizes = np.linalg.svd(scores @ vectors, compute_uv=False)
            assert found.sinks[image, head] == sink
            assert found.num_routed[image, head] == (scores[:, sink] >= 0.5).sum()
            assert found.least[image, head].item() == pytest.approx(scores[:, sink].min())
            assert found.attention[image, head].item() == pytest.approx(scores[:, sink].mean())
            ratio = lengths[sink] / np.delete(lengths, sink).mean()
            assert found.ratio[image, head].item() == pytest.approx(ratio, rel=1e-9)
            assert found.stable_rank[image, head].item() == pytest.approx((sizes**2).sum() / sizes[0] ** 2, rel=1e-5)


def test_effective_rank_counts_the_directions_in_which_patches_differ():
    tokens = torch.randn(2, 7, 5)
    for image, found in zip(tokens.double().numpy(), effective_rank(tokens)):
        shares = np.linalg.svd(image - image.mean(axis=0), compute_uv=False)
        shares /= shares.sum()
        assert found.item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert effective_rank(torch.ones(1, 7, 5)).item() == 1
    corners = torch.eye(4)[None]  # four equal directions, less their mean
    assert effective_rank(corners).item() == pytest.approx(3)
    assert effective_rank(torch.randn(1, 3, 64)).item() <= 2 + 1e-6


@torch.no_grad()
def test_cosines_and_the_share_of_registers_are_those_of_the_layers():
    model = plant_sink(plain_model(), layer=2, head=0, kind="registers", does="broadcast")
    images, encoder = pictures(4)[0], load_encoder(model)
    report = _survey(model, images).sinks
    pixels = encoder.prepare(images)
    states = model(pixels, output_hidden_states=[0, 1, 2, 3]).hidden_states
    for number, (layer, state, entry) in enumerate(zip(model.layers, states, report["layers"]), start=1):
        for name, tokens in (("cosine_before_norm", state), ("cosine_behind_norm", layer.norm1(state))):
            expected = F.cosine_similarity(tokens[:, :1], tokens[:, 3:], dim=-1).mean()
            assert entry[name] == pytest.approx(expected.item(), abs=1e-6)
            assert class_patch_cosine(tokens, 3).mean().item() == pytest.approx(expected.item(), abs=1e-6)
        share = register_share(encoder, pixels, layer=number).mean()
        assert entry["register_share"] == pytest.approx(share.item(), abs=1e-6)


def test_numbers_depend_neither_on_batches_nor_on_parts_nor_on_processes(monkeypatch):
    model = plant_sink(plain_model(), layer=3, head=1, kind="patches", does="broadcast")
    images, encoder = pictures(6)[0], load_encoder(model)
    one = _survey(model, images).sinks
    monkeypatch.setattr("modeling_vitreg.analysis.sinks.MAX_ENTRIES", 1)  # one image at a time
    two = _survey(model, images, batch_size=4).sinks
    from modeling_vitreg.analysis.sections import Sections
    from modeling_vitreg.encoding import PassSettings, run_pass

    halves = [Sections(encoder, SurveySettings(**QUICK)) for _ in range(2)]
    for half, part in zip(halves, (images[:2], images[2:])):
        run_pass(encoder, part, [half], PassSettings(has_progress_bar=False))
    first = copy.copy(halves[0])
    first.merge(halves[1:])
    three = first.compute(6)["sinks"]
    for other in (two, three):
        assert other["totals"] == one["totals"] and other["sentence"] == one["sentence"]
        for expected, found in zip(one["layers"], other["layers"]):
            assert found["per_image"] == expected["per_image"] and found["heads"] == expected["heads"]
            for name in ("effective_rank", "cosine_before_norm", "register_share", "attention_on_dominant"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_the_anatomy_comes_out_of_the_pass_that_reads_the_attention():
    encoder, seen = load_encoder(plain_model()), []
    encoder.tower.embeddings.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    settings = SurveySettings(**QUICK | {"batch_size": 16, "num_attention_images": 32})
    survey(encoder, pictures(64)[0], settings=settings)
    assert sum(seen) == 64 + 32 <= 1.5 * 64


def test_models_without_prefix_or_with_one_layer_are_measured():
    model = plain_model(has_cls_token=False, pooling="mean", num_register_tokens=0)
    report = _survey(model, pictures(3)[0])
    assert "skipped" in report.attention and report.sinks["num_images"] == 3
    assert "cosine_before_norm" not in report.sinks["layers"][0] and report.sinks["layers"][0]["effective_rank"] > 1
    assert "none of the 0 heads" in _survey(plain_model(num_hidden_layers=1), pictures(2)[0]).sinks["sentence"]
    skipped = _survey(plain_model(), pictures(2)[0], num_attention_images=0).sinks
    words = {"skipped": "not requested"}
    assert skipped == {**words, "edits": words, "shift_consistency": words}


def test_the_page_explains_sinks_and_old_reports_are_read(tmp_path):
    model = plant_sink(plain_model(), layer=3, head=1, kind="registers", does="no_operation")
    settings = SurveySettings(**QUICK)
    report = analyze(load_encoder(model), pictures(4)[0], output_folder=tmp_path, settings=settings)
    page = (tmp_path / "index.html").read_text()
    assert report.sinks["sentence"] in page and "<td>no-operation</td><td>1.00</td><td>0.00</td><td>1.00</td>" in page
    assert (tmp_path / "sinks.png").exists()
    path = write_report(report, tmp_path / "old.json")
    stored = json.loads(path.read_text())
    del stored["sinks"]
    path.write_text(json.dumps(stored))
    read = read_report(path)
    assert read == dataclasses.replace(report, sinks=read.sinks)
    assert "Not measured: not measured by the version that made this report" in render_page(read, {})

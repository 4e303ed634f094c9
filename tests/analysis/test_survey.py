"""The survey: it finds what was planted, nothing in a clean model, and loses nothing on the way."""

import errno
import json
import re
import threading

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from planted_models import DEPTH, GRID, pictures, plain_model, planted_model

from modeling_vitreg.analysis.html import render_page
from modeling_vitreg.analysis.report_dir import analyze, compare
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.images import open_images
from modeling_vitreg.reports import ArtifactReport, read_report, write_report


QUICK = {
    "is_strict": True,
    "batch_size": 8,
    "num_attention_images": 8,
    "num_ablation_images": 4,
    "has_progress_bar": False,
}


def _survey(model, images, **changes) -> ArtifactReport:
    settings = SurveySettings(**{**QUICK, **changes})
    return survey(load_encoder(model, name="model"), images, settings=settings, source="test", command="test")[0]


def test_of_windows_and_convolutions_norms_are_measured_and_the_rest_says_why_not():
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
    windows = transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=4))
    sizes = {"image_size": 32, "depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2}
    convolutions = transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
    reasons = ["layer 1 on windows|SwinLayer have (no known heads|heads of maps)", "ConvNextLayer have no known heads"]
    for model, reason in zip((windows, convolutions), reasons):
        images, encoder = pictures(3)[0], load_encoder(model, name="model")
        report = _survey(model, images, is_strict=False)
        tokens = extract_features(encoder, encoder.prepare(images), layers=[1, 2])
        assert [entry["layer"] for entry in report.layers] == [1, 2]
        for entry, layer in zip(report.layers, tokens):
            assert entry["max"] == pytest.approx(layer.patch_tokens.norm(dim=-1).max().item(), rel=1e-5)
        assert "no class token and no registers" in report.attention["skipped"]
        assert re.search(reason, report.sinks["skipped"])
        assert "Layers are the 2 blocks of the last of several grids." in render_page(report, {})


# Truth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, magnitude", [(1, 30.0), (3, 12.0), (4, 400.0)])
def test_planted_outliers_are_found_exactly(layer, magnitude):
    images, is_white = pictures(24)
    report = _survey(planted_model(layer=layer, magnitude=magnitude), images)
    shares = [entry["rules"]["automatic"]["share"] for entry in report.layers]
    assert shares == [is_white.mean() * (number >= layer) for number in range(1, DEPTH + 1)]
    verdict = report.verdict
    assert (verdict["level"], verdict["layer"], verdict["rule"]) == ("many", DEPTH, "valley")
    assert (verdict["from_layer"], verdict["to_layer"]) == (layer, DEPTH)
    assert verdict["num_images_above"] == 24
    assert f"appear in layer {layer}." in verdict["sentence"]
    np.testing.assert_array_equal(report.outlier_positions["heat_map"], is_white.mean(axis=0))
    ring = np.ones(GRID, bool)
    ring[1:-1, 1:-1] = False
    assert report.outlier_positions["border_share"] == pytest.approx(is_white[:, ring].sum() / is_white.sum())
    assert report.outlier_positions["similarity"]["outlier"]["num_patches"] == is_white.sum()


@pytest.mark.parametrize("settings", [{"layer": 1, "magnitude": 30.0}, {"layer": 3, "magnitude": 12.0},
                                      {"layer": 4, "magnitude": 400.0, "channel": 5}, None])  # fmt: skip
def test_the_verdict_in_bfloat16_is_that_in_float32(settings):
    model, images = planted_model(**settings) if settings else plain_model(), pictures(24)[0]
    exact, reduced = (_survey(model, images, precision=precision) for precision in ("float32", "bfloat16"))
    names = ("level", "layer", "rule", "share", "from_layer", "to_layer", "num_images_above")
    assert exact.verdict["level"] == ("many" if settings else "none")
    assert [reduced.verdict[name] for name in names] == [exact.verdict[name] for name in names]
    assert (exact.made_with["precision"], reduced.made_with["precision"]) == ("float32", "bfloat16")


def test_a_clean_model_has_none():
    report = _survey(plain_model(), pictures(24)[0])
    assert report.verdict["level"] == "none"
    assert report.verdict["sentence"].startswith("No artifacts: 0 % of the patches of layer 4 of 4")
    assert [layer["valley_depth"] for layer in report.layers] == [0] * DEPTH
    assert report.outlier_positions["border_share"] is None and not report.outlier_positions["most_frequent"]
    assert not any(sum(layer["massive"]["ratio"].values()) for layer in report.massive_activations["layers"])


def test_norms_that_differ_before_the_first_layer_are_told_from_what_layers_make():
    model = plain_model()
    with torch.no_grad():
        model.embeddings.patch_embeddings.weight[0] *= 10  # white patches enter with ten times the norm
    verdict = _survey(model, pictures(24)[0]).verdict
    assert verdict["is_in_input"] and verdict["from_layer"] == 1
    assert "may come from the pixels" in verdict["sentence"]
    verdict = _survey(planted_model(layer=1, magnitude=30.0), pictures(24)[0]).verdict
    assert not verdict["is_in_input"] and verdict["from_layer"] == 1


def test_a_few_planted_outliers_are_called_few():
    images = pictures(250, num_white=0)[0] + pictures(8, num_white=1)[0]
    report = _survey(planted_model(layer=2, magnitude=30.0), images, batch_size=64)
    assert report.verdict["level"] == "few"
    assert report.verdict["share"] == 8 / (258 * 16)
    assert report.verdict["rule"] == "3 x median"  # eight patches are no mode


def test_outliers_that_vanish_before_the_end_are_still_told():
    model = planted_model(layer=2, magnitude=30.0)
    with torch.no_grad():  # the last layer takes away what the second one gave
        for name in ("fc1", "fc2"):
            for part in ("weight", "bias"):
                getattr(getattr(model.layers[3].mlp, name), part).copy_(
                    getattr(getattr(model.layers[1].mlp, name), part)
                )
        model.layers[3].mlp.fc2.weight.mul_(-1)
        model.layers[3].mlp.fc1.bias[0] = 0
        output = model(torch.full((1, 3, 32, 32), 2.4), output_hidden_states=[1, 2, 3])
        states = [model.split_tokens(output.hidden_states[number], GRID).patch_tokens for number in (1, 2, 3)]
        unit = model.layers[3].mlp.activation(model.layers[3].mlp.fc1(model.layers[3].norm2(states[2])))[0, 0, 0]
        model.layers[3].mlp.fc2.weight[:, 0] = (states[0] - states[1])[0, 0] / unit
    verdict = _survey(model, pictures(24)[0]).verdict
    assert (verdict["level"], verdict["layer"], verdict["from_layer"], verdict["to_layer"]) == ("many", 2, 2, 3)
    assert "are gone after layer 3" in verdict["sentence"]


def test_a_planted_channel_is_found():
    report = _survey(planted_model(layer=2, magnitude=400.0, channel=5), pictures(24)[0])
    last, first = report.massive_activations["layers"][-1], report.massive_activations["layers"][0]
    assert last["top_channels"][0][0] == 5 and last["largest"] > 300
    assert last["top_shares"][0] > 0.99 > first["top_shares"][0]
    assert last["carriers"]["patches"] == 1
    assert last["massive"]["vision"]["patches"] == 2 and first["massive"]["ratio"]["patches"] == 0
    assert report.massive_activations["channels"][0] == [5, 3]


def test_numbers_do_not_depend_on_the_batch():
    model, images = planted_model(layer=3, magnitude=40.0), pictures(12)[0]
    one, two = (_survey(model, images, batch_size=size) for size in (5, 12))
    assert one.verdict == two.verdict and one.outlier_positions["heat_map"] == two.outlier_positions["heat_map"]
    for first, second in zip(one.layers, two.layers):
        assert first["histogram"] == second["histogram"]
        assert first["mean"] == pytest.approx(second["mean"])
    rows = zip(one.massive_activations["layers"], two.massive_activations["layers"])
    assert all(first["largest"] == pytest.approx(second["largest"], rel=1e-5) for first, second in rows)


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_images", "batch_size", "image_size", "num_probe_images", "num_shown"])
def test_settings_out_of_range_are_refused_before_work_starts(name):
    with pytest.raises(ValueError, match=f"expected {name} of [01] or more, got -1"):
        SurveySettings(**{name: -1})


def test_a_folder_that_cannot_be_written_is_refused_before_an_image_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    images = iter(pictures(2)[0])
    with pytest.raises(NotADirectoryError, match="file"):
        analyze(load_encoder(plain_model()), images, output_folder=tmp_path / "file" / "report")
    assert len(list(images)) == 2


def test_no_image_is_refused_in_words():
    with pytest.raises(ValueError, match="expected at least one readable image, got 0 unreadable ones"):
        _survey(plain_model(), [])
    with pytest.raises(ValueError, match=r"got 2 unreadable ones(.|\n)*image 0: expected a PIL image, got a str"):
        _survey(plain_model(), ["a", "b"])
    with pytest.raises(ValueError, match="images from `open_images` or an iterable of PIL images, got int"):
        _survey(plain_model(), 3)


def test_one_image_gives_a_report_without_intervals():
    report = _survey(planted_model(layer=2, magnitude=50.0), pictures(1)[0], num_probe_images=1)
    assert report.verdict["share"] == 2 / 16 and report.verdict["low"] is None
    assert "interval" not in report.verdict["sentence"]
    assert "two images or more, got 1" in report.ablation["skipped"]
    assert "two images or more" in report.probes["position"]["skipped"]
    page = render_page(report, {})
    assert page.count("two images or more") == 3 and "Not measured: class: the images have no labels" in page


def test_images_of_one_pixel_are_measured_and_broken_ones_counted():
    images = [Image.new("RGB", (1, 1)), "no image", *pictures(3)[0]]
    report = _survey(plain_model(), images)
    assert report.images["num_images"] == 4 and report.images["num_unreadable"] == 1
    assert report.images["unreadable"] == ["image 1: expected a PIL image, got a str"]
    assert report.images["is_complete"]


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_folder_is_read_once_and_its_broken_file_is_counted(tmp_path, is_streaming):
    images, is_white = pictures(6)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    source = open_images(str(tmp_path), is_streaming=True) if is_streaming else str(tmp_path)
    report = _survey(planted_model(layer=2, magnitude=50.0), source)
    assert report.images["num_images"] == 6 and report.images["is_complete"]
    assert report.images["num_unreadable"] == 1 and "broken.png" in report.images["unreadable"][0]
    np.testing.assert_allclose(report.outlier_positions["heat_map"], is_white.mean(axis=0))


@pytest.mark.parametrize("num_registers", [0, 1])
def test_a_model_without_class_token_is_measured(num_registers):
    changes = {"has_cls_token": False, "pooling": "mean", "num_register_tokens": num_registers}
    report = _survey(planted_model(layer=2, magnitude=50.0, **changes), pictures(8)[0])
    assert report.verdict["from_layer"] == 2
    assert report.layers[0]["cls"] is None and len(report.layers[0]["registers"]) == num_registers
    if num_registers:
        assert report.attention["queries"] == ["register 1"]
        assert report.ablation["modes"]["zeroed"]["cls"] is None
    else:
        assert report.attention["skipped"] == "the model has no class token and no registers"
        assert report.ablation["skipped"] == "the model has no registers"


@torch.no_grad()
def test_features_that_are_all_zero_have_a_report(tmp_path):
    model = plain_model()
    for parameter in model.parameters():
        parameter.zero_()
    report = analyze(load_encoder(model), pictures(3)[0], output_folder=tmp_path, settings=SurveySettings(**QUICK))
    assert report.verdict["level"] == "none" and report.layers[0]["max_over_median"] is None
    assert len(list(tmp_path.glob("*.png"))) == 8


def test_half_precision_finds_the_same():
    images, is_white = pictures(24)
    model = planted_model(layer=3, magnitude=400.0).to(torch.bfloat16)
    report = _survey(model, images)
    shares = [entry["rules"]["automatic"]["share"] for entry in report.layers]
    assert shares == [0, 0, is_white.mean(), is_white.mean()]
    assert report.made_with["dtype"] == "bfloat16"


class _Sick(torch.nn.Module):
    """Makes images whose first patch is black not finite."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, state, *arguments):
        state = self.layer(state, *arguments)
        return torch.where((state[:, -16:, 0] < -1).any(dim=1)[:, None, None], torch.nan, state)


def test_features_that_are_not_finite_are_left_out_and_counted():
    model, images = planted_model(layer=2, magnitude=50.0), pictures(8)[0]
    model.layers[2] = _Sick(model.layers[2])
    report = _survey(model, [*images, Image.new("RGB", (32, 32))], is_strict=False)
    assert report.images["num_nonfinite"] == 1 and report.images["num_images"] == 8
    assert report.images["nonfinite"] == ["image 8"]
    assert "1 of 9 images have features that are not finite and are left out: image 8" in render_page(report, {})
    assert report.verdict["share"] == 2 / 16
    assert "blocks of class _Sick have no known attention" in report.attention["skipped"]
    report = _survey(model, [Image.new("RGB", (32, 32))] * 3)
    assert report.verdict["level"] == "unknown" and report.layers == []
    assert "all 3 images contain NaN or infinity" in report.verdict["sentence"]
    assert report.outlier_positions == {"skipped": "no image has finite features"}


@pytest.mark.parametrize(
    "error, words", [(KeyboardInterrupt(), "stopped by hand after 8 images"), (OSError("disk"), "OSError after 8 im")]
)
def test_what_was_measured_survives_an_interruption(error, words, tmp_path):
    def images():
        yield from pictures(8)[0]
        raise error

    encoder = load_encoder(planted_model(layer=3, magnitude=50.0), name="model")
    report = analyze(
        encoder, images(), output_folder=tmp_path, settings=SurveySettings(**QUICK | {"is_strict": False})
    )
    assert not report.images["is_complete"] and words in report.images["stopped_by"]
    assert report.images["num_images"] == 8 and report.verdict["from_layer"] == 3
    assert words in (tmp_path / "index.html").read_text()
    assert read_report(tmp_path / "artifacts.json") == report


def test_control_c_ends_the_pass_behind_the_batch():
    import os
    import signal

    before = signal.getsignal(signal.SIGINT)

    def images():
        for number, image in enumerate(pictures(24)[0]):
            if number == 10:
                os.kill(os.getpid(), signal.SIGINT)
            yield image

    report = _survey(plain_model(), images())
    assert report.images["stopped_by"] == "stopped by hand after 16 images"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_survey_runs_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(_survey(plain_model(), pictures(2)[0])))
    thread.start()
    thread.join()
    assert found[0].images["num_images"] == 2


# Folder and report -------------------------------------------------------------------------------------------------


def test_a_folder_holds_page_report_and_figures(tmp_path):
    images = [(image, number % 2) for number, image in enumerate(pictures(10)[0])]
    encoder = load_encoder(planted_model(layer=3, magnitude=50.0), name="a <model>")
    settings = SurveySettings(**QUICK, num_probe_images=10)
    report = analyze(encoder, images, output_folder=tmp_path, settings=settings, command="vitreg analyze <x>")
    names = {path.name for path in tmp_path.iterdir()}
    pictures_written = {
        "norms",
        "shares",
        "norm_maps",
        "outlier_positions",
        "attention",
        "heads",
        "massive_activations",
        "sinks",
    }
    assert names == {"index.html", "artifacts.json"} | {f"{name}.png" for name in pictures_written}
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure><div") == len(pictures_written) - 2  # shares is a chart, attention maps to point at
    assert "a &lt;model&gt;" in page and "<model>" not in page and "vitreg analyze &lt;x&gt;" in page
    assert "http" not in page and page.count("<table>") == page.count("</table>") >= 6
    assert page.index(report.verdict["sentence"]) < page.index("<figure>")
    assert set(report.probes["class"]) == {"class token", "normal patch", "outlier patch", "register"}
    assert json.loads((tmp_path / "artifacts.json").read_text())["version"] == 2


def test_models_are_compared_side_by_side(tmp_path, drawn):
    encoders = [
        load_encoder(plain_model(num_register_tokens=0), name="without"),
        load_encoder(planted_model(layer=3, magnitude=50.0), name="with"),
    ]
    settings = SurveySettings(**QUICK)
    reports = compare(encoders, lambda: pictures(8)[0], output_folder=tmp_path, settings=settings, command="go")
    assert [report.verdict["level"] for report in reports] == ["none", "many"]
    page = (tmp_path / "index.html").read_text()
    assert all(report.verdict["sentence"] in page for report in reports)
    assert (tmp_path / "1" / "index.html").exists() and (tmp_path / "2" / "artifacts.json").exists()
    with pytest.raises(ValueError, match="two models or more to compare, got 1"):
        compare(encoders[:1], list, output_folder=tmp_path)


def test_a_report_of_another_kind_or_version_is_refused(tmp_path):
    path = write_report(_survey(plain_model(), pictures(2)[0]), tmp_path / "a" / "report.json")
    content = json.loads(path.read_text())
    for change, words in (
        ({"version": 0}, "version 2 or earlier, got kind 'artifacts', version 0"),
        ({"kind": "other"}, "kind 'artifacts', version 2 or earlier, got kind 'other'"),
        ({"extra": 1}, r"missing \[\], unknown \['extra'\]"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=words):
            read_report(path)
    for text, words in (("{", "does not parse"), ("[]", "a dictionary in JSON, got a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_report(path)


def test_a_number_that_json_lacks_is_refused_and_nothing_is_left(tmp_path):
    report = ArtifactReport(*["m", {}, {}, {"share": float("nan")}, {}, [], {}, {}, {}, {}, {}, "c"])
    with pytest.raises(ValueError, match="report of finite numbers"):
        write_report(report, tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_channels", [1, 4])
def test_models_of_other_channels_are_measured_and_drawn(tmp_path, num_channels):
    model = plain_model(num_channels=num_channels, num_hidden_layers=1)
    images = [image.convert("RGBA") for image in pictures(3)[0]]
    report = analyze(load_encoder(model), images, output_folder=tmp_path, settings=SurveySettings(**QUICK))
    assert report.images["num_images"] == 3 and (tmp_path / "norm_maps.png").exists()


def test_a_model_of_two_channels_is_refused_before_an_image_is_read():
    images = iter(pictures(2)[0])
    with pytest.raises(ValueError, match="expects images of 2 channels, but image files have 1"):
        _survey(plain_model(num_channels=2), images)
    assert len(list(images)) == 2


def test_a_disk_that_fills_at_the_report_leaves_the_report_before(tmp_path, monkeypatch):
    encoder, settings = load_encoder(plain_model(num_hidden_layers=1)), SurveySettings(**QUICK, num_shown=0)
    analyze(encoder, pictures(2)[0], output_folder=tmp_path, settings=settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modeling_vitreg.files.os.replace", fill)
    with pytest.raises(OSError, match="No space left on device"):
        analyze(encoder, pictures(3)[0], output_folder=tmp_path, settings=settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

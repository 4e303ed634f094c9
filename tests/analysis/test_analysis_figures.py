"""Figures and page of a report: drawn for every model, whole files only, nothing of the caller touched."""

import base64
import dataclasses
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image
from planted_models import DEPTH, GRID, pictures, plain_model, planted_model

from modeling_vitreg.analysis import figures
from modeling_vitreg.analysis.html import render_comparison, render_page
from modeling_vitreg.analysis.report_dir import write_comparison, write_folder
from modeling_vitreg.analysis.survey import SurveySettings, survey
from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.features import load_encoder


def _measure(model, num_images=12, **changes):
    quick = {"batch_size": 8, "num_attention_images": 8, "num_ablation_images": 4, "has_progress_bar": False}
    settings = SurveySettings(**{**quick, **changes})
    return survey(load_encoder(model, name="model"), pictures(num_images)[0], settings=settings)


@pytest.fixture(scope="module")
def planted():
    return _measure(planted_model(layer=3, magnitude=50.0))


def _labels(ax) -> list:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_norms_show_all_layers_and_every_threshold(planted, drawn, tmp_path):
    report, _ = planted
    figures.draw_norms(report, tmp_path / "norms.png")
    left, right, bar = drawn[0].axes
    assert left.get_title(loc="left") == "Norms of patches, all layers"
    assert left.get_yscale() == right.get_xscale() == "log"
    assert "residual units" in left.get_ylabel() and "residual units" in right.get_xlabel()
    assert bar.get_ylabel() == "share of patches of the layer"
    thresholds = [layer["rules"]["automatic"]["threshold"] for layer in report.layers]
    assert list(left.lines[0].get_ydata())[:DEPTH] == thresholds
    assert len(right.lines) == 5  # one a rule
    share = f"{100 * report.verdict['share']:.2g}"
    assert f"automatic: {thresholds[-1]:.3g} ({share} %)" in _labels(right)


def test_shares_have_a_line_a_model_and_a_band(planted, drawn, tmp_path):
    report, _ = planted
    other = dataclasses.replace(report, model="other")
    figures.draw_shares([report, other], tmp_path / "shares.png")
    (ax,) = drawn[0].axes
    shares = [layer["rules"]["automatic"]["share"] for layer in report.layers]
    assert ax.lines[0].get_ydata().tolist() == shares == ax.lines[1].get_ydata().tolist()
    assert _labels(ax) == ["model", "other"] and len(ax.collections) == 2


def test_a_series_has_a_place_for_each_report(planted, drawn, tmp_path):
    report, _ = planted
    figures.draw_series([report] * 3, tmp_path / "s.png", labels=["1k", "2k", "3k"], axis="training step")
    for ax in drawn[0].axes:
        assert [text.get_text() for text in ax.get_xticklabels()] == ["1k", "2k", "3k"]
        assert ax.get_xlabel() == "training step"
    with pytest.raises(ValueError, match="one label for each, got 1 and 2"):
        figures.draw_series([report], tmp_path / "s.png", labels=["a", "b"], axis="x")


def test_places_show_the_heat_map_and_both_groups(planted, drawn, tmp_path):
    report, _ = planted
    figures.draw_positions(report, tmp_path / "outlier_positions.png")
    left, right, _ = drawn[0].axes
    np.testing.assert_allclose(left.images[0].get_array(), report.outlier_positions["heat_map"])
    numbers = report.outlier_positions["similarity"]
    assert [label.split(":")[0] for label in _labels(right)] == ["normal patches", "outlier patches"]
    assert f"{numbers['outlier']['num_patches']}, mean {numbers['outlier']['mean']:.2f}" in _labels(right)[1]


def test_maps_stand_beside_their_image(planted, drawn, tmp_path):
    report, examples = planted
    figures.draw_norm_maps(report, examples, tmp_path / "n.png")
    figures.draw_attention(report, examples, tmp_path / "a.png")
    figures.draw_heads(report, examples, tmp_path / "h.png")
    norms, attention, heads = (np.array(figure.axes) for figure in drawn)
    norms = norms.reshape(4, DEPTH + 1)
    for row in range(4):
        assert norms[row, 0].images[0].get_array().shape == (32, 32, 3)
        np.testing.assert_allclose(norms[row, 3].images[0].get_array(), examples.norms[2, row])
    attention = attention.reshape(5, 5)
    titles = [ax.get_title().split("\n")[0] for ax in attention[0]]
    assert titles == ["image", "norms, layer 4", "class token", "register 1", "register 2"]
    shown = attention[1, 3].images[0].get_array()
    np.testing.assert_allclose(shown, examples.attention["register 1"][1].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(attention[4, 2].images[0].get_array(), examples.mean_maps["cls"])
    assert len(heads) == 3 * 2 and [ax.get_title() for ax in heads[:2]] == ["head 1", "head 2"]


@pytest.mark.parametrize(
    "changes, settings",
    [
        ({"num_register_tokens": 0, "has_cls_token": False, "pooling": "mean"}, {}),
        ({"num_hidden_layers": 1}, {"num_attention_images": 0}),
        ({"num_register_tokens": 12}, {"num_shown": 1}),
        ({"image_size": 8, "num_register_tokens": 1}, {"num_shown": 0}),
        ({"image_size": (16, 40)}, {"num_attention_images": 1}),
    ],
)
def test_every_model_has_a_page_and_what_it_lacks_is_left_out(drawn, tmp_path, changes, settings):
    report, examples = _measure(plain_model(**changes), num_images=3, **settings)
    page = write_folder(report, examples, tmp_path).read_text()
    names = {path.stem for path in tmp_path.glob("*.png")}
    expected = {"norms", "shares", "outlier_positions", "massive_activations"}
    expected |= {"sinks"} if settings.get("num_attention_images", 1) else set()
    if settings.get("num_shown", 4):
        expected |= {"norm_maps"}
        if changes.get("has_cls_token", True) and settings.get("num_attention_images", 1):
            expected |= {"attention", "heads"}
    assert names == expected
    shown = expected - {"shares", *(["attention"] if "norm_maps" in expected else [])}  # read as a chart and as maps
    assert page.count("<figure><div") == len(shown) and page.endswith("</html>\n")
    assert ("data-map=" in page) == ("norm_maps" in expected)


def test_a_figure_that_fails_is_left_out_with_a_warning(planted, monkeypatch, caplog, tmp_path):
    def fail(*_):
        raise RuntimeError("no paper")

    monkeypatch.setattr("modeling_vitreg.analysis.report_dir.draw_norms", fail)
    write_folder(*planted, tmp_path)
    assert "figure norms failed: RuntimeError: no paper" in caplog.text
    assert "RuntimeError: no paper" in (tmp_path / "errors.log").read_text()
    assert not (tmp_path / "norms.png").exists() and (tmp_path / "outlier_positions.png").exists()


def test_files_are_pictures_and_no_setting_of_the_caller_is_touched(planted, tmp_path):
    before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    report, examples = planted
    figures.draw_heads(report, examples, tmp_path / "new" / "heads.png")
    assert Image.open(tmp_path / "new" / "heads.png").size[0] > 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["heads.png"]
    assert {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"} == before


def test_warnings_stand_behind_the_verdict(planted):
    report, _ = planted
    images = {**report.images, "num_unreadable": 2, "unreadable": ["<a>", "b"], "num_nonfinite": 3}
    attention = {**report.attention, "registers": {"similarity": [], "duplicates": [[1, 3], [2, 4]]}}
    page = render_page(dataclasses.replace(report, images=images, attention=attention), {})
    assert "2 of 17 images could not be read and are left out: &lt;a&gt;; b" in page
    assert "3 of 17 images have features that are not finite and are left out" in page
    assert "These registers are equal and act as one: 1, 3; 2, 4." in page


def test_names_from_outside_are_text_on_the_page_whatever_they_hold(planted):
    report, _ = planted
    name = "a</title><script>alert(1)</script>\n|#{{ 7 * 7 }}\udcff"
    images = {**report.images, "source": name, "num_unreadable": 1, "unreadable": [name]}
    hostile = dataclasses.replace(report, model=name, images=images, command=name)
    for page in (render_page(hostile, {}), render_comparison([hostile] * 2, {}, command=name)):
        assert "<script>alert" not in page and "{{ 7 * 7 }}" in page and "&lt;script&gt;" in page
        page.encode("utf-8")


def test_a_comparison_needs_two_and_bears_a_model_that_was_not_measured(planted, drawn, tmp_path):
    report, _ = planted
    with pytest.raises(ValueError, match="two reports or more, got 1"):
        render_comparison([report], {}, command="")
    unknown = dataclasses.replace(report, layers=[], verdict={"level": "unknown", "sentence": "Unknown."})
    page = render_comparison([report, unknown], {}, command="a < b")
    with pytest.raises(ValueError, match="one label for each of 2 reports, got 1"):
        write_comparison([report, unknown], tmp_path, labels=["1k"], axis="training step")
    write_comparison([report, unknown, report], tmp_path, labels=["1k", "2k", "3k"], axis="training step")
    assert [text.get_text() for text in drawn[-1].axes[0].get_xticklabels()] == ["1k", "3k"]
    assert "Unknown." in page and "a &lt; b" in page and page.split("</section>")[0].count("<tr>") == 3


def test_values_of_maps_and_charts_are_read_from_the_page(planted, tmp_path):
    report, examples = planted
    page = write_folder(report, examples, tmp_path).read_text()
    rows, columns, low, high, text = re.search(
        r'data-map="(\d+) (\d+) (\S+) (\S+)" data-values="(.*?)"', page
    ).groups()
    levels = np.frombuffer(base64.b64decode(text), "<u2").reshape(int(rows), int(columns))
    values = float(low) + (float(high) - float(low)) * levels / 65535
    np.testing.assert_allclose(
        values, examples.norms[report.verdict["layer"] - 1, 0], atol=(values.max() - values.min()) / 65535
    )
    share = report.layers[2]["rules"]["automatic"]
    words = f"layer 3: model {format_share(share['share'])} ({format_share(share['low'])} to"
    assert f"<title>{words}" in page
    headings = re.findall(r'<section id="(\w+)"', page)
    assert re.findall(r'<a href="#(\w+)"', page) == headings and headings[0] == "images" and headings[-1] == "cite"


def test_a_comparison_shows_the_maps_of_both_models_for_each_image(planted, tmp_path):
    reports, examples = zip(planted, _measure(plain_model(num_register_tokens=0)))
    page = write_comparison(reports, tmp_path, labels=["a", "b"], examples=examples, pages=["1.html", "2.html"])
    page = page.read_text()
    # Four images and their mean, two models each; components and norms of each image, one or three queries.
    assert page.count('<div class="strip">') == 2 * 5 and page.count("<b>components</b>") == 2 * 4
    assert page.count("<b>class token</b>") == 2 * 5 and page.count("<b>register 2</b>") == 5
    assert 'href="2.html"' in page and page.count("<h3>a</h3>") == page.count("<h3>b</h3>") == 1


def test_the_grid_of_the_examples_is_that_of_the_images(planted):
    _, examples = planted
    assert examples.norms.shape == (DEPTH, 4, *GRID)
    assert examples.images.min() >= 0 and examples.images.max() == 1  # white patches

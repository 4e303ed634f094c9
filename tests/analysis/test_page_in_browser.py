"""The page of a comparison in a real browser: at three widths, in the dark, and when pointed at."""

import pytest
from planted_models import pictures, plain_model, planted_model

from modeling_vitreg.analysis.report_dir import compare
from modeling_vitreg.analysis.survey import SurveySettings
from modeling_vitreg.features import load_encoder


@pytest.mark.slow
def test_pages_open_offline_at_each_width_and_values_are_read(tmp_path, open_page, is_cut_off):
    models = {"before": planted_model(layer=3, magnitude=50.0), "after": plain_model()}
    encoders = [load_encoder(model, name=name) for name, model in models.items()]
    settings = SurveySettings(batch_size=8, num_ablation_images=2, has_progress_bar=False)
    images = pictures(8)[0]
    compare(encoders, lambda: images, output_folder=tmp_path, settings=settings, command="vitreg analyze " + "x" * 99)
    for name in ("index.html", "1/index.html"):
        for width, scheme in ((420, "light"), (800, "dark"), (1400, "light")):
            page = open_page((tmp_path / name).as_uri(), width=width, scheme=scheme)
            assert not page.problems and not is_cut_off(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
            ink, paper = page.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light") and ink != paper
    page = open_page((tmp_path / "index.html").as_uri())
    row = page.locator(".row").first
    row.locator(".map").nth(1).hover(position={"x": 2, "y": 2})
    read = [
        text for text in row.locator(".cell span:last-child").all_inner_texts() if text.startswith("row 1, column 1: ")
    ]
    assert len(read) == 2 * 4  # norms, class token and two registers of both models
    page.locator("svg g").nth(2).hover()
    assert page.locator(".read").first.inner_text().startswith("layer 3: before ")
    page.mouse.move(0, 0)
    assert "x median" in row.inner_text() and not page.problems

"""Figures of a run: drawn from any log and any model, whole files only, nothing of the caller touched."""

import ast
import math
import pathlib

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel, style
from modeling_vitreg.analysis import summarise_norms, token_norms
from modeling_vitreg.pretraining.monitoring import curves, pictures
from modeling_vitreg.pretraining.monitoring.curves import draw_norms
from modeling_vitreg.pretraining.monitoring.pictures import draw_attention
from modeling_vitreg.pretraining.objectives.registry import OBJECTIVES, objective_class


PANELS = {name: objective_class(name).panels for name in OBJECTIVES}
STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def draw_curves(records, path, *, objective="dinov2", **options):
    return curves.draw_curves(records, path, panels=PANELS[objective], **options)


def _log(num_records=30) -> list:
    records = []
    for step in range(num_records):
        losses = {"total": 12 - step / 50, "dino": 7 - step / 100, "ibot": 6 - step / 100, "koleo": 0.5}
        records.append({"step": step, **losses, "teacher_entropy": 5.0, "mean_entropy": 6.0, "learning_rate": 1e-3})
        if step % 10 == 0:
            records.append(
                {"step": step, "knn": 0.2 + step / 200, "chance": 0.1, "rank": 5 + step, "segmentation": 0.1}
            )
    return records


def _norm_records(num_layers=3, steps=(0, 10, 20)) -> list:
    quantiles = {"median": 10.0, "q90": 12.0, "q99": 15.0, "max": 20.0}
    layers = [{"layer": number + 1, **quantiles, "outlier_share": number / 100} for number in range(num_layers)]
    return [{"step": step, "multiple": 3.0, "layers": layers} for step in steps]


def _settings() -> dict:
    return {
        key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"
    }  # read, it would be chosen


def _texts(ax) -> list:
    return [text.get_text() for text in ax.texts]


def _size(path) -> tuple:
    with Image.open(path) as image:
        image.load()
        return image.size


# Files -------------------------------------------------------------------------------------------------------------


def test_all_three_figures_are_written_as_images(tmp_path, tiny):
    model = ViTWithRegistersModel(tiny())
    images = torch.randn(2, 3, 32, 32)
    norms = [{"step": step, **summarise_norms(token_norms(model, images))} for step in (0, 5)]
    assert draw_curves(_log(), tmp_path / "new" / "curves.png", num_prototypes=1024) == tmp_path / "new" / "curves.png"
    assert draw_norms(norms, str(tmp_path / "norms.png")) == tmp_path / "norms.png"
    assert draw_attention(model, images, tmp_path / "attention.jpg", **STATISTICS) == tmp_path / "attention.jpg"
    for name in ("new/curves.png", "norms.png", "attention.jpg"):
        assert min(_size(tmp_path / name)) > 300
    assert {path.name for path in tmp_path.iterdir()} == {"new", "norms.png", "attention.jpg"}  # nothing left beside


def test_a_failure_while_writing_leaves_the_old_figure_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(figure, sibling, **_):
        sibling.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(_log(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_figures_are_drawn_without_pyplot_and_no_setting_is_touched(drawn, tmp_path):
    for module in (curves, pictures, style):
        nodes = list(ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not any("pyplot" in str(name) for name in names + modules)
    before = _settings()
    draw_curves(_log(), tmp_path / "curves.png")
    draw_norms(_norm_records(), tmp_path / "norms.png")
    assert _settings() == before


# Curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["classify", "clip", "segment", "depth"])
def test_what_a_head_reaches_has_a_panel(drawn, tmp_path, objective):
    _, *panels = PANELS[objective]
    reached = dict.fromkeys((name for panel in panels for name in panel.curves), 0.5)
    records = [{"step": step, "total": 1.0, **reached} for step in range(3)]
    draw_curves(records, tmp_path / "heads.png", objective=objective)
    _, *axes = drawn[0].axes
    assert [ax.get_title(loc="left") for ax in axes] == [panel.title for panel in panels]
    assert [{line.get_label() for line in ax.lines} for ax in axes] == [set(panel.curves.values()) for panel in panels]


def test_panels_show_what_the_log_has(drawn, tmp_path):
    draw_curves(_log(), tmp_path / "all.png", num_prototypes=1024)
    axes = drawn[0].axes
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == [panel.title for panel in (*PANELS["dinov2"], *curves.COMMON_PANELS)]
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["total"].get_ydata()[-1] == pytest.approx(12 - 29 / 50)
    assert lines["class token (DINO)"].get_xdata()[-1] == 29
    assert "spread (KoLeo)" in lines
    for ax in axes[:2]:
        assert _texts(ax) == ["ln K = 6.93"]
        assert any(set(line.get_ydata()) == {math.log(1024)} for line in ax.lines)
    assert _texts(axes[2]) == ["chance 10.0%"]
    assert len({ax.get_xlim() for ax in axes}) == 1  # evaluations and losses stand over the same steps

    draw_curves([{"step": 0, "dino": 1.0}, {"step": 9, "knn": 0.5, "dino": math.nan}], tmp_path / "few.png")
    assert [ax.get_title(loc="left") for ax in drawn[1].axes] == ["Loss", "k-NN accuracy"]
    assert [_texts(ax) for ax in drawn[1].axes] == [[], []]


def test_a_long_curve_keeps_its_points_and_gets_a_running_median(drawn, tmp_path):
    records = [{"step": step, "total": 1000.0 if step == 450 else step / 100} for step in range(900)]
    draw_curves(records, tmp_path / "long.png")
    faint, median = drawn[0].axes[0].lines
    assert len(faint.get_xdata()) == 900 and max(faint.get_ydata()) == 1000
    np.testing.assert_allclose(median.get_ydata(), median.get_xdata() / 100, atol=0.011)


def test_a_log_without_anything_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected records with any of total, dino, .* got 1 without"):
        draw_curves([{"step": 0, "total": math.nan}], tmp_path / "none.png")


# Norms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers, shown", [(1, [1]), (3, [1, 2, 3]), (24, [1, 7, 13, 18, 24])])
def test_norms_are_drawn_for_a_few_layers_and_shares_for_all(drawn, tmp_path, num_layers, shown):
    draw_norms(_norm_records(num_layers), tmp_path / "norms.png")
    *panels, shares, bar = drawn[0].axes
    assert [ax.get_title(loc="left") for ax in panels] == [f"Norm of patches, layer {layer}" for layer in shown]
    assert len(shares.lines) == num_layers
    assert [line.get_ydata()[0] for line in shares.lines] == [number / 100 for number in range(num_layers)]
    for ax in panels:
        assert ax.get_yscale() == "log"
        lines = {line.get_label(): set(line.get_ydata()) for line in ax.lines}
        assert lines == {"median": {10}, "90 %": {12}, "99 %": {15}, "largest": {20}, "3 x median": {30}}
        assert ax.get_ylim() == panels[0].get_ylim()
    assert bar.get_ylabel() == "layer"


def test_norm_records_are_drawn_in_order_of_their_steps(drawn, tmp_path):
    draw_norms(_norm_records(steps=(20, 0, 10, 10)), tmp_path / "norms.png")
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [0, 10, 20]


def test_norms_of_different_models_are_refused(tmp_path):
    for records, got in (([], "no records"), (_norm_records(3) + _norm_records(4, steps=[30]), r"\[3, 4\]")):
        with pytest.raises(ValueError, match=f"one number of layers, got {got}"):
            draw_norms(records, tmp_path / "norms.png")


# Attention ---------------------------------------------------------------------------------------------------------


def _pictures(figure) -> dict:
    """Title of each column to its pictures, from the top down."""
    axes = figure.axes
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    return {title: [ax.images[0].get_array() for ax in axes[k :: len(titles)]] for k, title in enumerate(titles)}


def test_a_row_holds_image_attention_norms_and_components(drawn, tmp_path, tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(num_register_tokens=2)))
    pixels = torch.rand(3, 3, 16, 32)
    mean, std = (torch.tensor(STATISTICS[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (pixels - mean) / std
    draw_attention(model, images, tmp_path / "attention.png", **STATISTICS)
    pictures = _pictures(drawn[0])
    norms = model(images, output_pre_norm=True).pre_norm.patch_grid.norm(dim=-1)
    title = f"norms {norms.min():.3g} to {norms.max():.3g}"
    assert list(pictures) == ["image", "class token", "register 1", "register 2", title, "components"]
    maps = model.attention_maps(images, average_heads=True)
    for row in range(3):
        np.testing.assert_allclose(pictures["image"][row], pixels[row].permute(1, 2, 0), atol=1e-6)
        np.testing.assert_allclose(pictures["class token"][row], maps.cls[row, 0])
        np.testing.assert_allclose(pictures["register 2"][row], maps.registers[row, 0, 1])
        np.testing.assert_allclose(pictures[title][row], norms[row].detach(), rtol=1e-6)
        assert pictures["components"][row].shape == (2, 4, 3)
    ax = drawn[0].axes[1]
    share, peak = maps.cls[0, 0].sum(), maps.cls[0, 0].max() / maps.cls[0, 0].mean()
    assert _texts(ax) == [f"{share:.0%}, peak {peak:.1f}x"]
    limits = {ax.images[0].get_clim() for ax in drawn[0].axes[4::6]}
    assert limits == {(norms.min().item(), norms.max().item())}  # one scale for all images


@pytest.mark.parametrize(
    "changes, kinds",
    [
        ({"num_register_tokens": 0}, ["class token"]),
        ({"has_cls_token": False, "pooling": "mean", "num_register_tokens": 1}, ["register 1"]),
        ({"has_cls_token": False, "pooling": "mean", "num_register_tokens": 0}, []),
        ({"has_distillation_token": True, "pooling": "cls", "num_register_tokens": 1}, ["class token", "register 1"]),
        ({"hidden_size": 2, "num_attention_heads": 1, "num_register_tokens": 0}, ["class token"]),
    ],
)
def test_a_model_has_a_column_for_every_token_that_it_has(drawn, tmp_path, tiny, changes, kinds):
    draw_attention(ViTWithRegistersModel(tiny(**changes)), torch.randn(1, 3, 32, 32), tmp_path / "a.png", **STATISTICS)
    assert list(_pictures(drawn[0]))[1:-2] == kinds


def test_patches_that_halt_have_a_map_of_their_depth(drawn, tmp_path, tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny(token_reduction={"kind": "halt", "scale": 2.0, "center": 1.0})))
    images = torch.randn(2, 3, 32, 32)
    draw_attention(model, images, tmp_path / "attention.png", **STATISTICS)
    shown = np.stack(_pictures(drawn[0])["depth"])
    assert np.array_equal(shown, model(images).reduction.halting_depth) and len(np.unique(shown)) > 1


def test_components_are_those_of_the_patches_of_all_images(drawn, tmp_path, tiny, randomise):
    model = randomise(ViTWithRegistersModel(tiny()))
    images = torch.randn(2, 3, 32, 32)
    draw_attention(model, images, tmp_path / "attention.png", **STATISTICS)
    colours = torch.tensor(np.stack(_pictures(drawn[0])["components"]))
    assert colours.min() == 0 and colours.max() == 1
    rows = model(images).patch_tokens.flatten(0, 1).detach().double()
    expected, _, _ = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    for number in range(3):
        found = colours[..., number].flatten().double()
        is_inside = (found > 0) & (found < 1)  # the rest is cut off
        pair = torch.stack([found, expected[:, number]])[:, is_inside]
        assert torch.corrcoef(pair)[0, 1].abs() > 0.999999


def test_modes_return_and_the_random_state_is_left_alone(drawn, tmp_path, tiny):
    model = ViTWithRegistersForImageClassification(tiny(hidden_dropout_prob=0.5, num_labels=2)).train()
    model.vitreg.layers[1].eval()
    modes = [module.training for module in model.modules()]
    images = torch.randn(1, 3, 32, 32)
    state = torch.get_rng_state()
    for _ in range(2):
        draw_attention(model, images, tmp_path / "attention.png", **STATISTICS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (_pictures(figure) for figure in drawn)
    np.testing.assert_array_equal(first["class token"], second["class token"])  # without dropout


def test_images_and_statistics_of_other_channels_are_refused(tmp_path, tiny):
    model = ViTWithRegistersModel(tiny())
    with pytest.raises(ValueError, match=r"deviation for each channel, got \(1, 1, 32, 32\), 3 and 3"):
        draw_attention(model, torch.rand(1, 1, 32, 32), tmp_path / "a.png", **STATISTICS)
    with pytest.raises(ValueError, match="3 and 1"):
        draw_attention(model, torch.rand(1, 3, 32, 32), tmp_path / "a.png", mean=[0.5] * 3, std=[0.5])

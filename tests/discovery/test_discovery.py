"""From an encoder and annotated images to a report: exact boxes of scenes, one pass, padded and broken images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from annotated_scenes import annotated_scenes
from PIL import Image

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.discovery import (
    DiscoveryReport,
    DiscoverySettings,
    Sweep,
    discover,
    lost,
    write_folder,
)
from modeling_vitreg.discovery.boxes import component_boxes, seed_components
from modeling_vitreg.discovery.figures import draw_discoveries, draw_sweep
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.images import AnnotatedImage, UnreadableImage
from modeling_vitreg.metrics import best_iou
from modeling_vitreg.reports import read_report, write_report
from modeling_vitreg.scenes import SceneSettings


QUIET = {"has_progress_bar": False}


@pytest.fixture
def encoder(tiny):
    return load_encoder(ViTWithRegistersModel(tiny(num_register_tokens=2)), name="tiny")


@pytest.fixture
def transparent(tiny):
    """An encoder whose last layer has the mean colours of a patch, less their mean over a grey image, as its keys."""
    model = ViTWithRegistersModel(tiny(num_register_tokens=0, num_hidden_layers=1, layer_scale_init_value=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model.embeddings.patch_embeddings.weight[channel, channel] = 1 / 64
            model.embeddings.patch_embeddings.weight[3 + channel, channel] = -1 / 64
        model.layers[0].norm1.weight.fill_(1.0)
        model.layers[0].attention.qkv.weight[32:64] = torch.eye(32)
    return load_encoder(model, name="transparent")


def painted(name, box, sides=(48, 64)):
    """A red rectangle on a blue ground; `box` is its truth."""
    pixels = np.zeros((*sides, 3), dtype=np.uint8)
    pixels[..., 2] = 200
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = (200, 0, 0)
    return AnnotatedImage(name, Image.fromarray(pixels), boxes=np.array([box], dtype=float))


BOXES = {"a": (8, 8, 32, 40), "b": (40, 0, 64, 16), "c": (0, 24, 16, 48), "d": (16, 16, 48, 32)}


def test_rectangles_are_found_exactly_and_corloc_is_one(transparent):
    images = [painted(name, box) for name, box in BOXES.items()]
    report = discover(transparent, images, settings=DiscoverySettings(batch_size=3, **QUIET))
    assert [found["name"] for found in report.predictions] == list(BOXES)
    assert [tuple(found["box"]) for found in report.predictions] == list(BOXES.values())
    assert report.as_published["corloc"] == 1 and report.as_published["mean_iou"] == 1
    assert (report.images["num_images"], report.images["num_annotated"]) == (4, 4)
    assert report.images["is_complete"] and report.images["stopped_by"] is None


@pytest.mark.parametrize("method", ["lost", "tokencut"])
def test_images_of_other_sizes_are_padded_and_boxes_cut_to_them(transparent, method):
    images = [painted("a", (40, 24, 61, 43), sides=(43, 61)), painted("b", BOXES["b"])]
    report = discover(transparent, images, settings=DiscoverySettings(method=method, **QUIET))
    first, second = report.predictions
    assert first["box"] == [40, 24, 61, 43]
    assert (second["box"], second["iou"]) == ([40, 0, 64, 16], 1.0)


@pytest.mark.parametrize("change, expected", [({}, 1), ({"boxes": (0, 0, 8, 8)}, 0)])
def test_point_in_box_is_the_patch_that_the_class_token_resembles(transparent, change, expected):
    image = painted("a", (40, 24, 61, 43), sides=(43, 61))
    if change:
        image = dataclasses.replace(image, boxes=np.array([change["boxes"]], dtype=float))
    tokens = transparent.model.embeddings
    with torch.no_grad():  # the class token looks like a painted patch
        pixels = transparent.prepare([image.image.crop((40, 24, 56, 40)).resize((64, 64))])
        transparent.model.layernorm.weight.fill_(1.0)
        tokens.cls_token[:] = transparent.embed_patches(pixels)[0, 0] + 0 * tokens.cls_token
    report = discover(transparent, [image, painted("none", BOXES["a"])], settings=DiscoverySettings(**QUIET))
    assert report.as_published["point_in_box"] == (expected + 1) / 2
    without = discover(transparent, [dataclasses.replace(image, boxes=None)], settings=DiscoverySettings(**QUIET))
    assert without.as_published["point_in_box"] is None


def test_boxes_of_shrunk_images_are_in_pixels_of_the_original(transparent):
    image = painted("a", (32, 32, 64, 96), sides=(128, 160))
    report = discover(transparent, [image], settings=DiscoverySettings(longest_side=80, **QUIET))
    assert report.predictions[0]["box"] == [32, 32, 64, 96]


def test_an_image_smaller_than_a_patch_is_one_patch(transparent):
    image = AnnotatedImage("dot", Image.new("RGB", (3, 5)), boxes=np.array([[0, 0, 3, 5]]))
    report = discover(transparent, [image], settings=DiscoverySettings(**QUIET))
    assert report.predictions[0]["box"] == [0, 0, 3, 5]
    assert report.predictions[0]["is_degenerate"] and report.as_published["num_degenerate"] == 1


def test_the_sweep_equals_single_runs_in_one_pass(encoder):
    images = annotated_scenes(range(6), settings=SceneSettings(image_size=(44, 60)))
    sweep = Sweep(features=("key", "value"), layers=(2, -1), biases=(0.0, -0.2), is_normalized=True)
    calls = []
    handle = encoder.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    report = discover(encoder, images, settings=DiscoverySettings(batch_size=3, **QUIET), sweep=sweep)
    handle.remove()
    assert len(calls) == 2  # batches
    assert len(report.sweep["entries"]) == 8
    for entry in report.sweep["entries"]:
        names = {name: entry[name] for name in ("feature", "layer", "bias")}
        single = discover(encoder, images, settings=DiscoverySettings(**names, is_normalized=True, **QUIET))
        expected = {name: single.as_published[name] for name in ("corloc", "num_hits", "num_degenerate")}
        assert {name: entry[name] for name in expected} == expected
        assert entry["mean_iou"] == pytest.approx(single.as_published["mean_iou"])
    hits = [entry["num_hits"] for entry in report.sweep["entries"]]
    assert report.best_of_sweep["num_hits"] == max(hits) and "chosen on the images" in report.best_of_sweep["note"]
    plain = discover(encoder, images, settings=DiscoverySettings(**QUIET))
    assert report.as_published["corloc"] == plain.as_published["corloc"] and not plain.best_of_sweep


def test_scenes_give_the_boxes_of_the_steps_done_by_hand(encoder):
    images = annotated_scenes(range(3), settings=SceneSettings(image_size=32))
    report = discover(encoder, images, settings=DiscoverySettings(feature="value", layer=2, **QUIET))
    for image, found in zip(images, report.predictions):
        pixels = encoder.prepare([image.image])
        (tokens,) = extract_features(encoder, pixels, layers=2, feature="value")
        result = lost(tokens)
        components = seed_components(result.mask, result.seeds, grid=tokens.grid)
        (box,) = component_boxes(components, patch_shape=(8, 8))
        assert found["box"] == box.tolist()
        assert found["iou"] == pytest.approx(best_iou(box, image.boxes))


def test_dino_seg_reads_the_attention_of_the_class_token(encoder, tiny):
    images = annotated_scenes(range(2), settings=SceneSettings(image_size=32))
    report = discover(encoder, images, settings=DiscoverySettings(method="dino_seg", head=1, **QUIET))
    assert len(report.predictions) == 2
    with pytest.raises(ValueError, match="head from 0 to 1, got one and head 4"):
        discover(encoder, images, settings=DiscoverySettings(method="dino_seg"))
    headless = load_encoder(ViTWithRegistersModel(tiny(has_cls_token=False, pooling="mean")))
    with pytest.raises(ValueError, match="got none and head 1"):
        discover(headless, images, settings=DiscoverySettings(method="dino_seg", head=1))


def test_the_report_survives_json(encoder, tmp_path):
    images = annotated_scenes(range(2), settings=SceneSettings(image_size=32))
    report = discover(encoder, images, settings=DiscoverySettings(**QUIET), sweep=Sweep(), command="vitreg discover")
    path = write_report(report, tmp_path / "discovery.json")
    again = read_report(path, kind=DiscoveryReport)
    assert json.loads(path.read_text())["kind"] == "discovery"
    assert report.as_published["settings"]["layer"] == 3  # counted from the front, whatever was asked for
    assert (again.as_published, again.predictions) == (report.as_published, report.predictions)
    assert again.sweep["entries"] == report.sweep["entries"]


def test_images_without_boxes_have_predictions_but_no_corloc(encoder):
    images = [AnnotatedImage(f"{number}.png", Image.new("RGB", (32, 32), (number, 0, 0))) for number in range(3)]
    report = discover(encoder, images, settings=DiscoverySettings(**QUIET), sweep=Sweep())
    assert [found["name"] for found in report.predictions] == ["0.png", "1.png", "2.png"]
    assert report.as_published["corloc"] is None and not report.best_of_sweep
    assert report.predictions[0]["boxes"] is None
    draw_discoveries(images, report)
    with pytest.raises(ValueError, match="sweep over annotated images"):
        draw_sweep(report)


class Images(list):
    """Images of which some cannot be read."""

    def __getitem__(self, number):
        if isinstance(image := super().__getitem__(number), BaseException):
            raise image
        return image


def test_what_cannot_be_read_or_is_not_finite_is_counted_and_left_out(encoder):
    good = painted("good", BOXES["a"])
    images = Images([UnreadableImage("broken.png", "no image"), good, painted("bad", BOXES["a"])])
    handle = encoder.model.layers[0].register_forward_hook(_spoil_second_image)
    report = discover(encoder, images, settings=DiscoverySettings(**QUIET), sweep=Sweep())
    handle.remove()
    assert [found["name"] for found in report.predictions] == ["good"]
    assert (report.images["num_unreadable"], report.images["num_nonfinite"]) == (1, 1)
    assert "broken.png" in report.images["unreadable"][0] and report.images["nonfinite"] == ["bad"]
    alone = discover(encoder, [good], settings=DiscoverySettings(**QUIET))
    assert alone.predictions[0]["box"] == report.predictions[0]["box"]
    with pytest.raises(ValueError, match=r"at least one image, got 1 unreadable(.|\n)*broken\.png"):
        discover(encoder, Images([UnreadableImage("broken.png", "no image")]), settings=DiscoverySettings(**QUIET))
    with pytest.raises(ValueError, match="at least one image"):
        discover(encoder, [], settings=DiscoverySettings(**QUIET))


def _spoil_second_image(_, __, output):
    output = output.clone()
    output[1:] = torch.nan
    return output


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_measured_is_kept_when_the_pass_ends_early(transparent, error):
    images = Images([*(painted(name, box) for name, box in BOXES.items()), error])
    report = discover(transparent, images, settings=DiscoverySettings(batch_size=2, **QUIET), sweep=Sweep())
    assert report.images["num_images"] == 4 and report.as_published["corloc"] == 1
    assert not report.images["is_complete"] and "after 4 images" in report.images["stopped_by"]


def test_pictures_show_boxes_and_the_sweep(transparent, tmp_path):
    images = [painted(name, box) for name, box in BOXES.items()]
    sweep = Sweep(features=("key", "value"), biases=(-0.1, 0.0))
    report = discover(transparent, images, settings=DiscoverySettings(**QUIET), sweep=sweep)
    figure = draw_discoveries(images, report, num_columns=3)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 4 and [len(axis.patches) for axis in shown] == [2] * 4
    figure.savefig(tmp_path / "boxes.png")
    figure = draw_sweep(report)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["key, layer 1", "value, layer 1"]
    figure.savefig(tmp_path / "sweep.png")
    with pytest.raises(ValueError, match="none whose name"):
        draw_discoveries([], report)


def test_a_folder_holds_report_and_figures_whatever_images_are_called(transparent, tmp_path):
    images = [painted("$a$ \\frac\n<b>|#", BOXES["a"]), painted("b" * 200, BOXES["b"])]
    report = discover(transparent, images, settings=DiscoverySettings(**QUIET), sweep=Sweep(biases=(0.0,)))
    write_folder(report, images, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"discovery.json", "boxes.png", "sweep.png"}
    found = read_report(tmp_path / "out" / "discovery.json", kind=DiscoveryReport)
    assert [entry["name"] for entry in found.predictions] == [image.name for image in images]


def test_settings_that_contradict_are_refused(encoder):
    with pytest.raises(ValueError, match="expected method to be one of lost, tokencut, dino_seg"):
        DiscoverySettings(method="cut")
    with pytest.raises(ValueError, match="feature to be one of token, query"):
        DiscoverySettings(feature="keys")
    with pytest.raises(ValueError, match="iou_threshold in"):
        DiscoverySettings(iou_threshold=0)
    with pytest.raises(ValueError, match="sweep over at least one"):
        Sweep(layers=())
    with pytest.raises(ValueError, match="layers from 1 to 3"):
        discover(encoder, [], settings=DiscoverySettings(layer=4))

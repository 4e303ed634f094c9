"""Discovery as a task of the evaluation: CorLoc of `discover`, stopped and resumed, of boxes in every layout."""

import dataclasses
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from annotated_scenes import annotated_scenes
from PIL import Image

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.discovery import DiscoverySettings, discover
from modeling_vitreg.discovery.finder import ObjectFinder
from modeling_vitreg.evaluation import EncodingSettings, EvaluationSettings, compare, evaluate, open_data
from modeling_vitreg.evaluation.intervals import wilson_interval
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import DataOptions, open_images
from modeling_vitreg.images.labelled import FIRST_TEST_SCENE
from modeling_vitreg.scenes import SceneSettings


NUM_SCENES = 20
ENCODING = EncodingSettings(has_progress_bar=False, shard_size=8, workers=0)
SETTINGS = EvaluationSettings(encoding=ENCODING)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield open_data("scenes", image_size=32, num_train=20, num_test=NUM_SCENES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def encoder(tiny, randomise):
    """It finds some objects and not all, with the same weights in every version of transformers."""
    model = ViTWithRegistersModel(tiny(num_register_tokens=2))
    torch.manual_seed(3)
    return load_encoder(randomise(model), name="tiny")


def _run(encoder, data, folder, *, tasks=("discovery",), settings=SETTINGS):
    return evaluate(encoder, tasks=tasks, data=data, settings=settings, output_folder=folder)


def _with(**options):
    return dataclasses.replace(SETTINGS, discovery=DiscoverySettings(**options))


def _without_clocks(report):
    return [{name: value for name, value in result.items() if name != "seconds"} for result in report.results]


@pytest.mark.parametrize("options", [{}, {"method": "tokencut", "layer": 2}, {"method": "dino_seg", "head": 1}])
def test_corloc_is_that_of_discover_on_the_same_images(encoder, scenes, tmp_path, options):
    images = annotated_scenes(
        range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + NUM_SCENES), settings=SceneSettings(image_size=32)
    )
    expected = discover(encoder, images, settings=DiscoverySettings(**options, has_progress_bar=False))
    report = _run(encoder, scenes, tmp_path, settings=_with(**options))
    (result,) = report.results
    hits = expected.as_published["num_hits"]
    assert 0 < hits < NUM_SCENES
    assert (result["task"], result["metric"], result["n"]) == ("discovery", "corloc", NUM_SCENES)
    assert result["value"] == expected.as_published["corloc"]
    assert result["interval"] == list(wilson_interval(hits, NUM_SCENES))
    assert result["facts"]["mean_iou"] == pytest.approx(expected.as_published["mean_iou"])
    assert result["facts"]["layer"] == expected.as_published["settings"]["layer"]
    assert report.data[result["dataset_hash"]]["test"]["num_images"] == NUM_SCENES


def test_a_result_names_the_settings_that_its_method_reads_and_no_others(encoder, scenes, tmp_path):
    (result,) = _run(encoder, scenes, tmp_path, settings=_with(method="tokencut", tau=0.3, batch_size=2)).results
    expected = {"method": "tokencut", "feature": "key", "layer": -1, "tau": 0.3, "epsilon": 1e-5, "iou_threshold": 0.5}
    assert result["settings"] == expected | {"longest_side": None}
    again = _run(encoder, scenes, tmp_path, settings=_with(method="tokencut", tau=0.3, bias=-0.5, batch_size=3))
    assert len(again.results) == 1  # TokenCut reads no bias, and a batch changes nothing
    assert len(_run(encoder, scenes, tmp_path, settings=_with(bias=-0.5)).results) == 2


def test_a_pass_that_is_stopped_goes_on_and_gives_the_same_number(encoder, scenes, tmp_path, monkeypatch):
    update, seen = ObjectFinder.update, []

    def count(self, batch):
        seen.extend(batch.numbers.tolist())
        update(self, batch)

    def stop(self, batch):
        if 18 in batch.numbers:
            raise KeyboardInterrupt
        update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectFinder, "update", stop)
        report = _run(encoder, scenes, tmp_path / "a", tasks=("knn", "discovery"))
    assert report.stopped_by.startswith("stopped by hand") and not report.results
    assert len(list((tmp_path / "a" / "features").rglob("*.objects.json"))) == 2
    monkeypatch.setattr(ObjectFinder, "update", count)
    resumed = _run(encoder, scenes, tmp_path / "a", tasks=("knn", "discovery"))
    assert seen == [16, 17, 18, 19]  # the shard it was in
    whole = _run(encoder, scenes, tmp_path / "b", tasks=("knn", "discovery"))
    assert _without_clocks(resumed) == _without_clocks(whole)
    del seen[:]
    assert _run(encoder, scenes, tmp_path / "a").results == resumed.results and not seen


def test_the_pass_is_of_its_model_boxes_and_settings(encoder, tiny, scenes, tmp_path):
    _run(encoder, scenes, tmp_path)
    passes = lambda: {path.parent for path in (tmp_path / "features").rglob("*.objects.*")}  # noqa: E731
    assert len(passes()) == 1
    _run(encoder, scenes, tmp_path, settings=_with(feature="value"))
    _run(encoder, dataclasses.replace(scenes, test=scenes.test.select(np.arange(9))), tmp_path)
    assert len(passes()) == 3


def test_boxes_do_not_change_what_other_tasks_measured(encoder, tmp_path):
    source = _save(tmp_path / "saved", _painted(), layout="corners")
    first = _run(encoder, open_data(source), tmp_path / "out", tasks=("knn",))
    both = _run(
        encoder,
        open_data(source, options=DataOptions(box_column="objects")),
        tmp_path / "out",
        tasks=("knn", "discovery"),
    )
    assert both.results[0] == first.results[0] and [result["task"] for result in both.results] == ["knn", "discovery"]


# Boxes of users


def _painted(num_images=10):
    """Rectangles on a noisy ground, of several sizes, each with its box by corners and a second one somewhere."""
    random = np.random.default_rng(0)
    found = []
    for number in range(num_images):
        width = 48 if number % 3 else 64
        pixels = random.integers(0, 60, (48, width, 3), np.uint8)
        left, top = random.integers(0, 3, 2) * 8
        pixels[top : top + 24, left : left + 16] = (200, 30 * number % 255, 90)
        found.append((Image.fromarray(pixels), [[left, top, left + 16, top + 24], [width - 8, 40, width, 48]]))
    return found


def _wide(boxes):
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in np.asarray(boxes).tolist()]


def _cell(boxes, layout):
    boxes = np.asarray(boxes).tolist()
    return {
        "corners": boxes,
        "dictionary": {"bbox": _wide(boxes), "category": [1] * len(boxes)},
        "list": [{"bbox": box, "area": 1.0} for box in _wide(boxes)],
    }[layout]


def _save(folder, painted, *, layout):
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    kinds = {
        "corners": datasets.Sequence(box),
        "dictionary": {"bbox": datasets.List(box), "category": datasets.List(datasets.Value("int64"))},
        "list": datasets.List({"bbox": box, "area": datasets.Value("float32")}),
    }
    rows = {
        "image": [image for image, _ in painted],
        "label": [number % 2 for number in range(len(painted))],
        "objects": [_cell(boxes, layout) for _, boxes in painted],
    }
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": label, "objects": kinds[layout]})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(folder))
    return str(folder)


def _write_files(folder, painted):
    """The images, a COCO file and a folder of VOC files."""
    (folder / "images").mkdir(parents=True)
    (folder / "voc").mkdir()
    boxes, entry = [], "<object><bndbox>{}</bndbox></object>"
    for number, (image, own) in enumerate(painted):
        image.save(folder / "images" / f"{number}.png")
        boxes += [{"image_id": number, "bbox": box} for box in _wide(own)]
        sides = [zip(("xmin", "ymin", "xmax", "ymax"), np.add(box, [1, 1, 0, 0])) for box in own]
        objects = "".join(entry.format("".join(f"<{side}>{at}</{side}>" for side, at in box)) for box in sides)
        text = f"<annotation><filename>{number}.png</filename>{objects}</annotation>"
        (folder / "voc" / f"{number}.xml").write_text(text)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(painted))]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    return folder


def test_boxes_of_every_source_give_one_corloc(encoder, tmp_path):
    painted, folder = _painted(), _write_files(tmp_path / "files", _painted())
    expected = discover(
        encoder,
        open_images(str(folder / "images"), annotations=folder / "coco.json"),
        settings=DiscoverySettings(has_progress_bar=False),
    ).as_published
    opened = [
        open_data(_save(tmp_path / layout, painted, layout=layout), options=DataOptions(box_column="objects"))
        for layout in ("corners", "dictionary", "list")
    ]
    opened += [open_data(str(folder / "images"), annotations=folder / name) for name in ("coco.json", "voc")]
    for number, data in enumerate(opened):
        (result,) = _run(encoder, data, tmp_path / f"out {number}").results
        assert (result["n"], result["value"]) == (10, expected["corloc"]), number
        assert result["facts"]["mean_iou"] == pytest.approx(expected["mean_iou"])
    assert len({data.test.box_fingerprint for data in opened[:3]}) == 3


def test_images_without_boxes_that_cannot_be_read_or_with_boxes_outside_are_left_out(encoder, tmp_path):
    painted = _painted(6)
    painted[1] = (painted[1][0], [[0, 0, 200, 20]])
    folder = _write_files(tmp_path / "files", painted)
    (folder / "images" / "0.png").write_bytes(b"no picture")
    report = _run(encoder, open_data(str(folder / "images"), annotations=folder / "coco.json"), tmp_path / "out")
    (result,) = report.results
    counts = report.data[result["dataset_hash"]]["test"]
    assert (result["n"], counts["num_images"], counts["num_unreadable"]) == (4, 4, 2)
    assert "0.png" in counts["unreadable"][0] and "data.box_format may be wrong" in counts["unreadable"][1]
    with pytest.raises(ValueError, match="discovery: no image could be read"):
        for path in (folder / "images").iterdir():
            path.unlink()
        _run(encoder, open_data(str(folder / "images"), annotations=folder / "voc"), tmp_path / "none")


def test_what_lacks_its_truth_names_the_option_to_type(encoder, tmp_path):
    source = _save(tmp_path / "saved", _painted(4), layout="corners")
    report = _run(encoder, open_data(source), tmp_path / "a", tasks=("knn", "segmentation", "depth", "discovery"))
    for task, option in (
        ("segmentation", "--columns mask="),
        ("depth", "--columns depth="),
        ("discovery", "--columns box="),
    ):
        assert option in report.skipped[task]
    with pytest.raises(ValueError, match=r"expected boxes as .* got int"):
        _run(encoder, open_data(source, options=DataOptions(box_column="label")), tmp_path / "b")
    with pytest.raises(ValueError, match=r"no column 'boxes'; the columns are .*objects"):
        open_data(source, options=DataOptions(box_column="boxes"))
    folder = _write_files(tmp_path / "files", _painted(4))
    with pytest.raises(ValueError, match="knn: there are no images to train on"):
        _run(encoder, open_data(str(folder / "images"), annotations=folder / "voc"), tmp_path / "c", tasks=("knn",))
    with pytest.raises(ValueError, match="a file of annotations names the images of a folder itself"):
        open_data(str(folder / "images"), annotations=folder / "voc", options=DataOptions(label_column="label"))


def test_models_that_have_no_class_token_skip_dino_seg_only(tiny, scenes, tmp_path):
    encoder = load_encoder(ViTWithRegistersModel(tiny(has_cls_token=False, pooling="mean")))
    report = _run(encoder, scenes, tmp_path, tasks=("knn", "discovery"), settings=_with(method="dino_seg"))
    assert [result["task"] for result in report.results] == ["knn"] and "class token" in report.skipped["discovery"]


# The table


def test_two_models_stand_in_one_row_and_each_method_in_its_own(encoder, tiny, scenes, tmp_path):
    other = load_encoder(ViTWithRegistersModel(tiny(num_register_tokens=0, num_hidden_layers=2)), name="other")
    _run(encoder, scenes, tmp_path / "a")
    first = _run(encoder, scenes, tmp_path / "a", settings=_with(method="tokencut"))
    second = _run(other, scenes, tmp_path / "b")
    lines = compare([first, second]).splitlines()
    share = f"{100 * first.results[0]['value']:.1f}"
    assert lines[2].startswith(f"| discovery | corloc ↑, % | scenes of 32 pixels (method lost) | {share} [")
    assert "(method tokencut)" in lines[3] and lines[3].endswith("| - |") and not lines[4]
    assert "pixels: " not in lines[-1]  # images keep their own size


def test_the_evaluation_is_imported_without_scipy():
    # Pretraining measures k-NN accuracy, and its extra has no SciPy.
    program = "import sys; sys.modules['scipy'] = sys.modules['sklearn'] = None; import modeling_vitreg.evaluation"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

"""From an encoder and data to a report and a table: resumed, interrupted, refused; and a task that can fail."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.evaluation import (
    EncodingSettings,
    EvaluationReport,
    EvaluationSettings,
    compare,
    evaluate,
    knn_accuracy,
    open_data,
)
from modeling_vitreg.evaluation import tasks as tasks_module
from modeling_vitreg.evaluation.depth import DepthSettings
from modeling_vitreg.evaluation.intervals import wilson_interval
from modeling_vitreg.evaluation.linear import LinearSettings
from modeling_vitreg.evaluation.logistic import LogisticSettings
from modeling_vitreg.evaluation.segmentation import SegmentationSettings
from modeling_vitreg.evaluation.table import find_best
from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.images import DataOptions
from modeling_vitreg.reports import read_report, write_report


ALL = ("knn", "linear", "logistic", "segmentation", "depth")
SETTINGS = EvaluationSettings(
    encoding=EncodingSettings(has_progress_bar=False, shard_size=32, workers=0),
    linear=LinearSettings(num_steps=20, learning_rates=(0.01, 0.1)),
    logistic=LogisticSettings(num_strengths=3, max_steps=20),
    segmentation=SegmentationSettings(num_steps=5),
    depth=DepthSettings(num_steps=5, num_bins=8),
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield open_data("scenes", image_size=32, num_train=150, num_test=60)


@pytest.fixture
def encoder(tiny):
    return load_encoder(ViTWithRegistersModel(tiny(num_register_tokens=2)), name="tiny")


def _run(encoder, data, folder, *, tasks=ALL, settings=SETTINGS, **options):
    strict = {"is_strict": True, **options}
    return evaluate(encoder, tasks=tasks, data=data, settings=settings, output_folder=folder, **strict)


def _without_clocks(report):
    return [{name: value for name, value in result.items() if name != "seconds"} for result in report.results]


def test_a_report_holds_every_number_with_its_circumstances(encoder, scenes, tmp_path):
    report = _run(encoder, scenes, tmp_path, command="vitreg evaluate tiny")
    assert read_report(tmp_path / "evaluation.json", kind=EvaluationReport) == report
    assert {result["task"] for result in report.results} == set(ALL) and not report.skipped
    for result in report.results:
        low, high = result["interval"]
        assert low <= result["value"] <= high and result["n"] == 60 and result["seed"] == 0
        assert result["settings"]["image_size"] == [32, 32] and result["facts"]["num_train"] == 150
        assert result["weights_hash"] == report.architecture["weights_hash"]
        assert report.data[result["dataset_hash"]]["test"]["num_images"] == 60
        assert result["command"] == report.command == "vitreg evaluate tiny"
        assert (result["dataset"], result["split"], result["revision"]) == ("scenes of 32 pixels", "test", None)


def test_the_number_of_a_task_is_that_of_its_function(encoder, scenes, tmp_path):
    (result,) = _run(encoder, scenes, tmp_path, tasks=["knn"]).results
    parts = []
    for part in (scenes.train, scenes.test):
        examples = [part.read(number) for number in range(len(part))]
        pixels = encoder.prepare([image for image, _ in examples])
        (tokens,) = extract_features(encoder, pixels, is_normed=True)
        parts += [tokens.cls_token, torch.tensor([label for _, label in examples])]
    assert result["value"] == knn_accuracy(*parts)
    assert result["interval"] == list(wilson_interval(round(result["value"] * 60), 60))


def test_lists_of_labels_are_measured_by_the_linear_probe_alone(encoder, tmp_path):
    data = open_data(
        "scenes", options=DataOptions(label_column="categories"), image_size=32, num_train=40, num_test=60
    )
    with pytest.raises(ValueError, match="lists of labels: use --tasks linear"):
        _run(encoder, data, tmp_path / "knn", tasks=("knn", "logistic"))
    report = _run(encoder, data, tmp_path, tasks=("knn", "linear"))
    (result,) = report.results
    assert (result["metric"], result["n"]) == ("mean_average_precision", 60) and list(report.skipped) == ["knn"]
    low, high = result["interval"]
    assert 0 < low <= result["value"] <= high <= 1
    labels = torch.tensor(data.test.labels)
    missing = [name for name, count in zip(data.test.class_names, labels.sum(dim=0)) if not count]
    assert result["facts"]["classes_without_positives"] == missing


def test_a_reduced_precision_is_measured_beside_and_named(encoder, scenes, tmp_path):
    reduced = dataclasses.replace(SETTINGS.encoding, precision="bfloat16", patch_precision="float32")
    whole = dataclasses.replace(SETTINGS.encoding, patch_precision="float32")
    for encoding in (whole, reduced):
        settings = dataclasses.replace(SETTINGS, encoding=encoding)
        report = _run(encoder, scenes, tmp_path, tasks=["knn", "segmentation"], settings=settings)
    first, second = (
        [row for row in report.results if ("precision" in row["settings"]) == is_named] for is_named in (0, 1)
    )
    assert len(first) == len(second) > 1 and {row["settings"]["precision"] for row in second} == {"bfloat16"}
    assert (report.made_with["precision"], report.made_with["dtype"]) == ("bfloat16", "float32")
    files = [sorted(path.glob("*.normed_patches.*")) for path in sorted((tmp_path / "features").iterdir())]
    pairs = [[load_file(file)["patches"] for file in group] for group in files if len(group) == 2]  # of test images
    for ours, theirs in zip(*pairs):
        assert 0 < (ours - theirs).abs().max() < 0.05


def test_done_tasks_are_read_and_others_added(encoder, scenes, tmp_path, monkeypatch):
    whole = _run(encoder, scenes, tmp_path / "whole")
    _run(encoder, scenes, tmp_path / "parts", tasks=["knn", "depth"])
    calls = []
    monkeypatch.setattr(tasks_module, "knn_accuracy", lambda *_, **__: calls.append("knn"))
    parts = _run(encoder, scenes, tmp_path / "parts")
    assert not calls and len(parts.results) == len(whole.results)
    key = lambda result: (result["task"], result["metric"])  # noqa: E731
    assert sorted(_without_clocks(parts), key=key) == sorted(_without_clocks(whole), key=key)


def test_other_settings_or_seeds_are_measured_beside(encoder, scenes, tmp_path):
    _run(encoder, scenes, tmp_path, tasks=["linear"])
    report = _run(encoder, scenes, tmp_path, tasks=["linear"], settings=dataclasses.replace(SETTINGS, seed=1))
    assert [result["seed"] for result in report.results if result["metric"] == "top1"] == [0, 1]


def test_ctrl_c_keeps_what_was_measured_and_the_next_call_goes_on(encoder, scenes, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks_module, "fit_logistic", stop)
        report = _run(encoder, scenes, tmp_path / "a")
    assert report.stopped_by == "stopped by hand" and {result["task"] for result in report.results} == {
        "knn",
        "linear",
    }
    assert read_report(tmp_path / "a" / "evaluation.json", kind=EvaluationReport) == report
    resumed, whole = _run(encoder, scenes, tmp_path / "a"), _run(encoder, scenes, tmp_path / "b")
    assert resumed.stopped_by is None and _without_clocks(resumed) == _without_clocks(whole)


def test_a_task_that_fails_takes_no_other_with_it(encoder, scenes, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(tasks_module, "fit_linear", fail)
    report = _run(encoder, scenes, tmp_path, tasks=["linear", "knn", "zero_shot"], is_strict=False)
    assert [result["task"] for result in report.results] == ["knn"]
    assert report.skipped["linear"] == "ZeroDivisionError: oh (see errors.log)"
    assert "no text tower" in report.skipped["zero_shot"]
    assert "in fail" in (tmp_path / "errors.log").read_text()  # the traceback
    with pytest.raises(ZeroDivisionError):
        _run(encoder, scenes, tmp_path, tasks=["linear"])


def test_a_done_task_is_not_skipped_when_what_it_needed_is_gone(encoder, scenes, tmp_path):
    _run(encoder, scenes, tmp_path, tasks=["segmentation", "knn"])
    bare = dataclasses.replace(SETTINGS, knn=dataclasses.replace(SETTINGS.knn, num_neighbors=3))
    report = _run(encoder, scenes, tmp_path, tasks=["zero_shot", "segmentation"], settings=bare)
    assert set(report.skipped) == {"zero_shot"} and len(report.results) == 4
    assert not _run(encoder, scenes, tmp_path, tasks=["segmentation"]).skipped  # those that were asked for last


def test_embeddings_of_classes_that_were_given_are_enough_for_zero_shot(encoder, scenes, tmp_path):
    classes = torch.randn(24, 32)
    report = _run(encoder, scenes, tmp_path, tasks=["zero_shot"], class_embeddings=classes)
    top1, top5 = report.results
    assert (top1["metric"], top5["metric"]) == ("top1", "top5") and top1["value"] <= top5["value"]
    again = _run(encoder, scenes, tmp_path, tasks=["zero_shot"], class_embeddings=classes + 1)
    assert len(again.results) == 4  # other embeddings are another measurement


@pytest.mark.parametrize("with_class_token", [True, False])
def test_models_without_a_class_token_are_measured_by_their_patches(tiny, scenes, tmp_path, with_class_token):
    model = ViTWithRegistersModel(tiny(has_cls_token=with_class_token, pooling="cls" if with_class_token else "mean"))
    report = _run(load_encoder(model), scenes, tmp_path, tasks=["knn", "linear", "depth"])
    found = {result["task"]: result["facts"] for result in report.results}
    assert (
        found["knn"]["input"] == ("class token" if with_class_token else "mean of the patches") and not report.skipped
    )


def _images(folder, names, *, num_images=4):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(num_images):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_data_without_truth_say_what_is_missing(encoder, tmp_path, own_cache):
    with pytest.raises(ValueError, match=r"depth: the images have no depth(.|\n)*knn: expected images with labels"):
        _run(encoder, open_data(_images(tmp_path / "one", ["cat"])), tmp_path / "a", tasks=["knn", "depth"])
    two = open_data(_images(tmp_path / "two", ["cat", "dog"]))
    cats = [number for number in range(len(two.train)) if two.train.read(number)[1] == 0]
    with pytest.raises(ValueError, match="linear: expected training images of two classes or more, got 1"):
        one = dataclasses.replace(two, train=two.train.select(np.array(cats)))
        _run(encoder, one, tmp_path / "b", tasks=["linear"])
    with pytest.raises(ValueError, match="segmentation: the images have no masks"):
        _run(encoder, open_data(str(tmp_path / "one")), tmp_path / "c", tasks=["segmentation"])
    assert not (tmp_path / "a" / "evaluation.json").exists()


def test_a_folder_of_broken_images_says_so(encoder, tmp_path, own_cache):
    source = _images(tmp_path / "broken", ["cat", "dog"])
    for path in (tmp_path / "broken").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no image could be read, or none has finite features\n.*png"):
        _run(encoder, open_data(source), tmp_path / "out", tasks=["knn"])


def test_unknown_tasks_and_folders_of_other_models_are_refused(encoder, tiny, scenes, tmp_path):
    with pytest.raises(ValueError, match=r"tasks out of knn, linear, .*got corloc"):
        _run(encoder, scenes, tmp_path, tasks=["corloc"])
    _run(encoder, scenes, tmp_path, tasks=["knn"])
    other = load_encoder(ViTWithRegistersModel(tiny(num_register_tokens=0)), name="other")
    with pytest.raises(ValueError, match="expected an evaluation of this model, got an evaluation of tiny"):
        _run(other, scenes, tmp_path, tasks=["knn"])


def _pixels(part, size):
    """Pixels of thumbnails as features, with labels."""
    examples = [part.read(number) for number in range(len(part))]
    rows = [np.asarray(image.resize((size, size))).reshape(-1) / 255 - 0.5 for image, _ in examples]
    return torch.tensor(np.array(rows)).float(), torch.tensor([label for _, label in examples])


def test_the_task_can_fail_and_succeed(tiny, scenes, tmp_path):
    # A random encoder does not tell the 24 classes, which colour says nothing about; but pixels do tell colours.
    encoder = load_encoder(ViTWithRegistersModel(tiny()))
    (result,) = _run(encoder, scenes, tmp_path, tasks=["knn"]).results
    assert result["value"] < 5 / 24 and result["interval"][0] < 2 / 24
    whole = {"image_size": 32, "num_train": 150, "num_test": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        colours = open_data("scenes", **whole, options=DataOptions(label_column="colours"))
    accuracy = knn_accuracy(*_pixels(colours.train, 8), *_pixels(colours.test, 8), num_neighbors=5)
    chance = 1 / len(colours.train.class_names)
    assert wilson_interval(round(accuracy * 60), 60)[0] > chance


def _report(model, *results, **changes):
    fields = {field.name: {} for field in dataclasses.fields(EvaluationReport)}
    shared = {"dataset": "birds", "dataset_hash": "f", "settings": {"num_steps": 5}, "seed": 0, "n": 60}
    rows = [
        {"task": task, "metric": metric, "value": value, "interval": interval, "interval_method": "Wilson, 95 %"}
        | shared
        | changes
        for task, metric, value, interval in results
    ]
    return EvaluationReport(**{**fields, "model": model, "results": rows, "stopped_by": None, "command": ""})


def test_the_table_marks_the_best_only_where_intervals_are_apart():
    first = _report("a|b", ("knn", "top1", 0.9, [0.85, 0.95]), ("depth", "rmse", 0.5, [0.4, 0.6]))
    second = _report("c", ("knn", "top1", 0.7, [0.6, 0.8]), ("depth", "rmse", 0.55, [0.5, 0.7]))
    lines = compare([first, second]).splitlines()
    assert lines[0] == "| task | metric | data | a\\|b | c |"
    assert lines[2] == "| knn | top1 ↑, % | birds | **90.0** [85.0, 95.0] | 70.0 [60.0, 80.0] |"
    assert lines[3] == "| depth | rmse ↓, m | birds | 0.500 [0.400, 0.600] | 0.550 [0.500, 0.700] |"
    assert "Test images: 60. In brackets: intervals (Wilson, 95 %)" in lines[-1]


def test_text_from_outside_cannot_break_the_table_and_equal_names_are_numbered():
    result = ("knn", "top1", 0.9, [0.85, 0.95])
    first, second = _report("<b>\n# a", result, dataset="x|y\n<i>"), _report("<b>\n# a", result, dataset="x|y\n<i>")
    lines = compare([first, second]).splitlines()
    assert lines[0] == r"| task | metric | data | &lt;b&gt; \# a (1) | &lt;b&gt; \# a (2) |"
    assert lines[2].startswith(r"| knn | top1 ↑, % | x\|y &lt;i&gt; | 90.0") and len(lines) == 5


def test_less_is_better_for_errors_and_one_model_is_never_the_best():
    low, high = {"metric": "rmse", "interval": [0.1, 0.2]}, {"metric": "rmse", "interval": [0.3, 0.4]}
    assert find_best({0: high, 1: low}) == 1 and find_best({0: low}) is None
    assert find_best({0: low | {"metric": "top1"}, 1: high | {"metric": "top1"}}) == 1


def test_numbers_of_other_data_or_settings_stand_in_other_rows():
    result = ("knn", "top1", 0.9, [0.85, 0.95])
    first, second = _report("a", result), _report("b", result, settings={"num_steps": 9})
    lines = compare([first, second]).splitlines()
    assert "| birds (num_steps 5) | 90.0 [85.0, 95.0] | - |" in lines[2] and "(num_steps 9) | - |" in lines[3]
    third = _report("b", result, dataset_hash="g")
    assert "birds (dataset hash g)" in compare([first, third])


def test_models_share_a_row_at_their_own_sizes_and_one_model_at_two_sizes_has_two():
    result = ("knn", "top1", 0.9, [0.85, 0.95])
    small, large = (
        _report(name, result, settings={"image_size": [side, side]}) for name, side in (("a", 32), ("b", 64))
    )
    lines = compare([small, large]).splitlines()
    assert "| birds | 90.0 [85.0, 95.0] | 90.0 [85.0, 95.0] |" in lines[2] and not lines[3]
    assert lines[-1].startswith("Image sizes in pixels: a at 32 x 32; b at 64 x 64. ")
    both = dataclasses.replace(small, results=[*small.results, *large.results])
    lines = compare([both]).splitlines()
    assert "birds (image_size [32, 32])" in lines[2] and "birds (image_size [64, 64])" in lines[3]


def test_tables_of_nothing_and_labels_that_repeat_are_refused(tmp_path):
    report = _report("a", ("knn", "top1", 0.9, [0.85, 0.95]))
    with pytest.raises(ValueError, match="one label each, all different"):
        compare([report, report], labels=["a", "a"])
    assert "| first | second |" in compare([report, report], labels=["first", "second"])
    with pytest.raises(ValueError, match="with results, got none"):
        compare([_report("a")])
    path = write_report(report, tmp_path / "evaluation.json")
    assert json.loads(path.read_text())["kind"] == "evaluation"

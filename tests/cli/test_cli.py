"""The verbs of `vitreg`, as one types them."""

import json
import os
import pathlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.cli import app


def run(*arguments) -> object:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def model(tiny, tmp_path) -> pathlib.Path:
    folder = tmp_path / "model"
    ViTWithRegistersModel(tiny(initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture
def photographs(tmp_path, photograph) -> pathlib.Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(4):
        photograph.crop((100 * number, 50, 100 * number + 160, 210)).resize((48, 48)).save(folder / f"{number}.png")
    return folder


def test_analyze_writes_a_page_and_every_number(model, photographs, tmp_path):
    done = run("analyze", model, photographs, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "artifacts" in done.output.lower() and f"wrote {tmp_path / 'out' / 'index.html'}" in done.output
    page = (tmp_path / "out" / "index.html").read_text()
    assert ("data:image/png;base64" in page and "vitreg analyze" in page) or page.count("<img") > 3
    assert json.loads((tmp_path / "out" / "artifacts.json").read_text())["images"]["num_images"] == 4


def test_analyze_compares_models_on_the_built_in_scenes(model, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ViTWithRegistersModel(tiny(num_register_tokens=0)).save_pretrained(tmp_path / "without" / "model")
    done = run(
        "analyze",
        model,
        "scenes",
        "--compare",
        tmp_path / "without" / "model",
        "--output",
        tmp_path / "pair",
        "--num-images",
        8,
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pair" / "1" / "artifacts.json").exists() and (tmp_path / "pair" / "2" / "index.html").exists()
    assert "without" in (tmp_path / "pair" / "index.html").read_text()


def test_discover_measures_boxes_where_they_are_known_and_draws_them(model, photographs, tmp_path):
    done = run("discover", model, "--output", tmp_path / "scenes", "--num-images", 6, "--sweep")
    assert done.exit_code == 0, done.output
    assert "CorLoc" in done.output and "best of the sweep" in done.output
    assert {path.name for path in (tmp_path / "scenes").iterdir()} == {
        "boxes.png",
        "discovery.json",
        "objects",
        "sweep.png",
    }
    assert Image.open(tmp_path / "scenes" / "boxes.png").width > 300
    done = run("discover", model, photographs, "--output", tmp_path / "plain")
    assert done.exit_code == 0 and "CorLoc needs annotated boxes" in done.output


@pytest.mark.parametrize("verb", ["analyze", "discover"])
@pytest.mark.parametrize(
    ("images", "message"), [("empty", "expected"), ("nowhere/at all", "expected"), ("tiny", "image")]
)
def test_bad_images_end_in_words(model, tmp_path, verb, images, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "tiny" / "a.png")
    done = run(verb, model, tmp_path / images if images != "nowhere/at all" else images, "--output", tmp_path / "out")
    if images != "tiny":  # an image smaller than a patch is enlarged
        assert done.exit_code == 1
        assert message in done.output and "Traceback" not in done.output


def test_a_model_that_is_none_ends_in_words(tmp_path, photographs):
    done = run("analyze", tmp_path / "nothing", photographs, "--output", tmp_path / "out")
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert not os.path.exists(tmp_path / "out")


def test_evaluate_compares_models_on_the_same_scenes_and_goes_on(model, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ViTWithRegistersModel(tiny(num_register_tokens=0)).save_pretrained(tmp_path / "without" / "model")
    other = tmp_path / "without" / "model"
    usual = ["--compare", other, "--output", tmp_path / "out", "--num-images", "60,30"]
    monkeypatch.setattr("sys.argv", ["vitreg", "evaluate"])  # of the test runner otherwise
    done = run("evaluate", model, "scenes", "--tasks", "knn", *usual)
    assert done.exit_code == 0, done.output
    assert "| knn |" in done.output and (tmp_path / "out" / "table.md").exists()
    first = json.loads((tmp_path / "out" / "1" / "evaluation.json").read_text())
    assert first["results"][0]["n"] == 30 and first["results"][0]["command"].startswith("vitreg")
    again = run("evaluate", model, "scenes", "--tasks", "knn,zero_shot", *usual)
    assert again.exit_code == 0 and "zero_shot skipped" in again.output
    assert json.loads((tmp_path / "out" / "1" / "evaluation.json").read_text())["results"] == first["results"]


def test_a_card_holds_what_was_measured_and_a_dry_run_shows_it(model, photographs, tmp_path):
    assert run("analyze", model, photographs, "--output", tmp_path / "artifacts").exit_code == 0
    options = ["--reports", tmp_path / "artifacts", "--license", "apache-2.0"]
    done = run("card", model, "me/demo", *options)
    assert done.exit_code == 0, done.output
    assert "license: apache-2.0" in done.output and "artifacts" in done.output.lower()
    done = run("publish", model, "me/demo", *options, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "model.safetensors" in done.output and "README.md" in done.output


def test_the_doctor_names_equal_registers(tiny, tmp_path):
    sick = ViTWithRegistersModel(tiny())
    torch.nn.init.zeros_(sick.embeddings.register_tokens.weight)
    sick.save_pretrained(tmp_path / "sick")
    done = run("doctor", tmp_path / "sick")
    assert done.exit_code == 1 and "register" in done.output


def _rooms(folder) -> pathlib.Path:
    """A saved dataset of images with masks, depth in millimetres and boxes, under names of its owner's."""
    random = np.random.default_rng(0)
    kinds = {name: datasets.Image() for name in ("photo", "annotation", "range")}
    box = datasets.Sequence(datasets.Value("float64"), length=4)
    features = datasets.Features({**kinds, "objects": {"bbox": datasets.List(box)}})
    parts = {}
    for split, number in (("learn", 12), ("measure", 6)):
        masks = random.integers(0, 3, (number, 40, 48), np.uint8)
        rows = {
            "photo": [Image.fromarray(np.stack([80 * mask] * 3, axis=-1)) for mask in masks],
            "annotation": [Image.fromarray(mask) for mask in masks],
            "range": [Image.fromarray(1000 + 500 * mask.astype(np.int32)) for mask in masks],
            "objects": [{"bbox": [[8, 8, 24, 16]]}] * number,
        }
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


def test_evaluate_reads_maps_and_boxes_of_a_dataset_by_the_names_of_its_columns(model, tmp_path):
    rooms, tasks = _rooms(tmp_path / "rooms"), "segmentation,depth,discovery"
    columns = ["--columns", "mask=annotation,depth=range,image=photo", "--columns", "box=objects"]
    columns += ["--set", "data.depth_scale=0.001", "--set", "data.max_depth=5", "--split", "learn,measure"]
    done = run("evaluate", model, rooms, "--tasks", tasks, "--output", tmp_path / "out", *columns)
    assert done.exit_code == 0 and "skipped" not in done.output, done.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = {(result["task"], result["metric"]): result for result in report["results"]}
    assert found["segmentation", "mean_iou"]["facts"]["num_classes"] == 3
    assert found["depth", "rmse"]["facts"] == {"max_depth": 5.0, "num_train": 12}
    assert found["depth", "rmse"]["value"] < 1.5  # metres, between 1 and 2 everywhere: the scale was read
    assert {result["n"] for result in report["results"]} == {6}
    assert found["discovery", "corloc"]["settings"]["feature"] == "key"
    assert "| discovery | corloc ↑, % |" in done.output
    options = ["--columns", "image=photo", "--split", "learn,measure", "--output", tmp_path / "none"]
    done = run("evaluate", model, rooms, "--tasks", tasks, *options)
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert all(f"--columns {kind}=" in done.output for kind in ("mask", "depth", "box"))


def test_evaluate_reads_boxes_of_files_and_tries_another_method_beside(model, photographs, tmp_path):
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
    content = {"images": images, "annotations": [{"image_id": number, "bbox": [0, 0, 48, 48]} for number in range(4)]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    usual = ["evaluate", model, photographs, "--tasks", "discovery", "--annotations", tmp_path / "boxes.json"]
    assert run(*usual, "--output", tmp_path / "out").exit_code == 0
    done = run(*usual, "--output", tmp_path / "out", "--set", "discovery.method=tokencut")
    assert done.exit_code == 0 and "(method lost)" in done.output and "(method tokencut)" in done.output, done.output
    same = run(
        "discover", model, photographs, "--annotations", tmp_path / "boxes.json", "--output", tmp_path / "discovered"
    )
    assert same.exit_code == 0, same.output
    published = json.loads((tmp_path / "discovered" / "discovery.json").read_text())["as_published"]
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert results[0]["value"] == published["corloc"]

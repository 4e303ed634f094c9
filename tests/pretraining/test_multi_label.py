"""Training and evaluation on images with any number of classes: lists, 0 or 1 for each class, a COCO file."""

import json
import pathlib

import datasets
import pytest
import torch
import training_program
import yaml
from PIL import Image

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.evaluation import EncodingSettings, EvaluationSettings, evaluate
from modeling_vitreg.evaluation.linear import LinearSettings
from modeling_vitreg.features import load_encoder
from modeling_vitreg.images import DataOptions, open_data, open_images
from modeling_vitreg.pretraining.objectives.classify import ClassificationSettings, classification_loss
from modeling_vitreg.scenes import SceneSettings, render_scene


WORDS = ["cat", "dog", "owl"]
ROWS = [["owl", "cat"], [], ["dog", "dog"], None, ["owl"], ["cat", "dog", "owl"]]
EXPECTED = [(1, 0, 1), (0, 0, 0), (0, 1, 0), (-1, -1, -1), (0, 0, 1), (1, 1, 1)]
LISTS = {
    "words": (ROWS, datasets.Value("string")),
    "classes": (
        [None if row is None else [WORDS.index(name) for name in row] for row in ROWS],
        datasets.ClassLabel(names=WORDS),
    ),
    "numbers with gaps": (
        [None if row is None else [10 * WORDS.index(name) + 7 for name in row] for row in ROWS],
        datasets.Value("int64"),
    ),
    "zeros and ones": ([None if -1 in row else list(row) for row in EXPECTED], datasets.Value("int64")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe, scenes as files and a COCO file of the shapes in them; the class "hat" is in none."""
    folder, names = tmp_path_factory.mktemp("multi"), ["disc", "square", "hat"]
    recipe = yaml.safe_load((pathlib.Path(__file__).parents[2] / "examples/recipes/finetune-cpu.yaml").read_text())
    recipe["model"] |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    recipe["settings"] |= {"loss": "multi_label"}
    recipe |= {"num_steps": 6, "batch_size": 8}
    recipe["crops"] |= {"global_size": 32}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "photos").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 3 + n, "name": m} for n, m in enumerate(names)]}
    for number in range(40):
        scene = render_scene(number, settings=SceneSettings(image_size=40))
        Image.fromarray(scene.image).save(folder / "photos" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        content["annotations"] += [
            {"image_id": number, "category_id": 3 + int(kind) % 2, "bbox": [1, 1, 9, 9]} for kind in scene.categories
        ]
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_words_classes_and_numbers_and_zeros_and_ones_become_the_same_labels(kind, tmp_path):
    rows, feature = LISTS[kind]
    columns = {"image": datasets.Image(), "kinds": datasets.List(feature)}
    images = [Image.new("RGB", (8, 8))] * len(rows)
    dataset = datasets.Dataset.from_dict({"image": images, "kinds": rows}, features=datasets.Features(columns))
    dataset.save_to_disk(tmp_path / "data")
    options = DataOptions(label_column="kinds", allows_label_lists=True)
    source = open_images(str(tmp_path / "data"), options=options)
    assert source.labels == EXPECTED and source.has_label_lists and len(source.class_names) == 3
    assert "1 of 6 images have no label" in source.describe_labels()
    with pytest.raises(ValueError, match=r"lists are for settings\.loss=multi_label"):
        open_images(str(tmp_path / "data"), options=DataOptions(label_column="kinds"))


def test_lists_in_a_table_beside_the_images_and_voc_files_are_read(tmp_path):
    lines, voc = [], tmp_path / "voc"
    voc.mkdir()
    for number, names in enumerate((["owl"], ["cat", "owl"])):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "tags": names}))
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
        (voc / f"{number}.xml").write_text(f"<annotation><filename>{number}.png</filename>{objects}</annotation>")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    table = open_images(str(tmp_path), options=DataOptions(label_column="tags", allows_label_lists=True))
    named = DataOptions(label_column="categories", allows_label_lists=True)
    files = open_images(str(tmp_path), options=named, annotations=voc)
    assert table.labels == files.labels == [(0, 1), (1, 1)]
    assert table.class_names == files.class_names == ("cat", "owl")


def test_the_loss_equals_a_loop_over_images_and_classes():
    logits, targets = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    settings = ClassificationSettings(loss="multi_label", smoothing=0.2, mixup=0.0, cutmix=0.0)
    losses = []
    for score, truth in zip(logits.flatten().double(), targets.flatten().double()):
        wanted, share = 0.8 * truth + 0.1, 1 / (1 + (-score).exp())
        losses.append(-(wanted * share.log() + (1 - wanted) * (1 - share).log()))
    found = classification_loss(logits, targets, settings=settings)
    torch.testing.assert_close(found.double(), torch.stack(losses).mean())


OPTIONS = ("--data", "photos", "--annotations", "boxes.json", "--columns", "label=categories", "--workers", "0")


def test_a_run_on_a_coco_file_shows_its_map_and_what_does_not_count_and_resumes_with_the_same_bits(folder):
    screen = training_program.run("finetune.py", folder, *OPTIONS, output="whole")
    assert "1 of 3 classes are in none of the 8 evaluation images" in screen and "'hat'" in screen
    assert "mean average precision on" in screen
    facts = json.loads((folder / "whole" / "training.json").read_text())
    assert 0 < facts["mean_average_precision"] <= 1 and "accuracy" not in facts and "knn" not in facts
    model = ViTWithRegistersForImageClassification.from_pretrained(folder / "whole" / "model")
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.id2label.values()) == ["disc", "square", "hat"]
    training_program.assert_a_killed_run_goes_on("finetune.py", folder, *OPTIONS, num_steps=6)


def test_two_processes_follow_one_with_lists_of_labels(folder):
    for name, number in (("one", 1), ("two", 2)):
        training_program.run("finetune.py", folder, *OPTIONS, output=name, processes=number)
    one, two = (torch.tensor(training_program.losses_of(folder / name)) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


def test_a_coco_file_divides_into_training_and_test_images_where_its_classes_are_labels(folder):
    named = DataOptions(label_column="categories")
    data = open_data(str(folder / "photos"), annotations=folder / "boxes.json", options=named)
    assert (len(data.train), len(data.test)) == (28, 12) and data.test.class_names[2] == "hat"
    assert not len(open_data(str(folder / "photos"), annotations=folder / "boxes.json").train)


def test_evaluate_names_the_classes_that_no_image_has(folder, tiny, tmp_path):
    named = DataOptions(label_column="categories")
    data = open_data(str(folder / "photos"), annotations=folder / "boxes.json", options=named)
    settings = EvaluationSettings(
        encoding=EncodingSettings(has_progress_bar=False, workers=0, image_size=32), linear=LinearSettings(num_steps=5)
    )
    encoder = load_encoder(ViTWithRegistersModel(tiny()), name="tiny")
    (result,) = evaluate(encoder, tasks=("linear",), data=data, settings=settings, output_folder=tmp_path).results
    assert result["facts"]["classes_without_positives"] == ["hat"] and result["facts"]["num_classes"] == 3

"""The cards in hub_cards say what the reports beside them say, and nothing else."""

import json
import pathlib

import pytest
from huggingface_hub import ModelCard


FOLDERS = sorted(path.parent for path in (pathlib.Path(__file__).parents[2] / "hub_cards").glob("*/README.md"))


def test_there_are_cards():
    assert len(FOLDERS) >= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_of_a_card_lies_in_a_report_beside_it(folder):
    card = ModelCard.load(folder / "README.md")
    results = json.loads((folder / "reports" / "evaluation.json").read_text())["results"]
    measured = {(f"{result['task']} {result['metric']}", result["value"]) for result in results}
    assert measured == {(result.metric_name, result.metric_value) for result in card.data.eval_results}
    assert json.loads((folder / "reports" / "artifacts.json").read_text())["verdict"]["sentence"] in card.text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pictures_of_a_card_lie_beside_it_and_weights_do_not(folder):
    text = (folder / "README.md").read_text()
    shown = [part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")]
    assert shown and all((folder / path).exists() for path in shown)
    assert not list(folder.rglob("*.safetensors"))

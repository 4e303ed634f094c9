"""The example of a vision-language model: its table, its folders, and what it measures."""

import json
import pathlib
import runpy
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vitreg.scenes import SceneSettings, render_scene


ROOT = pathlib.Path(__file__).parents[2]


def test_ways_are_trained_measured_and_saved(tmp_path, monkeypatch, capsys):
    options = f"--steps 1 --scenes 32 --held-out 4 --tokens 2 --seeds 0 1 --output {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", ["caption.py", "--ways", "visual registers", "TokenLearner", *options])
    runpy.run_path(str(ROOT / "examples" / "caption.py"), run_name="__main__")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["way"], row["tokens"], len(row["runs"])) for row in rows] == [
        ("visual registers", 2, 2),
        ("TokenLearner", 2, 2),
    ]
    assert all(
        0 <= value <= 1 for row in rows for run in row["runs"] for name, value in run.items() if name != "seconds"
    )
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    for row in rows:
        folder = tmp_path / f"{row['way'].replace(' ', '-')}-2"
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        image = render_scene(0, settings=SceneSettings(image_size=48)).image
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        assert torch.isfinite(model(**inputs).logits).all()

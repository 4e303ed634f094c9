"""Studies: what is accepted, the tables from the numbers of seeds, and a whole one that is stopped and continued."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats


EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import study

        yield study
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_studies_name_programs_recipes_and_variants_that_exist(study):
    found = [study.read_study(path.stem) for path in study.STUDIES.glob("*.yaml")]
    assert len(found) >= 2
    for each in found:
        program, _, recipe, *_ = each.train.split()
        assert (EXAMPLES / program).exists() and (EXAMPLES / "recipes" / f"{recipe}.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {a: --registers 0}\nseeds: [0]", "expected two variants or more"),
        ("variants: {a: '', b: c@merge=2}\nseeds: [0]", "there is no variant 'c'"),
        (
            "variants: {a: b@merge=2, b: a@merge=2}\nseeds: [0]",
            "expected VARIANT@REDUCTION of a variant that is trained",
        ),
        ("variant: {}\nseeds: [0]", "did you mean 'variants'"),
        ("- a", "expected a mapping"),
    ],
)
def test_a_wrong_study_is_refused(study, tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        study.read_study(str(path))


def test_a_wrong_name_is_answered_with_the_right_one(study):
    with pytest.raises(ValueError, match="did you mean 'family'"):
        study.read_study("famly")


def test_means_and_differences_have_the_intervals_of_students_t(study):
    values = {"plain": [0.10, 0.14, 0.12], "registers": [0.21, 0.25, 0.22]}
    column = study.Column("accuracy", True, values)
    low, high = stats.t.interval(0.95, 2, np.mean(values["plain"]), stats.sem(values["plain"]))
    assert study.reach(values["plain"]) == pytest.approx((high - low) / 2)
    assert column.mean("plain") == "12 ± 5 %"
    differences = np.subtract(values["registers"], values["plain"])
    assert stats.ttest_1samp(differences, 0).pvalue < 0.05
    assert column.difference("registers", "plain") == "10.7 ± 1.4 % *"
    assert not column.difference("plain", "plain").endswith("*")
    assert study.Column("accuracy", True, {"plain": [0.1]}).mean("plain") == "10 %"


@pytest.mark.slow
def test_a_study_is_continued_after_it_was_stopped(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\n"
        "train: finetune.py --recipe finetune-cpu --set num_steps=4 --set batch_size=8 --num-scenes 64 "
        "--num-eval-images 80\n"
        "variants: {plain: --registers 0, registers: --registers 4, merged: registers@merge=3}\n"
        "seeds: [0, 1]\n"
        "compare: --tasks knn --num-images 60,20 --set cost.num_rounds=1\n"
        "analyze: --num-images 16\n"
    )
    command = [sys.executable, str(EXAMPLES / "study.py"), str(tmp_path / "mine.yaml")]
    command += ["--output", str(tmp_path / "out"), "--workers", "0"]
    first = subprocess.run([*command, "--set", "batch_size=7.5"], capture_output=True, text=True)
    assert first.returncode and "the same study continues once it is mended" in first.stderr
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "was trained with other options" in refused.stderr
    (tmp_path / "out" / "runs" / "plain-0.json").unlink()
    assert subprocess.run([*command, "--variants", "plain", "registers", "--seeds", "0"]).returncode == 0
    kept = (tmp_path / "out" / "runs" / "plain-0" / "model" / "model.safetensors").stat().st_mtime_ns
    subprocess.run(command, check=True)
    assert (tmp_path / "out" / "runs" / "plain-0" / "model" / "model.safetensors").stat().st_mtime_ns == kept
    numbers = json.loads((tmp_path / "out" / "study.json").read_text())
    assert numbers["seeds"] == [0, 1]
    for seed, expected in enumerate(numbers["results"]["knn, top-1 accuracy"]["merged"]):
        report = json.loads((tmp_path / "out" / f"seed-{seed}" / "comparison.json").read_text())
        assert report["models"][2]["results"][0]["value"] == expected
    assert len(numbers["results"]["no-operation sinks per image"]["registers"]) == 2
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Differences to plain" in page and "data:image/png" in page

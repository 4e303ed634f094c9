"""Reports as files: keys of earlier versions, provenance, what was left out, parts that failed, text from outside."""

import json
import sys

import numpy as np
import pytest

from modeling_vitreg.files import to_json
from modeling_vitreg.metrics import box_iou
from modeling_vitreg.omissions import Failures, list_left_out
from modeling_vitreg.reports import (
    ArtifactReport,
    EvaluationReport,
    command_line,
    escape_markdown,
    made_with,
    read_report,
    rename_old_keys,
    short_hash,
    versions,
)


OLD = {
    "kind": "artifacts",
    "version": 1,
    "model": "m",
    "architecture": {"num_layers": 12, "num_heads": 6, "num_registers": 4, "hidden_size": 384},
    "images": {"num_images": 3},
    "verdict": {"word": "few", "layer": 12},
    "bins": {},
    "layers": [{"layer": 1}],
    "places": {"hottest": [[0, 1, 0.5]]},
    "sinks": {"layers": []},
    "attention": {
        "layers": [{"mass": [{"patches": 0.5}], "top_mass": [0.1], "top_over_even": [2.0], "head_mass": []}]
    },
    "ablation": {"num_registers": 4},
    "probes": {"mass": 1, "num_layers": 2},
    "command": "vitreg analyze m",
    "made_with": {},
}


def test_a_report_of_version_1_is_read_with_the_present_names(tmp_path):
    path = tmp_path / "artifacts.json"
    path.write_text(json.dumps(OLD))
    report = read_report(path)
    assert report.architecture == {
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_register_tokens": 4,
        "hidden_size": 384,
    }
    assert report.verdict["level"] == "few" and report.outlier_positions == {"most_frequent": [[0, 1, 0.5]]}
    assert report.massive_activations == {"layers": []} and report.ablation == {"num_register_tokens": 4}
    (layer,) = report.attention["layers"]
    assert set(layer) == {"attention_share", "top_patch_share", "top_patch_ratio", "head_attention_share"}
    assert report.probes == {"mass": 1, "num_layers": 2}  # names of other sections stay


def test_settings_of_a_task_keep_a_name_that_means_something_else_there():
    old = {"kind": "evaluation", "version": 1, "architecture": {"num_layers": 3, "fingerprint": "f"}}
    old["results"] = [{"settings": {"num_layers": [1, 4], "num_neighbours": 20}, "data_fingerprint": "d"}]
    new = rename_old_keys(old)
    assert new["architecture"] == {"num_hidden_layers": 3, "weights_hash": "f"}
    assert new["results"] == [{"settings": {"num_layers": [1, 4], "num_neighbors": 20}, "dataset_hash": "d"}]
    assert rename_old_keys({**new, "version": 2}) == {**new, "version": 2}


def test_a_report_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"kind": "evaluation", "version": 99}))
    with pytest.raises(ValueError, match="version 2 or earlier, got kind 'evaluation', version 99"):
        read_report(path, kind=EvaluationReport)


def test_provenance_names_versions_commit_and_command(monkeypatch):
    made = made_with(device="cpu")
    assert made["python"] == ".".join(map(str, sys.version_info[:3])) and {"torch", "transformers"} <= set(made)
    assert made["device"] == "cpu" and (made["commit"] is None or len(made["commit"]) == 40)
    assert "no-such-package" not in versions("torch", "no-such-package")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vitreg", "analyze", "my model"])
    assert command_line() == "vitreg analyze 'my model'"
    assert short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1}) != short_hash({"a": 1})


def test_images_that_are_left_out_are_counted_and_named():
    assert list_left_out({"num_images": 5, "num_unreadable": 0, "num_nonfinite": 0}) == []
    images = {"num_images": 5, "num_unreadable": 3, "unreadable": ["a: torn", "b"], "num_nonfinite": 1}
    assert list_left_out(images) == [
        "3 of 9 images could not be read and are left out: a: torn; b; and 1 more",
        "1 of 9 images have features that are not finite and are left out: not named",
    ]


def test_a_part_that_does_not_apply_has_a_reason_and_a_defect_its_traceback(tmp_path):
    def refuse():
        return read_report(tmp_path / "a", kind=ArtifactReport)  # OSError, of no check of ours

    def contradict():
        return np.zeros(2) + np.zeros(3)  # ValueError of another library

    failures = Failures()
    assert failures.attempt("sum", lambda: {"value": 1}) == {"value": 1}
    (tmp_path / "b").write_text("[]")
    words = failures.attempt("read", lambda: read_report(tmp_path / "b"))["skipped"]
    assert "expected a report, a dictionary in JSON" in words and not failures.tracebacks
    failures.write(tmp_path)
    assert not (tmp_path / "errors.log").exists()
    assert failures.attempt("open", refuse)["skipped"].startswith("FileNotFoundError")
    assert failures.attempt("shapes", contradict)["skipped"].endswith("(see errors.log)")
    failures.write(tmp_path)
    assert "in contradict" in (tmp_path / "errors.log").read_text()
    with pytest.raises(ValueError, match="broadcast"):
        Failures(is_strict=True).attempt("shapes", contradict)
    boxes = [np.zeros((1, 3)), np.zeros((1, 4))]  # NumPy's own error in a line of this package
    assert "(see errors.log)" in failures.attempt("boxes", lambda: box_iou(*boxes))["skipped"]


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("x\n\n# y", r"x \# y"),
        ("[a](b)*c*`d`\\", r"[a]\(b)\*c\*\`d\`\\"),
        ("plain name_1", "plain name_1"),
    ],
)
def test_text_from_outside_is_one_line_of_markdown_without_markup(text, escaped):
    assert escape_markdown(text) == escaped


def test_json_has_a_line_for_each_entry_and_lists_of_numbers_on_one():
    content = {"a": [1, [2.5, None]], "b": {"c": "d\n", "e": []}, "f": [{"g": True}, {}], "h": {}}
    text = to_json(content)
    assert json.loads(text) == content
    lines = ["{", ' "a": [1, [2.5, null]],', ' "b": {', '  "c": "d\\n",', '  "e": []', " },", ' "f": [', "  {"]
    assert text.split("\n")[: len(lines)] == lines
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})

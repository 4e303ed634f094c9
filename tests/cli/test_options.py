"""The options of every verb, frozen; old spellings; what is answered before any work."""

import dataclasses
import inspect
import math
import os
import pathlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from modeling_vitreg import cli
from modeling_vitreg.cli import errors, options
from modeling_vitreg.cli.renamed import RENAMED, rewrite
from modeling_vitreg.settings import make_settings


ROOT = pathlib.Path(__file__).parents[2]
# A new knob is a field of a settings dataclass, reached by --set. This list changes on purpose only.
OPTIONS = {
    "look": "--model --trust-remote-code --parts --device --output",
    "convert": "--family --checkpoint-key --head --set --merge --code --tolerance --no-verify --to",
    "retrofit": "--images --columns --annotations --split --num-images --method --num-registers --recipe --device "
    "--set --report --force",
    "analyze": "--split --num-images --compare --trust-remote-code --parts --probes --batch-size --precision "
    "--workers --compile --seed --device --set --output",
    "discover": "--annotations --split --num-images --trust-remote-code --parts --sweep --precision --workers "
    "--compile --device --set --output",
    "evaluate": "--columns --annotations --split --num-images --compare --trust-remote-code --parts --tasks "
    "--batch-size --precision --workers --compile --seed --device --set --output",
    "compare": "--images --columns --split --num-images --trust-remote-code --parts --tasks --batch-size --precision "
    "--workers --seed --device --set --output",
    "embed": "--split --num-images --trust-remote-code --parts --batch-size --precision --workers --compile --device "
    "--set --registers --patches",
    "card": "--reports --license --license-name --license-link --accept-license --output",
    "publish": "--reports --license --license-name --license-link --accept-license --revision --public --dry-run",
    "doctor": "",
}
PANELS = [options.DATA, options.MODEL, options.COMPUTE, options.OUTPUT]


def run(*arguments) -> object:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def _options(verb):
    """Name of each option of a verb, and its panel, in the order in which --help shows them."""
    (command,) = (command for command in cli.app.registered_commands if command.callback.__name__ == verb)
    hints = inspect.get_annotations(command.callback, eval_str=True)
    for name, hint in hints.items():
        (information,) = getattr(hint, "__metadata__", (None,))
        if information is not None and type(information).__name__ == "OptionInfo":
            words = (information.default, *(information.param_decls or ()))  # in Annotated, names come first
            declared = [word for word in words if str(word).startswith("--")]
            yield declared[0] if declared else f"--{name.replace('_', '-')}", information.rich_help_panel


def test_the_options_of_every_verb_are_a_list_that_changes_on_purpose():
    assert [command.callback.__name__ for command in cli.app.registered_commands] == list(OPTIONS)
    for verb, expected in OPTIONS.items():
        assert [name for name, _ in _options(verb)] == expected.split(), verb
        assert len(expected.split()) <= 16


def test_panels_stand_in_one_order():
    for verb in OPTIONS:
        panels = list(dict.fromkeys(panel for _, panel in _options(verb)))
        assert panels == [panel for panel in PANELS if panel in panels], verb


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_is_a_sentence_and_three_examples(verb):
    (command,) = (command for command in cli.app.registered_commands if command.callback.__name__ == verb)
    sentence, *examples = inspect.getdoc(command.callback).split("\n\n")
    assert sentence.endswith(".") and sentence.count(". ") == 0
    assert all(example.startswith(f"* `vitreg {verb}") for example in examples[:3])
    shown = run(verb, "--help").output
    assert f"vitreg {verb}" in shown
    assert verb == "retrofit" or "--report " not in shown  # old spellings are not shown


def test_help_loads_neither_torch_nor_transformers():
    program = """
import sys
from typer.testing import CliRunner
from modeling_vitreg.cli import app
for verb in sys.argv[1:]:
    assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0
print([name for name in ("torch", "transformers", "numpy", "timm", "matplotlib") if name in sys.modules])
"""
    command = [sys.executable, "-c", program, *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_old_spellings_lead_to_options_that_exist():
    for verb, table in RENAMED.items():
        assert {text.split()[0] for text in table.values()} <= set(OPTIONS[verb].split())
        assert not set(table) & set(OPTIONS[verb].split())


def test_old_spellings_are_rewritten_and_named():
    old = ["m", "d", "--mask-column", "annotation", "--depth-scale=0.001", "--reduce-labels"]
    old += ["--split", "learn", "--test-split", "measure", "--num-test", "30", "--box-layout", "corners"]
    rewritten, notes = rewrite([*old, "--", "--report"], RENAMED["evaluate"])
    assert rewritten[:4] == ["--split", "learn,measure", "--num-images", ",30"]
    assert rewritten[4:] == [
        *("m", "d", "--columns", "mask=annotation", "--set", "data.depth_scale=0.001"),
        *("--set", "data.reduce_labels=true", "--set", "data.box_format=xyxy", "--", "--report"),
    ]
    assert notes[0] == "--mask-column is now --columns mask=VALUE" and len(notes) == 6
    assert rewrite(["m", "--split", "a,b"], RENAMED["evaluate"]) == (["m", "--split", "a,b"], [])
    assert rewrite(["f", "u/n", "--report", "r"], RENAMED["card"])[0] == ["f", "u/n", "--reports", "r"]


def test_an_old_spelling_works_and_is_told_in_one_line(tmp_path):
    done = run("analyze", tmp_path / "nothing", "--report", tmp_path / "out")
    assert done.exit_code == 1 and "renamed: --report is now --output VALUE\n" in done.output
    assert "there is no such model here" in done.output


@pytest.mark.parametrize("arguments", [["compare", "model"], ["retrofit", "model", "new", "--images", "photos"]])
def test_verbs_that_share_no_work_are_refused_in_several_processes(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run(*arguments)
    assert done.exit_code == 1 and f"vitreg {arguments[0]} runs in one process, got 2" in done.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["analyze", "discover", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./no/such"], "no such model here"),
        (["photos2"], "Did you mean 'photos'?"),
        (["photos"], "expected a folder with a config.json"),
        (["net.pth"], "vitreg convert net.pth NEW_FOLDER"),
        (["model", "./no/such"], "no such folder of images here"),
        (["model", "photos2"], "Did you mean 'photos'?"),
        (["model", "photo.png"], "expected a folder of images or .tar shards, got a file"),
        (["model", "photos", "--output", "photo.png"], "expected a folder to write"),
        (["model", "photos", "--output", "photo.png/below"], "photo.png is a file, so no folder can be made in it"),
    ],
)
def test_what_cannot_exist_is_answered_without_loading_anything(tmp_path, monkeypatch, verb, arguments, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for file in ("net.pth", "photo.png"):
        (tmp_path / file).write_bytes(b"")
    done = run(verb, *arguments)
    assert done.exit_code == 1 and words in done.output, done.output
    assert "Traceback" not in done.output


BAD_VALUES = {
    "--batch-size": (-1, "Invalid value for '--batch-size'"),
    "--workers": (-1, "Invalid value for '--workers'"),
    "--precision": ("bf16", "expected precision to be one of float32, bfloat16, float16, got 'bf16'"),
    "--device": ("cuda:99", "--device cuda:99"),
}
BAD_OPTIONS = [
    (verb, [name, value], words)
    for verb in ("analyze", "discover", "embed", "evaluate", "look", "retrofit")
    for name, (value, words) in BAD_VALUES.items()
    if name in OPTIONS[verb].split()
]
BAD_OPTIONS.append(("retrofit", ["--set", "batch_size=-1"], "batch_size of 1 or more, got -1"))


@pytest.mark.parametrize(("verb", "arguments", "words"), BAD_OPTIONS)
def test_every_verb_that_encodes_refuses_bad_values_before_work(tmp_path, verb, arguments, words):
    (tmp_path / "config.json").write_text("this is not read")
    folder, photo, output = str(tmp_path), "docs/use/scene.jpg", str(tmp_path / "out")
    inputs = {"look": [photo, "--model", folder], "retrofit": [folder, output, "--images", "scenes"]}
    inputs["embed"] = [folder, "scenes", output]
    done = run(verb, *inputs.get(verb, [folder, "scenes"]), *arguments)
    assert done.exit_code in (1, 2) and words in " ".join(done.output.replace("│", " ").split()), done.output
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", -1], "Invalid value for '--batch-size'"),
        (["--workers", -1], "Invalid value for '--workers'"),
        (["--precision", "bf16"], "expected precision to be one of float32, bfloat16, float16, got 'bf16'"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--seed", -1], "Invalid value for '--seed'"),
        (["--device", "gpu"], "expected cpu, cuda"),
        (["--device", "meta:x"], "--device"),
        (["--num-images", "many"], "expected TRAIN,TEST such as 2000,500"),
        (["--num-images", "0,1"], "expected TRAIN,TEST"),
        (["--tasks", "knnn"], "did you mean 'knn'?"),
        (["--tasks", ","], "expected one or more of knn"),
        (["--columns", "masks=a"], "did you mean 'mask'?"),
        (["--set", "dat.max_depth=1"], "did you mean 'data'?"),
        (["--set", "data.max_dept=1"], "did you mean 'max_depth'?"),
        (["--set", "data.max_depth=far"], "max_depth: expected a number, got 'far'"),
        (["--set", "discovery.method=lots"], "expected method to be one of lost"),
        (["--set", "knn"], "expected NAME=VALUE or a YAML file"),
        (["--set", "knn=3"], "expected knn.NAME=VALUE"),
        (["--set", "nothing.yaml"], "cannot be read"),
    ],
)
def test_bad_values_are_answered_before_the_model_is_loaded(tmp_path, arguments, words):
    (tmp_path / "config.json").write_text("this is not read")
    done = run("evaluate", tmp_path, "scenes", *arguments)
    assert done.exit_code in (1, 2) and words in " ".join(done.output.replace("│", " ").split()), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("verb", "others"), [("analyze", ()), ("embed", ("features",)), ("discover", ())])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", -1], "Invalid value for '--workers'"),
        (["--precision", "bf16"], "expected precision to be one of float32, bfloat16, float16, got 'bf16'"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_how_a_pass_runs_is_checked_before_the_model_is_loaded(tmp_path, monkeypatch, verb, others, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("this is not read")
    done = run(verb, tmp_path, "scenes", *others, *arguments)
    assert done.exit_code in (1, 2) and words in " ".join(done.output.replace("│", " ").split()), done.output
    assert "Traceback" not in done.output and not (tmp_path / "features").exists()


def test_settings_of_a_file_and_of_the_command_are_merged(tmp_path, capsys):
    from modeling_vitreg.evaluation import KnnSettings
    from modeling_vitreg.images import DataOptions

    (tmp_path / "mine.yaml").write_text("data: {depth_scale: 1e-3, mask_column: truth}\nknn: {num_neighbours: 5}\n")
    texts = [str(tmp_path / "mine.yaml"), "knn.temperature=0.1", "data.depth_scale=0.5"]
    found = options.read_settings(texts, {"data": DataOptions, "knn": KnnSettings})
    assert found == {
        "data": {"depth_scale": 0.5, "mask_column": "truth"},
        "knn": {"num_neighbors": 5, "temperature": 0.1},
    }
    assert "knn.num_neighbours -> --set knn.num_neighbors" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs as root may write anywhere
    with pytest.raises(ValueError, match="cannot be written to"):
        options.check_output(tmp_path / "new" / "folder")
    monkeypatch.undo()
    options.check_output(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="expected a file to write, and a folder of this name exists"):
        options.check_output(tmp_path, is_file=True)


def test_errors_of_users_and_libraries_are_words_and_our_bugs_have_a_traceback(capsys):
    import json

    def fails(make):
        with pytest.raises(BaseException) as caught, errors.plain_errors():
            make()
        return type(caught.value).__name__, capsys.readouterr().err

    def raise_(error):
        raise error

    assert fails(lambda: raise_(OSError(28, "No space left on device", "out/a.json")))[1].startswith(
        "out/a.json: No space left on device"
    )
    name, text = fails(lambda: raise_(ModuleNotFoundError("x", name="matplotlib")))
    assert name == "Exit" and "pip install" in text
    assert fails(lambda: raise_(KeyboardInterrupt()))[1] == "stopped\n"
    assert fails(lambda: rewrite(None, {}))[0] == "TypeError"  # a bug of this package
    # Through this package into a library: its error, in words.
    name, text = fails(lambda: options.read_settings([], _Through(json)))
    assert name == "Exit" and "failed with TypeError" in text


class _Through(dict):
    """Settings that make a library fail when this package reads them."""

    def __init__(self, library):
        super().__init__()
        self._library = library

    def __iter__(self):
        return iter([self._library.loads(None)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "./no/such.pth", "out"],
        ["card", "./no/such", "user/name"],
        ["publish", "./no/such", "user/name", "--dry-run"],
    ],
)
def test_a_source_that_does_not_exist_is_answered_without_loading_anything(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 1 and "there is no such file or folder here" in done.output
    assert not (tmp_path / "out").exists()


def test_such_an_answer_needs_neither_torch_nor_the_network(tmp_path):
    program = """
import sys
from typer.testing import CliRunner
from modeling_vitreg.cli import app
cases = ["analyze ./no/such", "evaluate net.pth", "convert ./no.pth out", "publish no a/b"]
for words in map(str.split, cases):
    assert CliRunner().invoke(app, words).exit_code == 1
print([name for name in ("torch", "transformers", "huggingface_hub", "datasets") if name in sys.modules])
"""
    (tmp_path / "net.pth").write_bytes(b"")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("loop", "a link that leads to itself"),
        ("loop/below", "a link that leads to itself"),
        ("n" * 250, "names of at most 200 bytes"),
        ("pipe", "a device or a pipe"),
        ("images/report", "lies in the folder of the images"),
        ("link/report", "lies in the folder of the images"),
    ],
)
def test_an_output_that_would_fail_or_harm_at_the_end_is_refused_at_once(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    os.mkfifo(tmp_path / "pipe")
    done = run("analyze", "nothing", "images", "--output", output)
    assert done.exit_code == 1 and message in done.output, done.output


def test_a_photograph_is_not_replaced_by_its_picture(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    done = run("look", tmp_path / "photo.png", "--output", tmp_path / "photo.png")
    assert done.exit_code == 1 and "is the photograph" in done.output
    assert (tmp_path / "photo.png").read_bytes() == b"mine"


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(tmp_path):
    done = run("look", tmp_path / "photo.png", "--output", tmp_path / "look.jpgg")
    assert done.exit_code == 1 and "did you mean 'jpg'" in done.output


def test_a_home_that_the_shell_left_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["~/model", "--output=~/out", "--set=a=~/b", "a~"]
    assert rewrite(words, {})[0] == [f"{tmp_path}/model", f"--output={tmp_path}/out", "--set=a=~/b", "a~"]


@dataclasses.dataclass(frozen=True)
class _Optional:
    count: int | None = None
    ratio: float | None = None
    word: str | None = None
    flag: bool | None = None


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 1.5), ("count", [1]), ("count", True), ("count", {"a": 1}), ("ratio", "x"), ("ratio", math.nan)]
    + [("ratio", True), ("word", 3), ("flag", 1)],
)
def test_optional_settings_are_checked_as_others_are(name, value):
    with pytest.raises(ValueError, match=f"--set: {name}: expected "):
        make_settings(_Optional, {name: value}, of="--set")


def test_optional_settings_take_numbers_as_yaml_reads_them():
    found = make_settings(_Optional, {"count": 2.0, "ratio": "1e-3", "word": None, "flag": True}, of="--set")
    assert found == _Optional(2, 0.001, None, True) and type(found.count) is int

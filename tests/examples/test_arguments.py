"""Options of the training programs: older names are read, wrong ones are answered with the right one."""

import importlib
import pathlib

import pytest


EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("arguments")


@pytest.fixture
def parse(arguments, monkeypatch):
    def run(*command: str):
        monkeypatch.setattr("sys.argv", ["pretrain.py", *command])
        return arguments.parse_options("Train.", "demo-cpu")

    return run


def test_older_names_of_options_are_read_and_told(parse, capsys):
    options = parse("--look-every", "7", "--num-looked-at=9", "--held-out", "test", "--licence", "mit")
    assert (options.eval_every, options.num_eval_images, options.eval_split, options.license) == (7, 9, "test", "mit")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "--look-every was renamed to --eval-every" and len(told) == 4


def test_help_names_no_older_option_and_has_the_panels_of_the_command_line(parse, arguments, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(f"\n{panel}:" in text for panel in ("Model", "Data", "Compute", "Output"))
    assert not any(f"{old} " in text for old in arguments.RENAMED)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--eval-evry", "3"], "did you mean '--eval-every'"),
        (["--save-every", "0"], "--save-every is 1 or more, got 0"),
        (["--micro-batch=-2"], "--micro-batch is 1 or more, got -2"),
        (["--workers=-1"], "--workers is 0 or more, got -1"),
    ],
)
def test_wrong_options_are_refused(parse, capsys, command, message):
    with pytest.raises(SystemExit):
        parse(*command)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--recipe", "demo-cpo"], "did you mean 'demo-cpu'"),
        (["--set", "batchsize=4"], "did you mean 'batch_size'"),
        (["--set", "batch_size"], "expects NAME=VALUE"),
    ],
)
def test_wrong_recipes_are_refused(parse, arguments, command, message):
    with pytest.raises(SystemExit, match=message):
        arguments.choose_recipe(parse(*command))

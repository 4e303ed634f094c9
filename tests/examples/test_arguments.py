"""Options of the training programs: older names are read, wrong ones are answered with the right one."""

import importlib
import pathlib
import weakref

import pytest
import torch


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
    assert told == [
        "renamed: --look-every is now --eval-every VALUE, --num-looked-at is now --num-eval-images VALUE, "
        "--held-out is now --eval-split VALUE, --licence is now --license VALUE"
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("--columns", "image=photo,mask=truth", "--columns", "label=fine", "--set", "data.reduce_labels=true"),
        ("--image-column", "photo", "--mask-column=truth", "--label-column", "fine", "--reduce-labels"),
    ],
)
def test_columns_are_named_as_on_the_command_line_and_older_options_are_read(parse, arguments, command, capsys):
    options = parse("--recipe", "segment-vitb14", "--data", "owner/ade20k", "--columns", "depth=far", *command)
    found = arguments.make_data_options(options, arguments.choose_recipe(options))
    assert (found.image_column, found.label_column, found.mask_column) == ("photo", "fine", "truth")
    assert found.reduce_labels and found.depth_column is None
    assert "--columns depth: not read by the objective segment" in capsys.readouterr().err


def test_columns_of_scenes_are_known(parse, arguments):
    def columns(*command):
        options = parse(*command)
        found = arguments.make_data_options(options, arguments.choose_recipe(options))
        return found.label_column, found.mask_column, found.text_column, found.depth_column

    assert columns() == ("colours", None, None, None)
    assert columns("--recipe", "segment-cpu") == ("colours", "semantic_mask", None, None)
    assert columns("--recipe", "depth-cpu", "--columns", "label=label") == ("label", None, None, "depth")
    assert columns("--recipe", "clip-cpu") == ("colours", None, "caption", None)
    assert columns("--recipe", "clip-cpu", "--data", "a/b", "--text-column", "txt") == (None, None, "txt", None)


def test_help_names_no_older_option_and_has_the_panels_of_the_command_line(parse, arguments, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(f"\n{panel}:" in text for panel in ("Model", "Data", "Compute", "Output"))
    assert not any(f"{old} " in text for old in arguments.RENAMED)
    assert "--columns KIND=COLUMN" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--eval-evry", "3"], "did you mean '--eval-every'"),
        (["--save-every", "0"], "--save-every is 1 or more, got 0"),
        (["--micro-batch=-2"], "--micro-batch is 1 or more, got -2"),
        (["--workers=-1"], "--workers is 0 or more, got -1"),
        (["--columns", "masks=a"], "did you mean 'mask'?"),
        (["--columns", "mask"], "expected KIND=COLUMN such as label=fine"),
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


def test_the_group_of_the_processes_outlives_the_model(monkeypatch):
    # Where it does not, a run of several processes hangs at its end in torch 2.8.
    from torch import distributed

    monkeypatch.syspath_prepend(EXAMPLES)
    launching = importlib.import_module("launching")
    monkeypatch.setattr(launching, "Accelerator", lambda **_: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, "num_processes", 1, raising=False)
    seen = []

    @launching.ends_in_words
    def main():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        launching.make_accelerator()
        group = weakref.ref(distributed.group.WORLD)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        weakref.finalize(model, lambda: seen.append(group() is not None))
        seen.append(group)
        distributed.destroy_process_group()

    main()
    assert seen[1:] == [True] and seen[0]() is None

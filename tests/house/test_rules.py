"""Sizes, homes and words: rules that keep the code and its language in shape."""

import ast
import importlib
import pathlib
import re

import pytest


ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_vitreg"
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
HUB_FILES = set(PACKAGE.glob("*_vitreg.py")) - {PACKAGE / "image_processing_vitreg.py"}  # test_house names all

MODULE_LINES, FUNCTION_LINES, NUM_PARAMETERS = 400, 60, 10
VERB_LINES = 80  # parameters and help of a verb of the command line included
# Words that a reader of timm and transformers has to translate; each has a plain form in CONTRIBUTING.
RIDDLES = re.compile(
    r"nobody (knows|has looked)|what is true of|a stranger|of their owner|as it is used|has it artifacts|"
    r"has my vit artifacts|line of collapse|looked at\b.*\bimages|lopsided",
    re.IGNORECASE,
)
FRAGMENT = re.compile(r"""help=f?["'](Of|That|What|Such as|Whether it)\b""")


def _functions(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_no_module_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES + PROGRAMS if path not in HUB_FILES}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MODULE_LINES}


def test_no_function_is_long():
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in _functions(path)
        if node.end_lineno - node.lineno + 1 > (VERB_LINES if path.parent.name == "cli" else FUNCTION_LINES)
    }
    # The constructor of the configuration is a list of fields; transformers 4.57 has no typed configurations.
    assert set(long) <= {"modeling_vitreg/configuration_vitreg.py:__init__"}, long


def test_no_function_has_many_parameters():
    many = {}
    for path in FILES:
        for node in _functions(path):
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            # Options of a verb have a list of their own, and Hub files keep the signatures of transformers.
            is_free = node.name == "__init__" or path.parent.name == "cli" or path in HUB_FILES
            if count > NUM_PARAMETERS and not is_free:
                many[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert not many


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (r"os\.replace\(|\.rename\(|os\.rename\(", {"files.py"}),
        (r"\b(transformers|timm|accelerate|datasets)\.__version__", {"reports.py"}),
        (r"0\.485", {"modeling_vitreg.py"}),
    ],
)
def test_an_idea_has_one_home(pattern, homes):
    found = {path.relative_to(PACKAGE).as_posix() for path in FILES if re.search(pattern, path.read_text())}
    assert found <= homes | {"modeling_vitreg.py"}


def test_only_packages_and_hub_files_list_their_names():
    listing = {path for path in FILES if re.search("^__all__", path.read_text(), re.MULTILINE)}
    others = (path for path in listing if path.name != "__init__.py" and not path.name.endswith("_vitreg.py"))
    assert not sorted(others)
    for path in sorted(listing):
        module = importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        assert not [name for name in module.__all__ if not hasattr(module, name)], path


def test_objectives_are_named_in_the_registry_only():
    from modeling_vitreg.pretraining.objectives.registry import OBJECTIVES

    home = PACKAGE / "pretraining" / "objectives"
    names = "|".join(map(re.escape, OBJECTIVES))
    literal = re.compile(
        rf"""objective["']?\]?\s*(==|!=|in|not in)\s*[("'\[{{]|["']objective["']:\s*["']({names})["']"""
    )
    found = [
        str(path) for path in FILES + PROGRAMS if not path.is_relative_to(home) and literal.search(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize("path", FILES + PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sentences_are_plain(path):
    text = path.read_text()
    assert not [line for line in text.splitlines() if RIDDLES.search(line) or FRAGMENT.search(line)]


def test_every_imported_name_exists():
    """Imports inside functions too, which no other check follows."""
    missing = []
    for path in FILES + PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("modeling_vitreg"):
                home = ROOT.joinpath(*node.module.split("."))
                home = home.with_suffix(".py") if home.with_suffix(".py").exists() else home / "__init__.py"
                text = home.read_text() if home.exists() else ""
                for alias in node.names:
                    is_module = (home.parent / alias.name).exists() or (home.parent / f"{alias.name}.py").exists()
                    if not is_module and not re.search(rf"\b{alias.name}\b", text):
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}")
    assert not missing

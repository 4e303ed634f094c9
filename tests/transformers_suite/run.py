"""Run transformers' own common tests of models, backbones, configurations and pipelines on the classes of this family.

    pip download --no-deps --no-binary :all: --no-build-isolation --dest build transformers==5.23.0
    tar -xzf build/transformers-5.23.0.tar.gz -C build
    python tests/transformers_suite/run.py --source build/transformers-5.23.0
    python tests/transformers_suite/run.py --source build/transformers-5.23.0 --remote-code

The tests come with the source archive of the installed version and are never copied into this repository. A temporary
tree is made of them, of `suite_vitreg.py`, and of stand-ins for what the archive lacks; pytest runs in it, without
network. With --remote-code the classes come from saved models, in a process that cannot import the package. At the
end the skipped tests are counted by reason; one that `EXPLANATIONS` does not cover fails the run, like a failed test.

Needs pytest, parameterized, timm and torchvision beside transformers. Other arguments go to pytest.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata, util


HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
OUR_FILES = ("stand_ins.py", "suite_vitreg.py", "tiny_models.py")
THEIR_FILES = (
    "test_backbone_common.py",
    "test_configuration_common.py",
    "test_modeling_common.py",
    "test_pipeline_mixin.py",
)

# Why a test does not apply, and what the reasons that the library gives for it look like.
EXPLANATIONS = {
    "skipped by us": "^vitreg: ",
    "needs hardware or a library that is not here": "^test requires",
    "for pipelines of other tasks": "pipeline_model_mapping|run_pipeline_test",
    "for models of text": "inputs_embeds|language modeling head|sliding window|take a cache",
    "for models with attention": "support attentions|output.attentions|support sdpa",
    "for mixtures of experts": "grouped_mm|experts|router",
    "for models made of several models; for plain ones there is another test": "composite|subconfig|SDPA",
    "for the library's own rotary embeddings and tables resized in place": "RoPE|position embeddings",
    "for models that keep parts in float32, split into parallel tensors or rename weights": "fp32|TP plan|onversion",
    "for hidden states recorded by the library; ours are recorded by the model": "[Cc]apture",
    "switched off in this version, or for what later versions dropped": "riorit|39120|torch.fx|head masking|Pruning",
}


def main() -> int:
    """Build the tree, save the models, run pytest, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, required=True, help="unpacked source archive of transformers")
    parser.add_argument("--remote-code", action="store_true", help="load the classes from saved models")
    arguments, for_pytest = parser.parse_known_args()
    check_version(arguments.source)
    with tempfile.TemporaryDirectory() as folder:
        tree, models = pathlib.Path(folder, "tree"), pathlib.Path(folder, "models")
        build_tree(tree, arguments.source)
        os.environ |= {"HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ["RUN_SLOW"] = "1"  # one test, of export, which takes seconds
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, HERE / "tiny_models.py", models], env=environment, check=True)
        os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(models)
        os.environ["VITREG_REMOTE_CODE"] = str(int(arguments.remote_code))
        return run_pytest(tree, for_pytest, hide_package=arguments.remote_code)


def check_version(source: pathlib.Path) -> None:
    """Stop unless the archive is that of the transformers that is installed."""
    installed = metadata.version("transformers")
    archived = re.search(r"^Version: (.+)$", (source / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if archived != installed:
        sys.exit(f"{source} has the tests of transformers {archived}, but {installed} is installed: get its archive")


def build_tree(tree: pathlib.Path, source: pathlib.Path) -> None:
    """Lay out `tests` and `src` as in the library's repository, with our suite among its tests."""
    tests = tree / "tests"
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(pathlib.Path(util.find_spec("transformers").origin).parent)
    for name in OUR_FILES:
        shutil.copy(HERE / name, tests)
    for name in THEIR_FILES:
        shutil.copy(source / "tests" / name, tests)
        # What they import from folders of tests, by a statement or by a dotted name, comes from our stand-ins.
        text = (tests / name).read_text(encoding="utf-8")
        for module, wanted in re.findall(r'(?:from |"tests)\.([\w.]+)(?: import |\.)(\w+)', text):
            stand_in = tests.joinpath(*module.split(".")).with_suffix(".py")
            stand_in.parent.mkdir(exist_ok=True)
            (stand_in.parent / "__init__.py").touch()
            with stand_in.open("a") as file:
                file.write(f"from tests.stand_ins import {wanted}\n")


def run_pytest(tree: pathlib.Path, arguments: list[str], *, hide_package: bool) -> int:
    """Run the suite in this process, which has not imported the package so far."""
    sys.path[0] = str(tree)
    if hide_package:
        sys.modules["modeling_vitreg"] = None  # an import fails, even where the package is installed
    else:
        sys.path.insert(1, str(REPOSITORY))
    os.chdir(tree)

    import pytest

    skips = SkipReasons()
    options = ["-q", "-rfEs", "--disable-warnings", "-p", "no:cacheprovider", *arguments]
    status = pytest.main([*options, "tests/suite_vitreg.py"], plugins=[skips])
    return int(status) or int(None in skips.reasons)


class SkipReasons:
    """Counts skipped tests by explanation and reason; those that nothing explains are filed under None."""

    def __init__(self):
        self.reasons = {}

    def pytest_runtest_logreport(self, report) -> None:
        """Count a skipped test, leaving out the names that differ from one to the next."""
        if report.skipped:
            reason = re.sub(r"^Skipped: |\w+::\w+ is skipped: ", "", report.longrepr[2])
            reason = re.sub(r"(<class ')?[\w.]*\b(?:ViTWithRegisters|MambaR)\w+('>)?|`[a-z\d-]+`", "...", reason)
            why = next((why for why, pattern in EXPLANATIONS.items() if re.search(pattern, reason)), None)
            self.reasons.setdefault(why, Counter())[reason] += 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Print the counts."""
        terminalreporter.section("skipped tests by reason")
        for why, counts in sorted(self.reasons.items(), key=lambda item: -item[1].total()):
            terminalreporter.write_line(f"{counts.total():5d} {why or 'NOT EXPLAINED'}")
            for reason, count in counts.most_common():
                terminalreporter.write_line(f"{count:11d} {reason}")


if __name__ == "__main__":
    sys.exit(main())

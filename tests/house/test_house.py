"""The rules of the house: who imports whom, what travels to the Hub, what a wheel holds, what the public names are."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import modeling_vitreg


ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_vitreg"
_HUB_NAMES = (
    "configuration",
    "image_processing",
    "positions",
    "token_reduction",
    "modeling",
    "dual_encoder",
    "mamba",
    "hat",
    "vision_language",
)
HUB_FILES = [PACKAGE / f"{name}_vitreg.py" for name in _HUB_NAMES]

# Layer of each module or subpackage; a module imports from lower layers and from its own subpackage only.
LAYERS = {
    "configuration_vitreg": 0,
    "image_processing_vitreg": 0,
    "modeling_vitreg": 0,
    "positions_vitreg": 0,
    "token_reduction_vitreg": 0,
    "dual_encoder_vitreg": 0,
    "mamba_vitreg": 0,
    "vision_language_vitreg": 0,
    "hat_vitreg": 0,
    "__init__": 0,
    "registration": 0,
    "files": 1,
    "images": 1,
    "hf_metrics": 1,
    "memory": 1,
    "metrics": 1,
    "modes": 1,
    "names": 1,
    "network": 1,
    "omissions": 1,
    "pages": 1,
    "style": 1,
    "scenes": 1,
    "distributed": 1,
    "encoding": 1,
    "features": 1,
    "reports": 1,
    "settings": 1,
    "workers": 1,
    "analysis": 2,
    "conversion": 2,
    "discovery": 2,
    "evaluation": 2,
    "pretraining": 2,
    "cards": 3,
    "comparison": 3,
    "look": 3,
    "retrofit": 3,
    "doctor": 3,
    "cli": 4,
    "__main__": 4,
}
# Mechanisms do not know each other, but for these: who -> whom, and never back.
ACQUAINTANCES = {"evaluation": {"discovery"}}  # CorLoc is one of the numbers in its table
# What each layer may import from others, beside the standard library; and single files of it.
ALLOWED = {0: {"torch", "transformers", "huggingface_hub"}}
ALLOWED[1] = ALLOWED[0] | {"numpy", "datasets", "PIL", "tqdm"}
ALLOWED[2] = ALLOWED[1] | {"safetensors"}
ALLOWED[3] = ALLOWED[2]
ALLOWED[4] = {"torch", "typer"}
ALLOWED_IN_FILE = {
    "image_processing_vitreg.py": {"numpy", "PIL"},
    "cli/processes.py": {"accelerate", "psutil"},  # where accelerate has started the command
    "cards/licences.py": {"yaml"},
    "cards/probe.py": {"peft"},
    "comparison/table.py": {"matplotlib"},
    "cards/card.py": {"jinja2"},
    "doctor.py": {"packaging"},
    "analysis/figures.py": {"matplotlib"},
    "pages.py": {"jinja2"},
    "style.py": {"matplotlib"},
    "analysis/probes.py": {"sklearn"},
    "conversion/timm_models.py": {"timm"},
    "discovery/boxes.py": {"scipy"},
    "discovery/figures.py": {"matplotlib"},
    "encoding/parquet.py": {"pyarrow"},
    "evaluation/logistic.py": {"sklearn"},
    "hf_metrics.py": {"evaluate"},
    "features/loading.py": {"timm"},
    "pretraining/objectives/classify.py": {"torchvision"},
    "pretraining/objectives/refine_registers.py": {"torchvision"},
    "pretraining/objectives/clip.py": {"tokenizers"},
    "pretraining/views/augmentation.py": {"torchvision"},
    "pretraining/views/colors.py": {"torchvision"},
    "pretraining/views/crops.py": {"torchvision"},
    "pretraining/monitoring/curves.py": {"matplotlib"},
    "pretraining/monitoring/pictures.py": {"matplotlib"},
    "pretraining/run/recipe.py": {"yaml"},
    "pretraining/objectives/adaptation.py": {"peft"},
    "settings.py": {"yaml"},
}
ROOTS = ("benchmarks", "convert", "examples", "tests")


def _imports(path: pathlib.Path):
    """Modules that a file imports, anywhere in it; a relative one as its dotted text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_every_module_has_a_layer_and_imports_only_what_its_layer_may():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert name in LAYERS, f"{path} has no layer: add it to LAYERS"
        for module in _imports(path):
            top = module.split(".")[0]
            if module.startswith("."):
                assert path in HUB_FILES or len(path.relative_to(PACKAGE).parts) > 1, f"{path}: {module} is relative"
            elif top == "modeling_vitreg":
                imported = module.split(".")[1] if "." in module else "__init__"
                is_lower = LAYERS[imported] < LAYERS[name] or LAYERS[imported] == LAYERS[name] != 2
                is_known = imported == name or imported in ACQUAINTANCES.get(name, set())
                assert is_known or is_lower, f"{path} imports {module}"
            else:
                file = path.relative_to(PACKAGE).as_posix()
                allowed = ALLOWED[LAYERS[name]] | ALLOWED_IN_FILE.get(file, set())
                assert top in sys.stdlib_module_names or top in allowed, f"{path} imports {module}"


def test_roots_import_public_names_only_and_never_each_other():
    hidden = re.compile(r"from modeling_vitreg(\.\w+)* import .*\b_[a-z]")
    for root in ROOTS:
        for path in (ROOT / root).rglob("*.py"):
            assert not hidden.search(path.read_text()), f"{path} imports a private name"
            others = {other for other in ROOTS if other != root}
            assert not {module.split(".")[0] for module in _imports(path)} & others, path


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_the_library_sees_the_imports_of_a_hub_file_as_they_are(path):
    # The library finds relative imports with a regular expression, over docstrings too, and copies what they name.
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    true = {module for module in _imports(path) if module.startswith(".")}
    assert {f".{name}" for name in get_relative_imports(path)} == true
    assert true <= {f".{other.stem}" for other in HUB_FILES[: HUB_FILES.index(path)]}
    # Up to 4.57 a loader copies only the files that the loaded one names itself, not those that they name in turn.
    indirect = {f".{name}" for each in true for name in get_relative_imports(PACKAGE / f"{each[1:]}.py")}
    assert indirect <= true
    allowed = ALLOWED[0] | ALLOWED_IN_FILE.get(path.name, set())
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= allowed


def test_the_modeling_file_holds_the_texts_that_let_the_back_end_be_switched():
    text = (PACKAGE / "modeling_vitreg.py").read_text()
    assert "eager_attention_forward" in text
    assert "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]" in text  # up to 5.0
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in text  # from 5.1 on


def _words_of(program: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return run.stdout.split()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    loaded = _words_of("import sys, modeling_vitreg; print(*sys.modules)")
    ours = {name for name in loaded if name.startswith("modeling_vitreg")}
    assert ours == {"modeling_vitreg", "modeling_vitreg.registration"}
    heavy = {"PIL", "datasets", "huggingface_hub", "matplotlib", "numpy", "scipy", "sklearn"}
    heavy |= {"timm", "torch", "torchvision", "transformers"}
    assert not {name.split(".")[0] for name in loaded} & heavy


def test_using_a_class_loads_only_layer_0_and_what_transformers_loads_itself():
    # transformers' own modeling base imports accelerate, scikit-learn and others where they are installed.
    program = (
        "import sys, torch; from transformers import AutoBackbone, BitImageProcessor, GenerationMixin, ViTModel\n"
    )
    program += "known = set(sys.modules); from modeling_vitreg import ViTWithRegistersModel\n"
    num_known, *added = _words_of(program + "print(len(known), *set(sys.modules) - known)")
    assert {name for name in added if name.startswith("modeling_vitreg")} == {
        "modeling_vitreg",
        "modeling_vitreg.registration",
        *(f"modeling_vitreg.{path.stem}" for path in HUB_FILES if "image_processing" not in path.stem),
    }
    tops = {name.split(".")[0] for name in added}
    assert not tops - {"modeling_vitreg"} - sys.stdlib_module_names
    assert len(added) < 0.05 * int(num_known), sorted(added)


def test_the_auto_classes_know_the_family_in_whatever_order_both_are_imported():
    statements = (
        "import modeling_vitreg; from transformers import AutoModel",
        "from transformers import AutoModel; import modeling_vitreg",
        "from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig",
        "import modeling_vitreg.dual_encoder_vitreg",
        "from modeling_vitreg import ViTWithRegistersModel",
    )
    check = (
        "from transformers import AutoConfig; import sys; assert 'modeling_vitreg.modeling_vitreg' in sys.modules; "
    )
    check += "assert AutoConfig.for_model('vitreg', hidden_size=12, num_attention_heads=1).num_register_tokens == 4"
    # Each in a process of its own, forked from one that has imported torch, which takes most of the time.
    program = "import os, torch._dynamo, torch.distributed.tensor; os.environ['TOKENIZERS_PARALLELISM'] = 'false'\n"
    program += f"for statement in {statements!r}:\n    if not os.fork():\n        exec(statement + {'; ' + check!r})\n"
    program += "        os._exit(0)\n    assert os.wait()[1] == 0, statement\n"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_public_names_are_a_list_that_changes_on_purpose():
    names = """
        HATNetConfig HATNetForImageClassification HATNetModel MambaRConfig MambaRForImageClassification MambaRModel
        ViTWithRegistersAttentionMaps ViTWithRegistersBackbone ViTWithRegistersClassifierOutput ViTWithRegistersConfig
        ViTWithRegistersDualEncoderConfig ViTWithRegistersDualEncoderModel ViTWithRegistersDualEncoderOutput
        ViTWithRegistersForConditionalGeneration
        ViTWithRegistersForDepthEstimation ViTWithRegistersForImageClassification
        ViTWithRegistersForMaskedImageModeling ViTWithRegistersForSemanticSegmentation ViTWithRegistersModel
        ViTWithRegistersModelOutput ViTWithRegistersPreTrainedModel ViTWithRegistersTokens
        ViTWithRegistersVisionLanguageConfig ViTWithRegistersVisionLanguageOutput
    """
    assert sorted(modeling_vitreg.__all__) == names.split()
    for name in names.split():
        assert getattr(modeling_vitreg, name).__doc__, f"{name} has no docstring"


def test_public_functions_have_docstrings_and_annotations():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_no_file_is_a_drawer_and_no_script_hides_a_package():
    installed = {"timm", "torch", "transformers", "datasets", "accelerate", "evaluate", "peft", "ssl"}
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("modeling_vitreg", *ROOTS):
            continue
        assert path.stem not in {"utils", "common", "helpers", "misc"}, path
        # A script puts its own folder first on the path; modules of the package are never run by path.
        assert path.stem not in installed or path.is_relative_to(PACKAGE), path


def _replaces_a_file(node: ast.AST) -> bool:
    """Whether a call renames: `os.replace`, `shutil.move`, `path.rename(...)`, `path.replace(target)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    owner = getattr(node.func.value, "id", "")
    is_renaming = node.func.attr in ("rename", "renames") or (owner, node.func.attr) == ("shutil", "move")
    # `replace` of texts has two arguments, that of dataclasses has keywords.
    is_replacing = node.func.attr == "replace" and (owner == "os" or (len(node.args) == 1 and not node.keywords))
    return is_renaming or is_replacing


def test_files_are_replaced_in_one_place():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        if path not in (*HUB_FILES, PACKAGE / "files.py"):
            calls = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if _replaces_a_file(node)]
            assert not calls, f"{path}, line {calls[0]}: write with atomic_write or atomic_folder of files.py"


def test_a_wheel_from_a_clean_copy_holds_one_package(tmp_path):
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "__pycache__", "outputs", ".venv")
    shutil.copytree(ROOT, copy, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)],
        check=True,
        capture_output=True,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modeling_vitreg"}
    assert {"modeling_vitreg/configuration_vitreg.py", "modeling_vitreg/py.typed"} <= set(names)


def test_the_oldest_versions_that_are_tested_are_the_floors_that_are_declared():
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [Requirement(text) for text in project["dependencies"]]
    declared += [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    floors = {each.name: part.version for each in declared for part in each.specifier if part.operator == ">="}
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    different = {name for name in floors if Version(floors[name]) != Version(pinned.get(name, "0"))}
    assert not different and floors.keys() == pinned.keys(), different or floors.keys() ^ pinned.keys()

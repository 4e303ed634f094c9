"""A saved folder in a process that has never heard of the package: every head, the Auto classes, the pipelines."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vitreg import (
    ViTWithRegistersForDepthEstimation,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersForSemanticSegmentation,
    ViTWithRegistersModel,
)
from modeling_vitreg.modeling_vitreg import AUTO_MODELS


def run_without_the_package(program: str, *, folder, **environment) -> subprocess.CompletedProcess:
    """Run a program in a new process, offline, in which `import modeling_vitreg` fails."""
    header = """
        import sys
        sys.modules["modeling_vitreg"] = None  # an import of this name now fails, installed or not
        import transformers
        import torch
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(header) + textwrap.dedent(program)],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every model saved, with the outputs it gave."""
    from conftest import TINY

    from modeling_vitreg import ViTWithRegistersConfig

    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    images = torch.randn(2, 3, 24, 40)
    save_file({"images": images}, root / "images.safetensors")
    architectures = {
        "learned": {"layer_scale_init_value": 0.1},
        "rope": {"position_embedding_type": "rope", "hidden_act": "swiglu", "has_key_bias": False},
    }
    for name, architecture in architectures.items():
        for cls in AUTO_MODELS:
            config = ViTWithRegistersConfig(**TINY, **architecture, num_labels=3, initializer_range=0.2)
            model = cls(config).eval()
            folder = root / f"{name}-{cls.__name__}"
            model.save_pretrained(folder)
            with torch.no_grad():
                save_file(_tensors(model(images)), folder / "expected.safetensors")
    return root


def _tensors(output) -> dict:
    named = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
    named |= {f"feature_map_{i}": value for i, value in enumerate(output.get("feature_maps", ()))}
    return {key: value.contiguous().clone() for key, value in named.items()}


def test_every_model_gives_the_same_outputs_from_a_bare_folder(folders):
    run = run_without_the_package(
        """
        import json, pathlib
        from safetensors.torch import load_file, save_file
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            import modeling_vitreg
        except ImportError:
            pass
        else:
            raise SystemExit("the package can be imported")
        images = load_file("images.safetensors")["images"]
        for folder in sorted(pathlib.Path.cwd().glob("*-ViT*")):
            settings = json.loads((folder / "config.json").read_text())
            reference = "modeling_vitreg." + settings["architectures"][0]
            auto_class = next(auto for auto, name in settings["auto_map"].items() if name == reference)
            if auto_class == "AutoBackbone":  # the library asks the network about a local folder
                model = get_class_from_dynamic_module(reference, folder).from_pretrained(folder)
            else:
                model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            with torch.no_grad():
                output = model(images)
            named = {k: v.contiguous().clone() for k, v in output.items() if isinstance(v, torch.Tensor)}
            named |= {f"feature_map_{i}": v.clone() for i, v in enumerate(output.get("feature_maps", ()))}
            save_file(named, folder / "actual.safetensors")
            for auto, name in settings["auto_map"].items():  # any other head loads from the same folder
                if auto not in ("AutoConfig", "AutoBackbone", "AutoModel", auto_class):
                    getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        """,
        folder=folders,
    )
    assert run.returncode == 0, run.stderr
    saved = sorted(folders.glob("*-ViT*"))
    assert len(saved) == 2 * len(AUTO_MODELS)
    for folder in saved:
        expected, actual = load_file(folder / "expected.safetensors"), load_file(folder / "actual.safetensors")
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected), folder.name


def test_importing_and_loading_say_nothing(folders):
    run = run_without_the_package(
        """
        import warnings
        warnings.simplefilter("error", category=FutureWarning)
        transformers.utils.logging.disable_progress_bar()
        transformers.AutoModel.from_pretrained("learned-ViTWithRegistersModel", trust_remote_code=True)
        """,
        folder=folders,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_folder_is_flat_complete_and_lists_every_auto_class(folders):
    for folder in folders.glob("*-ViT*"):
        names = {path.name for path in folder.iterdir()} - {"expected.safetensors", "actual.safetensors"}
        assert names == {
            "config.json",
            "configuration_vitreg.py",
            "image_processing_vitreg.py",
            "model.safetensors",
            "modeling_vitreg.py",
            "positions_vitreg.py",
            "preprocessor_config.json",
            "token_reduction_vitreg.py",
        }
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        expected = {cls._auto_class: f"modeling_vitreg.{cls.__name__}" for cls in AUTO_MODELS}
        assert auto_map == expected | {"AutoConfig": "configuration_vitreg.ViTWithRegistersConfig"}


def test_a_remote_model_saves_again_with_code_and_processor(folders, tmp_path):
    model = ViTWithRegistersModel.from_pretrained(folders / "learned-ViTWithRegistersModel")
    processor = folders / "learned-ViTWithRegistersModel" / "preprocessor_config.json"
    settings = json.loads(processor.read_text()) | {
        "image_mean": [0.1, 0.2, 0.3],
        "crop_size": {"height": 8, "width": 8},
    }
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "preprocessor_config.json").write_text(json.dumps(settings))
    model.save_pretrained(tmp_path / "first")
    run = run_without_the_package(
        """
        model = transformers.AutoModel.from_pretrained("first", trust_remote_code=True)
        model.save_pretrained("second")
        again = transformers.AutoModel.from_pretrained("second", trust_remote_code=True)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(images).last_hidden_state, again(images).last_hidden_state)
        model = transformers.AutoModelForSemanticSegmentation.from_pretrained("second", trust_remote_code=True)
        model.save_pretrained("segmentation")
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    first, second, segmentation = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir() if path.suffix in (".py", ".json")}
        for name in ("first", "second", "segmentation")
    )
    assert first.keys() == second.keys() == segmentation.keys()
    assert first["modeling_vitreg.py"] == second["modeling_vitreg.py"]
    assert json.loads(second["preprocessor_config.json"]) == settings
    assert json.loads(second["config.json"])["auto_map"] == json.loads(first["config.json"])["auto_map"]
    processor = json.loads(segmentation["preprocessor_config.json"])
    assert processor["image_processor_type"] == "SegformerImageProcessor"
    assert processor["image_mean"] == [0.1, 0.2, 0.3]


def test_any_model_loads_from_the_folder_of_any_other(folders):
    images = torch.randn(1, 3, 32, 32)
    for source in AUTO_MODELS:
        folder = folders / f"learned-{source.__name__}"
        expected = ViTWithRegistersModel.from_pretrained(folder)(images).last_hidden_state
        for cls in AUTO_MODELS:
            model = cls.from_pretrained(folder)
            assert torch.equal(model.base_model(images).last_hidden_state, expected), (source, cls)


def test_saving_to_the_hub_saves_first_and_then_uploads_everything(tiny, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(
        ViTWithRegistersModel, "push_to_hub", lambda self, *args, **kwargs: uploads.append((args, kwargs))
    )
    folder = tmp_path / "name"
    ViTWithRegistersModel(tiny()).save_pretrained(folder, push_to_hub=True, private=True, token="t")
    assert (folder / "preprocessor_config.json").exists()
    assert uploads == [(("name",), {"private": True, "token": "t"})]


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory, photograph):
    """One model a pipeline, and a photograph."""
    from conftest import TINY

    from modeling_vitreg import ViTWithRegistersConfig

    root = tmp_path_factory.mktemp("tasks")
    photograph.save(root / "photograph.png")
    for task, cls in {
        "image-feature-extraction": ViTWithRegistersModel,
        "image-classification": ViTWithRegistersForImageClassification,
        "image-segmentation": ViTWithRegistersForSemanticSegmentation,
        "depth-estimation": ViTWithRegistersForDepthEstimation,
    }.items():
        id2label = {0: "person", 1: "rocket", 2: "flag"}
        cls(ViTWithRegistersConfig(**TINY, id2label=id2label, initializer_range=0.2)).save_pretrained(root / task)
    return root


def test_pipelines_run_on_a_bare_folder(task_folders):
    run = run_without_the_package(
        """
        import json
        from transformers import pipeline

        found = {}
        for task in ("image-feature-extraction", "image-classification", "image-segmentation", "depth-estimation"):
            options = {"pool": True} if task == "image-feature-extraction" else {}
            pipe = pipeline(task, model=task, trust_remote_code=True, **options)
            found[task] = pipe("photograph.png")
        found["image-segmentation"] = [(part["label"], part["mask"].size) for part in found["image-segmentation"]]
        depth = found["depth-estimation"]
        found["depth-estimation"] = [list(depth["predicted_depth"].shape), depth["depth"].size]
        json.dump(found, open("found.json", "w"))
        """,
        folder=task_folders,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((task_folders / "found.json").read_text())
    assert torch.tensor(found["image-feature-extraction"]).shape == (1, 32)
    assert {entry["label"] for entry in found["image-classification"]} == {"person", "rocket", "flag"}
    assert sum(entry["score"] for entry in found["image-classification"]) == pytest.approx(1, abs=1e-3)
    assert {label for label, _ in found["image-segmentation"]} <= {"person", "rocket", "flag"}
    assert all(size == [512, 512] for _, size in found["image-segmentation"])
    assert found["depth-estimation"][1] == [512, 512]


def test_the_pipeline_gives_what_processor_and_model_give(task_folders, photograph):
    from transformers import AutoImageProcessor, pipeline

    folder = task_folders / "image-feature-extraction"
    model, processor = ViTWithRegistersModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor(photograph, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    pooled = pipeline("image-feature-extraction", model=model, image_processor=processor, pool=True)(photograph)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(pooled), model(pixel_values).pooler_output)

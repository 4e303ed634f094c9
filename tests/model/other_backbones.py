"""What holds for every backbone with a Hub file of its own, for the tests of each."""

import pathlib

import torch
from PIL import Image
from safetensors.torch import save_file
from test_remote_code import run_without_the_package
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification


def assert_loads_through_the_auto_classes(
    model: nn.Module, images: Tensor, *, file: str, folder: pathlib.Path
) -> None:
    """A saved classifier, its backbone and its configuration; `file` is its Hub file."""
    model.save_pretrained(folder)
    assert (folder / file).is_file() and (folder / "preprocessor_config.json").is_file()
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(loaded) is type(model) and torch.equal(loaded(images).logits, model(images).logits)
    base = AutoModel.from_pretrained(folder).eval()
    assert type(base) is type(model.vitreg)
    assert torch.equal(base(images).pooler_output, model.vitreg(images).pooler_output)
    assert type(model.config).from_pretrained(folder).to_dict() == model.config.to_dict()


def assert_runs_and_learns_without_the_package(
    model: nn.Module, images: Tensor, *, photograph: Image.Image, folder: pathlib.Path
) -> None:
    """A saved classifier of three classes gives the same numbers to two images in a process without the package."""
    model.save_pretrained(folder / "model")
    photograph.save(folder / "photograph.png")
    save_file({"images": images, "logits": model(images).logits}, folder / "expected.safetensors")
    run = run_without_the_package(
        """
        from safetensors.torch import load_file

        expected = load_file("expected.safetensors")
        model = transformers.AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        output = model(expected["images"], labels=torch.tensor([0, 2]))
        assert torch.equal(output.logits, expected["logits"])
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.save_pretrained("again")
        base = transformers.AutoModel.from_pretrained("again", trust_remote_code=True)
        assert torch.equal(base(expected["images"]).pooler_output, model.vitreg(expected["images"]).pooler_output)
        found = transformers.pipeline("image-classification", model="again", trust_remote_code=True)("photograph.png")
        assert abs(sum(entry["score"] for entry in found) - 1) < 1e-3
        """,
        folder=folder,
    )
    assert run.returncode == 0, run.stderr

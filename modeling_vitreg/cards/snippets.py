"""Programs that a reader of a card copies; the tests run every one of them as it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from .model_folder import ModelFolder


_TASKS = {
    "ViTWithRegistersForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ViTWithRegistersForSemanticSegmentation": ("image-segmentation", "AutoModelForSemanticSegmentation"),
    "ViTWithRegistersForDepthEstimation": ("depth-estimation", "AutoModelForDepthEstimation"),
    "ViTWithRegistersForMaskedImageModeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling"),
    "ViTWithRegistersDualEncoderModel": ("zero-shot-image-classification", "AutoModel"),
}
_OTHERS = ("image-feature-extraction", "AutoModel")
_PIPELINES = ("image-classification", "image-segmentation", "depth-estimation")


@dataclass(frozen=True)
class Snippet:
    """A program and what it does."""

    title: str
    code: str


def pipeline_tag(class_name: str) -> str:
    """The task of the Hub that a class is for."""
    return _TASKS.get(class_name, _OTHERS)[0]


def make_snippets(folder: ModelFolder, repo_id: str) -> list[Snippet]:
    """The programs that fit a model; they read an image named photograph.jpg."""
    if folder.is_adapter:
        return [_adapter(folder, repo_id)]
    task = pipeline_tag(folder.class_name)
    if task == "zero-shot-image-classification":
        return [_zero_shot(repo_id)]
    snippets = [_pipeline(task, repo_id)] if task in _PIPELINES else []
    return [*snippets, _tokens(folder.architecture, repo_id), *_attention(folder.architecture)]


def _pipeline(task: str, repo_id: str) -> Snippet:
    code = f"""
from transformers import pipeline

run = pipeline("{task}", model="{repo_id}", trust_remote_code=True)
print(run("photograph.jpg"))
"""
    return Snippet(f"For {task.replace('-', ' ')}:", code.strip())


def _zero_shot(repo_id: str) -> Snippet:
    code = f"""
from transformers import pipeline

run = pipeline("zero-shot-image-classification", model="{repo_id}", trust_remote_code=True)
print(run("photograph.jpg", candidate_labels=["a red cube", "a blue sphere"]))
"""
    return Snippet("For classes in your words:", code.strip())


def _tokens(config: dict, repo_id: str) -> Snippet:
    names = ["cls_token"] if config["has_cls_token"] else []
    names += ["register_tokens"] if config["num_register_tokens"] else []
    prints = "\n".join(f"print(output.{name}.shape)" for name in [*names, "patch_grid"])
    channels = config["num_channels"]
    mode = '.convert("RGB")' if channels == 3 else ""
    code = f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repo_id}")
model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
image = Image.open("photograph.jpg"){mode}
pixel_values = processor(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    output = model(pixel_values)
print(output.pooler_output.shape)  # one vector an image
{prints}  # (1, rows, columns, width)
"""
    return Snippet("One vector an image, and every token by its name:", code.strip())


def _attention(config: dict) -> list[Snippet]:
    queries = ["cls"] if config["has_cls_token"] else []
    queries += ["registers"] if config["num_register_tokens"] else []
    if not queries:
        return []
    names = f'"{queries[0]}",' if len(queries) == 1 else '"cls", "registers"'
    code = f"""
with torch.no_grad():
    maps = model.attention_maps(pixel_values, layers=-1, queries=({names}), average_heads=True)
for name, values in maps.items():
    print(name, values.shape)  # the last two axes are rows and columns of patches
"""
    return [Snippet("Then, where these tokens look, as maps over the patches of the last layer:", code.strip())]


def _adapter(folder: ModelFolder, repo_id: str) -> Snippet:
    auto = _TASKS.get(folder.class_name, _OTHERS)[1]
    base = folder.settings["base_model_name_or_path"]
    classifier = [shape for name, shape in folder.shapes.items() if name.endswith("classifier.weight")]
    labels = f", num_labels={classifier[0][0]}" if classifier else ""
    code = f"""
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("{base}")
model = {auto}.from_pretrained("{base}", trust_remote_code=True{labels})
model = PeftModel.from_pretrained(model, "{repo_id}").eval()
image = Image.open("photograph.jpg").convert("RGB")
with torch.no_grad():
    output = model(**processor(image, return_tensors="pt"))
print({{name: value.shape for name, value in output.items() if isinstance(value, torch.Tensor)}})
"""
    return Snippet("The adapter is small, and is loaded onto the model that it belongs to:", code.strip())


__all__ = ["Snippet", "make_snippets", "pipeline_tag"]

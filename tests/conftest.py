"""Shared by all tests: no network, fixed seeds, one tiny configuration, real photographs."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; the programs that it starts inherit this
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers.utils import logging

from modeling_vitreg import ViTWithRegistersConfig


logging.disable_progress_bar()

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """Make a tiny configuration: width 32, 3 layers, 2 heads, images of 32 and patches of 8 pixels."""

    def make(**overrides) -> ViTWithRegistersConfig:
        return ViTWithRegistersConfig(**{**TINY, **overrides})

    return make


@pytest.fixture
def randomise():
    """Give every parameter of a model values that differ from its initial ones, so that zeros hide nothing."""

    def fill(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_factor = name.endswith("weight") and parameter.ndim == 1
                parameter.normal_(float(is_factor), 0.2)
        return model.eval()

    return fill


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are saved, and no pixels, which take most of the time."""
    from matplotlib.figure import Figure

    kept = []

    def keep(figure, path, **_):
        kept.append(figure)
        path.write_bytes(b"figure")

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


@pytest.fixture(scope="session")
def photograph():
    """The photograph of Eileen Collins that scikit-image ships, as a PIL image of 512 x 512 pixels."""
    from PIL import Image
    from skimage.data import astronaut

    return Image.fromarray(astronaut())

"""Shared by all tests: no network, fixed seeds, one tiny configuration, real photographs."""

import os
import shutil


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


@pytest.fixture
def open_page():
    """Open an address in a headless browser: a page of playwright with the list `problems` of what went wrong on it.

    Problems are errors on the console, failed requests, and requests to other machines.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra docs")
    program = shutil.which("chromium") or pytest.skip("needs chromium")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags = [*flags.split(), "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=flags)

        def open_address(address: str, *, width: int = 1200, scheme: str = "light"):
            size = {"width": width, "height": 900}
            page = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True).new_page()
            page.problems = []
            page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            local = ("file:", "data:", "blob:", "http://127.0.0.1", "http://localhost", "ws://127.0.0.1")
            page.on("request", lambda call: call.url.startswith(local) or page.problems.append(call.url))
            page.goto(address)
            return page

        yield open_address
        browser.close()


@pytest.fixture
def is_cut_off():
    """Whether something on a page lies right of its edge and no scroll bar leads there."""
    program = """() => [...document.querySelectorAll("body *")].some(each => {
        const box = each.getBoundingClientRect();
        if (box.width == 0 || box.right <= innerWidth + 1) return false;
        for (let box = each.parentElement; box; box = box.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
        return true;
    })"""
    return lambda page: page.evaluate(program)

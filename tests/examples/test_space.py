"""The app of the Space in a real browser, and with two visitors at once."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import zipfile

import pytest
from planted_models import plain_model, planted_model

from modeling_vitreg.features import load_encoder
from modeling_vitreg.look import look


ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The address of the running app, and its two models."""
    pytest.importorskip("gradio", reason="needs gradio, see examples/space/README.md")
    folder = tmp_path_factory.mktemp("space")
    names = [str(folder / "planted"), str(folder / "plain")]
    for model, name in zip((planted_model(layer=3, magnitude=50.0), plain_model()), names):
        model.save_pretrained(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VITREG_MODELS": ",".join(names), "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder)}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(ROOT / "examples" / "space" / "app.py")]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = next((line for line in server.stdout if "http://" in line), "")
            yield re.search(r"http://\S+", line).group(), names
        finally:
            server.terminate()


@pytest.mark.slow
def test_a_visitor_uploads_chooses_and_sees_and_a_broken_file_gives_words(space, open_page, tmp_path, photograph):
    address, names = space
    photograph.save(tmp_path / "astronaut.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    page = open_page(address, width=400)
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "broken.jpg")
    page.get_by_text("broken").first.wait_for()
    page.get_by_role("button", name="Look").click()
    page.get_by_text("This file cannot be read as an image").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400

    page = open_page(address)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "astronaut.jpg")
    page.get_by_text("astronaut").first.wait_for()
    page.get_by_label(names[1]).check()
    page.get_by_role("button", name="Look").click()
    page.get_by_text("of the patches of layer").nth(1).wait_for(timeout=60_000)
    assert page.evaluate("[...document.images].some(each => each.naturalWidth > 300)")
    link = page.locator("a[href*='page.zip']").first
    with page.expect_download() as download:
        link.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {"index.html", "1/index.html", "2/index.html"} <= set(archive.namelist())


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_and_a_repair_is_told(space, tmp_path, photograph):
    gradio_client = pytest.importorskip("gradio_client")
    address, names = space
    images = {"astronaut": photograph, "turned": photograph.rotate(90).crop((0, 0, 512, 300))}
    expected, jobs, clients = {}, {}, []
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        expected[name] = look(load_encoder(names[0]), image).sentence
    for name in images:
        clients.append(gradio_client.Client(address, verbose=False))
        file = gradio_client.handle_file(str(tmp_path / f"{name}.png"))
        jobs[name] = clients[-1].submit(file, names[:1], name == "turned", api_name="/look")
    words = {name: job.result(timeout=120)[1] for name, job in jobs.items()}
    assert expected["astronaut"] != expected["turned"]
    assert words["astronaut"] == expected["astronaut"] and words["turned"].startswith(expected["turned"])
    assert "epair" in words["turned"][len(expected["turned"]) :]

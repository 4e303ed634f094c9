"""A photograph as one or two models see it, with and without repair: the app of a Space, on CPU."""

import functools
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator

import gradio as gr

from modeling_vitreg.analysis.report_dir import analyze, compare
from modeling_vitreg.analysis.survey import SurveySettings
from modeling_vitreg.features import Encoder, load_encoder
from modeling_vitreg.images import UnreadableImage, decode_image, open_images
from modeling_vitreg.look import draw_looks, look
from modeling_vitreg.retrofit import NothingToRepair, RetrofitError, RetrofitSettings, retrofit


DEFAULT = "facebook/dinov2-small,facebook/dinov2-with-registers-small,facebook/dino-vits16"
MODELS = [name.strip() for name in os.environ.get("VITREG_MODELS", DEFAULT).split(",") if name.strip()]
MOST_MODELS = 2
REPAIR = RetrofitSettings(num_images=32)
REPAIRED = pathlib.Path(tempfile.mkdtemp())  # one folder for each model, shared by all visitors
LOCK = threading.Lock()  # models are opened once for all, and attention is read by hooks on them


@functools.lru_cache(maxsize=4)
def open_model(name: str) -> Encoder:
    return load_encoder(name)


@functools.cache
def repair(name: str) -> tuple[Encoder | None, str]:
    """The model with a test-time register, or None, and one sentence."""
    folder = REPAIRED / str(MODELS.index(name))
    try:
        report = retrofit(name, folder, images=open_images("scenes", scenes=range(REPAIR.num_images)), settings=REPAIR)
    except (NothingToRepair, RetrofitError) as error:
        return None, f"{name}: {error}.".partition("; --force")[0]
    return load_encoder(folder, name=f"{name}, repaired"), f"{name}: {report.verdict['sentence']}"


def show(photograph: str | None, names: list[str], is_repaired: bool) -> Iterator[tuple[str, str, str | None]]:
    """The picture and its sentences, then also the page as an archive; each visitor has a folder of his own."""
    if not photograph:
        raise gr.Error("Upload a photograph first.")
    if not 1 <= len(names) <= MOST_MODELS:
        raise gr.Error(f"Choose one or two models, not {len(names)}.")
    source = pathlib.Path(photograph)
    try:
        image = decode_image({"bytes": source.read_bytes(), "path": None, "label": None, "name": source.name})
    except UnreadableImage as error:
        raise gr.Error(f"This file cannot be read as an image. {error}") from error
    encoders, words = [], []
    with LOCK:
        for name in names:
            encoders.append(open_model(name))
            if is_repaired:
                repaired, sentence = repair(name)
                encoders += [repaired] if repaired else []
                words.append(sentence)
        looks = [look(encoder, image) for encoder in encoders]
    text = "\n\n".join([*(found.sentence for found in looks), *words])
    settings = SurveySettings(num_images=1, num_shown=1, has_progress_bar=False)
    with tempfile.TemporaryDirectory() as made:  # gradio copies what is yielded, and deletes its copies after an hour
        folder = pathlib.Path(made)
        picture = str(draw_looks(looks, folder / "look.png"))
        yield picture, text, None
        facts = {"output_folder": folder / "page", "settings": settings, "source": source.name}
        with LOCK:
            if len(encoders) == 1:
                analyze(encoders[0], [image], **facts)
            else:
                compare(encoders, lambda: [image], **facts)
        yield picture, text, shutil.make_archive(str(folder / "page"), "zip", folder / "page")


def build() -> gr.Blocks:
    with gr.Blocks(title="Registers and artifacts", delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            "# What does a Vision Transformer make of my photograph?\nUpload a photograph, choose one or two models."
        )
        with gr.Row():
            photograph = gr.File(label="Photograph", file_count="single", type="filepath")
            with gr.Column():
                names = gr.CheckboxGroup(MODELS, value=MODELS[:1], label="Models, one or two")
                is_repaired = gr.Checkbox(label="Also repaired, with a test-time register")
                button = gr.Button("Look", variant="primary")
        picture = gr.Image(type="filepath", format="png", show_label=False, buttons=[])
        words = gr.Markdown()
        page = gr.File(label="The page of all measurements")
        button.click(show, [photograph, names, is_repaired], [picture, words, page], api_name="look")
    return app


if __name__ == "__main__":
    build().launch(theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]))

"""Repair of a model: from any model that can be converted to a folder of the same model without artifacts.

    OUTPUT/   config.json, model.safetensors, preprocessor_config.json, the code of the family, retrofit.json; of a
              model that was converted first also conversion.json, of a dual encoder also its tokenizer

The folder is written only if the repair worked: the share of outliers falls to a fifth or less, and the class token
keeps a cosine of at least 0.99 with the original. The page of `comparison.py` and `page.py` is written in any case in
which there is something to repair.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

import modeling_vitreg
from modeling_vitreg.analysis.verdict import format_share
from modeling_vitreg.configuration_vitreg import ViTWithRegistersConfig
from modeling_vitreg.conversion import convert
from modeling_vitreg.dual_encoder_vitreg import ViTWithRegistersDualEncoderConfig
from modeling_vitreg.encoding import Crop, ImageFacts, PassSettings, read_all
from modeling_vitreg.features import Encoder, load_encoder
from modeling_vitreg.features.folders import check_weights, read_json
from modeling_vitreg.features.loading import load_whole
from modeling_vitreg.files import atomic_folder, check_writable
from modeling_vitreg.images import ImageSource, LabelledData
from modeling_vitreg.modeling_vitreg import PROCESSOR_FILE
from modeling_vitreg.names import count_of
from modeling_vitreg.reports import RetrofitReport, write_report
from modeling_vitreg.settings import expect

from .comparison import HeldOutData, compare_models
from .page import REPORT_FILE, write_page
from .register_neurons import (
    LARGEST_SHARE,
    LEAST_COSINE,
    NothingToRepair,
    Observed,
    Outliers,
    add_test_time_register,
    choose_num_units,
    find_outliers,
    group_units,
    image_tower,
    measure_repair,
    observe,
    rank_units,
    score_units,
)


LEAST_IMAGES = 16
HELD_OUT = 4  # one image in four is held out
TRIED = 3  # one held-out image in three, 16 or more, chooses the number of units; all judge the result
_KINDS = (ViTWithRegistersConfig, ViTWithRegistersDualEncoderConfig)  # others have no layers of this kind
# Files beside the weights that belong to the result too.
_KEPT_FILES = (PROCESSOR_FILE, "conversion.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


class RetrofitError(ValueError):
    """The model cannot be repaired, or the repair would make it worse; nothing was written."""


@dataclass(frozen=True)
class RetrofitSettings:
    """Settings of a retrofit.

    Args:
        num_registers: test-time registers to add.
        num_units: units that act on them; None: the smallest number that lowers the largest norm as far as any.
        layer: detection layer, from 1; None: the one with the deepest valley between two modes of norms.
        threshold: norm above which a patch is an outlier; None: the valley.
        highest_layer: last layer whose units are searched; None: the first with a tenth of the outliers.
        num_images: images to read; a quarter of them is held out to choose the number of units and to judge.
        image_size: side in pixels; None: that of the model. Units carry over to other sizes, thresholds do not.
        batch_size: images in a batch.
        force: write the model even if there is nothing to repair or the result is worse.
    """

    num_registers: int = 1
    num_units: int | None = None
    layer: int | None = None
    threshold: float | None = None
    highest_layer: int | None = None
    num_images: int = 200
    image_size: int | None = None
    batch_size: int = 8
    force: bool = False

    def __post_init__(self):
        counts = dict.fromkeys(("num_registers", "num_units", "image_size", "batch_size"), "[1, inf)")
        expect(self, "", num_images=f"[{LEAST_IMAGES}, inf)", **counts)


def retrofit(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    images: object,
    settings: RetrofitSettings | None = None,
    report_folder: str | os.PathLike | None = None,
    source_of_images: str = "",
    device: str | torch.device | None = None,
    command: str = "",
) -> RetrofitReport:
    """Add test-time registers to a finished model, without training.

    Args:
        source: a folder of this family, or anything that `conversion.convert` takes.
        output: folder to make; it must not exist, or be empty.
        images: an `ImageSource`, an `ImageStream` or an iterable of PIL images, or of pairs of an image and its label.
        settings: see `RetrofitSettings`.
        report_folder: folder for a page that compares the models on the held-out images; None: no page. Tasks are
            measured for the annotations of an `ImageSource`.
        source_of_images: for the report, in words.
        device: where to run; None: the CPU.
        command: for the report.

    Raises:
        NothingToRepair: the model has no outliers on these images.
        RetrofitError: fewer than 16 images, an output that is not empty, a model that was retrofitted already, or a
            repair that fails or harms.
        ConversionError: the source cannot be represented.
    """
    settings, output = settings or RetrofitSettings(), pathlib.Path(output)
    check_places(output, report_folder)
    page = None if report_folder is None else check_writable(report_folder)
    with as_folder(source) as folder:
        model = load_model(folder).to(device or "cpu")
        tower = image_tower(model)
        if not settings.force:
            refuse_second(tower, source)
        encoder = load_encoder(tower, name=os.fspath(source))
        split = read_images(encoder, images, settings)
        facts = {"method": "test-time", "images": {"source": source_of_images, **split.facts}, "command": command}
        facts |= {"model": os.fspath(source), "made_with": encoder.made_with()}
        try:
            found, measured = _search(tower, *split.batches, settings)
        except NothingToRepair as error:
            if not settings.force:
                raise
            return _write_unchanged(model, folder, output, facts, str(error))
        repaired = add_test_time_register(model, found, num_registers=settings.num_registers)
        report = RetrofitReport(register_neurons={str(layer): found[layer] for layer in found}, **facts, **measured)
        data = None if page is None else split.data(images, settings, source_of_images)
        return finish(report, (model, repaired), folder, output, page=page, data=data, is_forced=settings.force)


def check_places(output: str | os.PathLike, report: str | os.PathLike | None) -> None:
    """Raise a `RetrofitError` for an output that is not empty, and for a report that the model would replace."""
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RetrofitError(f"{output} exists and is not empty: name another folder")
    if report is not None and pathlib.Path(report).resolve().is_relative_to(output.resolve()):
        raise RetrofitError(f"{output} is made at the end, and would replace the report {report}: name another folder")


def finish(
    report: RetrofitReport,
    models: tuple[nn.Module, nn.Module],
    folder: pathlib.Path,
    output: pathlib.Path,
    *,
    page: pathlib.Path | None,
    data: HeldOutData | None,
    is_forced: bool,
) -> RetrofitReport:
    """Compare original and result on a page, refuse a repair that fails or harms, and write the model.

    Args:
        report: without the comparison.
        models: original and result.
        folder: of the original.
        output: folder of the model.
        page: folder of the page; None: no page.
        data: held-out images for the page; None: nothing to compare.
        is_forced: write the model even if it is not repaired.

    Raises:
        RetrofitError: with the verdict in words.
    """
    has_page = page is not None and data is not None
    if has_page:
        report = _compare_on_page(report, models, data, folder, page)
    if not (is_forced or report.verdict["is_repaired"]):
        written = f"No model was written, {page / 'index.html'} shows why" if has_page else "Nothing was written"
        raise RetrofitError(f"{report.verdict['sentence']} {written}; --force writes the model anyway")
    _write_model(models[1], folder, output, report)
    return report


def _compare_on_page(
    report: RetrofitReport,
    models: tuple[nn.Module, nn.Module],
    data: HeldOutData,
    folder: pathlib.Path,
    page: pathlib.Path,
) -> RetrofitReport:
    """The report with the comparison of the page, which is written."""
    names = (report.model, f"{report.model}, repaired")
    encoders = tuple(load_encoder(model, name=name) for model, name in zip(models, names))
    has_text = hasattr(models[0], "get_text_features") and (folder / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_text else None
    comparison, figures = compare_models(encoders, data, folder=page, tokenizer=tokenizer, command=report.command)
    report = replace(report, comparison=comparison)
    write_page(report, figures, page)
    return report


def _write_unchanged(
    model: nn.Module, folder: pathlib.Path, output: pathlib.Path, facts: dict, reason: str
) -> RetrofitReport:
    """Write a model that has nothing to repair, as it is."""
    verdict = {"is_repaired": False, "sentence": f"Written unchanged, because of --force: {reason}."}
    report = RetrofitReport(
        outliers={}, register_neurons={}, tried=[], control={}, result={}, verdict=verdict, **facts
    )
    _write_model(model, folder, output, report)
    return report


def refuse_second(tower: nn.Module, source: str | os.PathLike) -> None:
    config = tower.config
    if config.num_gated_registers:
        raise RetrofitError(
            f"{source} was retrofitted already: {config.num_gated_registers} registers were appended. Retrofit the "
            "original model, train on with examples/pretrain.py --init, or add --force"
        )
    if config.register_neurons:
        count, layers = sum(map(len, config.register_neurons.values())), ", ".join(config.register_neurons)
        raise RetrofitError(
            f"{source} was retrofitted already: {count} units of layers {layers} act on "
            f"{config.num_test_time_registers} test-time registers. Retrofit the original model, or add --force to "
            f"search for more units"
        )


def _search(
    tower: nn.Module, batches: list[Tensor], held_out: list[Tensor], settings: RetrofitSettings
) -> tuple[dict[int, list[int]], dict]:
    """Register neurons, and the measured fields of the report."""
    seen = tqdm(batches, desc="find outliers", unit="batch")
    outliers = find_outliers(
        tower, seen, layer=settings.layer, threshold=settings.threshold, highest_layer=settings.highest_layer
    )
    ranking = rank_units(score_units(tower, tqdm(batches, desc="score units", unit="batch"), outliers))
    before = observe(tower, held_out, outliers)
    step = max(1, min(TRIED, len(before.norms) // LEAST_IMAGES))
    tried_on = list(torch.cat(held_out)[::step].split(settings.batch_size))
    few = Observed(before.norms[::step], before.vectors[::step])
    candidates = {} if settings.num_units is None else {"candidates": [settings.num_units]}
    number, tried = choose_num_units(tower, ranking, tried_on, outliers, original=few, **candidates)
    units = group_units(ranking[:number])
    repaired, control = (
        add_test_time_register(tower, each, num_registers=settings.num_registers) for each in (units, {})
    )
    result, of_control = (
        measure_repair(before, observe(model, held_out, outliers), outliers) for model in (repaired, control)
    )
    result["time_ratio"] = time_ratio(tower, repaired, held_out[0])
    return units, {
        "outliers": describe_outliers(outliers),
        "tried": tried,
        "control": of_control,
        "result": result,
        "verdict": judge(result, outliers, change=f"with {count_of(number, 'unit')} moved"),
    }


def describe_outliers(outliers: Outliers) -> dict:
    """Outliers as plain JSON values, without their places."""
    described = asdict(outliers) | {"share": outliers.share, "shares": list(outliers.shares)}
    del described["masks"]
    return described


def judge(result: dict, outliers: Outliers, *, change: str) -> dict:
    """Whether a repair worked, in a dictionary of `is_repaired` and `sentence`; `change` says what was done."""
    before, after, cosine = result["share_before"], result["share"], result["cosine"]
    is_gone, is_same = after <= LARGEST_SHARE * before, cosine >= LEAST_COSINE
    shares = f"{format_share(before)} to {format_share(after)} of the patches of layer {outliers.layer}"
    kept = f"the class token keeps a cosine of {cosine:.4f} with the original"
    if before == 0:
        sentence = f"The held-out images have no outliers in layer {outliers.layer}: use more images."
    elif is_gone and is_same:
        sentence = f"Repaired: {change}, outliers fall from {shares}, and {kept}."
    elif not is_gone:
        sentence = f"Not repaired: {change}, outliers change from {shares}; they must fall to a fifth or less."
    else:
        sentence = f"Not repaired: outliers fall from {shares}, but {kept}, below {LEAST_COSINE}."
    return {"is_repaired": before > 0 and is_gone and is_same, "sentence": sentence}


@contextlib.contextmanager
def as_folder(source: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder of this family: the source itself, or what it converts to."""
    folder = pathlib.Path(source)
    if (folder / "model" / "config.json").exists():  # the output of a training run
        folder = folder / "model"
    if str((read_json(folder / "config.json") or {}).get("model_type")).startswith("vitreg"):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        converted = pathlib.Path(temporary) / "converted"
        convert(source, converted)
        yield converted


def load_model(folder: pathlib.Path) -> nn.Module:
    """A model of this family, whole, in float32.

    Raises:
        RetrofitError: another kind of model.
        ValueError, RuntimeError: the folder is damaged, see `features.load_encoder`.
    """
    settings = read_json(folder / "config.json")
    check_weights(folder, settings)
    name = (settings.get("architectures") or [""])[0]
    kind = getattr(modeling_vitreg, name, None) if name in modeling_vitreg.__all__ else None
    if getattr(kind, "config_class", None) not in _KINDS:
        raise RetrofitError(f"{folder}: expected a plain Vision Transformer or a dual encoder with one, got {name!r}")
    return load_whole(kind, folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class _Split:
    """Batches to search on and batches that are held out, with the facts of each image of both."""

    batches: tuple[list[Tensor], list[Tensor]]
    groups: tuple[list[ImageFacts], list[ImageFacts]]
    held_out: list[tuple[Image.Image, int | None]]
    facts: dict

    def data(self, images: object, settings: RetrofitSettings, source: str) -> HeldOutData:
        """The held-out images, with their annotations where the source has an index."""
        labelled = None
        if isinstance(images, ImageSource):
            parts = (images.select(np.array([image.number for image in group])) for group in self.groups)
            labelled = LabelledData(source or "images", *parts, max_depth=images.options.max_depth)
        return HeldOutData(self.held_out, labelled, source, settings.image_size, settings.batch_size)


def read_images(encoder: Encoder, images: object, settings: RetrofitSettings) -> _Split:
    """Read all images; every fourth is held out."""
    reading = PassSettings(batch_size=settings.batch_size, limit=settings.num_images, title="images")
    group, counts = read_all(images, Crop(settings.image_size).make(encoder), reading)
    if counts.num_seen < LEAST_IMAGES:
        raise RetrofitError(
            f"expected {LEAST_IMAGES} images or more, got {counts.num_seen} ({len(counts.unreadable)} cannot be read)"
        )
    is_held_out = torch.arange(counts.num_seen) % HELD_OUT == HELD_OUT - 1
    masks = (~is_held_out, is_held_out)
    parts = [encoder.normalise(group.pixels[mask]).to(encoder.device) for mask in masks]
    groups = tuple([image for image, kept in zip(group.images, mask.tolist()) if kept] for mask in masks)
    bytes_of_images = group.pixels[is_held_out].permute(0, 2, 3, 1).squeeze(-1).numpy()  # [B, C, ...] -> [B, ..., C]
    labels = (image.label for image in groups[1])
    found = counts.describe()
    return _Split(
        batches=tuple(list(part.split(settings.batch_size)) for part in parts),
        groups=groups,
        held_out=[(Image.fromarray(pixels), label) for pixels, label in zip(bytes_of_images, labels)],
        facts={"num_images": len(parts[0]), "num_held_out": len(parts[1]), "size": list(parts[0].shape[2:])}
        | {name: found[name] for name in ("num_unreadable", "unreadable")},
    )


@torch.no_grad()
def time_ratio(original: nn.Module, repaired: nn.Module, images: Tensor, *, rounds: int = 4) -> float:
    """Time of a forward of the repaired model in units of the original's: the quickest of several rounds, because
    other programs only add time."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for number in range(2 * rounds):
        start = time.perf_counter()
        (original, repaired)[number % 2](images).last_hidden_state.sum().item()
        seconds[number % 2].append(time.perf_counter() - start)
    return min(seconds[1]) / min(seconds[0])


def _write_model(model: nn.Module, original: pathlib.Path, output: pathlib.Path, report: RetrofitReport) -> None:
    with atomic_folder(output) as folder:
        model.to("cpu").save_pretrained(folder)
        for path in (path for pattern in _KEPT_FILES for path in original.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
        write_report(report, folder / REPORT_FILE)

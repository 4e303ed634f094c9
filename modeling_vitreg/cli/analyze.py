"""`vitreg analyze`."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .options import COMPUTE, OUTPUT, option
from .tell import tell_left_out, tell_unreadable


_OUTPUT = pathlib.Path("artifacts")


@dataclass(frozen=True)
class ImageSize:
    """The group `encoding` of --set, as in `vitreg evaluate`."""

    image_size: int | None = None


def analyze(
    model: options.Model,
    images: options.Images = "scenes",
    split: options.Split = "train",
    num_images: options.NumImages = 1000,
    compare: options.Compare = None,
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    probes: Annotated[int, option(COMPUTE, "Number of images for the linear probes (0: skip).", min=0)] = 0,
    batch_size: options.BatchSize = 32,
    precision: options.Precision = None,
    workers: options.Workers = None,
    compile: options.Compile = False,
    seed: options.Seed = 0,
    device: options.Device = None,
    settings: options.Set = None,
    output: Annotated[pathlib.Path, option(OUTPUT, "Folder to write. Open its index.html.")] = _OUTPUT,
) -> None:
    """Find out whether a ViT has artifacts, and what its registers do.

    * `vitreg analyze outputs/demo-cpu/model`

    * `vitreg analyze facebook/dinov2-large my_photos --output large`

    * `vitreg analyze outputs/without/model --compare outputs/demo-cpu/model --output pair`

    Measures the norms of all layers, the positions of outlier tokens, attention, massive activations and the effect of
    removing registers. Writes a page with figures and a verdict (index.html) and all numbers (artifacts.json). Ctrl-C
    keeps what was measured. Settings for --set: `encoding.image_size`, `analysis.NAME`, `data.NAME`.
    """
    with plain_errors():
        options.check_output(output, images=images)
        names, device = options.check_inputs([model, *(compare or [])], images, device)
        from modeling_vitreg.analysis import report_dir
        from modeling_vitreg.analysis.settings import SurveySettings
        from modeling_vitreg.distributed import first_process_first, joined_processes
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.images import DataOptions, open_images
        from modeling_vitreg.reports import command_line

        kinds = {"encoding": ImageSize, "analysis": SurveySettings, "data": DataOptions}
        found = options.read_settings(settings, kinds)
        usual = {"num_images": num_images, "batch_size": batch_size, "num_probe_images": probes, "seed": seed}
        usual |= {"precision": precision, "workers": workers, "compile": compile}
        chosen = SurveySettings(**(usual | found["encoding"] | found["analysis"]))
        loading = {"device": device, "trust_remote_code": trust_remote_code, "parts": parts}
        encoders = [load_encoder(name, dtype=options.weights_dtype(chosen.precision), **loading) for name in names]

        side = chosen.image_size or max(encoders[0].image_size)
        scene_settings, source_name = options.scene_settings(images, side)

        def open_source() -> object:
            scenes = {"scenes": range(chosen.num_images or 10_000), "scene_settings": scene_settings}
            return open_images(images, split=split, options=DataOptions(**found["data"]), **scenes)

        with joined_processes() as context:
            with first_process_first(context):
                opened = open_source()
            if not context.rank:
                tell_left_out(opened)
            words = {"settings": chosen, "source": source_name, "command": command_line(), "context": context}
            if len(encoders) > 1:
                reports = report_dir.compare(encoders, open_source, output_folder=output, **words)
            else:
                reports = [report_dir.analyze(encoders[0], opened, output_folder=output, **words)]
        if context.rank:
            return
    tell_unreadable(reports[0].images)
    for report in reports:
        typer.echo(f"{report.model}: {report.verdict['sentence']}")
    typer.echo(f"wrote {output / 'index.html'}")

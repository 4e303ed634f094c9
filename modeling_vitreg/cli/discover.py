"""`vitreg discover`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .options import COMPUTE, OUTPUT, option
from .tell import tell_left_out, tell_unreadable


def discover(
    model: options.Model,
    images: options.Images = "scenes",
    annotations: options.Annotations = None,
    split: options.Split = "train",
    num_images: options.NumImages = 200,
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    sweep: Annotated[bool, option(COMPUTE, "Also try LOST with every feature and bias.", "--sweep")] = False,
    precision: options.Precision = None,
    workers: options.Workers = None,
    compile: options.Compile = False,
    device: options.Device = None,
    settings: options.Set = None,
    output: Annotated[pathlib.Path, option(OUTPUT, "Folder to write.")] = pathlib.Path("discovery"),
) -> None:
    """Discover objects without labels by LOST, TokenCut or DINO-seg, and measure CorLoc where boxes are known.

    * `vitreg discover outputs/demo-cpu/model --sweep`

    * `vitreg discover facebook/dino-vits16 VOC2007/JPEGImages --annotations VOC2007/Annotations`

    * `vitreg discover outputs/demo-cpu/model my_photos --set discovery.method=tokencut --set discovery.layer=-2`

    Writes pictures with boxes and discovery.json, which keeps the published settings apart from the best of a sweep.
    Ctrl-C keeps what was measured, and the same command continues. Settings for --set: `discovery.NAME`, `data.NAME`.
    """
    with plain_errors():
        options.check_output(output, images=images)
        (name,), device = options.check_inputs([model], images, device)
        from modeling_vitreg import discovery
        from modeling_vitreg.distributed import first_process_first, joined_processes
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.images import DataOptions
        from modeling_vitreg.reports import command_line

        kind = discovery.DiscoverySettings
        found = options.read_settings(settings, {"discovery": kind, "data": DataOptions})
        reading = {"workers": workers, "precision": precision, "compile": compile}
        reading = kind(**found["discovery"]).for_pass(**reading)  # refuses values before work starts
        loading = {"device": device, "trust_remote_code": trust_remote_code, "parts": parts}
        encoder = load_encoder(name, dtype=options.weights_dtype(precision), **loading)
        chosen = kind(**({"head": min(4, (encoder.num_heads or 1) - 1)} | found["discovery"]))
        with joined_processes() as context:
            with first_process_first(context):
                annotated = _open(images, annotations, split, num_images, encoder, DataOptions(**found["data"]))
            if not context.rank:
                tell_left_out(annotated)
            report = discovery.discover(
                encoder,
                annotated,
                settings=chosen,
                sweep=discovery.Sweep(layers=(chosen.layer,)) if sweep else None,
                reading=reading,
                folder=output / "objects",
                source=options.scene_settings(images, max(encoder.image_size))[1],
                command=command_line(),
            )
        if context.rank:
            return
        written = discovery.write_folder(report, annotated, output)
    for note in report.images["notes"]:
        typer.echo(note, err=True)
    tell_unreadable(report.images)
    typer.echo(_describe(report))
    typer.echo(f"wrote {', '.join(map(str, written))}")


def _open(images, annotations, split, num_images, encoder, data):
    """Images, with boxes where they are known."""
    from modeling_vitreg.images import ImageSource, open_images

    scene_settings, _ = options.scene_settings(images, max(encoder.image_size))
    if scene_settings:
        data = dataclasses.replace(data, box_column="boxes")
    source = open_images(
        images,
        split=split,
        options=data,
        annotations=annotations,
        scenes=range(num_images),
        scene_settings=scene_settings,
    )
    if not isinstance(source, ImageSource):
        raise ValueError(f"{images}: expected an indexed dataset, got a stream: save it as a dataset first")
    return source.select(range(min(num_images, len(source))))


def _describe(report) -> str:
    published, best, num_images = report.as_published, report.best_of_sweep, report.images["num_images"]
    if published["corloc"] is None:
        return f"{report.model}: a box for each of {num_images} images; CorLoc needs annotated boxes"
    line = f"{report.model}: CorLoc {published['corloc']:.1%} as published, {num_images} images"
    if published.get("point_in_box") is not None:
        line += f"; point in box {published['point_in_box']:.1%}"
    if not best:
        return line
    return f"{line}; best of the sweep {best['corloc']:.1%} ({best['feature']}, bias {best['bias']:g}), same images"

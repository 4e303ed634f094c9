"""`vitreg embed`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .options import DATA, OUTPUT, option
from .tell import tell_left_out, tell_unreadable


Output = Annotated[pathlib.Path, typer.Argument(help="Folder to write. Shards that it already has are kept.")]


def embed(
    model: options.Model,
    images: options.Images,
    output: Output,
    split: options.Split = "train",
    num_images: Annotated[int | None, option(DATA, "Maximum number of images. Default: all.", min=1)] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    batch_size: options.BatchSize = 64,
    precision: options.Precision = None,
    workers: options.Workers = None,
    compile: options.Compile = False,
    device: options.Device = None,
    settings: options.Set = None,
    registers: Annotated[bool, option(OUTPUT, "Store the registers, in float16.", "--registers")] = False,
    patches: Annotated[bool, option(OUTPUT, "Store all patches, in float16.", "--patches")] = False,
) -> None:
    """Store the features of images as Parquet files that the library datasets opens.

    * `vitreg embed outputs/demo-cpu/model my_photos features`

    * `vitreg embed facebook/dinov2-large my_photos features --registers --patches`

    * `vitreg embed timm/vit_small_patch16_dinov3 owner/photos features --split validation`

    A row holds the name and the label of an image, its class token and the mean of its patches. The same command
    continues after Ctrl-C or a crash. With `torchrun` or `accelerate launch` several processes share the images.
    Settings for --set: `embedding.NAME` (such as `embedding.layer=9`), `data.NAME`.
    """
    with plain_errors():
        options.check_output(output)
        (name,), device = options.check_inputs([model], images, device)
        from modeling_vitreg.distributed import first_process_first, joined_processes
        from modeling_vitreg.encoding import PassSettings, parquet
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.images import DataOptions, open_images
        from modeling_vitreg.reports import command_line

        kinds = {"embedding": parquet.EmbeddingSettings, "data": DataOptions}
        found = options.read_settings(settings, kinds)
        chosen = parquet.EmbeddingSettings(
            **({"has_registers": registers, "has_patches": patches} | found["embedding"])
        )
        how = PassSettings(
            batch_size=batch_size, workers=workers, precision=precision, compile=compile, limit=num_images
        )
        dtype = options.weights_dtype(precision)
        encoder = load_encoder(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, parts=parts)
        scene_settings, source_name = options.scene_settings(images, chosen.image_size or max(encoder.image_size))
        with joined_processes() as context:
            with first_process_first(context):
                scenes = {"scenes": range(num_images or 10_000), "scene_settings": scene_settings}
                opened = open_images(images, split=split, options=DataOptions(**found["data"]), **scenes)
            if not context.rank:
                tell_left_out(opened)
            facts = {"source": source_name, "split": split, "revision": opened.revision, "command": command_line()}
            words = {"settings": chosen, "reading": how, "facts": facts, "context": context}
            counts = parquet.embed(encoder, opened, output_folder=output, **words)
        if counts is None:
            return
    tell_unreadable(counts.describe())
    if counts.stopped_by:
        typer.echo(f"{counts.stopped_by}; the same command continues", err=True)
    typer.echo(f"{output} holds the features of {counts.num_images} images, computed in {counts.precision}")

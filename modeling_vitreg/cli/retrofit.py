"""`vitreg retrofit`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .options import DATA, MODEL, OUTPUT, option
from .tell import tell_unreadable


_IMAGES = "Images to find the units on: a folder, .tar shards, a Hub dataset, or scenes."
_COLUMNS = "Columns of the dataset, to compare tasks in the report: image, label, mask, box."
_REPORT = "Folder for a page that compares the model before and after on held-out images."
_FORCE = "Write the model even if there is nothing to repair or the result is worse."


def retrofit(
    model: Annotated[str, typer.Argument(help="Folder of a model, or anything that `vitreg convert` takes.")],
    output: Annotated[pathlib.Path, typer.Argument(help="Folder to write.")],
    images: Annotated[str, option(DATA, _IMAGES)],
    columns: Annotated[list[str] | None, option(DATA, _COLUMNS, metavar="KIND=COLUMN,...")] = None,
    annotations: options.Annotations = None,
    split: options.Split = "train",
    num_images: Annotated[int, option(DATA, "Number of images; a quarter is held out.", min=16)] = 200,
    num_registers: Annotated[int, option(MODEL, "Number of test-time registers to add.", min=1)] = 1,
    device: options.Device = None,
    settings: options.Set = None,
    report: Annotated[pathlib.Path | None, option(OUTPUT, _REPORT)] = None,
    force: Annotated[bool, option(OUTPUT, _FORCE, "--force")] = False,
) -> None:
    """Repair a finished model that has artifacts, without training: add a test-time register.

    * `vitreg retrofit facebook/dinov2-large dinov2-large-repaired --images my_photos`

    * `vitreg retrofit timm:vit_base_patch16_clip_224.openai clip-repaired --images my_photos --report before-after`

    * `vitreg retrofit my-model my-model-repaired --images my_photos --set num_units=50 --set highest_layer=18`

    Finds the MLP units that write outliers and lets them act on an extra register (arXiv 2506.08010). Nothing is
    written unless outliers fall to a fifth and the class token keeps its direction. The report compares norms,
    attention and, where the images have labels, masks or boxes, k-NN, a segmentation probe and CorLoc. Settings for
    --set: `layer`, `threshold`, `highest_layer`, `num_units`, `image_size`, `batch_size`, `data.NAME`.
    """
    with plain_errors():
        options.check_output(output)
        if report is not None:
            options.check_output(report)
        _, device = options.check_inputs([], images, device)
        from modeling_vitreg.cards import record_expected_outputs
        from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, open_images, parse_columns
        from modeling_vitreg.reports import command_line
        from modeling_vitreg.retrofit import RetrofitSettings
        from modeling_vitreg.retrofit import retrofit as run_retrofit
        from modeling_vitreg.scenes import is_scenes
        from modeling_vitreg.settings import make_settings, read_assignments

        found = read_assignments(settings or ())
        usual_columns = {"label_column": "colours", **SCENE_COLUMNS} if is_scenes(images) else {}
        data = usual_columns | found.pop("data", {}) | parse_columns(columns or ())
        usual = {"num_images": num_images, "num_registers": num_registers, "force": force}
        chosen = make_settings(RetrofitSettings, usual | found, of="--set")
        scene_settings, source_name = options.scene_settings(images, chosen.image_size or 224)
        opened = open_images(
            images,
            split=split,
            options=make_settings(DataOptions, data, of="--set data"),
            annotations=annotations,
            scenes=range(chosen.num_images),
            scene_settings=scene_settings,
        )
        words = {"source_of_images": source_name, "command": command_line()}
        made = run_retrofit(
            model, output, images=opened, settings=chosen, report_folder=report, device=device, **words
        )
        record_expected_outputs(output)
    tell_unreadable(made.images)
    typer.echo(made.verdict["sentence"])
    for layer, units in made.register_neurons.items():
        typer.echo(f"  layer {layer}: units {', '.join(map(str, units))}")
    typer.echo(f"wrote {output}" + (f" and {report / 'index.html'}" if report else ""))
    typer.echo(f'next: AutoModel.from_pretrained("{output}", trust_remote_code=True)')


__all__ = ["retrofit"]

"""`vitreg retrofit`."""

from __future__ import annotations

import enum
import importlib.util
import os
import pathlib
import subprocess
import sys
from typing import Annotated

import typer

from . import options
from .errors import plain_errors
from .options import DATA, MODEL, OUTPUT, option
from .processes import refuse_several_processes
from .tell import tell_left_out, tell_unreadable


_METHOD = "test-time (no training), append, distill or refine."
_RECIPE = "Recipe of a method that trains (default: retrofit-METHOD)."
_NUMBER = "Registers to add (default: 1 for test-time, 4 for append, 16 for distill and refine)."
_IMAGES = "Images to find outliers on, and to train on: a folder, .tar shards, a Hub dataset, or scenes."
_COLUMNS = "Columns of the dataset, to compare tasks in the report: image, label, mask, box."
_REPORT = "Folder for a page that compares the model before and after on held-out images."
_FORCE = "Write the model even if there is nothing to repair or the result is worse."


class Method(str, enum.Enum):
    """Values of `--method`; typer 0.16 knows no `Literal`."""

    test_time = "test-time"
    append = "append"
    distill = "distill"
    refine = "refine"


def retrofit(
    model: Annotated[str, typer.Argument(help="Folder of a model, or anything that `vitreg convert` takes.")],
    output: Annotated[pathlib.Path, typer.Argument(help="Folder to write.")],
    images: Annotated[str, option(DATA, _IMAGES)],
    columns: Annotated[list[str] | None, option(DATA, _COLUMNS, metavar="KIND=COLUMN,...")] = None,
    annotations: options.Annotations = None,
    split: options.Split = "train",
    num_images: Annotated[int, option(DATA, "Number of images; a quarter is held out.", min=16)] = 200,
    method: Annotated[Method, option(MODEL, _METHOD)] = Method.test_time,
    num_registers: Annotated[int | None, option(MODEL, _NUMBER, min=1)] = None,
    recipe: Annotated[str | None, option(MODEL, _RECIPE)] = None,
    device: options.Device = None,
    settings: options.Set = None,
    report: Annotated[pathlib.Path | None, option(OUTPUT, _REPORT)] = None,
    force: Annotated[bool, option(OUTPUT, _FORCE, "--force")] = False,
) -> None:
    """Repair a finished model that has artifacts: give it registers, without training or by training them.

    * `vitreg retrofit facebook/dinov2-large dinov2-large-repaired --images my_photos`

    * `vitreg retrofit timm:vit_base_patch16_clip_224.openai clip-repaired --images my_photos --report before-after`

    * `vitreg retrofit my-model my-model-repaired --images my_photos --method append --recipe retrofit-append-cpu`

    Without training, finds the MLP units that write outliers and lets them act on an extra register (arXiv
    2506.08010). The other methods run examples/retrofit.py. Nothing is written unless outliers fall to a fifth and the
    class token keeps its direction. The report compares norms, attention and, where the images have labels, masks or
    boxes, k-NN, a segmentation probe and CorLoc. Settings for --set: `layer`, `threshold`, `highest_layer`,
    `num_units`, `image_size`, `batch_size`, `data.NAME`; of a method that trains, all values of its recipe.
    """
    with plain_errors():
        refuse_several_processes("retrofit")
        options.check_output(output)
        if report is not None:
            options.check_output(report, images=images)
        if method is not Method.test_time:
            if columns or annotations:
                raise ValueError("--columns and --annotations are for --method test-time: see examples/retrofit.py")
            train = {"init": model, "output": output, "method": method.value, "data": images, "split": split}
            train |= {"num-images": num_images, "num-registers": num_registers, "recipe": recipe, "report": report}
            return _train(train, settings or [], device=device, force=force)
        if recipe is not None:
            raise ValueError("--recipe is for methods that train: add --method append, distill or refine")
        _, device = options.check_inputs([], images, device)
        from modeling_vitreg.cards import record_expected_outputs
        from modeling_vitreg.images import SCENE_COLUMNS, DataOptions, open_images, parse_columns
        from modeling_vitreg.reports import command_line
        from modeling_vitreg.retrofit import RetrofitSettings
        from modeling_vitreg.retrofit import retrofit as run_retrofit
        from modeling_vitreg.scenes import is_scenes
        from modeling_vitreg.settings import make_settings, read_assignments

        found = read_assignments(settings or ())
        if not isinstance(found.get("data", {}), dict):
            raise ValueError(f"--set: expected data.NAME=VALUE, got data={found['data']!r}")
        usual_columns = {"label_column": "colours", **SCENE_COLUMNS} if is_scenes(images) else {}
        data = usual_columns | found.pop("data", {}) | parse_columns(columns or ())
        usual = {"num_images": num_images, "num_registers": num_registers or 1, "force": force}
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
        tell_left_out(opened)
        words = {"source_of_images": source_name, "command": command_line()}
        made = run_retrofit(
            model, output, images=opened, settings=chosen, report_folder=report, device=device, **words
        )
        record_expected_outputs(output)
    tell_unreadable(made.images)
    typer.echo(made.verdict["sentence"])
    for layer, units in made.register_neurons.items():
        typer.echo(f"  layer {layer}: units {', '.join(map(str, units))}")
    typer.echo(f"wrote {output}" + (f" and {report / 'index.html'}" if report and made.comparison else ""))
    typer.echo(f'next: AutoModel.from_pretrained("{output}", trust_remote_code=True)')


def _train(chosen: dict, settings: list[str], *, device: str | None, force: bool) -> None:
    """Run the training program, which is part of a clone of the repository."""
    from modeling_vitreg.retrofit import check_places

    check_places(chosen["output"], chosen["report"])
    program = pathlib.Path(__file__).parents[2] / "examples" / "retrofit.py"
    missing = [name for name in ("accelerate", "psutil") if importlib.util.find_spec(name) is None]
    if not program.exists() or missing:
        raise ValueError(
            f"--method {chosen['method']} trains, and needs a clone of the repository, installed by pip install -e "
            "'.[train]'; --method test-time does not train"
        )
    given = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    given += [*(f"--set={change}" for change in settings), *(["--force"] if force else [])]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})
    if code := subprocess.run([sys.executable, str(program), *given], env=environment).returncode:
        raise typer.Exit(code)

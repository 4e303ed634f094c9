"""`vitreg look`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from modeling_vitreg.names import check_model_name, suggest_path

from . import options
from .errors import plain_errors
from .options import MODEL, OUTPUT, option


_DEFAULT = "facebook/dinov2-small"
_MODEL = f"Folder of a model, name on the Hub or timm/NAME (repeatable). Default: {_DEFAULT}."
_OUTPUT = pathlib.Path("look.png")


def look(
    photo: Annotated[pathlib.Path, typer.Argument(help="Photograph: a file that Pillow opens.")],
    model: Annotated[list[str] | None, option(MODEL, _MODEL)] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    parts: options.Parts = None,
    device: options.Device = None,
    output: Annotated[pathlib.Path, option(OUTPUT, "Picture to write.")] = _OUTPUT,
) -> None:
    """Look at one photograph with one or several models.

    * `vitreg look photo.jpg --model outputs/demo-cpu/model`

    * `vitreg look photo.jpg --output dinov2.png`

    * `vitreg look photo.jpg --model facebook/dinov2-base --model facebook/dinov2-with-registers-base`

    Draws norms, attention of class token and registers, principal components and the object that LOST finds, all of
    the last layer. For a model with registers, the text below its name gives the share of the update of the class
    token that comes through registers: if it is large, the attention map shows little of what the class token learns.
    """
    with plain_errors():
        options.check_output(output, is_file=True)
        from modeling_vitreg.style import check_suffix

        check_suffix(output)
        if output.exists() and photo.exists() and output.samefile(photo):
            raise ValueError(f"--output {output}: is the photograph, which would be replaced: choose another file")
        if not photo.is_file():
            remedy = "It is a folder: use vitreg analyze" if photo.is_dir() else suggest_path(photo)
            raise ValueError(f"{photo}: expected the file of a photograph, and there is none. {remedy}")
        names, device = [check_model_name(name) for name in model or [_DEFAULT]], options.choose_device(device)
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.images import UnreadableImage, decode_image
        from modeling_vitreg.look import draw_looks
        from modeling_vitreg.look import look as look_at

        try:
            image = decode_image({"path": str(photo), "bytes": None, "name": str(photo)})
        except UnreadableImage as error:
            raise ValueError(str(error)) from error
        looks = []
        for name in names:
            encoder = load_encoder(name, device=device, trust_remote_code=trust_remote_code, parts=parts)
            looks.append(look_at(encoder, image))
            typer.echo(looks[-1].sentence)
        draw_looks(looks, output)
    typer.echo(f"wrote {output}")

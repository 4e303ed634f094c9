"""Messages about images that are left out."""

from __future__ import annotations

import typer

from modeling_vitreg.omissions import list_left_out


def tell_left_out(images: object) -> None:
    """Print what an opened source does not read, before work starts."""
    from modeling_vitreg.images.messages import show_name

    for note in images.left_out:
        typer.echo(f"note: {show_name(note)}", err=True)


def tell_unreadable(images: dict, *, part: str = "") -> None:
    """Print how many images were left out, and the first of them with the reason.

    Args:
        images: part of a report with `num_images` and, where some were left out, `num_unreadable`, `unreadable` and
            `num_nonfinite`.
        part: part of the data, such as "train".
    """
    for line in list_left_out(images, name=f"{part} images" if part else "images"):
        typer.echo(line, err=True)

"""Messages about images that were left out."""

from __future__ import annotations

import typer


def tell_unreadable(images: dict, *, part: str = "") -> None:
    """Print how many images were left out, and the first of them with the reason.

    Args:
        images: part of a report with `num_images` and, where some were left out, `num_unreadable`, `unreadable` and
            `num_nonfinite`.
        part: part of the data, such as "train".
    """
    name = f"{part} images" if part else "images"
    lost, broken = images.get("num_unreadable") or 0, images.get("num_nonfinite") or 0
    total = images.get("num_images", 0) + lost + broken
    if lost:
        typer.echo(f"{lost} of {total} {name} could not be read and were left out:", err=True)
        for line in images.get("unreadable") or ():
            typer.echo(f"  {line}", err=True)
    if broken:
        typer.echo(f"{broken} of {total} {name} gave features that are not finite and were left out", err=True)
        for line in images.get("nonfinite") or ():
            typer.echo(f"  {line}", err=True)


__all__ = ["tell_unreadable"]

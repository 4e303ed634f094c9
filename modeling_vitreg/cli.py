"""`vitreg`: the verbs of the package. Each imports what it needs when it is called."""

from __future__ import annotations

import ast
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Annotated

import typer


app = typer.Typer(
    name="vitreg",
    help="Vision Transformers with registers: convert checkpoints, and know what became of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
Path = pathlib.Path


@app.callback()
def _about() -> None:
    """Keep verbs as verbs while there is only one."""


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[str, typer.Argument(help="File, folder, or timm:NAME; with --to, a folder of this family.")],
    output: Annotated[Path, typer.Argument(help="Folder to make; with --to dinov2, a file ending in .pth.")],
    to: Annotated[str | None, typer.Option(help="Write another layout: dinov2, timm or transformers.")] = None,
    family: Annotated[str | None, typer.Option(help="Layout of the source, if it is taken for another.")] = None,
    part: Annotated[str | None, typer.Option(help="State in a file of several, such as student.")] = None,
    head: Annotated[Path | None, typer.Option(help="Linear head of DINOv2 for this backbone, a file.")] = None,
    code: Annotated[Path | None, typer.Option(help="Clone of the original repository, which runs as proof.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the configuration that no tensor shows.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest error, in units of the largest value.")] = 1e-5,
    unverified: Annotated[bool, typer.Option("--unverified", help="Skip the proof, and record that.")] = False,
) -> None:
    """Convert an official checkpoint, and prove it: every tensor accounted for, every token compared.

    Known: facebookresearch/dinov2 (backbones, training checkpoints, linear heads), dino, deit (DeiT-III too), mae,
    dinov3, capi; OpenCLIP and OpenAI's CLIP; timm; transformers (ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT,
    CLIPVision, ViTMAE, IJepa). Which one it is, and its sizes, are read from the file.

    * vitreg convert dinov2_vits14_reg4_pretrain.pth dinov2-small-registers

    * vitreg convert dinov2_vits14_pretrain.pth classifier --head dinov2_vits14_linear_head.pth

    * vitreg convert timm:vit_small_patch16_dinov3 dinov3-small

    * vitreg convert outputs/demo-cpu/model demo.pth --to dinov2

    The folder has config.json, model.safetensors, preprocessor_config.json, the code of the family, and
    conversion.json with the proof. Nothing is written if the ledger does not balance or the numbers differ.
    """
    from modeling_vitreg.conversion import ConversionError, ConversionSettings
    from modeling_vitreg.conversion import convert as run_convert
    from modeling_vitreg.conversion import export as run_export

    with _plain_errors(ConversionError):
        known = ConversionSettings(
            family=family,
            container=part,
            head=head,
            stated=_stated(settings or []),
            code=code,
            tolerance=tolerance,
            skips_proof=unverified,
        )
        if to is None:
            report = run_convert(source, output, settings=known)
        else:
            report = run_export(source, output, to=to, settings=known)
    typer.echo(report.ledger["coverage"])
    for reason in sorted(set(report.ledger["dropped"].values())):
        count = sum(why == reason for why in report.ledger["dropped"].values())
        typer.echo(f"  dropped {count}: {reason}")
    typer.echo(_describe_proof(report.proof))
    typer.echo(f"wrote {output}")
    if to is None:
        typer.echo(f'next: AutoModel.from_pretrained("{output}", trust_remote_code=True)')


def _describe_proof(proof: dict) -> str:
    if not proof["is_verified"]:
        return f"UNVERIFIED: {proof['why']}"
    sizes = ", ".join("x".join(map(str, size)) for size in proof["sizes"])
    notes = "".join(f"\n  {note}" for note in proof["notes"])
    return (
        f"verified against {proof['reference']}: largest error of any token {proof['largest_relative_error']:.1e} "
        f"(limit {proof['tolerance']:g}) at {sizes}{notes}"
    )


def _stated(settings: list[str]) -> dict:
    """Values as Python reads them, words as they are."""
    stated = {}
    for setting in settings:
        name, is_there, value = setting.partition("=")
        if not is_there:
            raise typer.BadParameter(f"expected FIELD=VALUE, got {setting!r}", param_hint="--set")
        try:
            stated[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            stated[name] = value
    return stated


@contextlib.contextmanager
def _plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """An error of the caller's is its message, without the path through the code."""
    try:
        yield
    except kinds as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


__all__ = ["app"]

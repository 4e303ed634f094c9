"""`vitreg convert`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from modeling_vitreg.names import check_source_name

from . import options
from .errors import plain_errors
from .options import COMPUTE, DATA, MODEL, OUTPUT, option


_KEY = "Key of the state dict to load when the file holds several (student, teacher)."
_MERGE = "Patches that each layer joins to similar ones (ToMe); no training is needed."
_CODE = "Clone of the original repository, used to verify the outputs."


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint file or folder, or timm:NAME. With --to, the folder of a converted or trained model."
        ),
    ],
    output: Annotated[
        pathlib.Path, typer.Argument(help="Folder to write. With --to dinov2, mamba-reg or hat-net, a .pth file.")
    ],
    family: Annotated[str | None, option(DATA, "Source format, if auto-detection is wrong.")] = None,
    checkpoint_key: Annotated[str | None, option(DATA, _KEY)] = None,
    head: Annotated[pathlib.Path | None, option(MODEL, "File of DINOv2's linear head for this backbone.")] = None,
    settings: Annotated[
        list[str] | None,
        option(MODEL, "Set a field of the configuration (repeatable).", "--set", metavar="FIELD=VALUE"),
    ] = None,
    merge: Annotated[int | None, option(MODEL, _MERGE, min=1)] = None,
    code: Annotated[pathlib.Path | None, option(COMPUTE, _CODE)] = None,
    tolerance: Annotated[float, option(COMPUTE, "Maximum relative error of a token.", min=0.0, max=1.0)] = 1e-5,
    no_verify: Annotated[bool, option(COMPUTE, "Do not compare with the original model.", "--no-verify")] = False,
    to: Annotated[
        str | None, option(OUTPUT, "Export to another format: dinov2, timm, transformers, mamba-reg or hat-net.")
    ] = None,
) -> None:
    """Convert a checkpoint to this model family, or back, and verify that both models give the same tokens.

    * `vitreg convert dinov2_vits14_reg4_pretrain.pth dinov2-small-registers`

    * `vitreg convert timm:vit_small_patch16_dinov3 dinov3-small`

    * `vitreg convert deit_small.pth deit-small-merged --merge 13`

    * `vitreg convert outputs/demo-cpu/model demo-timm --to timm`

    The format and the sizes are read from the file: official checkpoints of dinov2, dino, deit, mae, dinov3, capi,
    Mamba-Reg, HAT-Net, OpenCLIP and CLIP, and ViTs of timm and transformers; convert/README.md lists all of them.
    Nothing is written if a tensor has no rule or the outputs differ.
    """
    with plain_errors():
        check_source_name(source)
        options.check_output(output, is_file=to in ("dinov2", "mamba-reg", "hat-net"))
        from modeling_vitreg.cards import record_expected_outputs
        from modeling_vitreg.conversion import ConversionSettings
        from modeling_vitreg.conversion import convert as run_convert
        from modeling_vitreg.conversion import export as run_export
        from modeling_vitreg.settings import read_assignments

        overrides = read_assignments(settings or ())
        if merge is not None:
            overrides["token_reduction"] = {"kind": "merge", "per_layer": merge}
        known = ConversionSettings(
            family=family,
            checkpoint_key=checkpoint_key,
            head=head,
            config_overrides=overrides,
            code=code,
            tolerance=tolerance,
            skip_verification=no_verify,
        )
        if to is None:
            report = run_convert(source, output, settings=known)
            record_expected_outputs(output)
        else:
            report = run_export(source, output, to=to, settings=known)
    dropped = list(report.ledger["dropped"].values())
    for note in report.source.get("notes") or ():
        typer.echo(f"note: {note}")
    typer.echo(report.ledger["coverage"])
    for reason in sorted(set(dropped)):
        typer.echo(f"  dropped {dropped.count(reason)}: {reason}")
    typer.echo(_describe_verification(report.verification))
    typer.echo(f"wrote {output}")
    if to is None:
        typer.echo(f'next: AutoModel.from_pretrained("{output}", trust_remote_code=True)')


def _describe_verification(found: dict) -> str:
    if not found["is_verified"]:
        return f"NOT VERIFIED: {found['why']}"
    sizes = ", ".join("x".join(map(str, size)) for size in found["sizes"])
    notes = "".join(f"\n  {note}" for note in found["notes"])
    return (
        f"verified against {found['reference']}: largest error of any token {found['largest_relative_error']:.1e} "
        f"(limit {found['tolerance']:g}) at {sizes}{notes}"
    )

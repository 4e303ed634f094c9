"""`vitreg doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import plain_errors


def doctor(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder of a model, or name of a model in the cache of the Hub.")
    ] = None,
) -> None:
    """Check the installation, and a model, for common problems.

    * `vitreg doctor`

    * `vitreg doctor outputs/demo-cpu/model`

    * `vitreg doctor facebook/dinov2-small`

    Checks versions, torchvision, accelerators, the cache of the Hub and the token. For a model, checks its
    files, code, tensors and registers. Exits with 1 if there is a problem.
    """
    with plain_errors():
        from modeling_vitreg.doctor import diagnose, render_findings

        findings = diagnose(checkpoint)
    typer.echo(render_findings(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)

"""`vitreg card`."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from modeling_vitreg.names import check_source_name

from . import options
from .errors import plain_errors
from .options import OUTPUT, option


def card(
    folder: options.Run,
    name: options.RepoId,
    reports: options.Reports = None,
    license: options.License = None,
    license_name: options.LicenseName = None,
    license_link: options.LicenseLink = None,
    accept_license: options.AcceptLicense = None,
    output: Annotated[pathlib.Path | None, option(OUTPUT, "File to write. Default: the terminal.")] = None,
) -> None:
    """Show the model card that `vitreg publish` would upload.

    * `vitreg card outputs/demo-cpu me/demo`

    * `vitreg card outputs/demo-cpu me/demo --reports artifacts --reports evaluation`

    * `vitreg card dinov3-small me/dinov3-small --accept-license dinov3-license --output README.md`

    Every number comes from a report: conversion.json, artifacts.json, evaluation.json and training.json, in the folder
    of the model or in those of --reports.
    """
    with plain_errors():
        check_source_name(folder)
        if output is not None:
            options.check_output(output, is_file=True)
        from modeling_vitreg.cards import make_plan
        from modeling_vitreg.files import write_text

        plan = make_plan(
            folder,
            name,
            reports=reports or (),
            licence=license,
            licence_name=license_name,
            licence_link=license_link,
            accepts_licence=accept_license,
        )
        if output is None:
            typer.echo(plan.card)
            return
        write_text(output, plan.card)
    typer.echo(f"wrote {output}")

"""`vitreg publish`."""

from __future__ import annotations

from typing import Annotated

import typer

from modeling_vitreg.names import check_source_name

from . import options
from .errors import plain_errors
from .options import OUTPUT, option


def publish(
    folder: options.Run,
    name: options.RepoId,
    reports: options.Reports = None,
    license: options.License = None,
    license_name: options.LicenseName = None,
    license_link: options.LicenseLink = None,
    accept_license: options.AcceptLicense = None,
    revision: Annotated[str | None, option(OUTPUT, "Branch to write to. Default: main.")] = None,
    public: Annotated[
        bool, option(OUTPUT, "Make the repository public. Default: a new repository is private.", "--public")
    ] = False,
    dry_run: Annotated[bool, option(OUTPUT, "Check and show everything, upload nothing.", "--dry-run")] = False,
) -> None:
    """Publish a model on the Hub with a card made from its reports, after checking that it loads anywhere.

    * `vitreg publish outputs/demo-cpu me/demo --license apache-2.0 --dry-run`

    * `vitreg publish outputs/demo-cpu me/demo --reports artifacts --reports evaluation --license apache-2.0`

    * `vitreg publish dinov3-small me/dinov3-small --accept-license dinov3-license --public`

    The folder is loaded in a process without this package and without your tokens, and its outputs are compared with
    the recorded ones. All files appear in one commit. Run the command again after a failure: files that have arrived
    are not sent again. The environment variable HF_ENDPOINT selects another Hub.
    """
    with plain_errors():
        check_source_name(folder)
        from modeling_vitreg.cards import publish as run_publish

        done = run_publish(
            folder,
            name,
            reports=reports or (),
            revision=revision,
            is_public=public,
            licence=license,
            licence_name=license_name,
            licence_link=license_link,
            accepts_licence=accept_license,
            dry_run=dry_run,
            say=typer.echo,
        )
        if dry_run:
            typer.echo(done.plan.describe())
            typer.echo(done.plan.card)
            return
    typer.echo(f'next: AutoModel.from_pretrained("{name}", trust_remote_code=True, revision="{done.commit}")')

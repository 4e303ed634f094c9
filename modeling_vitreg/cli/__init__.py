"""`vitreg`: one file for each verb. A verb imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import typer

from .analyze import analyze
from .card import card
from .compare import compare
from .convert import convert
from .discover import discover
from .doctor import doctor
from .embed import embed
from .evaluate import evaluate
from .look import look
from .publish import publish
from .renamed import RenamingGroup
from .retrofit import retrofit


app = typer.Typer(
    cls=RenamingGroup,
    name="vitreg",
    help="Vision Transformers with registers: look, convert, repair, analyze, evaluate and publish models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
for _verb in (look, convert, retrofit, analyze, discover, evaluate, compare, embed, card, publish):
    app.command(no_args_is_help=True)(_verb)
app.command()(doctor)

__all__ = ["app"]

"""Old spellings of options: they are rewritten before the arguments are parsed, with one line on stderr."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup


_DISCOVERY = {
    "--method": "--set discovery.method={}",
    "--feature": "--set discovery.feature={}",
    "--longest-side": "--set discovery.longest_side={}",
    "--boxes": "--annotations {}",
    "--report": "--output {}",
}
_LICENSE = {"--report": "--reports {}", "--licence": "--license {}", "--accept-licence": "--accept-license {}"}
# For each verb: old options and their replacements; {} is the value. Options of two values, "A,B", are merged.
RENAMED = {
    "convert": {"--part": "--checkpoint-key {}", "--unverified": "--no-verify"},
    "analyze": {"--report": "--output {}", "--image-size": "--set encoding.image_size={}"},
    "discover": {**_DISCOVERY, "--layer": "--set discovery.layer={}"},
    "evaluate": {
        **_DISCOVERY,
        "--num-train": "--num-images {},",
        "--num-test": "--num-images ,{}",
        "--test-split": "--split ,{}",
        "--image-size": "--set encoding.image_size={}",
        "--image-column": "--columns image={}",
        "--label-column": "--columns label={}",
        "--mask-column": "--columns mask={}",
        "--depth-column": "--columns depth={}",
        "--box-column": "--columns box={}",
        "--reduce-labels": "--set data.reduce_labels=true",
        "--depth-scale": "--set data.depth_scale={}",
        "--max-depth": "--set data.max_depth={}",
        "--box-layout": "--set data.box_format={}",
    },
    "card": _LICENSE,
    "publish": _LICENSE,
}
_VALUES = {"--box-layout": {"corners": "xyxy"}}
_HOME = re.compile(r"^(--[\w-]+=)?(~.*)", re.DOTALL)
_PAIRS = ("--num-images", "--split")


class RenamingGroup(TyperGroup):
    """The group of verbs, which accepts the old spellings of their options too."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Rewrite the arguments, then parse them."""
        arguments = list(sys.argv[1:] if args is None else args)
        rewritten, notes = rewrite(arguments[1:], RENAMED.get(arguments[0], {})) if arguments else ([], [])
        if notes:
            typer.echo(f"renamed: {', '.join(notes)}", err=True)
        return super().main([*arguments[:1], *rewritten], *others, **options)


def rewrite(arguments: list[str], renamed: dict[str, str]) -> tuple[list[str], list[str]]:
    """Arguments in today's spelling, and for each old option "OLD is now NEW"; shells leave "~" in --name=~/folder.

    Args:
        arguments: of a verb or a program.
        renamed: a table such as those of `RENAMED`.
    """
    table = dict(renamed)
    arguments = [_HOME.sub(lambda found: (found[1] or "") + os.path.expanduser(found[2]), each) for each in arguments]
    names = {argument.partition("=")[0] for argument in arguments}
    if any(name in names and table[name].startswith(_PAIRS) for name in table):
        table |= {name: f"{name} {{}}" for name in _PAIRS}  # to merge with what the old options say
    rewritten, notes, pairs, rest = [], [], {}, iter(arguments)
    for argument in rest:
        name, separator, value = argument.partition("=")
        if argument == "--" or name not in table:
            rewritten += [argument, *rest] if argument == "--" else [argument]
            continue
        if "{}" in table[name] and not separator:
            value = next(rest, "")
        option, _, content = table[name].format(_VALUES.get(name, {}).get(value, value)).partition(" ")
        if name not in _PAIRS:
            notes.append(f"{name} is now {table[name].format('VALUE')}")
        if option in _PAIRS:
            parts = [*content.split(","), ""]
            pairs[option] = [new or old for new, old in zip(parts, pairs.get(option, ["", ""]))]
        else:
            rewritten += [option, content] if content else [option]
    merged = [word for name, pair in pairs.items() for word in (name, ",".join(pair).rstrip(","))]
    return [*merged, *rewritten], notes

"""The licence under which weights are published: that of their parent model, or else the choice of their author."""

from __future__ import annotations

import difflib
import functools
import pathlib
import re
from dataclasses import dataclass

import yaml

from .errors import CardError


TEXT_FILE = "LICENSE"  # holds the text of a licence that the Hub does not know


@dataclass(frozen=True)
class Licence:
    """A licence as a card states it.

    Args:
        name: what one types, and what a conversion records.
        metadata: fields of the card.
        conditions: conditions that every publisher or user of the weights must accept; empty where there are none.
        is_gated: whether readers must agree to it before they may download, as they had to at the source.
    """

    name: str
    metadata: dict[str, str]
    conditions: str = ""
    is_gated: bool = False


def decide_licence(
    inherited: str | None,
    *,
    parent: str | None = None,
    stated: str | None = None,
    accepted: str | None = None,
    name: str | None = None,
    link: str | None = None,
) -> Licence | None:
    """The licence of a card.

    Args:
        inherited: the recorded licence of the model that the weights were made from, or None.
        parent: name of that model, or None for weights trained from scratch.
        stated: identifier that the author chose, for weights of their own or where none was recorded.
        accepted: name of the conditional licence that the author agrees to.
        name: name of a licence that the Hub does not know, stated as "other"; None: "custom".
        link: to its text, an address or a file of the repository; None: the file LICENSE.

    Returns:
        The licence, or None where the author states none.

    Raises:
        CardError: the Hub does not know the identifier, the licence contradicts the stated one, or it has conditions
            that were not accepted.
    """
    if inherited and stated and stated != inherited:
        raise CardError(
            f"the weights were made from {parent} and inherit its licence, {inherited}: they cannot be published "
            f"under {stated}"
        )
    chosen = inherited or stated
    if (name or link) and chosen != "other":
        raise CardError(f"a name and a link belong to the licence other (--license other), got {chosen}")
    if chosen is None:
        if parent is None:
            return None
        raise CardError(
            f"the weights were made from {parent}, whose licence is unknown to this package. The weights inherit it: "
            "look it up and state it (licence=..., --license)"
        )
    known = _read_licences()
    if chosen in known["conditional"]:
        licence = Licence(chosen, **known["conditional"][chosen])
    else:
        _check_identifier(chosen, known, parent=parent if inherited else None)
        details = {"license_name": name or "custom", "license_link": link or TEXT_FILE} if chosen == "other" else {}
        is_free = chosen in known["free"] or inherited is None
        conditions = "" if is_free else "this package does not know its conditions, so read them"
        licence = Licence(chosen, {"license": chosen, **details}, conditions)
    if licence.conditions and accepted != chosen:
        raise CardError(
            f"the weights are under the licence {chosen}: {licence.conditions}. To publish them, accept the licence "
            f"by its name (accepts_licence={chosen!r}, --accept-license {chosen})"
        )
    return licence


def _check_identifier(identifier: str, licences: dict, *, parent: str | None) -> None:
    known, free = licences["identifiers"], licences["free"]
    if identifier in known:
        return
    words = re.sub(r"\b(licen[cs]e|version|the|v(?=\d))", "", identifier.lower())
    guess = re.sub(r"^(gpl|lgpl|agpl)v?(?=\d)", r"\1-", "-".join(re.findall(r"[a-z0-9.+]+", words)))
    matches = [name for name in known if guess in (name, name.removesuffix(".0"))]
    matches = matches or difflib.get_close_matches(guess, known, n=1)
    hint = f"did you mean {matches[0]!r}?" if matches else f"common ones are {', '.join(free)}."
    source = f", the licence of {parent}" if parent else ""
    raise CardError(
        f"the Hub has no licence with the identifier {identifier!r}{source}: {hint} For a licence that it does not "
        "list, state other, with its name and a link to its text (--license other --license-name NAME --license-link "
        "LINK)"
    )


@functools.cache
def _read_licences() -> dict:
    return yaml.safe_load(pathlib.Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

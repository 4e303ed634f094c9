"""Under which licence weights may be published: that of what they were made from, and else their author's choice."""

from __future__ import annotations

from dataclasses import dataclass

from .folder import CardError


# Identifiers of the Hub that ask for no more than that the licence is named.
_FREE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense", "isc")


@dataclass(frozen=True)
class Licence:
    """A licence as a card states it.

    Args:
        name: what one types, and what a conversion records.
        metadata: fields of the card.
        conditions: what whoever publishes or uses the weights takes upon themselves; empty where free.
        is_gated: whether readers must agree to it before they may download, as they had to at the source.
    """

    name: str
    metadata: dict[str, str]
    conditions: str = ""
    is_gated: bool = False


_CONDITIONAL = {
    "dinov3-license": Licence(
        name="dinov3-license",
        metadata={
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        },
        conditions="what is made from DINOv3 is shared under the same agreement, of which a copy goes with it, and "
        "the uses that the agreement forbids stay forbidden",
        is_gated=True,
    ),
    "cc-by-nc-4.0": Licence(
        name="cc-by-nc-4.0",
        metadata={"license": "cc-by-nc-4.0"},
        conditions="the authors are named, and there is no commercial use",
    ),
}


def decide_licence(
    inherited: str | None, *, parent: str | None = None, stated: str | None = None, accepted: str | None = None
) -> Licence | None:
    """The licence of a card.

    Args:
        inherited: that on record for what the weights were made from, or None.
        parent: what they were made from, or None for weights trained from scratch.
        stated: by the author, for weights of their own or where no record has it.
        accepted: name of the conditional licence that the author agrees to.

    Returns:
        The licence, or None where the author states none.

    Raises:
        CardError: the licence is not known, contradicts what was stated, or has conditions that nobody accepted.
    """
    if inherited and stated and stated != inherited:
        raise CardError(
            f"the weights were made from {parent}, under the licence {inherited}, which they inherit: they cannot be "
            f"published under {stated}"
        )
    name = inherited or stated
    if name is None:
        if parent is None:
            return None
        raise CardError(
            f"the weights were made from {parent}, whose licence is not on record: look it up, and state it "
            "(licence=..., --licence), for the weights inherit it"
        )
    licence = _CONDITIONAL.get(name) or Licence(name, {"license": name}, _unknown_conditions(name, inherited))
    if licence.conditions and accepted != name:
        raise CardError(
            f"the weights are under the licence {name}: {licence.conditions}. To publish them under it, accept it by "
            f"its name (accepts_licence={name!r}, --accept-licence {name})"
        )
    return licence


def _unknown_conditions(name: str, inherited: str | None) -> str:
    return "" if name in _FREE or inherited is None else "its conditions are not known here, so read them"


__all__ = ["Licence", "decide_licence"]

"""Whether an error comes from the network, whichever library was in between."""

from __future__ import annotations

from collections.abc import Iterator


# Of the network libraries of all versions of the Hub's client: requests, httpx and httpx2.
_NAMES = {"TransportError", "ConnectionError", "Timeout", "TimeoutException"}


def is_of_network(error: BaseException) -> bool:
    """Whether a connection broke or was never made, anywhere among the causes of an error."""
    return any(base.__name__ in _NAMES for one in causes_of(error) for base in type(one).__mro__)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


__all__ = ["causes_of", "is_of_network"]

"""Whether the Hub can be reached, and whether an error comes from the network, whichever library raised it."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


# Of the network libraries of all versions of the Hub's client: requests, httpx and httpx2.
_NAMES = {"TransportError", "ConnectionError", "Timeout", "TimeoutException"}


def is_hub_known() -> bool:
    """Whether the address of the Hub can be looked up; without it, its clients retry for 20 seconds."""
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # nothing is asked, or another machine asks
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or address.scheme)
    except OSError:
        return False
    return True


def is_of_network(error: BaseException) -> bool:
    """Whether a connection broke or was never made, anywhere among the causes of an error."""
    return any(base.__name__ in _NAMES for one in causes_of(error) for base in type(one).__mro__)


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

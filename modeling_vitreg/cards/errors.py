"""Errors of cards and of uploads, with what to do about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from modeling_vitreg.network import causes_of, is_of_network


_AGAIN = (
    "No partial model is visible, because all files appear in one commit. Run the same command again: files that have "
    "arrived are not sent again"
)


class CardError(ValueError):
    """A folder or a report that a card cannot be made from; the message says what to do."""


class PublishError(RuntimeError):
    """The Hub cannot be reached, or refused; the message says what to do."""


@contextlib.contextmanager
def in_words(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into a `PublishError`.

    Args:
        repo_id: repository to write to.

    Raises:
        PublishError: instead of any error of the network, the token or the Hub.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise PublishError(
            f"there is no token: create a token with write access at {constants.ENDPOINT}/settings/tokens, then "
            f"type `hf auth login`, or set HF_TOKEN"
        ) from None
    except OfflineModeIsEnabled:
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it") from None
    except HfHubHTTPError as error:
        raise PublishError(_describe_refusal(error, repo_id)) from error
    except PublishError:
        raise
    except Exception as error:
        refusal = next((one for one in causes_of(error) if isinstance(one, HfHubHTTPError)), None)
        if refusal is not None:
            raise PublishError(_describe_refusal(refusal, repo_id, words=str(error))) from error
        if is_of_network(error):
            raise PublishError(f"the connection to {constants.ENDPOINT} broke ({_last(error)}). {_AGAIN}") from error
        raise


def _describe_refusal(error: HfHubHTTPError, repo_id: str, *, words: str = "") -> str:
    """A refusal in words; in those of the client, which may repeat the answer of the Hub, for other states."""
    status = error.response.status_code
    if status == 401:
        return (
            "the Hub refused the token: it is wrong, revoked or expired. Create a token with write access at "
            f"{constants.ENDPOINT}/settings/tokens, then type `hf auth login`, or set HF_TOKEN"
        )
    if status in (403, 404):
        return (
            f"the token may not write to {repo_id}: the repository belongs to another user, or the token is "
            "read-only. Choose another name, or a token with write access"
        )
    said = " ".join((words or str(error)).split())
    return f"the Hub answered {status} ({said}). {_AGAIN}"


def _last(error: BaseException) -> str:
    """The words of the first cause."""
    *_, first = causes_of(error)
    words = str(first).strip().splitlines()
    return words[0] if words else type(first).__name__

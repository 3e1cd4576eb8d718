"""What goes wrong with the Hub, in our words: what to do about it, and whether trying again can help."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note

FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 16.0
_MAX_ASKED_WAIT_S = 300.0
TRIES = 7  # without a new byte: about half a minute of waiting, and the time that each of them took
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_Result = TypeVar("_Result")


class HubError(YarnEdgeError):
    """The Hub refused, or sent something wrong."""


class HubUnreachableError(HubError):
    """No connection, or none any more, after all retries."""


def retried(
    subject: str, action: Callable[[], _Result], progressed: Callable[[], int] = lambda: 0, tries_at_most: int = TRIES
) -> _Result:
    """`action`, repeated while it fails in ways that pass. subject: what is asked for, as users call it.

    progressed: a number that grows with every byte received; tries are counted anew when it has grown. tries_at_most: how many in a
    row. Raises HubError for what does not pass, HubUnreachableError when the tries are used up.
    """
    from huggingface_hub.errors import HTTPError

    tries, before = 0, progressed()
    while True:
        try:
            return action()
        except HTTPError as error:
            now = progressed()
            tries = 1 if now > before else tries + 1
            before = now
            wait = _wait_s(subject, error, tries, tries_at_most)
            if tries == 1:
                note(f"note: {subject}: {_reason(error)}; trying again")
        time.sleep(wait)


def _wait_s(subject: str, error: Exception, tries: int, most: int) -> float:
    """Seconds until the next try. Raises HubError if there is to be none."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is not None and status not in _AGAIN:
        raise _refusal(subject, error, status) from error
    asked = _asked_wait_s(response.headers) if response is not None else None
    if asked is not None and asked > _MAX_ASKED_WAIT_S:
        raise HubError(f"{subject}: the Hub asks to wait {asked:.0f} s (status {status}): try again then") from error
    if tries >= most:
        what = _reason(error)
        raise HubUnreachableError(f"{subject}: gave up after {tries} tries: {what}") from error
    return asked if asked is not None else float(min(FIRST_WAIT_S * 2 ** (tries - 1), _MAX_WAIT_S))


def _asked_wait_s(headers: Any) -> float | None:
    """What Retry-After, or the Hub's own header for its limits ("api";r=0;t=55), says."""
    after = headers.get("retry-after", "")
    if after.isdigit():
        return float(after)
    reset = headers.get("ratelimit", "").partition("t=")[2]
    return float(reset) if reset.isdigit() else None


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 429:
        return "the Hub limits the rate of requests (status 429)"
    if status is not None:
        return f"the Hub answered with status {status}"
    return f"no connection ({one_line(str(error), 120) or type(error).__name__})"


def _refusal(subject: str, error: Exception, status: int) -> HubError:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return HubError(
            f"{subject}: is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{subject}: has no such revision (after the @): give a branch, a tag or a commit")
    if isinstance(error, EntryNotFoundError):
        return HubError(f"{subject}: has no such file")
    if status in (401, 404):
        return HubError(
            f"{subject}: does not exist, or is private: check the name, or set HF_TOKEN to a token that may read it"
        )
    if status == 403:
        return HubError(f"{subject}: the token in HF_TOKEN (or that of `hf auth login`) may not do this (status 403)")
    return HubError(f"{subject}: the Hub answered with status {status}: {one_line(str(error), 200)}")

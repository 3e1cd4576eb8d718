"""Bytes of a file on the Hub, by HTTP range: what is cut off goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from yarn_edge import __version__
from yarn_edge.errors import one_line

from .failures import HubError, retried
from .repository import RemoteEntry, Repository

_EXPIRED = (401, 403, 404, 410)


class RangeReader:
    """One file at one commit, from the place where the Hub keeps it. Any thread may read.

    The Hub redirects to a signed address. It is kept for further ranges until it is refused, because it expires.
    """

    def __init__(self, repository: Repository, entry: RemoteEntry) -> None:
        from huggingface_hub import hf_hub_url

        self.label = f"{repository.label}@{repository.commit[:12]}/{one_line(entry.name, 200)}"
        self.size = entry.size
        self._url = hf_hub_url(repository.reference.repo, entry.name, revision=repository.commit)
        self._signed = ""

    def read_into(self, buffer: Any, offset: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """Fill `buffer` from byte `offset` on; it stays unfinished once `stopped`. Raises HubError."""
        view = memoryview(buffer).cast("B")
        done = 0

        def go_on() -> None:
            nonlocal done
            while done < len(view) and not stopped():
                with self._response(offset + done, offset + len(view)) as response:
                    if not self._is_range(response, offset + done):
                        continue
                    before = done
                    for chunk in response.iter_raw():
                        part = chunk[: len(view) - done]
                        view[done : done + len(part)] = part
                        done += len(part)
                        if stopped() or done == len(view):
                            break
                    if done == before:
                        raise HubError(f"{self.label}: the server sends nothing from byte {offset + done} on")

        retried(self.label, go_on, lambda: done)

    def _response(self, begin: int, end: int) -> Any:
        """The answer to a request for bytes [begin, end), as a context manager."""
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if not self._signed or urlsplit(self._signed).netloc == urlsplit(self._url).netloc:
            headers |= build_hf_headers(library_name="yarn-edge", library_version=__version__)
        return get_session().stream("GET", self._signed or self._url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT)

    def _is_range(self, response: Any, begin: int) -> bool:
        """Whether an answer holds the bytes from `begin` on; not that of a signed address that has expired, which is then forgotten.

        Raises the client's error for a refusal, and HubError for an answer of another kind.
        """
        from huggingface_hub.utils import hf_raise_for_status

        if self._signed not in ("", self._url) and response.status_code in _EXPIRED:
            self._signed = ""
            return False
        hf_raise_for_status(response)
        self._signed = str(response.url)
        headers = response.headers
        where, plain = headers.get("content-range", ""), headers.get("content-encoding", "identity") == "identity"
        if plain and response.status_code == 200 and begin == 0 and headers.get("content-length") == str(self.size):
            return True
        if (
            plain
            and response.status_code == 206
            and where.startswith(f"bytes {begin}-")
            and where.endswith(f"/{self.size}")
        ):
            return True
        raise HubError(
            f"{self.label}: the server does not send the range that was asked for (from byte {begin} of {self.size}; status "
            f"{response.status_code}, {one_line(where, 60) or 'no Content-Range'})"
        )

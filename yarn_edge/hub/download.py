"""Files of a repository in the shared cache, in the layout that huggingface_hub and other programs use. What is downloaded is hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import bar, note

from .failures import HubError, retried
from .repository import RemoteEntry, Repository

_STEP_BYTES = 1 << 20


def download(repository: Repository, names: Iterable[str]) -> dict[str, Path]:
    """The files `names`, by name, in the shared cache; those that are not there yet are downloaded and hashed.

    Raises HubError if one cannot be had, or if its hash is not the one that the Hub states: then it is removed.
    """
    wanted = [repository.entries[name] for name in names]
    missing = [entry for entry in wanted if repository.cached(entry.name) is None]
    if missing and repository.offline:
        raise HubError(f"{repository.label}: offline, and {missing[0].name} is not in the cache")
    n_bytes = sum(entry.size for entry in missing)
    if n_bytes > 100e6:
        note(f"note: {repository.label}: {n_bytes / 1e9:.2f} GB are downloaded to {repository.snapshot}")
    with bar(repository.label, n_bytes, "bytes") as advance:
        for entry in missing:
            _fetch(repository, entry)
            advance(entry.size, entry.name)
    return {entry.name: repository.snapshot / entry.name for entry in wanted}


def _fetch(repository: Repository, entry: RemoteEntry) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    from yarn_edge import __version__

    disable_progress_bars()
    subject = f"{repository.label}: {one_line(entry.name, 100)}"

    def fetch() -> str:
        try:
            # The commit, not the branch: what was listed is what is downloaded.
            return str(
                hf_hub_download(
                    repository.reference.repo,
                    entry.name,
                    revision=repository.commit,
                    library_name="yarn-edge",
                    library_version=__version__,
                )
            )
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from error
            raise

    try:
        path = Path(retried(subject, fetch))
    except OSError as error:
        raise HubError(f"{subject}: {one_line(str(error), 300)}") from error
    _name_commit(repository)
    if not is_intact(path, entry):
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{subject}: what was downloaded has another hash than the Hub states, and was removed: try again"
        )


def _name_commit(repository: Repository) -> None:
    """Note in the cache which commit the branch or tag stands for, as the client does when it is asked for a branch."""
    ref = repository.snapshot.parent.parent / "refs" / repository.reference.revision
    if repository.reference.revision == repository.commit or (ref.is_file() and ref.read_text() == repository.commit):
        return
    from yarn_edge.writer import write_file

    ref.parent.mkdir(parents=True, exist_ok=True)
    write_file(ref, repository.commit, force=True)


def is_intact(path: Path, entry: RemoteEntry) -> bool:
    """Whether a file has the size and the hash that the Hub states for it."""
    size = path.stat().st_size
    hashed = hashlib.sha256()
    if not entry.sha256:
        hashed = hashlib.sha1(usedforsecurity=False)
        hashed.update(b"blob %d\0" % size)
    with path.open("rb") as file:
        while part := file.read(_STEP_BYTES):
            hashed.update(part)
    return size == entry.size and hashed.hexdigest() == (entry.sha256 or entry.git_sha1)


def require_entries(repository: Repository, names: Iterable[str], what: str) -> list[str]:
    """`names` as a list. Raises YarnEdgeError, with what the repository has instead, if there are none."""
    found = list(names)
    if not found:
        others = one_line(", ".join(sorted(repository.entries)), 200)
        raise YarnEdgeError(f"{repository.reference}: has no {what}; it has {others or 'no files'}")
    return found

"""A repository of the Hub at one commit: its files with their sizes and hashes, from the Hub or from the shared cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge import __version__
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note
from yarn_edge.regular_file import read_regular

from .failures import HubError, HubUnreachableError, retried
from .reference import HubReference

_MAX_REF = 1000  # bytes of a file that names a commit
_FIRST_TRIES = 4  # whoever is not connected at all shall not wait for long


@dataclass(frozen=True)
class RemoteEntry:
    """A file. sha256: of a large file, from Git LFS. git_sha1: of any other, as git computes it. Both are "" if it is only cached."""

    name: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository at a commit. entries: by name. offline: they are those of the cache, because the Hub was not asked."""

    reference: HubReference
    commit: str
    entries: Mapping[str, RemoteEntry]
    offline: bool = False

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"hf:{self.reference.repo}"

    def cached(self, name: str) -> Path | None:
        """The file in the shared cache; None if it is not there."""
        path = self.snapshot / name
        return path if path.exists() else None

    @property
    def snapshot(self) -> Path:
        """The folder of this commit in the shared cache, which may not exist yet."""
        return _repo_folder(self.reference) / "snapshots" / self.commit


def client() -> Any:
    """huggingface_hub's client, with the token that the environment or its login gives."""
    from huggingface_hub import HfApi

    return HfApi(library_name="yarn-edge", library_version=__version__)


def list_repository(reference: HubReference) -> Repository:
    """Ask the Hub for a repository's files. Without a connection, the commit that the cache knows, with a note.

    Raises HubError for a repository or revision that is missing or not for this token, or that neither has.
    """
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT, is_offline_mode

    label = str(HubReference(reference.repo, reference.revision))
    if is_offline_mode():
        return _from_cache(reference, "offline (HF_HUB_OFFLINE)")
    try:
        found = retried(
            label,
            lambda: client().model_info(
                reference.repo, revision=reference.revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT
            ),
            tries_at_most=_FIRST_TRIES,
        )
    except HubUnreachableError as error:
        return _from_cache(reference, str(error).removeprefix(f"{label}: "))
    entries = {}
    for sibling in found.siblings or ():
        name = sibling.rfilename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise HubError(f"{label}: lists a file {one_line(repr(name), 100)}, which no folder can hold")
        entries[name] = RemoteEntry(
            name, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else "", sibling.blob_id or ""
        )
    if not isinstance(found.sha, str) or not found.sha.isalnum():
        raise HubError(f"{label}: the Hub names no commit")
    return Repository(reference, found.sha, entries)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _repo_folder(reference: HubReference) -> Path:
    return hub_cache() / f"models--{reference.repo.replace('/', '--')}"


def cached_snapshot(reference: HubReference) -> Path | None:
    """The folder of a revision (a branch, a tag or a commit) in the cache; None if it is not there, or leads out of the cache."""
    folder = _repo_folder(reference)
    ref = folder / "refs" / reference.revision
    commit = read_regular(ref, _MAX_REF).decode("ascii", "replace").strip() if ref.is_file() else reference.revision
    snapshot = folder / "snapshots" / commit
    inside = snapshot.resolve().is_relative_to(folder.resolve())
    return snapshot if inside and snapshot.is_dir() else None


def _from_cache(reference: HubReference, why: str) -> Repository:
    snapshot = cached_snapshot(reference)
    if snapshot is None:
        raise YarnEdgeError(f"{reference}: {why}, and the cache ({hub_cache()}) does not have it")
    commit = snapshot.name
    note(f"note: {reference}: {why}: commit {commit[:12]} is taken from the cache")
    files = (path for path in snapshot.rglob("*") if path.is_file())
    entries = {
        name: RemoteEntry(name, path.stat().st_size)
        for path in files
        for name in [path.relative_to(snapshot).as_posix()]
    }
    return Repository(reference, commit, entries, offline=True)

"""Files put into a repository of the Hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note

from .download import download
from .failures import HubError, retried
from .reference import HubReference
from .repository import Repository, client, list_repository


def existing_repository(reference: HubReference) -> Repository | None:
    """The repository to publish to; None if there is none, or none that this token may see."""
    try:
        found = list_repository(reference)
    except HubError as error:
        if "does not exist, or is private" in str(error):
            return None
        raise
    if found.offline:
        raise YarnEdgeError(f"{reference}: nothing can be published without a connection")
    return found


def readme_of(repository: Repository) -> str:
    """The model card that a repository has, "" without one."""
    if "README.md" not in repository.entries:
        return ""
    return download(repository, ["README.md"])["README.md"].read_text(encoding="utf-8", errors="replace")


def upload(
    reference: HubReference,
    texts: Mapping[str, str],
    files: Sequence[Path],
    sha256: Mapping[str, str],
    *,
    private: bool,
) -> str:
    """Make the repository if need be, and commit `texts` and `files` to it. Returns the commit's address.

    sha256: by file name, what must be uploaded. Raises HubError, and YarnEdgeError for a file with another hash.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api, label = client(), str(reference)
    operations = [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    for path in files:
        operation = CommitOperationAdd(path.name, str(path))  # hashes the file
        if operation.upload_info.sha256.hex() != sha256[path.name]:
            raise YarnEdgeError(f"{path}: was changed while it was measured: nothing was uploaded")
        operations.append(operation)
    names = ", ".join(operation.path_in_repo for operation in operations)
    note(f"note: {label}: uploading {names}")
    message = "GGUFs and what was measured, by yarn-edge publish"

    def commit() -> str:
        done = api.create_commit(reference.repo, operations, commit_message=message, revision=reference.revision)
        return str(done.commit_url)

    try:
        retried(label, lambda: api.create_repo(reference.repo, private=private, exist_ok=True))
        return retried(label, commit)
    except (OSError, RuntimeError) as error:  # what the client's transfers raise
        raise HubError(f"{label}: the upload failed: {one_line(str(error.__cause__ or error), 300)}") from error

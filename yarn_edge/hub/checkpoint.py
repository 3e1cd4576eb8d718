"""A checkpoint on the Hub: its small files in the shared cache, its weights where they are, unless the cache has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from yarn_edge.errors import YarnEdgeError, one_line

from .download import download, require_entries
from .failures import HubError
from .reference import HubReference
from .repository import Repository, list_repository
from .weights import RemoteWeights

# What configs, tokenizers and templates are written in, and the names of a model's own code, which is read for its name alone.
_SMALL = frozenset((".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"))
_MAX_SMALL_BYTES = 200_000_000


@dataclass(frozen=True)
class HubCheckpoint:
    """folder: in the shared cache, with all files but those of `weights`."""

    folder: Path
    weights: RemoteWeights


def small_files(reference: HubReference) -> tuple[Repository, Path]:
    """Bring everything but the weights of a checkpoint to the cache. Returns the repository, and the folder."""
    if reference.file:
        raise YarnEdgeError(
            f"{reference}: a checkpoint is a whole repository: leave :{one_line(reference.file, 60)} out"
        )
    repository = list_repository(reference)
    names = [
        name
        for name, entry in repository.entries.items()
        if "/" not in name and PurePosixPath(name).suffix in _SMALL and entry.size <= _MAX_SMALL_BYTES
    ]
    if not {"config.json", "params.json", "adapter_config.json"} & set(names):
        require_entries(repository, [], "config.json, so it is not a checkpoint")
    download(repository, names)
    return repository, repository.snapshot


def streamed_checkpoint(reference: HubReference) -> HubCheckpoint:
    """A checkpoint to convert: safetensors stay on the Hub; other weights, which can only be read whole, are downloaded."""
    repository, folder = small_files(reference)
    weights = _weight_names(repository)
    if not any(name.endswith(".safetensors") for name in weights):
        download(repository, weights)
        return HubCheckpoint(folder, RemoteWeights(repository, ()))
    weights = [name for name in weights if name.endswith(".safetensors")]
    for name in weights:
        path = repository.cached(name)
        if path is not None and path.stat().st_size != repository.entries[name].size:
            raise HubError(
                f"{path}: has {path.stat().st_size} bytes, on the Hub it has {repository.entries[name].size}: remove it"
            )
    away = [name for name in weights if repository.cached(name) is None]
    if away and repository.offline:
        raise HubError(f"{reference}: offline, and {one_line(away[0], 100)} is not in the cache")
    return HubCheckpoint(folder, RemoteWeights(repository, away))


def whole_checkpoint(reference: HubReference) -> Path:
    """A checkpoint in the cache with all its weights, for programs that read folders: safetensors if there are any."""
    repository, folder = small_files(reference)
    weights = _weight_names(repository)
    safe = [name for name in weights if name.endswith(".safetensors")]
    download(repository, require_entries(repository, safe or weights, "weights"))
    return folder


def _weight_names(repository: Repository) -> list[str]:
    return sorted(
        name
        for name in repository.entries
        if "/" not in name
        and (name.endswith(".safetensors") or (name.startswith("pytorch_model") and name.endswith(".bin")))
    )

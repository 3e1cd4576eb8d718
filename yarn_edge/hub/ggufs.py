"""Which GGUF of a repository is meant: by quantization, as llama.cpp and Ollama name them, or by the file's name."""

from __future__ import annotations

import re
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line

from .download import download, require_entries
from .reference import HubReference
from .repository import Repository, list_repository

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_NOT_MODELS = re.compile(r"(?:^|/)(?:mmproj|imatrix)[^/]*$", re.IGNORECASE)
DEFAULT = "Q4_K_M"  # what llama.cpp's -hf takes, too


def hub_gguf(reference: HubReference) -> Path:
    """The GGUF in the shared cache, downloaded if it is not there; of a split one all shards, and the first is returned."""
    repository = list_repository(reference)
    files = download(repository, chosen(repository))
    return next(iter(files.values()))


def chosen(repository: Repository) -> list[str]:
    """The names of the one model that the reference means, shards in order. Raises YarnEdgeError with the choices otherwise."""
    reference = repository.reference
    models: dict[str, list[str]] = {}
    for name in sorted(repository.entries):
        if name.lower().endswith(".gguf") and not _NOT_MODELS.search(name):
            models.setdefault(_SHARD.sub("", name), []).append(name)
    require_entries(repository, models, "GGUF")
    wanted = reference.file or (DEFAULT if len(models) > 1 else "")
    found = [key for key, names in models.items() if not wanted or wanted in (key, *names)] or [
        key for key in models if names_quant(key, wanted)
    ]
    if len(found) != 1:
        what = (
            f"has no GGUF named {one_line(wanted, 60)}"
            if not found
            else f"has {len(found)} GGUFs named {one_line(wanted, 60)}"
        )
        choices = one_line(", ".join(found or models), 400)
        raise YarnEdgeError(f"{reference}: {what}: put one of these after a colon: {choices}")
    names = models[found[0]]
    shard = _SHARD.search(names[0])
    if shard is not None and len(names) != int(shard[2]):
        raise YarnEdgeError(
            f"{reference}: of {one_line(found[0], 100)}, {len(names)} of {int(shard[2])} shards are there"
        )
    return names


def names_quant(name: str, quant: str) -> bool:
    """Whether a type stands in a file's name, as a word of its own: Q4_K does not stand in model-Q4_K_M.gguf."""
    return (
        re.search(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", name.removesuffix(".gguf"), re.IGNORECASE)
        is not None
    )

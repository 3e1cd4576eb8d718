"""`hf:` where a command takes a file or a folder: brought to the shared cache before the command runs.

`convert` and `get` read their references themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import small_files, whole_checkpoint
from .ggufs import hub_gguf
from .reference import HubReference, is_reference, parse_reference
from .repository import list_repository


def _is_checkpoint(reference: HubReference) -> bool:
    return not reference.file and "config.json" in list_repository(reference).entries


def _gguf_or_name(reference: HubReference) -> Path:
    """A GGUF, or a checkpoint's name, of which the command reads the headers where they are."""
    return Path(str(reference)) if _is_checkpoint(reference) else hub_gguf(reference)


def _config(reference: HubReference) -> Path:
    return small_files(reference)[1]


def _either(reference: HubReference) -> Path:
    """A checkpoint's small files, or a GGUF if the reference names one or the repository has no checkpoint."""
    return _config(reference) if _is_checkpoint(reference) else hub_gguf(reference)


_GGUF = hub_gguf
# command -> argument -> what brings it
BROUGHT: dict[str, dict[str, Callable[[HubReference], Path]]] = {
    "quantize": {"model": _GGUF},
    "imatrix": {"model": _GGUF},
    "inspect": {"model": _either, "against_base": _config},
    "patch": {"model": _GGUF, "checkpoint": _config},
    "verify": {"model": _GGUF, "against": whole_checkpoint},
    "publish": {"against": whole_checkpoint, "base": _GGUF},
    "export": {"model": _GGUF},
    "passkey": {"model": _GGUF},
    "perplexity": {"model": _GGUF},
    "compare": {"base": _GGUF, "models": _GGUF},
    "sweep": {"model": _GGUF},
    "bench": {"models": _GGUF},
    "fit": {"model": _gguf_or_name},
    "chat": {"model": _GGUF},
    "serve": {"model": _GGUF},
}


def bring(command: str, args: argparse.Namespace) -> None:
    """Replace every reference among a command's arguments by the path in the cache. Raises YarnEdgeError."""
    for name, brings in BROUGHT.get(command, {}).items():
        value = getattr(args, name, None)
        if isinstance(value, list):
            setattr(args, name, [_brought(item, brings) for item in value])
        else:
            setattr(args, name, _brought(value, brings))


def _brought(value: Any, brings: Callable[[HubReference], Path]) -> Any:
    if not isinstance(value, (str, Path)) or not is_reference(value) or Path(value).exists():
        return value
    text, at, how = str(value).rpartition("@")
    if not at or "=" not in how:  # MODEL@kv=q8_0: how to run it
        text, how = str(value), ""
    path = brings(parse_reference(text))
    return path if isinstance(value, Path) else f"{path}{'@' + how if how else ''}"

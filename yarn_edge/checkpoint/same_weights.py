"""Whether training changed the weights that meet positions: those of queries and keys, compared with the base's, bit by bit.

Both folders hold safetensors (a length, a JSON header, the data). Reading stops at the first difference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.checkpoint.config_file import MAX_JSON_BYTES, refuse_pointer
from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import open_regular

_QUERY_OR_KEY = re.compile(
    r"\.(?:q_proj|k_proj|qkv_proj|query_key_value|q_a_proj|q_b_proj|kv_a_proj_with_mqa)\.weight$"
)
_STEP = 1 << 22


@dataclass(frozen=True)
class _Stored:
    path: Path
    kind: tuple[object, object]  # dtype and shape
    start: int
    end: int


@dataclass(frozen=True)
class QueryKeyWeights:
    """compared: the weights that both folders have. changed: the first that differs, None if all are equal."""

    compared: int
    changed: str | None


def compare_query_keys(folder: Path, base: Path) -> QueryKeyWeights | None:
    """The weights of queries and keys in both folders; None if they cannot be compared (no safetensors, other names, types or sizes).

    Raises YarnEdgeError for damaged files.
    """
    ours, theirs = _stored(folder), _stored(base)
    if not ours or ours.keys() != theirs.keys() or any(ours[name].kind != theirs[name].kind for name in ours):
        return None
    changed = (name for name in sorted(ours) if not _equal(ours[name], theirs[name]))
    return QueryKeyWeights(len(ours), next(changed, None))


def _stored(folder: Path) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= _header(path)
    return found


def _header(path: Path) -> dict[str, _Stored]:
    try:
        with open_regular(path) as file:
            start = file.read(64)
            refuse_pointer(path, start)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > MAX_JSON_BYTES:
                raise ValueError
            file.seek(8)
            header = json.loads(file.read(length))
            size = file.seek(0, 2)
        found = {}
        for name, value in header.items():
            if _QUERY_OR_KEY.search(name):
                first, last = value["data_offsets"]
                if not 0 <= first <= last <= size - 8 - length:
                    raise ValueError
                found[name] = _Stored(path, (value["dtype"], value["shape"]), 8 + length + first, 8 + length + last)
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: not a valid safetensors file") from error


def _equal(a: _Stored, b: _Stored) -> bool:
    if a.end - a.start != b.end - b.start:
        return False
    with open_regular(a.path) as mine, open_regular(b.path) as other:
        mine.seek(a.start)
        other.seek(b.start)
        for at in range(0, a.end - a.start, _STEP):
            n = min(_STEP, a.end - a.start - at)
            if mine.read(n) != other.read(n):
                return False
    return True

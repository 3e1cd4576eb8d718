"""A file's own description of its positions: the keys `yarn_edge.rope.*`, which convert and patch write.

It has every field of a RopeScaling, even those that no key of llama.cpp can carry, and the source of each value.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, errors_naming
from yarn_edge.positions.scaling import MAX_DIM, OPTIONAL, RopeScaling

CANONICAL = "yarn_edge.rope."
CANONICAL_VERSION = 1


def is_described(file: GGUFFile) -> bool:
    """Whether the file carries its own description, which leaves nothing open."""
    return CANONICAL + "version" in file.metadata


def _stored_provenance(file: GGUFFile) -> dict[str, str]:
    """The sources of the values when the file was written; {} if they are missing or damaged."""
    stored = file.metadata.get(CANONICAL + "provenance")
    try:
        sources = json.loads(stored) if isinstance(stored, str) and len(stored) < 1 << 16 else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(sources, dict):
        return {}
    return {
        k: one_line(v, 200) for k, v in sources.items() if k in RopeScaling.__dataclass_fields__ and isinstance(v, str)
    }


def canonical(file: GGUFFile) -> RopeScaling | None:
    """The description under `yarn_edge.rope.*`, None if the file has none."""
    meta = file.metadata
    version = meta.get(CANONICAL + "version")
    if version is None:
        return None
    if not isinstance(version, int) or version != CANONICAL_VERSION:
        raise YarnEdgeError(
            f"{file.path}: {CANONICAL}version is {one_line(repr(version), 60)}, this yarn-edge reads {CANONICAL_VERSION}"
        )
    names = [n for n in RopeScaling.__dataclass_fields__ if n != "provenance"]
    missing = [n for n in names if n not in OPTIONAL and CANONICAL + n not in meta]
    if missing:
        raise YarnEdgeError(f"{file.path}: {CANONICAL}{missing[0]} is missing")
    values = {n: meta[CANONICAL + n] for n in names if CANONICAL + n in meta}
    factors = values.get("frequency_factors")
    if isinstance(factors, np.ndarray) and factors.size <= MAX_DIM:
        values["frequency_factors"] = tuple(factors.tolist())
    with errors_naming(file):
        return RopeScaling(**values, provenance={n: CANONICAL + n for n in names} | _stored_provenance(file))


def canonical_keys(scaling: RopeScaling, form: str) -> dict[str, Any]:
    """The keys `yarn_edge.rope.*`: every field, the planner's form, and the provenance as JSON."""
    fields = scaling.as_dict()
    provenance = fields.pop("provenance")
    keys: dict[str, Any] = {CANONICAL + "version": CANONICAL_VERSION, CANONICAL + "form": form}
    keys |= {CANONICAL + name: value for name, value in fields.items()}
    keys[CANONICAL + "provenance"] = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
    return keys

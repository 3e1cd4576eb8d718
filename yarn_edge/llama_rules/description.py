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
SLIDING = CANONICAL + "sliding."  # of layers with a sliding window, if they have positions of their own
FORM = CANONICAL + "form"
CANONICAL_VERSION = 1
FORMS = ("native", "baked", "arguments", "live", "approximate")  # the planner's


def is_described(file: GGUFFile) -> bool:
    """Whether the file carries its own description, which leaves nothing open."""
    return CANONICAL + "version" in file.metadata


def is_live(file: GGUFFile) -> bool:
    """Whether the file's description is put into the live graph, because no keys can carry it."""
    return is_described(file) and file.metadata.get(FORM) == "live"


def _stored_provenance(file: GGUFFile, prefix: str) -> dict[str, str]:
    """The sources of the values when the file was written; {} if they are missing or damaged."""
    stored = file.metadata.get(prefix + "provenance")
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
    if isinstance(version, bool) or not isinstance(version, int) or version != CANONICAL_VERSION:
        raise YarnEdgeError(
            f"{file.path}: {CANONICAL}version is {one_line(repr(version), 60)}, this yarn-edge reads {CANONICAL_VERSION}"
        )
    form = meta.get(FORM)
    if not isinstance(form, str) or form not in FORMS:
        raise YarnEdgeError(f"{file.path}: {FORM} is {one_line(repr(form), 60)}, expected one of {', '.join(FORMS)}")
    return _described(file, CANONICAL)


def canonical_sliding(file: GGUFFile) -> RopeScaling | None:
    """The description of layers with a sliding window, None if they have none of their own."""
    described = is_described(file) and any(key.startswith(SLIDING) for key in file.metadata)
    return _described(file, SLIDING) if described else None


def _described(file: GGUFFile, prefix: str) -> RopeScaling:
    meta = file.metadata
    names = [n for n in RopeScaling.__dataclass_fields__ if n != "provenance"]
    missing = [n for n in names if n not in OPTIONAL and prefix + n not in meta]
    if missing:
        raise YarnEdgeError(f"{file.path}: {prefix}{missing[0]} is missing")
    values = {n: meta[prefix + n] for n in names if prefix + n in meta}
    factors = values.get("frequency_factors")
    if isinstance(factors, np.ndarray) and factors.size <= MAX_DIM:
        values["frequency_factors"] = tuple(factors.tolist())
    with errors_naming(file):
        return RopeScaling(**values, provenance={n: prefix + n for n in names} | _stored_provenance(file, prefix))


def canonical_keys(scaling: RopeScaling, form: str, sliding: RopeScaling | None = None) -> dict[str, Any]:
    """The keys `yarn_edge.rope.*`: every field, the planner's form, and the provenance as JSON.

    sliding: of layers with a sliding window, if they are described by themselves.
    """
    keys: dict[str, Any] = {CANONICAL + "version": CANONICAL_VERSION, FORM: form, **_fields(scaling, CANONICAL)}
    return keys if sliding is None else keys | _fields(sliding, SLIDING)


def _fields(scaling: RopeScaling, prefix: str) -> dict[str, Any]:
    fields = scaling.as_dict()
    provenance = fields.pop("provenance")
    keys = {prefix + name: value for name, value in fields.items()}
    keys[prefix + "provenance"] = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
    return keys

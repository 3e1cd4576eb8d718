"""`convert` proves the tokenizer each time; in tests the same files are proved once a process."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

from yarn_edge.convert.vocab import Vocabulary

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def proved_once(prove: Callable[..., Vocabulary]) -> Callable[..., Vocabulary]:
    """`prove`, which remembers by the tokenizer's files and what was read from them. A refusal is not remembered."""
    proofs: dict[bytes, Vocabulary] = {}

    def proved(vocabulary: Vocabulary, checkpoint: Path, *reference: object) -> Vocabulary:
        key = hashlib.sha256(pickle.dumps((vocabulary, reference[2:])))
        for path in (checkpoint / name for name in _FILES):
            key.update(path.read_bytes() if path.exists() else b"none")
        if key.digest() not in proofs:
            proofs[key.digest()] = prove(vocabulary, checkpoint, *reference)
        return proofs[key.digest()]

    return proved

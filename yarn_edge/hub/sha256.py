"""SHA-256 that can be interrupted: its state can be saved and taken up again by another process.

hashlib cannot do that. OpenSSL's own functions can: their context is a plain structure, 112 bytes. Python's hashlib is linked
with them in most builds; where it is not, or where they fail a first comparison, `state` is None and a hash begins anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from typing import Any

_CONTEXT_BYTES = 112  # sha.h: SHA256_CTX


class Sha256:
    """A hash in the making. state: what `state` returned earlier."""

    def __init__(self, state: bytes | None = None) -> None:
        self._library = _openssl()
        self._plain = None if self._library else hashlib.sha256()
        self._context = ctypes.create_string_buffer(_CONTEXT_BYTES)
        if state is not None and (self._library is None or len(state) != _CONTEXT_BYTES):
            raise ValueError("this Python cannot take up a hash")
        if state is not None:
            self._context.raw = state
        elif self._library is not None:
            self._library.SHA256_Init(self._context)

    def update(self, data: Any) -> None:
        """Add bytes."""
        if self._plain is not None:
            self._plain.update(data)
            return
        view = memoryview(data).cast("B")
        held = (ctypes.c_char * len(view)).from_buffer(view) if not view.readonly else bytes(view)
        assert self._library is not None
        self._library.SHA256_Update(self._context, held, ctypes.c_size_t(len(view)))

    @property
    def state(self) -> bytes | None:
        """What a later `Sha256(state)` needs; None where that is impossible."""
        return None if self._library is None else self._context.raw

    def hexdigest(self) -> str:
        """The hash of what was added. The hash can go on."""
        if self._plain is not None:
            return self._plain.hexdigest()
        copy = ctypes.create_string_buffer(self._context.raw, _CONTEXT_BYTES)
        digest = ctypes.create_string_buffer(32)
        assert self._library is not None
        self._library.SHA256_Final(digest, copy)
        return digest.raw.hex()


@functools.cache
def _openssl() -> Any:
    """The library that hashlib is linked with, if its functions can be called and agree with hashlib; else None."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        for name in ("SHA256_Init", "SHA256_Update", "SHA256_Final"):
            getattr(library, name)
    except (ImportError, AttributeError, OSError):
        return None
    text = b"The quick brown fox jumps over the lazy dog" * 5
    context, digest = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
    library.SHA256_Init(context)
    library.SHA256_Update(context, text[:70], ctypes.c_size_t(70))
    moved = ctypes.create_string_buffer(context.raw[:_CONTEXT_BYTES], _CONTEXT_BYTES)
    library.SHA256_Update(moved, text[70:], ctypes.c_size_t(len(text) - 70))
    library.SHA256_Final(digest, moved)
    return library if digest.raw == hashlib.sha256(text).digest() else None

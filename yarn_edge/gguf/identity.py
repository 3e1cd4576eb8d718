"""Which model a file holds: one fingerprint of its headers and of samples of its weights, whatever the file is called."""

from __future__ import annotations

import hashlib

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.regular_file import open_regular

_SAMPLE_BYTES = 4096  # of each end of a tensor


def model_identity(file: GGUFFile) -> str:
    """SHA-256 of the headers of all shards and of both ends of every tensor; the same for a copy under another name."""
    digest = hashlib.sha256()
    for shard in file.shards or (file.path,):
        tensors = sorted((t for t in file.tensors.values() if t.path == shard), key=lambda t: t.offset)
        with open_regular(shard) as data:
            digest.update(data.read(tensors[0].offset if tensors else shard.stat().st_size))
            for tensor in tensors:
                n_bytes = min(_SAMPLE_BYTES, tensor.n_bytes)
                for at in (tensor.offset, tensor.offset + tensor.n_bytes - n_bytes):
                    data.seek(at)
                    digest.update(data.read(n_bytes))
    return digest.hexdigest()

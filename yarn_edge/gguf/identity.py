"""Which model a file holds: fingerprints of its header and of samples of its weights, whatever the file is called."""

from __future__ import annotations

import hashlib
import os

from yarn_edge.gguf.file import GGUFFile

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # of all weights, for `weights_identity`
_TENSOR_SAMPLE_BYTES = 4096  # of each end of a tensor, for `model_identity`


def model_identity(file: GGUFFile) -> str:
    """SHA-256 of the headers and the beginning and end of every tensor; wherever the file lies and whatever its name."""
    found = hashlib.sha256()
    for shard in file.shards or (file.path,):
        tensors = sorted((t for t in file.tensors.values() if t.path == shard), key=lambda t: t.offset)
        with shard.open("rb") as data:
            found.update(data.read(tensors[0].offset if tensors else shard.stat().st_size))
            for tensor in tensors:
                sample = min(_TENSOR_SAMPLE_BYTES, tensor.n_bytes)
                for at in (tensor.offset, tensor.offset + tensor.n_bytes - sample):
                    data.seek(at)
                    found.update(data.read(sample))
    return found.hexdigest()


def weights_identity(file: GGUFFile) -> str:
    """Of every shard its size, its header and samples of its weights, as one word; the same for a copy of the file."""
    found = hashlib.blake2b(digest_size=16)
    for shard in file.shards:
        header = min((tensor.offset for tensor in file.tensors.values() if tensor.path == shard), default=0)
        with shard.open("rb") as data:
            size = data.seek(0, os.SEEK_END)
            found.update(size.to_bytes(8, "little"))
            data.seek(0)
            found.update(data.read(header))
            for number in range(_SAMPLES):
                data.seek(header + number * max(0, size - header - _SAMPLE_BYTES) // (_SAMPLES - 1))
                found.update(data.read(_SAMPLE_BYTES))
    return found.hexdigest()

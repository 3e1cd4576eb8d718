"""Upper bounds of speed: the bytes that must be read for one token, and the bandwidth of the memory.

A generated token needs every weight that takes part, and the whole cache, once: no program is faster than bandwidth / bytes.
Reading a prompt is bound by arithmetic instead, so it has no ceiling here.
"""

from __future__ import annotations

import re

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.runtime.kv_cache import kv_bytes

from .bandwidth import last_level_cache_bytes, read_bandwidth

# Tables of which a token reads only its own row.
_BY_ROW = frozenset({"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"})
_EXPERTS = re.compile(r"_(ch)?exps\.")
_LAYER = re.compile(r"blk\.(\d+)\.")


def bytes_per_token(file: GGUFFile, depth: int, kv_type: str) -> int:
    """Bytes that must be read to generate one token after `depth` others: the weights that take part, and the cache.

    For an architecture whose form of cache we cannot count (`has_plain_cache`), the weights alone: still a bound, but a looser one.
    Raises YarnEdgeError for a file whose keys make no sense.
    """
    return weight_bytes_per_token(file) + (kv_bytes(file, depth, kv_type) or 0)


def weight_bytes_per_token(file: GGUFFile) -> int:
    """Bytes of the weights that one token needs: one row of the embeddings, and only the experts in use.

    The embeddings are read whole if they are also the output matrix. Layers that only predict further tokens
    (`nextn_predict_layers`) do not take part.
    """
    tied = "output.weight" not in file.tensors
    share = _share_of_experts(file)
    layers = int(file.number("block_count") or 0) - int(file.number("nextn_predict_layers") or 0)
    total = 0.0
    for name, tensor in file.tensors.items():
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= layers > 0:
            continue
        if name in _BY_ROW:
            total += _row_bytes(tensor)
            if name != "token_embd.weight" or not tied:
                continue
        total += tensor.n_bytes * (share if _EXPERTS.search(name) else 1)
    return int(total)


def _row_bytes(tensor: TensorInfo) -> float:
    return tensor.n_bytes * tensor.shape[0] / tensor.n_elements


def _share_of_experts(file: GGUFFile) -> float:
    count, used = file.number("expert_count") or 0, file.number("expert_used_count") or 0
    if count > 0 and not 0 < used <= count:
        raise YarnEdgeError(f"{file.path}: {file.architecture}.expert_used_count is {used:g} of {count:g} experts")
    return used / count if count > 0 else 1.0


class Ceilings:
    """Tokens per second that the CPU's memory allows. The best bandwidth seen counts: call `look` whenever there is time."""

    def __init__(self) -> None:
        self.bytes_per_s: dict[int, float] = {}  # by threads
        self.cache_bytes = last_level_cache_bytes()

    def look(self, threads: int) -> None:
        """Measure with this number of threads. A disturbed measurement never lowers an earlier result."""
        self.bytes_per_s[threads] = max(self.bytes_per_s.get(threads, 0.0), read_bandwidth(threads))

    def tok_per_s(self, n_bytes: int, threads: int) -> float | None:
        """None if nothing was measured, or if the caches may hold all of it, because then memory is not the bound."""
        bandwidth = self.bytes_per_s.get(threads)
        if not bandwidth or n_bytes <= (self.cache_bytes or 0):
            return None
        return bandwidth / n_bytes

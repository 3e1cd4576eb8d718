"""Which attention is fastest on this machine: measured once for each kind of heads and cache, then read from the cache folder."""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path

from yarn_edge.attention.compiled import kernel_of, why_not_compiled
from yarn_edge.attention.heads import HeadShape, head_shapes
from yarn_edge.attention.kernel_shapes import kernel_shapes, no_kernels
from yarn_edge.cache_folder import user_cache_folder
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.progress import note
from yarn_edge.regular_file import read_regular
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.llama_api import llama
from yarn_edge.writer import write_file

LEAST_CONTEXT = 4096  # tokens: for shorter contexts our kernels gain less than it takes to load them
_FORMAT, _MOST_BYTES = 1, 1 << 20
Times = dict[str, dict[str, float]]  # "few" and "many": seconds by "fast", "flash", "plain"


def fastest_attention(settings: ContextSettings, file: GGUFFile) -> Attention:
    """A kind of "fast" if our kernels are faster here than ggml's; "ggml" otherwise, with a note if they are missing."""
    n_ctx = settings.n_ctx or int(file.number("context_length") or 0)
    if n_ctx < LEAST_CONTEXT or no_kernels(file, settings.kv_type) is not None:
        return "ggml"
    reason = why_not_compiled()
    if reason is not None:
        _say_missing(reason)
        return "ggml"
    try:
        times = [_times(settings.kv_type, heads) for heads in head_shapes(file)]
        best = best_of(times)
        if best != "ggml":
            for _, shape in kernel_shapes(file, settings.kv_type):
                kernel_of(shape)
    except Exception as error:  # whatever Numba and LLVM raise; a kernel that computes wrongly
        _say_missing(f"{type(error).__name__}: {error}".splitlines()[0])
        return "ggml"
    return best


def best_of(times: list[Times]) -> Attention:
    """The attention with the smallest times, relative to the best for few queries and for many."""
    total = {
        phase: {way: sum(t[phase].get(way, float("inf")) for t in times) for way in _WAYS} for phase in ("few", "many")
    }
    plain = total["few"]["plain"] * total["many"]["plain"]
    few, many = (total[phase]["fast"] < total[phase]["flash"] for phase in ("few", "many"))
    ours = min(total["few"]["fast"], total["few"]["flash"]) * min(total["many"]["fast"], total["many"]["flash"])
    if plain <= ours or not (few or many):
        return "ggml"
    return "fast" if few and many else "fast-few" if few else "fast-many"


_WAYS = ("fast", "flash", "plain")


@cache
def _say_missing(reason: str) -> None:
    note(f"note: ggml computes attention, which is slow behind a long context: {reason}")


@cache
def _times(kind: str, heads: HeadShape) -> Times:
    """From the cache folder, or measured and kept there."""
    key = f"{kind} {heads.query}/{heads.kv} x {heads.d_k}/{heads.d_v}"
    path = user_cache_folder() / "attention.json"
    kept = _kept(path)
    found = kept.get(key)
    if found is None:
        from yarn_edge.attention.trial import FEW_QUERIES, MANY_QUERIES, attention_times

        found = {phase: attention_times(kind, heads, n) for phase, n in (("few", FEW_QUERIES), ("many", MANY_QUERIES))}
        _keep(path, {**_kept(path), key: found})
    return found


def _kept(path: Path) -> dict[str, Times]:
    """What was measured here, by the same programs; nothing if the file is of others, or unreadable."""
    try:
        read = json.loads(read_regular(path, _MOST_BYTES))
        if read["of"] != _machine():
            return {}
        return {
            str(key): {phase: {way: float(s) for way, s in found[phase].items()} for phase in ("few", "many")}
            for key, found in read["times"].items()
            if all({"fast", "flash"} <= set(found[phase]) for phase in ("few", "many"))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, YarnEdgeError):
        return {}


def _keep(path: Path, times: dict[str, Times]) -> None:
    """Written whole or not at all; a folder that cannot be written only costs the second again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"of": _machine(), "times": times}, indent=1), force=True)
    except (OSError, YarnEdgeError):
        return


@cache
def _machine() -> list[str]:
    from yarn_edge.attention.vectors import WIDTH
    from yarn_edge.runtime.ggml import cpu_device

    return [str(_FORMAT), platform.machine(), cpu_device().description, str(WIDTH), llama().__version__]

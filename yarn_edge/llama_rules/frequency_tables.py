"""The tensors of a GGUF by which llama.cpp divides the frequencies: `rope_freqs.weight`, or LongRoPE's two tables."""

from __future__ import annotations

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import file_origin
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS, HONOURED, LONG_FACTORS, SHORT_FACTORS, honoured
from yarn_edge.positions.scaling import MAX_DIM


def chosen_table(file: GGUFFile, n_ctx: int | None = None) -> str | None:
    """Which of LongRoPE's two tables runs in a context of `n_ctx` tokens; either if they are equal.

    None if the file has none, or if that cannot be said: without `n_ctx`, or for an architecture that may not load them.
    """
    row = HONOURED.get(file.architecture)
    tables = (LONG_FACTORS, SHORT_FACTORS)
    if row is None or row.table_names != tables or not set(tables) <= file.tensors.keys():
        return None
    if n_ctx is not None:
        return LONG_FACTORS if n_ctx > file_origin(file) else SHORT_FACTORS
    long, short = (file.float32_tensor(name, MAX_DIM // 2) for name in tables)
    return LONG_FACTORS if np.array_equal(long, short) else None


def judged_contexts(file: GGUFFile) -> tuple[int | None, ...]:
    """Sizes of contexts that stand for all others: of LongRoPE's, the largest with each table; (None,) if the size is all the same."""
    at_origin = chosen_table(file, 1)
    if at_origin is None or chosen_table(file) is not None:
        return (None,)
    return file_origin(file), max(file_origin(file) + 1, file.required_int("context_length"))


def file_frequency_factors(file: GGUFFile, n_ctx: int | None = None) -> tuple[float, ...] | None:
    """The values by which llama.cpp divides each pair's frequency; None if the file has no table of them.

    n_ctx: the size of the context, by which llama.cpp chooses one of LongRoPE's two tables. Raises YarnEdgeError if they differ and
    it is not given, and if the architecture does not use the tensor (llama.cpp refuses the file, or ignores the tensor).
    """
    for name in (LONG_FACTORS, SHORT_FACTORS):
        if name not in file.tensors:
            continue
        chosen = chosen_table(file, n_ctx)
        if chosen is not None:
            return tuple(float(v) for v in file.float32_tensor(chosen, MAX_DIM // 2))
        raise YarnEdgeError(
            f"{file.path}: has {name}: LongRoPE, whose frequencies depend on the requested context, so they cannot be judged"
        )
    if FREQUENCY_FACTORS not in file.tensors:
        return None
    if not honoured(file.architecture).frequency_factors:
        raise YarnEdgeError(
            f"{file.path}: has {FREQUENCY_FACTORS}, which architecture {file.architecture} does not load or does not use: it cannot be "
            "judged"
        )
    return tuple(float(v) for v in file.float32_tensor(FREQUENCY_FACTORS, MAX_DIM // 2))

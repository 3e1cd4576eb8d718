"""Whether an answer of a context with several sequences depends on its neighbors.

What is computed of one token must not depend on what else is in its batch. Attention: our kernels read the cells of each sequence in
the order of their positions, and a row's sums do not depend on other rows; ggml's depend on where cells are. Products with weights
of type F32 and F16: ggml's take one way for a single row and another for two and more (llamafile's tinyBLAS), which is the same for
any number of rows; so a batch with a prompt, which others may reuse, or with an answer that is to be repeatable has at least two rows,
and two outputs if any. Quantized weights: that depends on the type, the
processor and the number of rows. Everything else is computed row by row.
"""

from __future__ import annotations

from yarn_edge.runtime.context import Context
from yarn_edge.runtime.unified import UnifiedContext

_ROW_BY_ROW = ("F32", "F16")


def why_not_repeatable(context: Context) -> str | None:
    """Why an answer may depend on what is computed beside it; None if it does not."""
    if not isinstance(context, UnifiedContext):
        return None
    if context.model.device is not None:
        return "a GPU rounds differently for batches of different sizes"
    kinds = sorted({t.type_name for t in context.model.gguf.tensors.values() if len(t.shape) > 1} - set(_ROW_BY_ROW))
    if kinds:
        return f"products with weights of type {', '.join(kinds)} round differently for batches of different sizes"
    if not context.in_order:
        return "ggml computes attention, and rounds differently for other places in the cache"
    return None

"""Where the answers of a GGUF end.

llama.cpp ends one at EOS, at EOT, at EOM, and at tokens whose texts are in a list of its own (llama-vocab.cpp:
special_eog_ids). Further ends are in `yarn_edge.eog_token_ids`, which convert writes: only yarn-edge stops there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile

END_SLOTS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
OWN_ENDS = "yarn_edge.eog_token_ids"


def own_ends(file: GGUFFile) -> frozenset[int]:
    """The ids in `yarn_edge.eog_token_ids`. Raises YarnEdgeError if they are no ids of the file's tokens."""
    value = file.metadata.get(OWN_ENDS)
    if value is None:
        return frozenset()
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind not in "iu"
        or not ((value >= 0) & (value < n_tokens)).all()
    ):
        raise YarnEdgeError(
            f"{file.path}: {OWN_ENDS} is {one_line(repr(value), 60)}, expected ids below {n_tokens}, the number of tokens: "
            "convert the checkpoint again"
        )
    return frozenset(value.tolist())


def token_names(tokens: Sequence[str], ids: Sequence[int], most: int = 8) -> str:
    """Tokens for a message, by text and id: `'<|im_end|>' (2), …`. tokens: the vocabulary."""
    shown = [f"{one_line(repr(tokens[i]), 40)} ({i})" if 0 <= i < len(tokens) else f"id {i}" for i in ids[:most]]
    return ", ".join(shown) + (f" and {len(ids) - most} more" if len(ids) > most else "")

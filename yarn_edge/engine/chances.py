"""How probable the model itself thought the tokens that were chosen: before filters, penalties, biases and temperature."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MOST_TOP = 20  # alternatives of a token, as in OpenAI's interface


class TokenChance(NamedTuple):
    """A token, the natural logarithm of its probability, and the most probable tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_chance(logits: npt.NDArray[np.float32], token: int, n_top: int) -> TokenChance:
    """logits: of one position, shape (n_vocab,). n_top: alternatives, the most probable first, the first among equals."""
    values = logits.astype(np.float64)
    largest = values.max()
    values -= largest + np.log(np.exp(values - largest).sum())
    if not n_top:
        return TokenChance(token, float(values[token]), ())
    some = np.argpartition(-values, min(n_top, len(values)) - 1)[:n_top]
    best = sorted(some.tolist(), key=lambda i: (-values[i], i))
    return TokenChance(token, float(values[token]), tuple((i, float(values[i])) for i in best))

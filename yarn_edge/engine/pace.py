"""How many tokens of a prompt are read at once, so that those who wait do not wait long."""

from __future__ import annotations

SLICE_S = 0.15  # a step in which answers are generated, or a short prompt is read
ALONE_S = 0.5  # one for which nobody waits
_STEP, _FIRST_TOK_PER_S = 32, 200.0


class Pace:
    """The speed of reading, measured step by step: a moving average."""

    def __init__(self) -> None:
        self.tok_per_s = _FIRST_TOK_PER_S

    def read(self, n_tokens: int, seconds: float) -> None:
        """A step read a slice of n_tokens, and took so long."""
        if n_tokens >= _STEP // 2 and seconds > 0:
            self.tok_per_s = 0.6 * self.tok_per_s + 0.4 * n_tokens / seconds

    def tokens(self, *, alone: bool) -> int:
        """The tokens of the next slice."""
        return max(1, int(self.tok_per_s * (ALONE_S if alone else SLICE_S)) // _STEP) * _STEP


def shared_out(lengths: list[int], most: int) -> list[int]:
    """How many tokens of each prompt, in order of arrival, are read in one step that reads `most`.

    The shortest is read first, so that a short question does not wait for a long document, but a quarter is the oldest's.
    """
    if not lengths:
        return []
    given = [0] * len(lengths)
    given[0] = min(lengths[0], -(-most // 4))
    left = most - given[0]
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        more = min(lengths[i] - given[i], left)
        given[i] += more
        left -= more
    return given

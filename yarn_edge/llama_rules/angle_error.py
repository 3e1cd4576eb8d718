"""How far the angles of one scaling are from those of another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from yarn_edge.positions import rope
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling


@dataclass(frozen=True)
class AngleError:
    """How far one scaling is from another, as relative errors.

    frequency: of the worst pair, whose index is `pair`. attention: of A or of the softmax factor, whichever is larger.
    """

    frequency: float
    pair: int
    attention: float

    @property
    def any_difference(self) -> bool:
        """Whether an error exceeds what float32 storage explains."""
        return not (self.frequency <= SAME_RELATIVE and self.attention <= SAME_RELATIVE)  # so that NaN is a difference

    def __str__(self) -> str:
        return f"frequencies up to {self.frequency:.2%} off (pair {self.pair}) and an attention factor {self.attention:.2%} off"


def worse(a: AngleError, b: AngleError) -> AngleError:
    """The larger of each error."""
    first = a if a.frequency >= b.frequency else b
    return AngleError(first.frequency, first.pair, max(a.attention, b.attention))


def angle_error(actual: RopeScaling, goal: RopeScaling) -> AngleError:
    """Compare what two static scalings compute. The errors are infinite if the rotated dimensions differ."""
    if actual.dim != goal.dim:
        return AngleError(math.inf, 0, math.inf)
    target = rope.inv_freq(goal)
    relative = np.abs(rope.inv_freq(actual) / target - 1)
    pair = int(relative.argmax())
    magnitudes = (abs(getattr(actual, n) / getattr(goal, n) - 1) for n in ("attention_factor", "softmax_factor"))
    return AngleError(float(relative[pair]), pair, max(magnitudes))

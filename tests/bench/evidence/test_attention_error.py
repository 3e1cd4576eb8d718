"""The errors that docs/attention.md states, on the first layers of the real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.bench.evidence.attention_error import QUERIES, errors_of


def test_ours_are_smaller(smol_f32: Path) -> None:
    """Up to 16 queries at most 1/100 of flash attention's; for blocks as large as ggml's, which sums in float32 too."""
    found = errors_of(str(smol_f32), 256, threads=2)
    assert set(found) == set(QUERIES)
    for n, pairs in found.items():
        theirs, ours = np.array(pairs).T
        assert len(pairs) >= 2
        assert (ours < 2e-6).all()
        assert (ours <= theirs * (0.01 if n <= 16 else 1.2)).all()

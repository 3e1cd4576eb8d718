"""The spans of the cache: whole tiles, without gaps, few enough for their results to stay small."""

from __future__ import annotations

from itertools import pairwise

import pytest

from yarn_edge.attention.spans import span_count, span_start
from yarn_edge.attention.work import TILE, WorkArea, partials_floats, scratch_floats


def test_spans_follow_each_other() -> None:
    starts = [span_start(i) for i in range(200)]
    assert starts[0] == 0
    assert all(b > a and a % TILE == 0 for a, b in pairwise(starts))


@pytest.mark.parametrize("cells", [1, 64, 256, 257, 8192, 8193, 12288, 131072, 1 << 20])
def test_the_count_covers_the_cells(cells: int) -> None:
    n = span_count(cells)
    assert span_start(n - 1) < cells <= span_start(n)


def test_a_million_cells_need_little_memory() -> None:
    assert span_count(1 << 20) <= 150
    assert 4 * partials_floats(128, 32, 1, 1 << 20) < 64 << 20


def test_an_area_is_as_large_as_it_was_asked_for() -> None:
    area = WorkArea(3, scratch_floats(64, 64, 9, 3), partials_floats(64, 9, 2, 4096))
    assert area.scratch >= 4 * scratch_floats(64, 64, 9, 3)
    assert area.partials == 4 * partials_floats(64, 9, 2, 4096)
    assert area.calls == 0
    assert area.address % 64 == 0

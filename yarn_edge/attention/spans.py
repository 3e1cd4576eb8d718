"""How the cache is cut for few queries: spans whose ends depend on nothing but their place in the cache.

So a row's sums are added in the same order whatever is asked beside it, however long the cache is, and with any number of threads.
Spans grow with the cache, so that the results of all of them stay small.
"""

from __future__ import annotations

SPAN, EVEN_SPANS, PER_DOUBLING = 256, 32, 16  # cells; spans of that length; spans of each doubling after them


def span_start(span: int) -> int:
    """The first cell of a span: 32 of 256 cells, then 16 for every doubling of the cache."""
    if span < EVEN_SPANS:
        return span * SPAN
    doubled, place = (span - EVEN_SPANS) // PER_DOUBLING, (span - EVEN_SPANS) % PER_DOUBLING
    even = EVEN_SPANS * SPAN
    return (even << doubled) + place * ((even // PER_DOUBLING) << doubled)


def span_count(cells: int) -> int:
    """The number of spans that `cells` cells fill."""
    spans = 0
    while span_start(spans) < cells:
        spans += 1
    return spans

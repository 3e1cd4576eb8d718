"""Drafts from the text: what they copy, and when none are made."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from yarn_edge.engine.prompt_lookup import _PAUSE, _RECENT, PromptLookup
from yarn_edge.runtime.context import MAX_DRAFT


def ready(tokens: list[int], *, always: bool = True) -> PromptLookup:
    found = PromptLookup(always=always)
    found.read(tokens)
    found.took(1.0)
    return found


def test_what_followed_before_is_drafted() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert ready(text).draft(99) == [4, 5, 6, 7]
    assert ready(text).draft(2) == [4, 5]
    assert ready([1, 2, 3, 4, 5, 6]).draft(99) == []  # never said before
    assert ready([1, 2]).draft(99) == []


def test_the_longest_common_past_wins_then_the_latest() -> None:
    text = [7, 8, 1, 2, 3, 40, 9, 1, 2, 3, 50, 0, 7, 8, 1, 2, 3]
    assert ready(text).draft(1) == [40]
    assert ready([1, 2, 3, 40, 9, 1, 2, 3, 50, 0, 1, 2, 3]).draft(1) == [50]


def test_drafts_grow_while_they_are_right() -> None:
    text = [*range(100), 0, 1, 2]
    lookup = ready(text)
    sizes = []
    for _ in range(4):
        draft = lookup.draft(99)
        sizes.append(len(draft))
        lookup.judged(len(draft), len(draft), 0.1)
    assert sizes == [4, 8, MAX_DRAFT, MAX_DRAFT]
    lookup.judged(MAX_DRAFT, 1, 0.1)
    assert len(lookup.draft(99)) == 2
    assert (lookup.drafted, lookup.accepted) == (sum(sizes) + MAX_DRAFT, sum(sizes) + 1)


def test_where_drafts_do_not_pay_there_are_none_for_a_while() -> None:
    text = [*range(50), 0, 1, 2]
    lookup = ready(text, always=False)
    for _ in range(_RECENT):
        assert lookup.draft(99)
        lookup.judged(4, 0, 2.0)  # one token in the time of two
    assert [bool(lookup.draft(99)) for _ in range(_PAUSE + 1)] == [False] * _PAUSE + [True]
    for _ in range(_RECENT):
        lookup.judged(4, 3, 2.0)  # four tokens in the time of two
    assert lookup.draft(99)


def test_without_knowing_what_a_token_costs_there_is_no_draft() -> None:
    lookup = PromptLookup()
    lookup.read([1, 2, 3, 4, 1, 2, 3])
    assert lookup.draft(9) == []
    lookup.took(0.1)
    assert lookup.draft(9)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=20), st.integers(1, 20))
def test_a_text_read_in_parts_or_after_another_is_the_same(tokens: list[int], other: list[int], cut: int) -> None:
    at_once, in_parts = ready(tokens), ready(other)
    in_parts.read(tokens[:cut])
    for token in tokens[cut:]:
        in_parts.add(token)
    if tokens[: len(other)] == other or not other:
        in_parts.read(tokens)
    assert at_once.draft(9) == in_parts.draft(9)
    draft = at_once.draft(9)
    if draft:  # it stands in the text, behind the same three tokens
        assert any(
            tokens[at : at + 3] == tokens[-3:] and tokens[at + 3 :][: len(draft)] == draft
            for at in range(len(tokens) - 3)
        )

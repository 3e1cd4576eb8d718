"""Reasoning is separated from the answer, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yarn_edge.chat.reasoning import begins_inside, split

CASES: dict[str, tuple[str, str | None, str, str]] = {
    "none": ("Just an answer.", None, "Just an answer.", ""),
    "a block": ("<think>Let me see.</think>Yes.", None, "Yes.", "Let me see."),
    "with lines": ("\n<think>\nLet me\nsee.\n</think>\n\nYes.\n", None, "Yes.\n", "Let me\nsee.\n"),
    "opened by the prompt": ("Let me see.</think>\n\nYes.", "</think>", "Yes.", "Let me see."),
    "never closed": ("<think>Let me see", None, "", "Let me see"),
    "talk of tags": ("Use <think> and </think>.", None, "Use <think> and </think>.", ""),
    "half a tag": ("<thin", None, "<thin", ""),
    "another tag": ("<reasoning>a</reasoning>b", None, "b", "a"),
    "a tag in a block": ("<think>a <think> b</think>c", None, "c", "a <think> b"),
    "two blocks": ("<think>a</think><think>b</think>c", None, "c", "ab"),
    "less than": ("<5 is small", None, "<5 is small", ""),
    "an empty block": ("<think>\n\n</think>\n\nYes.", None, "Yes.", ""),
}


def joined(pieces: Iterable[str], closing: str | None) -> tuple[str, str]:
    found = {"answer": "", "reasoning": ""}
    for kind, text in split(pieces, lambda: closing):
        assert text
        found[kind] += text
    return found["answer"], found["reasoning"]


@pytest.mark.parametrize("text, closing, answer, reasoning", CASES.values(), ids=CASES)
def test_blocks(text: str, closing: str | None, answer: str, reasoning: str) -> None:
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert joined(pieces, closing) == (answer, reasoning), size


@given(st.lists(st.text("<think>/ \nab", max_size=6), max_size=12), st.booleans())
def test_pieces_do_not_matter(pieces: list[str], inside: bool) -> None:
    closing = "</think>" if inside else None
    if pieces:
        assert joined(["", *pieces], closing) == joined(["", "".join(pieces)], closing)


def test_nothing_is_held_back_without_need() -> None:
    said = iter(["Hel", "lo", " <b", ">"])
    seen = []
    for _kind, text in split(said):
        seen.append(text)
    assert seen == ["Hel", "lo", " <b", ">"]


def test_the_end_of_a_prompt() -> None:
    assert begins_inside("<|im_start|>assistant\n<think>\n") == "</think>"
    assert begins_inside("<|im_start|>assistant\n") is None

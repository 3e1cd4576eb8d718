"""The Markdown that is styled in a terminal, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yarn_edge.chat.answer_view import BOLD, CODE, FENCE, HEADING, REASONING, AnswerView

Shown = list[tuple[str, str]]


def shown(pieces: list[str]) -> Shown:
    """Neighbors of the same style joined."""
    seen: Shown = []

    def show(text: str, style: str) -> None:
        if seen and seen[-1][1] == style:
            seen[-1] = (seen[-1][0] + text, style)
        elif text:
            seen.append((text, style))

    view = AnswerView(show)
    for piece in pieces:
        view.answer(piece)
    view.end()
    return seen


CASES: dict[str, tuple[str, Shown]] = {
    "plain": ("Two words.\nA line.", [("Two words.\nA line.", "")]),
    "bold": ("A **strong** word", [("A ", ""), ("strong", BOLD), (" word", "")]),
    "code": ("Call `f(**x)` now", [("Call ", ""), ("f(**x)", CODE), (" now", "")]),
    "heading": ("# Title\ntext", [("# Title", HEADING), ("\ntext", "")]),
    "no heading": ("#tag", [("#tag", "")]),
    "fence": (
        "```py\nx = 1 # **no**\n```\nok",
        [("```py\n", FENCE), ("x = 1 # **no**\n", CODE), ("```\n", FENCE), ("ok", "")],
    ),
    "an open fence": ("```\nx", [("```\n", FENCE), ("x", CODE)]),
    "a fence in a fence": ("````\n```\n````\n", [("````\n", FENCE), ("```\n", CODE), ("````\n", FENCE)]),
    "a list": ("* one\n* two", [("* one\n* two", "")]),
    "asterisks": ("2 * 3 = 6", [("2 * 3 = 6", "")]),
    "bold that is not closed": ("a **b\nc", [("a ", ""), ("b", BOLD), ("\nc", "")]),
    "controls": ("a\x1b[31mb\x07\r\n", [("a[31mb\n", "")]),
    "empty lines": ("a\n\n\nb", [("a\n\n\nb", "")]),
}


@pytest.mark.parametrize("text, expected", CASES.values(), ids=CASES)
def test_styles(text: str, expected: Shown) -> None:
    for size in (1, 2, 5, max(1, len(text))):
        assert shown([text[at : at + size] for at in range(0, len(text), size)]) == expected, size


@given(st.lists(st.text("*`#~ \nab", max_size=8), max_size=10))
def test_pieces_do_not_matter_and_no_word_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert shown(pieces) == shown([text])
    letters = "".join(c for c in "".join(t for t, _style in shown(pieces)) if c in "ab\n")
    assert letters == "".join(c for c in text if c in "ab\n") or "```" in text or "~~~" in text


def test_text_comes_at_once() -> None:
    seen: list[str] = []
    view = AnswerView(lambda text, _style: seen.append(text))
    view.answer("Hello")
    view.answer(" there")
    assert seen == ["Hello", " there"]
    view.reasoning("hm\x1b[2J")
    assert seen[-1] == "hm[2J"
    assert REASONING

"""Separates what a model thinks before it answers from the answer. The model writes both as text, the thoughts between tags.

Whether the next prompt repeats the thoughts is up to the chat template; here they are only shown differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

Kind = Literal["answer", "reasoning"]

TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"))
_TAIL_TOKENS = 16  # enough for an opening tag and the white space after it


def opened_by(model: Model, prompt: Sequence[int]) -> str | None:
    """The closing tag, if the tokens of a prompt end in an opening tag and so the answer starts inside the block."""
    return begins_inside(b"".join(map(model.token_bytes, prompt[-_TAIL_TOKENS:])).decode(errors="replace"))


def begins_inside(prompt_end: str) -> str | None:
    """The same for a prompt's last characters."""
    return next((close for opening, close in TAGS if prompt_end.rstrip().endswith(opening)), None)


def split(pieces: Iterable[str], opened: Callable[[], str | None] = lambda: None) -> Iterator[tuple[Kind, str]]:
    """Label pieces of text as answer or reasoning, and drop the tags.

    opened: called at the first piece; returns the closing tag of the block that the piece is in, or None.
    A block counts only if nothing but white space precedes it, because an answer may talk about tags. Text that could be the
    beginning of a tag is held back until that is decided.
    """
    held, answered, at_edge = "", False, False  # at_edge: right after a tag, whose line breaks are not part of the text
    inside: str | None = None
    for number, piece in enumerate(pieces):
        inside = opened() if number == 0 else inside
        held += piece
        while held:
            if at_edge:
                held = held.lstrip("\n")
                at_edge = not held
                continue
            if inside is not None:
                before, tag, after = held.partition(inside)
                if tag:
                    if before:
                        yield "reasoning", before
                    held, inside, at_edge = after, None, True
                    continue
                keep = _beginning_of(held, (inside,))
                if held[: len(held) - keep]:
                    yield "reasoning", held[: len(held) - keep]
                held = held[len(held) - keep :]
                break
            if not answered:
                start = held.lstrip()
                tags = next(((o, c) for o, c in TAGS if start.startswith(o)), None)
                if tags is not None:
                    held, inside, at_edge = start[len(tags[0]) :], tags[1], True
                    continue
                if not start or any(opening.startswith(start) for opening, _close in TAGS):
                    break
            answered = True
            yield "answer", held
            held = ""
    if held:
        yield ("answer" if inside is None else "reasoning"), held


def _beginning_of(text: str, tags: tuple[str, ...]) -> int:
    """How many of the last characters could be the beginning of a tag."""
    longest = 0
    for tag in tags:
        for length in range(1, len(tag)):
            if text.endswith(tag[:length]):
                longest = max(longest, length)
    return longest

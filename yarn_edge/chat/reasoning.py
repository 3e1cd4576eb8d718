"""What a model thinks before it answers, told apart from the answer: between tags that the model writes as text.

Whether the next prompt repeats it is the chat template's decision; here it is only shown otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

Kind = Literal["answer", "reasoning"]

TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"))
_TAG_TOKENS = 16  # the last tokens of a prompt, enough for any opening tag


def begins_inside(prompt_end: str) -> str | None:
    """The closing tag of the block of reasoning that a prompt's last characters open, None if they open none."""
    return next((close for opening, close in TAGS if prompt_end.rstrip().endswith(opening)), None)


def opened_block(model: Model, prompt: Sequence[int]) -> str | None:
    """`begins_inside` for the token ids of a prompt: the answer continues the block of reasoning that they open."""
    return begins_inside(b"".join(map(model.token_bytes, prompt[-_TAG_TOKENS:])).decode(errors="replace"))


def split(pieces: Iterable[str], opened: Callable[[], str | None] = lambda: None) -> Iterator[tuple[Kind, str]]:
    """Pieces of text with what they are, without the tags. opened: asked at the first piece for the closing tag of the block
    that it is in, None for none.

    A block is one only where nothing but space stands before it: an answer may talk about tags. Text is held back as long as
    it may become a tag.
    """
    held, answered, at_edge = "", False, False  # at_edge: behind a tag, whose line breaks are not the text's
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
                before, found, after = held.partition(inside)
                if found:
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
    """How many of the last characters may be the beginning of a tag."""
    longest = 0
    for tag in tags:
        for length in range(1, len(tag)):
            if text.endswith(tag[:length]):
                longest = max(longest, length)
    return longest

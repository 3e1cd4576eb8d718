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
    """Label pieces of text as answer or reasoning, and drop the tags, as `ReasoningSplitter` does.

    opened: called at the first piece; returns the closing tag of the block that the piece is in, or None.
    """
    splitter: ReasoningSplitter | None = None
    for piece in pieces:
        splitter = splitter or ReasoningSplitter(opened())
        yield from splitter.feed(piece)
    if splitter is not None:
        yield from splitter.end()


class ReasoningSplitter:
    """Labels text as answer or reasoning as it comes, and drops the tags.

    inside: the closing tag of the block that the text begins in, or None. A block counts only if nothing but white space precedes
    it, because an answer may talk about tags. Text that could be the beginning of a tag is held back until that is decided.
    splits: without, all is the answer.
    """

    def __init__(self, inside: str | None, splits: bool = True) -> None:
        self._inside, self._answered = inside, not splits
        self._held, self._at_edge = "", False  # at_edge: right after a tag, whose line breaks are not part of the text

    def feed(self, piece: str) -> Iterator[tuple[Kind, str]]:
        """What is certain, with one more piece."""
        self._held += piece
        while self._held:
            if self._at_edge:
                self._held = self._held.lstrip("\n")
                self._at_edge = not self._held
            elif self._inside is not None:
                before, tag, after = self._held.partition(self._inside)
                keep = 0 if tag else undecided(self._held, (self._inside,))
                if said := before[: len(before) - keep]:
                    yield "reasoning", said
                self._held = after if tag else before[len(before) - keep :]
                if not tag:
                    return
                self._inside, self._at_edge = None, True
            elif not self._answered:
                start = self._held.lstrip()
                tags = next(((o, c) for o, c in TAGS if start.startswith(o)), None)
                if tags is not None:
                    self._held, self._inside, self._at_edge = start[len(tags[0]) :], tags[1], True
                elif not start or any(opening.startswith(start) for opening, _close in TAGS):
                    return
                else:
                    self._answered = True
            else:
                held, self._held = self._held, ""
                yield "answer", held

    def end(self) -> Iterator[tuple[Kind, str]]:
        """What was held back."""
        held, self._held = self._held, ""
        if held:
            yield ("answer" if self._inside is None else "reasoning"), held


def undecided(text: str, wholes: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of `wholes`."""
    longest = max(map(len, wholes), default=1) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(whole.startswith(text[-n:]) for whole in wholes)), 0
    )

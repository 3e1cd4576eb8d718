"""Prompts that hide a number in a long text and ask for it at the end, made to a length in tokens.

`Passkey` is the test of the YaRN paper (4.3.2, B.2) in the words of landmark-attention (llama/run_test.py), so that results are
comparable. `Needle` hides one sentence in real text. The number of tokens depends on the exact text, so each prompt is made as one
string and tokenized whole; a search finds how much text fills a length.
"""

from __future__ import annotations

import random
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.runtime.model import Model

ANSWER_TOKENS = 10  # the authors' max_new_tokens

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
LARGEST_KEY = 50000

NEEDLE_TASK = "A special magic number is hidden in the following text. Remember it. There will be a question about it."
CITIES = (
    "Amsterdam", "Athens", "Bangkok", "Berlin", "Bogota", "Brisbane", "Brussels", "Budapest", "Cairo", "Chicago",
    "Copenhagen", "Dakar", "Dublin", "Hanoi", "Helsinki", "Istanbul", "Jakarta", "Lima", "Lisbon", "London", "Madrid",
    "Manila", "Montreal", "Nairobi", "Oslo", "Paris", "Prague", "Rome", "Seoul", "Stockholm", "Tokyo", "Vienna", "Warsaw",
)  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\s*\n\s*\n\s*|(?<=[。！？])")
_REACH = 400  # characters: if no sentence begins this close, a word will do
_WORD = 40  # characters: if no word begins this close (Chinese, base64), any character will do
_SAMPLE = 4096  # characters to estimate characters per token from


@dataclass(frozen=True)
class Secret:
    """What is hidden: a number, and what it belongs to ("" for the pass key)."""

    number: int
    subject: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt that, with room for the answer, takes at most `length` tokens; what it hides, and at which depth (0 to 1)."""

    length: int
    depth: float
    secret: Secret
    tokens: Sequence[int]


class Kind(Protocol):
    """A kind of prompt: what it hides, and the text around it."""

    def secret(self, source: random.Random) -> Secret:
        """A new secret."""

    def text(self, secret: Secret, depth: float, n_chars: int) -> str:
        """The prompt: the secret after the share `depth` (0 to 1) of `n_chars` characters of text."""

    def filler(self, n_chars: int) -> str:
        """`n_chars` characters of the text around the secret, or a few less."""


class Passkey:
    """The paper's kind: a key from 1 to 50000 among five repeating sentences, cut at any character before and after it."""

    def secret(self, source: random.Random) -> Secret:
        """A pass key."""
        return Secret(source.randint(1, LARGEST_KEY))

    def text(self, secret: Secret, depth: float, n_chars: int) -> str:
        """Five lines: the task, filler, the key, filler (from its beginning again, as in the authors' code), the question."""
        before, key = round(depth * n_chars), secret.number
        return "\n".join(
            (
                TASK,
                self.filler(before),
                f"The pass key is {key}. Remember it. {key} is the pass key.",
                self.filler(n_chars - before),
                "What is the pass key? The pass key is",
            )
        )

    def filler(self, n_chars: int) -> str:
        """The repeating sentences."""
        return (GARBAGE * (n_chars // len(GARBAGE) + 1))[:n_chars]


class Needle:
    """A sentence with a seven-digit number between two sentences of real text. A text that is too short is repeated."""

    def __init__(self, text: str) -> None:
        self._unit = text.removeprefix("\ufeff").strip() + "\n\n"
        if not self._unit.strip():
            raise YarnEdgeError("the text to hide a needle in is empty")
        self._starts = sorted({0, *(m.end() for m in _SENTENCE.finditer(self._unit))} - {len(self._unit)})

    def secret(self, source: random.Random) -> Secret:
        """A number and a city."""
        return Secret(source.randint(1_000_000, 9_999_999), source.choice(CITIES))

    def text(self, secret: Secret, depth: float, n_chars: int) -> str:
        """Three lines: the task, the text with the needle in it, the question."""
        words, what = self.filler(n_chars), f"special magic number for {secret.subject}"
        at = self._place(words, round(depth * len(words)))
        before, after = words[:at], words[at:]
        gap = "" if not before or before[-1].isspace() else " "
        needle = f"{gap}The {what} is {secret.number}.{' ' if after else ''}"
        return f"{NEEDLE_TASK}\n{before}{needle}{after}\nWhat is the {what}? The {what} is"

    def filler(self, n_chars: int) -> str:
        """The beginning of the text, ending before a word that would be cut."""
        words = (self._unit * (n_chars // len(self._unit) + 1))[: n_chars + 1]
        return words[: _word_start(words, n_chars)].rstrip()

    def _place(self, words: str, wanted: int) -> int:
        """The place closest to character `wanted` where a sentence begins, or where the text ends with one."""
        if not words:
            return 0
        unit = len(self._unit)
        round_, at = divmod(wanted, unit)
        here = bisect_left(self._starts, at)
        near = [self._starts[i] + round_ * unit for i in (here - 1, here) if 0 <= i < len(self._starts)]
        near = [start for start in (*near, (round_ + 1) * unit) if start < len(words)]
        if words.endswith((".", "!", "?", "…", "。", "！", "？")):
            near.append(len(words))
        best = min(near, key=lambda start: abs(start - wanted))
        return best if abs(best - wanted) <= _REACH else _word_start(words, wanted)


def _word_start(words: str, at: int) -> int:
    """The last place up to `at` that cuts no word; `at` itself if words are too long for that."""
    if not 0 < at < len(words):
        return min(at, len(words))
    for place in range(at, max(0, at - _WORD), -1):
        if words[place].isspace() or words[place - 1].isspace():
            return place
    return at


def midpoints(n: int) -> list[float]:
    """Depths in the middle of n equal parts: 10 are 5 %, 15 %, …, 95 %. Their mean is that of the paper's random positions."""
    return [(i + 0.5) / n for i in range(n)]


def prompt_tokens(model: Model, text: str) -> list[int]:
    """Token ids of a text to continue: BOS if the model wants one, markup taken as text, no EOS."""
    tokens = model.tokenize(text, add_special=True, parse_special=False)
    if model.add_eos and tokens and tokens[-1] == model.eos:
        tokens.pop()
    return tokens


def longest(make: Callable[[int], list[int]], room: int, guess: int) -> list[int]:
    """make(n) for the largest n found at which it has at most `room` tokens. make(0) must fit.

    The search starts at `guess`, doubles its steps until it exceeds the room, then bisects. One more character can make fewer
    tokens, so an n larger by a few characters may fit as well.
    """
    low, high, step = 0, guess, 16
    best: list[int] | None = None
    while len(found := make(high)) <= room:
        low, high, best, step = high, high + step, found, 2 * step
    if best is None:  # the guess was too large: down to what fits
        step = 16
        while high - step > 0 and len(found := make(high - step)) > room:
            high, step = high - step, 2 * step
        low = max(0, high - step)
        best = found if low > 0 else make(0)
    while high - low > 1:
        middle = (low + high) // 2
        if len(found := make(middle)) <= room:
            low, best = middle, found
        else:
            high = middle
    return best


def make_prompts(
    model: Model, kind: Kind, lengths: Sequence[int], depths: Sequence[float], secrets: Sequence[Sequence[Secret]]
) -> list[Prompt]:
    """All prompts, by length, from deep to shallow. secrets: for each depth, what is hidden there (the same at every length).

    Each prompt fills its length as far as it can with ANSWER_TOKENS left over. Raises YarnEdgeError for lengths that are too short.
    """
    todo = [(depth, secret) for depth, those in zip(depths, secrets, strict=True) for secret in those]
    todo.sort(key=lambda item: -item[0])
    bare = max(len(prompt_tokens(model, kind.text(secret, depth, 0))) for depth, secret in todo)
    if min(lengths) < bare + ANSWER_TOKENS:
        raise YarnEdgeError(
            f"--lengths {min(lengths)}: task, question and answer alone take {bare + ANSWER_TOKENS} tokens of {model.path.name}"
        )
    a_token = _SAMPLE / max(1, len(prompt_tokens(model, kind.filler(_SAMPLE))))
    found = []
    with bar("Making the prompts", sum(lengths) * len(todo), "tokens") as advance:
        for length in lengths:
            room = length - ANSWER_TOKENS
            for depth, secret in todo:
                tokens = longest(_tokens_by_size(model, kind, depth, secret), room, int((room - bare) * a_token))
                found.append(Prompt(length, depth, secret, array("i", tokens)))
                advance(length, f"{length} tokens")
    return found


def _tokens_by_size(model: Model, kind: Kind, depth: float, secret: Secret) -> Callable[[int], list[int]]:
    return lambda n_chars: prompt_tokens(model, kind.text(secret, depth, n_chars))


def draw_secrets(kind: Kind, source: random.Random, n_depths: int, trials: int) -> list[list[Secret]]:
    """For each depth, one secret per trial. The first secrets do not depend on the number of trials."""
    rounds = [[kind.secret(source) for _ in range(n_depths)] for _ in range(trials)]
    return [list(those) for those in zip(*rounds, strict=True)]

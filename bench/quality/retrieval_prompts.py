"""Prompts that hide a number in a long text and ask for it at the end, made to a length in tokens.

`Passkey` is the test of the YaRN paper (4.3.2, B.2), whose words are those of landmark-attention (llama/run_test.py), so that
results compare. `Needle` hides one sentence in real text. The number of tokens depends on the exact text, so each prompt is
made as one string and tokenized whole; how much text it takes for a length is searched.
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
_REACH = 400  # characters: where no sentence begins as near as this, a word will do
_WORD = 40  # characters: where no word begins as near as this (Chinese, base64), any character will do
_SAMPLE = 4096  # characters that tell how many make a token


@dataclass(frozen=True)
class Secret:
    """What is hidden: a number, and what it belongs to ("" for the pass key)."""

    number: int
    subject: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt of `length` tokens at most, the room for the answer included, and what it hides how deep (0 to 1)."""

    length: int
    depth: float
    secret: Secret
    tokens: Sequence[int]


class Kind(Protocol):
    """A kind of prompt: what it hides, and its text with so much text around."""

    def secret(self, source: random.Random) -> Secret:
        """A new one."""

    def text(self, secret: Secret, depth: float, n_chars: int) -> str:
        """The prompt, with the secret behind `depth` (0 to 1) of `n_chars` characters."""

    def filler(self, n_chars: int) -> str:
        """Characters of the text around."""


class Passkey:
    """The paper's: a key of 1 to 50000 in five sentences that repeat, which are cut at a character, before and behind it."""

    def secret(self, source: random.Random) -> Secret:
        """A key."""
        return Secret(source.randint(1, LARGEST_KEY))

    def text(self, secret: Secret, depth: float, n_chars: int) -> str:
        """Five lines: the task, garbage, the key, garbage (from its beginning again, as the authors have it), the question."""
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
        """Garbage."""
        return (GARBAGE * (n_chars // len(GARBAGE) + 1))[:n_chars]


class Needle:
    """A sentence with a number of seven digits in real text, between two sentences of it. Repeats a text that is too short."""

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
        """The text's beginning, without a word that would be cut at its end."""
        words = (self._unit * (n_chars // len(self._unit) + 1))[: n_chars + 1]
        return words[: _word_start(words, n_chars)].rstrip()

    def _place(self, words: str, wanted: int) -> int:
        """Where a sentence begins (or the text ends with one), nearest to the character `wanted`."""
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
    """The last place up to `at` where no word is cut; `at` itself where words are too long for that."""
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
    """Token ids of a text to go on with: BOS where the model asks for it, markup is text, no EOS."""
    tokens = model.tokenize(text, add_special=True, parse_special=False)
    if model.add_eos and tokens and tokens[-1] == model.eos:
        tokens.pop()
    return tokens


def longest(make: Callable[[int], list[int]], room: int, guess: int) -> list[int]:
    """make(n), with the n from 0 on at which it is about to exceed `room` tokens. make(0) must not.

    From `guess` on in doubled steps to where it exceeds, then by bisection. One character more can make tokens fewer, so a
    larger n may fit as well: by a few characters.
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
    """All prompts, by length, from deep to shallow: `secrets` has for each depth what is hidden there, at every length.

    Each is as near below its length as it can be with ANSWER_TOKENS left. Raises YarnEdgeError for lengths without room.
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
    """For each depth as many secrets as trials. More trials begin with those of fewer."""
    rounds = [[kind.secret(source) for _ in range(n_depths)] for _ in range(trials)]
    return [list(those) for those in zip(*rounds, strict=True)]

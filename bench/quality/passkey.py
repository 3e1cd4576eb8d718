"""`yarn-edge passkey`: does a model find a number that is hidden in a long text? By length and by depth.

The retrieval test of the YaRN paper (4.3.2, B.2), and one with real text around (a needle in a haystack). A model whose
positions are right can still be unable to use them so far away: perplexity hardly shows it, this does.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import count, lengths
from yarn_edge.progress import Advance, bar, note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.report import HeatMap, Report, Table
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.llama_api import deferred_ctrl_c
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.text_file import read_text

from ..scoring.evaluate import open_context
from ..scoring.variants import Variant, parse_variant
from .perplexity import add_running_flags
from .retrieval_prompts import ANSWER_TOKENS, Kind, Needle, Passkey, Prompt, draw_secrets, make_prompts, midpoints

_NUMBER = re.compile("[0-9]+")
_TITLES = {"passkey": "Passkey retrieval", "needle": "Needle in a haystack"}


@dataclass
class Cell:
    """What was found at one length and depth. n_tokens: of the longest prompt; answers: as generated."""

    length: int
    depth: float
    n_tokens: int = 0
    hits: int = 0
    answers: list[str] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)

    @property
    def trials(self) -> int:
        """Prompts that were answered."""
        return len(self.answers)

    def add(self, prompt: Prompt, answer: str) -> None:
        """Count an answer."""
        self.n_tokens = max(self.n_tokens, len(prompt.tokens))
        self.answers.append(answer)
        self.expected.append(prompt.secret.number)
        self.hits += is_hit(answer, prompt.secret.number)


def is_hit(answer: str, expected: int) -> bool:
    """True when the first digits in the answer are the number (the rule of the authors' eval/passkey.py)."""
    found = _NUMBER.search(answer)
    return found is not None and found[0].lstrip("0") == str(expected)


def wilson_error(hits: int, n: int) -> float:
    """Standard error of the rate hits / n: half of Wilson's interval for one sigma, so that 0 of n is not taken for certain."""
    rate = hits / n
    return math.sqrt(rate * (1 - rate) / n + 1 / (4 * n * n)) / (1 + 1 / n)


class Reader:
    """Answers prompts one after the other in one context, evaluating only what differs from what its cache holds."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.n_evaluated, self.seconds = 0, 0.0  # tokens of prompts, and the time they took
        self._cached: Sequence[int] = ()

    def answer(self, tokens: Sequence[int], advance: Callable[[float], None] | None = None) -> str:
        """What the model says, greedily, at most ANSWER_TOKENS. `advance` gets the tokens of the prompt that were evaluated.

        Raises YarnEdgeError with the position where the logits are not finite.
        """
        with self.context.interruptible() as interrupt, deferred_ctrl_c(interrupt):
            return self._answer(tokens, advance)

    def _answer(self, tokens: Sequence[int], advance: Callable[[float], None] | None) -> str:
        same = shared(self._cached, tokens)
        self._cached = tokens[:same]  # what is there if the evaluation is stopped
        self.context.keep(same)
        began = time.perf_counter()
        self.context.evaluate(tokens[same:], same, "last", advance)
        self.seconds += time.perf_counter() - began
        self.n_evaluated += len(tokens) - same
        self._cached = tokens
        model, said = self.context.model, b""
        for at in range(len(tokens), len(tokens) + ANSWER_TOKENS):
            token = self._most_probable(at - 1)
            if model.is_end(token):
                break
            said += model.token_bytes(token, special=False)
            if at + 1 < len(tokens) + ANSWER_TOKENS:
                self.context.evaluate([token], at)
        return said.decode("utf-8", errors="replace")

    def _most_probable(self, position: int) -> int:
        logits = self.context.logits()[-1]
        best = int(logits.argmax())  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise YarnEdgeError(
                f"{self.context.model.path}: the logits at position {position} are {logits[best]}: the model cannot be run so "
                "far with these weights, this scaling and this type of cache"
            )
        return best


def shared(cached: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens both begin with, without the last of `tokens`: it is always evaluated, for its logits."""
    for i, (mine, theirs) in enumerate(zip(cached, tokens[:-1], strict=False)):
        if mine != theirs:
            return i
    return min(len(cached), len(tokens) - 1)


class Retrieval:
    """A run over prompts, in their order. `cells` holds what was measured so far, also when it was stopped."""

    def __init__(self, context: Context, prompts: Sequence[Prompt]) -> None:
        self.reader, self.prompts = Reader(context), prompts
        self._cells: dict[tuple[int, float], Cell] = {}

    @property
    def cells(self) -> list[Cell]:
        """By length and depth; only those with an answer."""
        return [self._cells[key] for key in sorted(self._cells)]

    @property
    def tok_per_s(self) -> float | None:
        """Speed of reading prompts, without what came from the cache; None before the first."""
        return self.reader.n_evaluated / self.reader.seconds if self.reader.n_evaluated else None

    def go(self) -> None:
        """Answer every prompt."""
        before: list[Sequence[int]] = [(), *(p.tokens for p in self.prompts)]
        total = sum(len(p.tokens) - shared(old, p.tokens) for old, p in zip(before, self.prompts, strict=False))
        hits = 0
        with bar("Asking", total, "tokens") as advance:
            for done, prompt in enumerate(self.prompts):
                what = f"{prompt.length} tokens, depth {prompt.depth:.0%}, {hits}/{done}"
                advance(0, what)
                answer = self.reader.answer(prompt.tokens, _showing(advance, what))
                cell = self._cells.setdefault((prompt.length, prompt.depth), Cell(prompt.length, prompt.depth))
                cell.add(prompt, answer)
                hits += is_hit(answer, prompt.secret.number)


def _showing(advance: Advance, what: str) -> Callable[[float], None]:
    return lambda amount: advance(amount, what)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge passkey`."""
    parser.add_argument(
        "model", metavar="MODEL.gguf", help="also MODEL.gguf@kv=q8_0,yarn-factor=2: another cache or scaling"
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=[2048, 4096, 8192],
        metavar="LIST",
        help="tokens of prompt and answer together: 2k,4k,8k (the default) or 2k:16k:2k",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--depths",
        type=count(1, 1000),
        default=10,
        metavar="N",
        help="the middles of N equal parts of the text (default: 10: 5 %%, 15 %%, …, 95 %%)",
    )
    places.add_argument("--random", type=count(1, 1000), metavar="N", help="N random depths instead, as in the paper")
    parser.add_argument(
        "--trials", type=count(1, 1000), default=1, metavar="N", help="numbers at each length and depth (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=count(0, 2**63 - 1), default=0, metavar="N", help="of numbers and depths (%(default)s)"
    )
    parser.add_argument(
        "--variant",
        choices=tuple(_TITLES),
        default="passkey",
        help="passkey: the paper's, in sentences that repeat; needle: one sentence in real text",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="the text of --variant needle, UTF-8 (default: one that comes along)"
    )
    add_running_flags(parser)
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge passkey`. What was measured is delivered however it ends, and the failure told after it."""
    check_outputs(args)
    if args.text is not None and args.variant != "needle":
        raise YarnEdgeError("--text is what a needle is hidden in: it needs --variant needle")
    kind: Kind = Passkey()
    if args.variant == "needle":
        kind = Needle(sample_text() if args.text is None else read_text(Path(args.text)))
    variant = parse_variant(args.model, kv_type=args.kv_type, backend=args.backend)
    with (
        variant.load() as model,
        open_context(model, variant, max(args.lengths), args.threads, args.flash_attention) as context,
    ):
        declared = model.n_ctx_train
        beyond = [_short(n) for n in args.lengths if n > declared]
        if beyond:
            note(f"{variant.label}: its context is {_short(declared)} tokens: {', '.join(beyond)} lie beyond it")
        depths, prompts = _prompts(model, kind, args)
        test = Retrieval(context, prompts)
        try:
            test.go()
        except (KeyboardInterrupt, Terminated, YarnEdgeError):
            if test.cells:
                deliver(args, *outcome(args, variant, depths, test, declared), [variant.path])
            raise
        deliver(args, *outcome(args, variant, depths, test, declared), [variant.path])
    return 0


def _prompts(model: Model, kind: Kind, args: argparse.Namespace) -> tuple[list[float], list[Prompt]]:
    """The depths, ascending, and the prompts: the same depths and numbers at every length."""
    source = random.Random(args.seed)
    depths = sorted(source.random() for _ in range(args.random)) if args.random else midpoints(args.depths)
    return depths, make_prompts(model, kind, args.lengths, depths, draw_secrets(kind, source, len(depths), args.trials))


def outcome(
    args: argparse.Namespace, variant: Variant, depths: Sequence[float], test: Retrieval, declared: int
) -> tuple[dict[str, Any], Report]:
    """(what --json says, the report) of all that was measured."""
    cells, n_prompts = test.cells, len(test.prompts)
    hits, n = sum(c.hits for c in cells), sum(c.trials for c in cells)
    by_length, rows = [], []
    for length in sorted({c.length for c in cells}):
        those = [c for c in cells if c.length == length]
        right, asked = sum(c.hits for c in those), sum(c.trials for c in those)
        accuracy, stderr = right / asked, wilson_error(right, asked)
        by_length.append({"length": length, "n": asked, "accuracy": accuracy, "stderr": stderr})
        rows.append((_short(length), max(c.n_tokens for c in those), asked, right, accuracy, stderr))
    data = {
        "model": variant.label,
        "variant": args.variant,
        "seed": args.seed,
        "lengths": list(args.lengths),
        "cells": [_told(c) for c in cells],
        "by_length": by_length,
        "accuracy": hits / n,
        "tok_per_s": test.tok_per_s,
        "complete": n == n_prompts,
    }
    summary = [f"{variant.label} found {hits} of {n} numbers ({hits / n:.0%})."]
    if n < n_prompts:
        summary.append(f"Incomplete: stopped after {n} of {n_prompts} prompts.")
    beyond = "" if max(args.lengths) <= declared else f"The model's context is {_short(declared)} tokens."
    title = _TITLES[args.variant]
    columns = ("length", "prompt tokens", "prompts", "found", "accuracy", "std. error")
    table = Table(f"{title} by length", columns, tuple(rows), note=beyond, digits=3)
    return data, Report(title, tuple(summary), (table,), (_heat_map(title, args.lengths, depths, cells),))


def _told(cell: Cell) -> dict[str, Any]:
    return {
        "length": cell.length,
        "n_tokens": cell.n_tokens,
        "depth": cell.depth,
        "trials": cell.trials,
        "hits": cell.hits,
        "answers": cell.answers,
        "expected": cell.expected,
    }


def _heat_map(title: str, lengths: Sequence[int], depths: Sequence[float], cells: Sequence[Cell]) -> HeatMap:
    rates = {(c.length, c.depth): c.hits / c.trials for c in cells}
    return HeatMap(
        f"{title}: found by length and depth",
        "length in tokens",
        "depth",
        tuple(_short(n) for n in lengths),
        tuple(f"{100 * d:.3g} %" for d in depths),
        tuple(tuple(rates.get((n, d), math.nan) for n in lengths) for d in depths),
    )


def _short(n_tokens: int) -> str:
    return f"{n_tokens // 1024}k" if n_tokens % 1024 == 0 else str(n_tokens)

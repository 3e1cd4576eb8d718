"""Flags that several commands share: the same word means the same everywhere, and has the same limits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

MAX_THREADS = 512  # ggml.h: GGML_MAX_N_THREADS; more ends the process

# RopeScaling field -> (flag, type, help)
_ROWS: dict[str, tuple[str, type, str]] = {
    "factor": ("--yarn-factor", float, "s: new context / original context"),
    "original_context": ("--yarn-orig-ctx", int, "context before the extension, in tokens"),
    "attention_factor": (
        "--yarn-attention-factor",
        float,
        "A: cos and sin are multiplied by it (default: 0.1 ln s + 1)",
    ),
    "ext_factor": ("--yarn-ext-factor", float, "1: YaRN, 0: interpolation alone (default: 1)"),
    "beta_fast": ("--yarn-beta-fast", float, "turns above which a pair keeps its frequency (default: 32)"),
    "beta_slow": ("--yarn-beta-slow", float, "turns below which a pair is divided by s (default: 1)"),
}
FLAGS: dict[str, str] = {field: flag for field, (flag, _kind, _told) in _ROWS.items()}


def add_scaling_flags(parser: argparse.ArgumentParser, told: str) -> None:
    """Add every --yarn-… flag; `told` says what they are for in this command."""
    group = parser.add_argument_group("scaling", told)
    for field, (flag, kind, text) in _ROWS.items():
        group.add_argument(flag, dest=field, type=kind, metavar="N", help=text)
    add_freeze_flag(group)


def add_freeze_flag(parser: argparse._ActionsContainer) -> None:
    """--freeze-at, None where it is not given."""
    text = "dynamic scaling: take the angles of a length of N tokens"
    parser.add_argument("--freeze-at", type=count(1, 2**31 - 1), metavar="N", help=text)


def add_planner_flags(parser: argparse.ArgumentParser) -> None:
    """--bake-rope and --allow-approximate-rope: what the planner may do."""
    parser.add_argument(
        "--bake-rope", choices=("auto", "never", "always"), default="auto",
        help="exact frequencies as a tensor that every llama.cpp program reads (auto: where keys alone cannot carry them)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-approximate-rope",
        action="store_true",
        help="write the nearest where nothing carries the scaling exactly",
    )


def scaling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by RopeScaling's field names."""
    return {field: getattr(args, field) for field in FLAGS if getattr(args, field) is not None}


def count(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return parse


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """--threads, None where it is not given."""
    parser.add_argument("--threads", type=count(1, MAX_THREADS), metavar="N", help="threads (default: all cores)")


def length(text: str) -> int:
    """An argparse type: a number of tokens, such as 4096 or 4k (k: 1024)."""
    digits, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    try:
        value = int(digits) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 4096 or 4k") from None
    if not 1 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 2 to {2**31 - 1}")
    return value


def lengths(text: str) -> list[int]:
    """An argparse type: numbers of tokens, ascending: 2k,4k,8k, or first:last:step as 2k:16k:1k."""
    found: list[int] = []
    for item in text.split(","):
        first, *rest = [length(part) for part in item.split(":")]
        if len(rest) not in (0, 2) or (rest and (rest[0] < first or (rest[0] - first) // rest[1] > 10_000)):
            raise argparse.ArgumentTypeError(f"{item!r} is no length and no first:last:step")
        found += [first] if not rest else range(first, rest[0] + 1, rest[1])
    return sorted(set(found))

"""Flags that several commands share: the same word means the same everywhere, and has the same limits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# --backend NAME -> the names that ggml's backend libraries give themselves.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPU",),
    "cuda": ("CUDA",),
    "metal": ("MTL", "Metal"),
    "vulkan": ("Vulkan",),
}

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
Bake = Literal["auto", "never", "always"]


@dataclass(frozen=True)
class ScalingOverrides:
    """Values that flags put on top of a model's scaling: RopeScaling's fields. None keeps the model's own value.

    freeze_at: the length in tokens whose angles a dynamic scaling takes for good, and LongRoPE's table.
    """

    factor: float | None = None
    original_context: int | None = None
    attention_factor: float | None = None
    ext_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    freeze_at: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The RopeScaling fields that were given, by name."""
        return {name: value for name in FLAGS if (value := getattr(self, name)) is not None}

    def __bool__(self) -> bool:
        """Whether anything was given."""
        return bool(self.fields) or self.freeze_at is not None


@dataclass(frozen=True)
class PlannerOptions:
    """What the planner may write (`yarn_edge.llama_rules.planner`).

    bake: whether exact frequencies become a tensor ("auto": where keys alone cannot carry them). allow_approximate: write the
    nearest form where none is exact.
    """

    bake: Bake = "auto"
    allow_approximate: bool = False


NO_OVERRIDES = ScalingOverrides()
EXACT = PlannerOptions()


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
        "--bake-rope",
        choices=("auto", "never", "always"),
        default="auto",
        help="exact frequencies as a tensor that every llama.cpp program reads (auto: where keys alone cannot carry them)",
    )
    parser.add_argument(
        "--allow-approximate-rope",
        action="store_true",
        help="write the nearest where nothing carries the scaling exactly",
    )


def scaling_overrides(args: argparse.Namespace) -> ScalingOverrides:
    """The values of `add_scaling_flags`."""
    return ScalingOverrides(freeze_at=args.freeze_at, **{name: getattr(args, name) for name in FLAGS})


def planner_options(args: argparse.Namespace) -> PlannerOptions:
    """The values of `add_planner_flags`."""
    return PlannerOptions(args.bake_rope, args.allow_approximate_rope)


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
    parser.add_argument(
        "--threads", type=count(1, MAX_THREADS), metavar="N", help="threads (default: as many as physical cores)"
    )


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


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_size(text: str) -> int:
    """An argparse type: bytes, such as 16GiB, 16G (the same), 16GB (10^9) or 800MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory, such as 16GiB, 16GB or 800MiB")
    unit = match[2].upper()
    factor = _DECIMAL[f"{unit}B"] if unit and (match[3] or "").upper() == "B" else _UNITS[unit]
    value = round(float(match[1]) * factor)
    if not 0 < value < 2**60:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory that a machine has")
    return value


def add_memory_flag(parser: argparse.ArgumentParser) -> None:
    """--memory in bytes, None where it is not given."""
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="what may be used, such as 16GiB or 16GB (default: what is free now, less 1 GiB or an eighth)",
    )


def add_backend_flag(parser: argparse.ArgumentParser) -> None:
    """--backend, None where it may be chosen."""
    parser.add_argument(
        "--backend",
        choices=tuple(BACKENDS),
        help="where all layers and the cache go (default: a GPU that holds them, else the CPU)",
    )


def number_or_auto(text: str) -> float | str:
    """An argparse type: a number of at least 1, or auto."""
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and not auto") from None
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 1000000")
    return value

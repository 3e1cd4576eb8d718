"""Flags that several commands share, with the same meaning and the same limits everywhere."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

# --backend NAME -> the names that ggml's backend libraries use for themselves.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPU",),
    "cuda": ("CUDA",),
    "metal": ("MTL", "Metal"),
    "vulkan": ("Vulkan",),
}

TRUST = "YARN_EDGE_TRUST"  # the environment variable that --trust sets, for the processes of a command too

MAX_THREADS = 512  # ggml.h: GGML_MAX_N_THREADS; more threads end the process


def parse_length(text: str) -> int:
    """A number of tokens, such as 4096 or 4k (k is 1024). Raises ValueError for anything else."""
    digits, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    return int(digits) * unit


def _whole(low: int, high: int, read: Callable[[str], int], what: str) -> Callable[[str], int]:
    """An argparse type: what `read` makes of a text, from `low` to `high`. what: it is called in the error if it is none."""

    def parse(text: str) -> int:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    return _whole(low, high, int, "whole number")


def length_from(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a number of tokens from `low` to `high`, as `parse_length` reads it."""
    return _whole(low, high, parse_length, "number of tokens, such as 4096 or 4k")


length = length_from(2)


# RopeScaling field -> (flag, type, help)
_ROWS: dict[str, tuple[str, Callable[[str], float], str]] = {
    "factor": ("--yarn-factor", float, "s, the new context divided by the original context"),
    "original_context": ("--yarn-orig-ctx", length_from(1), "original context in tokens, before the extension"),
    "attention_factor": ("--yarn-attention-factor", float, "A, the multiplier of cos and sin (default: 0.1 ln s + 1)"),
    "ext_factor": ("--yarn-ext-factor", float, "1 for YaRN, 0 for plain interpolation (default: 1)"),
    "beta_fast": ("--yarn-beta-fast", float, "turns above which a pair keeps its frequency (default: 32)"),
    "beta_slow": ("--yarn-beta-slow", float, "turns below which a pair's frequency is divided by s (default: 1)"),
    "rope_theta": ("--rope-theta", float, "b, the base of the rotation (default: the model's own)"),
}
FLAGS: dict[str, str] = {field: flag for field, (flag, _kind, _help) in _ROWS.items()}
Bake = Literal["auto", "never", "always"]
Reading = Literal["transformers", "multiply"]
READING_FLAG = "--attention-factor-reading"


@dataclass(frozen=True)
class ScalingOverrides:
    """Values on top of a model's scaling: fields of RopeScaling. None keeps the model's own value.

    freeze_at: the length in tokens whose angles a dynamic scaling keeps for all positions, and whose table LongRoPE uses.
    attention_factor_reading: whether an attn_factor that transformers does not read multiplies A.
    """

    factor: float | None = None
    original_context: int | None = None
    attention_factor: float | None = None
    ext_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    rope_theta: float | None = None
    freeze_at: int | None = None
    attention_factor_reading: Reading | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The RopeScaling fields that were given, by name."""
        return {name: value for name in FLAGS if (value := getattr(self, name)) is not None}

    def __bool__(self) -> bool:
        """Whether anything was given."""
        return bool(self.fields) or bool(self.for_checkpoints)

    @property
    def for_checkpoints(self) -> list[str]:
        """The flags given that only a checkpoint's config can answer."""
        given = {"--freeze-at": self.freeze_at, READING_FLAG: self.attention_factor_reading}
        return [flag for flag, value in given.items() if value is not None]


@dataclass(frozen=True)
class PlannerOptions:
    """The forms that the planner may write (`yarn_edge.llama_rules.planner`).

    bake: whether exact frequencies become a tensor ("auto": if keys alone cannot carry them). allow_approximate: write the
    nearest form if none is exact. positions: "portable" for the forms alone that every llama.cpp program runs exactly.
    """

    bake: Bake = "auto"
    allow_approximate: bool = False
    positions: Literal["any", "portable"] = "any"


NO_OVERRIDES = ScalingOverrides()
EXACT = PlannerOptions()


def add_scaling_flags(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add every --yarn-… flag and --rope-theta. purpose: what they are for in this command."""
    group = parser.add_argument_group("scaling", purpose)
    for field, (flag, kind, text) in _ROWS.items():
        group.add_argument(flag, dest=field, type=kind, metavar="N", help=text)
    text = "for dynamic scaling: use the angles of a length of N tokens"
    group.add_argument("--freeze-at", type=length_from(1), metavar="N", help=text)
    group.add_argument(
        READING_FLAG,
        choices=get_args(Reading),
        help="for a checkpoint with an attn_factor that transformers does not read: leave it out of A, or multiply A by it (default: "
        "transformers, with a note)",
    )


def add_planner_flags(parser: argparse.ArgumentParser) -> None:
    """--bake-rope and --allow-approximate-rope: what the planner may do."""
    parser.add_argument(
        "--bake-rope",
        choices=("auto", "never", "always"),
        default="auto",
        help="write exact frequencies as a tensor that every llama.cpp program reads (default: auto, only if keys alone cannot "
        "carry them)",
    )
    parser.add_argument(
        "--positions",
        choices=("any", "portable"),
        default="any",
        help="portable: refuse positions that other llama.cpp programs would run wrong (default: any, with a warning)",
    )
    parser.add_argument(
        "--allow-approximate-rope",
        action="store_true",
        help="write the nearest scaling if no GGUF can carry the exact one",
    )


def scaling_overrides(args: argparse.Namespace) -> ScalingOverrides:
    """The values of `add_scaling_flags`."""
    return ScalingOverrides(
        freeze_at=args.freeze_at,
        attention_factor_reading=args.attention_factor_reading,
        **{name: getattr(args, name) for name in FLAGS},
    )


def planner_options(args: argparse.Namespace) -> PlannerOptions:
    """The values of `add_planner_flags`."""
    return PlannerOptions(args.bake_rope, args.allow_approximate_rope, args.positions)


ATTENTION_CHOICES = ("auto", "fast", "ggml", "flash", "plain")


def add_kv_flags(parser: argparse.ArgumentParser, what: str, default: str | None) -> None:
    """--kv-type, --kv-k, --kv-v, which `yarn_edge.runtime.kv_cache` puts together and checks. what: they are the types of."""
    of_both = "f16, or q8_0 if f16 does not fit" if default is None else default
    add, types = (
        parser.add_argument,
        "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl; two for K and V: q8_0/q4_0",
    )
    add("--kv-type", metavar="TYPE", default=default, help=f"type of {what}: {types} (default: {of_both})")
    for part in ("K", "V"):
        add(f"--kv-{part.lower()}", metavar="TYPE", help=f"type of {part} in it (default: as --kv-type)")


def add_attention_flag(parser: argparse.ArgumentParser) -> None:
    """--attention, which becomes the setting of a context."""
    parser.add_argument(
        "--attention",
        choices=ATTENTION_CHOICES,
        default="auto",
        help="what computes attention. fast: our kernels (on a CPU, with Numba); flash, plain: llama.cpp's; ggml: whichever of "
        "these two suits; auto: from contexts of 4096 tokens on what is fastest here, measured once (default: %(default)s)",
    )


def add_lora_flag(parser: argparse.ArgumentParser, what: str = "the model") -> None:
    """--lora, a list of FILE or FILE=SCALE (`yarn_edge.runtime.lora`). what: the adapters are added to it."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help=f"GGUF adapter to add to {what}, times SCALE (default: 1); may be repeated",
    )


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """--threads, None if it is not given."""
    parser.add_argument(
        "--threads",
        type=count(1, MAX_THREADS),
        metavar="N",
        help="number of threads (default: the number of physical cores)",
    )


class _Trust(argparse.Action):
    """Sets the variable, which the processes that a command starts inherit."""

    def __call__(self, *_given: Any, **_options: Any) -> None:
        os.environ[TRUST] = "1"


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """--trust: for every command that loads a model (`yarn_edge.runtime.first_load`)."""
    parser.add_argument(
        "--trust",
        action=_Trust,
        nargs=0,
        help="load a GGUF that is new on this machine at once, without trying it in a process of its own first",
    )


def lengths(text: str) -> list[int]:
    """An argparse type: numbers of tokens, such as 2k,4k,8k, or first:last:step, such as 2k:16k:1k. Returns them ascending."""
    values: list[int] = []
    for item in text.split(","):
        first, *rest = [length(part) for part in item.split(":")]
        if len(rest) not in (0, 2) or (rest and (rest[0] < first or (rest[0] - first) // rest[1] > 10_000)):
            raise argparse.ArgumentTypeError(f"{item!r} is neither a length nor first:last:step")
        values += [first] if not rest else range(first, rest[0] + 1, rest[1])
    return sorted(set(values))


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_size(text: str) -> int:
    """An argparse type: a size in bytes, such as 16GiB, 16G (the same), 16GB (powers of 10) or 800MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory, such as 16GiB, 16GB or 800MiB")
    unit = match[2].upper()
    factor = _DECIMAL[f"{unit}B"] if unit and (match[3] or "").upper() == "B" else _UNITS[unit]
    value = round(float(match[1]) * factor)
    if not 0 < value < 2**60:
        raise argparse.ArgumentTypeError(f"{text} is not an amount of memory that a machine can have")
    return value


def add_memory_flag(parser: argparse.ArgumentParser) -> None:
    """--memory in bytes, None if it is not given."""
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="memory that may be used, such as 16GiB or 16GB (default: what is free now, minus the smaller of 1 GiB and an eighth)",
    )


_WHERE = "where all layers and the cache go (default: a GPU if they fit there, else the CPU)"


def add_backend_flag(parser: argparse.ArgumentParser, purpose: str = _WHERE) -> None:
    """--backend, None if yarn-edge may choose it."""
    parser.add_argument("--backend", choices=tuple(BACKENDS), help=purpose)


def number_or_auto(text: str) -> float | str:
    """An argparse type: a number of at least 1, or auto."""
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 1000000")
    return value

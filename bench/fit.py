"""`yarn-edge fit MODEL`: what of a model runs on this machine, with which context, cache type and quantization, and why.

A GGUF is simulated by llama.cpp as it is (`yarn_edge.memory_plan`); of what is not made yet (a checkpoint, the
quantizations of a 16-bit GGUF) the headers are planned as `convert` and `quantize` would write them, and simulated. No
weights are read or written.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yarn_edge.flags import add_threads_flag, length
from yarn_edge.llama_api import physical_threads

if TYPE_CHECKING:
    from .fit_search import Fit

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


def total_memory() -> int | None:
    """Bytes of memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def as_json(found: Fit) -> dict[str, Any]:
    """The contract's object."""
    from yarn_edge.memory import available_bytes

    choice, candidate = found.choice, found.candidate
    return {
        "model": str(found.model),
        "machine": {
            "memory_bytes": total_memory(), "free_bytes": available_bytes(),
            "devices": [
                {"name": d.device.name, "backend": d.device.backend, "free_bytes": d.free_bytes,
                 "needed_bytes": d.needed_bytes, "fits": d.fits, "told": d.told}
                for d in found.devices
            ],
        },
        "budget_bytes": found.budget_bytes, "budget": found.budget_told, "most_ctx": found.most_ctx,
        "rows": [
            {"quant": r.candidate.quant, "exists": r.candidate.verb is None, "kv_type": r.kv_type,
             "weights_bytes": r.candidate.file.weight_bytes, "repacked_bytes": r.candidate.weights.repacked,
             "longest_ctx": r.longest_ctx, "total_bytes": r.plan.total_bytes if r.plan else None,
             "tok_per_s_estimate": r.tok_per_s, "refused": r.refused}
            for r in found.rows
        ],
        "choice": None if choice is None or candidate is None else {
            "quant": candidate.quant, **vars(choice.plan), "total_bytes": choice.plan.total_bytes, "reason": found.why,
        },
        "why": found.why, "commands": [list(words) for words in found.command], "tok_per_s_estimate": found.tok_per_s,
        "memory_by_ctx": {kv: [{"ctx": n, "total_bytes": b} for n, b in points] for kv, points in found.curves.items()},
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge fit`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file, or checkpoint folder")
    parser.add_argument(
        "--memory", type=memory_size, metavar="SIZE", help="such as 16GiB or 16GB (default: what is free now)"
    )
    parser.add_argument("--ctx", type=length, metavar="N", help="the context that is needed, such as 16k")
    add_threads_flag(parser)
    from .report import add_output_flags

    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge fit`. Returns 1 where nothing fits."""
    from .fit_speed import Speed

    with Speed(args.threads or physical_threads()) as speed:
        from .fit_search import fit
        from .fit_table import as_report
        from .report import check_outputs, deliver

        check_outputs(args)
        shown = args.json or args.plot is not None or args.report is not None
        found = fit(args.model, speed, memory=args.memory, ctx=args.ctx, threads=args.threads, with_curves=shown)
    deliver(args, as_json(found), as_report(found), [args.model] if args.model.is_file() else [])
    return 0 if found.choice is not None else 1

"""`yarn-edge fit MODEL`: whether a model runs on this machine, with which context, cache type and quantization, and why.

llama.cpp simulates a GGUF as it is (`yarn_edge.memory.plan`). For files that do not exist yet (from a checkpoint, or the
quantizations of a 16-bit GGUF), the headers that `convert` and `quantize` would write are planned and simulated. No weights
are read or written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_backend_flag, add_memory_flag, add_threads_flag, add_trust_flag, length
from yarn_edge.progress import note
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.split_flags import add_split_flags, split_request
from yarn_edge.text_file import read_text

if TYPE_CHECKING:
    from .search import Fit


def fit_json(result: Fit) -> dict[str, Any]:
    """The JSON object of the command."""
    from yarn_edge.runtime.machine import available_bytes, machine_bytes

    chosen, choice, candidate = result.chosen, result.chosen.choice, result.chosen.candidate
    return {
        "model": str(result.model),
        "machine": {"memory_bytes": machine_bytes(), "free_bytes": available_bytes()},
        "budget": "given" if result.given else "free now, less what others need",
        "most_ctx": result.most_ctx,
        "devices": [
            {
                "device": p.name,
                "backend": "CPU" if p.device is None else p.device.backend,
                "budget_bytes": p.budget_bytes,
                "longest_ctx": p.choice.n_ctx if p.choice else 0,
                "why": p.why,
            }
            for p in result.places
        ],
        "rows": [
            {
                "device": p.name,
                "quant": r.candidate.quant,
                "exists": r.candidate.verb is None,
                "kv_type": r.kv_type,
                "weights_bytes": r.candidate.file.weight_bytes,
                "repacked_bytes": r.candidate.weights.repacked,
                "longest_ctx": r.longest_ctx,
                "total_bytes": r.plan.taken_bytes if r.plan else None,
                "tok_per_s_estimate": r.tok_per_s,
                "refused": r.refused,
            }
            for p in result.places
            for r in p.rows
        ],
        "choice": None
        if choice is None or candidate is None
        else {
            "device": chosen.name,
            "quant": candidate.quant,
            **vars(choice.plan),
            "total_bytes": choice.plan.taken_bytes,
            "reason": chosen.why,
        },
        "why": chosen.why,
        "commands": [list(words) for words in result.command],
        "tok_per_s_estimate": chosen.tok_per_s,
        "memory_by_ctx": {
            kv: [{"ctx": n, "total_bytes": b} for n, b in points] for kv, points in chosen.curves.items()
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge fit`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file or checkpoint folder")
    add_memory_flag(parser)
    add_backend_flag(parser)
    parser.add_argument(
        "--ctx",
        type=length,
        metavar="N",
        help="required context, such as 16k (default: what the model was trained for, or what fits)",
    )
    parser.add_argument(
        "--text",
        metavar="TEXT[,TEXT…]",
        help="choose the types of weights and cache by what they cost on such texts, of a checkpoint (needs yarn-edge[fast,hf]; takes "
        "minutes)",
    )
    text = "with --text: file of what the texts showed; read if it is there, else written (as by convert --moments)"
    parser.add_argument("--moments", metavar="FILE", help=text)
    parser.add_argument("-o", "--output", metavar="OUT.gguf", help="with --text: write the file that was chosen")
    add_split_flags(parser)
    add_threads_flag(parser)
    add_trust_flag(parser)
    from yarn_edge.report.deliver import add_output_flags

    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge fit`. Returns 1 if nothing fits."""
    if args.text is not None:
        if split_request(args):
            raise YarnEdgeError("--text chooses types for one machine: leave --rpc and --layers-on out")
        return _best_file(args)
    if args.output is not None:
        raise YarnEdgeError(
            "-o writes a file whose types are chosen by what they cost on a text: pass --text TEXT as well"
        )
    if split_request(args):
        from .split import run as fit_split

        return fit_split(args)
    from .speed import Speed

    with Speed(args.threads or physical_threads()) as speed:
        from yarn_edge.report.deliver import check_outputs, deliver

        from .search import fit
        from .table import fit_report

        check_outputs(args)
        shown = args.json or args.plot is not None or args.report is not None
        result = fit(
            args.model,
            speed,
            memory=args.memory,
            ctx=args.ctx,
            backend=args.backend,
            threads=args.threads,
            with_curves=shown,
        )
    deliver(args, fit_json(result), fit_report(result), [args.model] if args.model.is_file() else [])
    return 0 if result.chosen.choice is not None else 1


def _best_file(args: argparse.Namespace) -> int:
    """--text: one budget for the types of weights and cache. Returns 1 if nothing fits."""
    from yarn_edge.memory.choice import DoesNotFitError
    from yarn_edge.report.deliver import check_outputs, deliver

    from .best_file import FileWanted, best_file
    from .best_table import best_json, best_report

    if args.backend not in (None, "cpu"):
        raise YarnEdgeError(f"--text chooses for the CPU only: leave out --backend {args.backend}")
    if args.model.is_file():
        raise YarnEdgeError(
            f"{args.model}: --text measures sensitivities in transformers: give the checkpoint's folder"
        )
    check_outputs(args)
    texts = {name: read_text(Path(name)) for name in args.text.split(",") if name}
    if not texts:
        raise YarnEdgeError("--text is empty: name one or more texts")
    memory = spare_bytes() if args.memory is None else args.memory
    output = None if args.output is None else Path(args.output)
    moments = None if args.moments is None else Path(args.moments)
    wanted = FileWanted(args.model, texts, memory, args.ctx, output, moments, args.force, args.threads)
    try:
        result = best_file(wanted)
    except DoesNotFitError as error:
        note(str(error))
        return 1
    deliver(args, best_json(result), best_report(result), [])
    return 0

"""`yarn-edge fit` with --rpc or --layers-on: which layers of one GGUF go where, and what each device takes."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.choice import DoesNotFitError, gib
from yarn_edge.memory.placement import Placement, Wanted, place
from yarn_edge.report.deliver import check_outputs, deliver
from yarn_edge.report.report import Report, Table
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.load_log import MIB
from yarn_edge.split_flags import SplitRequest, split_request
from yarn_edge.stdout import write_json, write_text


def run(args: argparse.Namespace) -> int:
    """The plan on stdout. Returns 1 if the model does not fit."""
    check_outputs(args)
    if args.model.is_dir():
        raise YarnEdgeError(f"{args.model}: --rpc and --layers-on plan a GGUF: convert the checkpoint first")
    request = split_request(args)
    wanted = Wanted(args.backend, args.ctx, None, args.memory, args.threads, split=request)
    try:
        placement = place(args.model, wanted)
    except DoesNotFitError as refusal:
        if args.json:
            write_json({"model": str(args.model), "choice": None, "why": str(refusal)})
        else:
            write_text(f"Nothing to recommend: {refusal}\n")
        return 1
    deliver(args, split_json(args.model, placement, request), _report(args.model, placement, request), [args.model])
    return 0


def _command(model: Any, placement: Placement, request: SplitRequest) -> tuple[str, ...]:
    assert isinstance(placement.device, LayerSplit)
    fixed = SplitRequest(request.workers, placement.device.name, request.insecure)
    choice = placement.choice
    return ("yarn-edge", "chat", str(model), *fixed.flags(), "--ctx", str(choice.n_ctx), "--kv-type", choice.kv_type)


def split_json(model: Any, placement: Placement, request: SplitRequest) -> dict[str, Any]:
    """The JSON object."""
    plan = placement.choice.plan
    parts = [vars(p) | {"total_bytes": p.total_bytes, "budget_bytes": placement.budgets[p.device]} for p in plan.parts]
    chosen = {"ctx": plan.n_ctx, "kv_type": plan.kv_type, "parts": parts}
    command = list(_command(model, placement, request))
    return {"model": str(model), "choice": chosen, "why": placement.choice.reason, "commands": [command]}


def _report(model: Any, placement: Placement, request: SplitRequest) -> Report:
    plan = placement.choice.plan
    columns = ("device", "layers", "weights MiB", "cache MiB", "buffers MiB", "other MiB", "total MiB", "of MiB")
    rows: tuple[tuple[str | int | float | None, ...], ...] = tuple(
        (
            f"{p.device} ({p.description})",
            p.layers,
            *(round(n / MIB, 1) for n in (p.weights_bytes, p.kv_bytes, p.compute_bytes, p.other_bytes, p.total_bytes)),
            round(placement.budgets[p.device] / MIB),
        )
        for p in plan.parts
    )
    what = "other: scratch memory and kernels; on the CPU the process. The embeddings are always on the CPU, the output on the last device."
    table = Table(f"{model.name} with {plan.n_ctx} tokens, split", columns, rows, what, digits=4)
    total = gib(sum(p.total_bytes for p in plan.parts))
    sentences = (
        f"{placement.choice.reason}; {total} in all.",
        f"    {shlex.join(_command(model, placement, request))}",
    )
    return Report(f"What goes where: {model.name}", sentences, (table,), ())

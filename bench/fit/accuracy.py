"""How well `fit` predicts memory: the peak resident memory of real loads, each in a process of its own, next to the prediction.

    python -m yarn_edge.bench.fit.accuracy MODEL.gguf… --ctx 512,4k,16k --kv-type f16,q8_0,q4_0

Each combination is loaded and its whole context evaluated, as in `chat`; the prediction comes from another process, as in
`fit`. A prediction fails if it is below the measurement, or more than 5 % above it. With --backend, the memory is that of the
device: free memory before the model is loaded, minus free memory when the context is full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import BACKENDS, add_threads_flag, lengths
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory.placement import device_places
from yarn_edge.progress import bar, note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.report import Report, Table
from yarn_edge.runtime import ggml
from yarn_edge.runtime.machine import peak_resident_bytes

from .fresh_process import in_a_process

MOST_ABOVE = 0.05


@dataclass(frozen=True)
class MeasuredMemory:
    """One combination, in bytes. parts: of the prediction."""

    model: str
    n_ctx: int
    kv_type: str
    predicted_bytes: int
    measured_bytes: int
    parts: dict[str, int]

    @property
    def error(self) -> float:
        """Prediction / measurement - 1: above 0 if too much was predicted."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def ok(self) -> bool:
        """Whether the error is from 0 to MOST_ABOVE."""
        return 0 <= self.error <= MOST_ABOVE


def predict_memory(path: Path, n_ctx: int, kv_type: str, threads: int | None, backend: str = "cpu") -> dict[str, int]:
    """The parts of the plan, and "taken_bytes", as `fit` predicts them."""
    from yarn_edge.memory.plan import Simulation

    with Simulation(path, device=device_places(backend)[0], threads=threads) as simulation:
        plan = simulation.plan(n_ctx, kv_type)
    parts = {name: value for name, value in vars(plan).items() if name.endswith("_bytes") and value is not None}
    return {**parts, "taken_bytes": plan.taken_bytes}


def measure_memory(path: Path, n_ctx: int, kv_type: str, threads: int | None, backend: str = "cpu") -> dict[str, int]:
    """ "peak_bytes" of this process (or of a device) after loading a model and filling its context: prompt, single tokens, draft."""
    from yarn_edge.graph.opening import open_context
    from yarn_edge.memory.plan import OUTPUTS, conversation_settings
    from yarn_edge.runtime.model import Model

    device = device_places(backend)[0]
    before = ggml.device_memory(device)[0] if device else 0
    settings = conversation_settings(read_gguf(path, vocabulary=False), n_ctx, kv_type, device, threads)
    with Model(path, device=device) as model, open_context(model, settings) as context:
        tokens = [int(t) for t in np.random.default_rng(0).integers(0, model.n_vocab, n_ctx)]
        prompt = max(1, n_ctx - OUTPUTS - 8)
        with bar(f"{path.name}, {n_ctx} tokens", n_ctx, "tokens") as advance:
            context.evaluate(tokens[:prompt], 0, advance=advance)
            for at in range(prompt, prompt + 8):
                context.evaluate(tokens[at : at + 1], at)
            context.evaluate(tokens[prompt + 8 :][:OUTPUTS], prompt + 8, "all")  # a draft that is checked
            context.logits_in_place()
        return {"peak_bytes": before - ggml.device_memory(device)[0] if device else peak_resident_bytes()}


def compare_memory(
    path: Path, n_ctx: int, kv_type: str, threads: int | None = None, backend: str = "cpu"
) -> MeasuredMemory:
    """Predict and measure one combination."""
    predicted = in_a_process(predict_memory, path, n_ctx, kv_type, threads, backend)
    measured = in_a_process(measure_memory, path, n_ctx, kv_type, threads, backend)["peak_bytes"]
    return MeasuredMemory(path.name, n_ctx, kv_type, predicted["taken_bytes"], measured, predicted)


def accuracy_report(measured: Sequence[MeasuredMemory]) -> Report:
    """The table, and the largest errors on both sides."""
    mib = 2**20
    rows = tuple(
        (
            m.model,
            m.n_ctx,
            m.kv_type,
            round(m.predicted_bytes / mib, 1),
            round(m.measured_bytes / mib, 1),
            round(100 * m.error, 2),
            "ok" if m.ok else "FAILS",
        )
        for m in measured
    )
    columns = ("model", "context", "cache", "predicted MiB", "measured MiB", "error %", "")
    errors = [100 * m.error for m in measured]
    summary = (
        f"Errors from {min(errors):+.2f} % to {max(errors):+.2f} %; the allowed range is 0 to {100 * MOST_ABOVE:.0f} %."
    )
    return Report("Memory: predicted and measured", (summary,), (Table("Peak resident memory", columns, rows),))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all combinations. Returns 1 if any prediction is below the measurement or too far above it, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="fit.accuracy", description="Compare the memory that fit predicts with real loads."
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="GGUF files")
    parser.add_argument(
        "--ctx", type=lengths, default=[512, 4096, 16384], metavar="N,…", help="context lengths, such as 512,4k,16k"
    )
    parser.add_argument("--kv-type", default="f16,q8_0,q4_0", metavar="TYPE,…", help="cache types")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="cpu", help="device to measure (default: cpu)")
    add_threads_flag(parser)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    try:
        check_outputs(args)
        measured = []
        for path in args.models:
            for n_ctx in args.ctx:
                for kv_type in args.kv_type.split(","):
                    measured.append(compare_memory(path, n_ctx, kv_type, args.threads, args.backend))
                    note(f"{path.name}, {n_ctx} tokens, {kv_type}: {100 * measured[-1].error:+.2f} %")
        rows = [{**asdict(m), "error": m.error, "ok": m.ok} for m in measured]
        deliver(args, {"rows": rows, "most_above": MOST_ABOVE}, accuracy_report(measured), args.models)
    except YarnEdgeError as error:
        sys.stderr.write(f"fit.accuracy: error: {error}\n")
        return 2
    return 0 if all(m.ok for m in measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())

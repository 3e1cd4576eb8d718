"""The fast kernels next to ggml's: weights per second of one core, the error of what they make, how many blocks are the same.

`python -m yarn_edge.bench.peers.kernels MODEL.gguf` takes both kernels in turns on weights of a 16 or 32-bit model, for each
type without importance and with it (random, of each column), and then the model's matrices as a whole, as rows of 256. The
error is the sum of importance times the square of what quantizing changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.convert.kernels.choose import FAST, Kernels, choose_kernels
from yarn_edge.convert.kernels.layout import LAYOUTS, WEIGHTS
from yarn_edge.convert.one_pass import SourceTensor
from yarn_edge.convert.quantize import gguf_source
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_threads_flag
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar
from yarn_edge.report.environment import environment, machine_state
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, type_named
from yarn_edge.runtime.llama_api import physical_threads

SAMPLE_ROWS, SAMPLE_WIDTH = 128, 2048
LIMIT = 1 + 1e-4  # ours / ggml's error, of any tensor
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KernelCase:
    """A type, and whether it is made with importance weights."""

    kind: GGMLType
    important: bool

    def weights(self, width: int) -> Floats | None:
        """Importance of each column, uniformly random."""
        return np.random.default_rng(0).random(width, np.float32) + np.float32(0.01) if self.important else None

    @property
    def told(self) -> str:
        """How tables call it."""
        return self.kind.name + (", importance" if self.important else "")


def matrices(model: Path) -> Iterator[tuple[str, Floats]]:
    """(name, weights as rows of 256) of every matrix; what is left over of the last row is dropped."""
    for tensor in gguf_source(read_gguf(model)).tensors:
        if len(tensor.ne) > 1:
            values = _values(tensor).reshape(-1)
            yield tensor.name, values[: values.size // WEIGHTS * WEIGHTS].reshape(-1, WEIGHTS)


def _values(tensor: SourceTensor) -> Floats:
    raw = np.empty((tensor.n_rows, tensor.kind.row_bytes(tensor.width)), np.uint8)
    tensor.read(0, raw)
    values = np.empty((tensor.n_rows, tensor.width), np.float32)
    dequantize_into(tensor.kind, raw.reshape(-1), values.reshape(-1))
    return values


def _made(kernels: Kernels, case: KernelCase, rows: Floats) -> npt.NDArray[np.uint8]:
    made: npt.NDArray[np.uint8] = kernels.quantize_rows(case.kind, rows, case.weights(rows.shape[1]))
    return made


def speeds(cases: Sequence[KernelCase], sample: Floats, sides: dict[str, Kernels], repeat: int) -> list[dict[str, Any]]:
    """Million weights per second of one core: the median of `repeat`, in turns, after a warm-up; ours / ggml's."""
    rows = []
    with bar("Speed", len(cases)) as advance:
        for case in cases:
            times: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(repeat + 1):
                for side in sorted(sides, reverse=bool(turn % 2)):
                    start = time.perf_counter()
                    _made(sides[side], case, sample)
                    if turn:
                        times[side].append(time.perf_counter() - start)
            rates = {side: sample.size / statistics.median(took) / 1e6 for side, took in times.items()}
            spread = {side: [sample.size / t / 1e6 for t in (max(took), min(took))] for side, took in times.items()}
            rows.append(
                {"case": case.told, "million_per_s": rates, "range": spread, "ratio": rates["fast"] / rates["ggml"]}
            )
            advance(1, case.told)
    return rows


def _compared(case: KernelCase, rows: Floats, sides: dict[str, Kernels]) -> tuple[list[float], int]:
    """([error of ours, of ggml's], blocks that are the same)."""
    made = [_made(sides[side], case, rows) for side in ("fast", "ggml")]
    weights, errors = case.weights(rows.shape[1]), []
    for data in made:
        again = np.empty_like(rows)
        dequantize_into(case.kind, data.reshape(-1), again.reshape(-1))
        again -= rows
        np.square(again, out=again)
        columns = again.sum(axis=0, dtype=np.float64)
        errors.append(float(columns.sum() if weights is None else columns @ weights))
    blocks = [data.reshape(-1, case.kind.block_bytes) for data in made]
    return errors, int((blocks[0] == blocks[1]).all(axis=1).sum())


def errors(cases: Sequence[KernelCase], model: Path, sides: dict[str, Kernels], threads: int) -> list[dict[str, Any]]:
    """Of each case: error of ours over ggml's in all and of the worst matrix; the share of blocks that are the same."""
    tensors = list(matrices(model))
    total = sum(rows.size for _name, rows in tensors) * len(cases)
    found = []
    with bar("Errors", total) as advance, ThreadPoolExecutor(threads) as pool:
        for case in cases:
            results = []
            for (_name, rows), result in zip(
                tensors, pool.map(partial(_compared, case, sides=sides), [rows for _name, rows in tensors]), strict=True
            ):
                results.append(result)
                advance(rows.size, case.told)
            worst = max((_ratio(*e), name) for (e, _same), (name, _rows) in zip(results, tensors, strict=True))
            ours, theirs = (sum(e[side] for e, _same in results) for side in range(2))
            same = sum(n for _e, n in results) / sum(len(rows) for _name, rows in tensors)
            found.append(
                {
                    "case": case.told,
                    "tensors": len(tensors),
                    "error_ratio": _ratio(ours, theirs),
                    "worst_ratio": worst[0],
                    "worst_tensor": worst[1],
                    "same_blocks": same,
                }
            )
    return found


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float(ours > 0) + 1


def main() -> int:
    """Print the tables, or JSON. Returns 1 if the error of any matrix is more than 0.01 % above ggml's."""
    parser = argparse.ArgumentParser(prog="kernel_speed", description="The fast kernels next to ggml's.")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="F32, F16 or BF16")
    parser.add_argument(
        "--types", default=",".join(LAYOUTS), metavar="TYPE[,TYPE…]", help=f"default: {','.join(LAYOUTS)}"
    )
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="turns that count (default: 9)")
    parser.add_argument("--only", choices=("speed", "errors"), help="one of the two (default: both)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_threads_flag(parser)
    args = parser.parse_args()
    try:
        names = args.types.upper().split(",")
        if unknown := [name for name in names if name not in LAYOUTS]:
            raise YarnEdgeError(f"--types: {unknown[0]!r} is none of {', '.join(LAYOUTS)}")
        if args.repeat < 1:
            raise YarnEdgeError("--repeat is below 1")
        cases = [KernelCase(type_named(name), important) for name in names for important in (False, True)]
        sides = {"fast": choose_kernels(FAST, {type_named("Q4_K"): 1}), "ggml": Kernels()}
        found: dict[str, Any] = {"environment": environment([args.model]), **machine_state()}
        if args.only != "errors":
            sample = _sample(args.model)
            found["speed"] = speeds(cases, sample, sides, args.repeat)
        if args.only != "speed":
            found["errors"] = errors(cases, args.model, sides, args.threads or physical_threads())
    except YarnEdgeError as error:
        sys.stderr.write(f"kernel_speed: error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(found) + "\n" if args.json else _tables(found))
    return int(any(row["worst_ratio"] > LIMIT for row in found.get("errors", [])))


def _sample(model: Path) -> Floats:
    """The first weights of the model's matrices behind the embeddings, as rows of 2048."""
    wanted, parts = SAMPLE_ROWS * SAMPLE_WIDTH, []
    for name, rows in matrices(model):
        if name.startswith("blk."):
            parts.append(rows.reshape(-1))
            if sum(part.size for part in parts) >= wanted:
                return np.ascontiguousarray(np.concatenate(parts)[:wanted].reshape(SAMPLE_ROWS, SAMPLE_WIDTH))
    raise YarnEdgeError(f"{model}: has less than {wanted} weights in its blocks")


def _tables(found: dict[str, Any]) -> str:
    told = ""
    if "speed" in found:
        rows = [
            [
                row["case"],
                *(
                    f"{row['million_per_s'][s]:.1f} ({row['range'][s][0]:.1f}-{row['range'][s][1]:.1f})"
                    for s in ("fast", "ggml")
                ),
                f"{row['ratio']:.2f}",
            ]
            for row in found["speed"]
        ]
        told += _markdown(["million weights/s of a core (least-most)", "fast", "ggml", "ratio"], rows) + "\n"
    if "errors" in found:
        rows = [
            [row["case"], f"{100 * row['same_blocks']:.4f} %", f"{row['error_ratio']:.7f}", f"{row['worst_ratio']:.7f}"]
            for row in found["errors"]
        ]
        told += _markdown(["all matrices", "same blocks", "error, fast / ggml", "worst matrix"], rows) + "\n"
    return told + (f"{found['busy']}\n" if found["busy"] else "")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

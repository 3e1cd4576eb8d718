"""The fast kernels next to ggml's: weights per second of one core, the error of what they make, how many blocks are the same.

`python -m yarn_edge.bench.peers.kernels MODEL.gguf` runs both kernels in turns on weights of a 16- or 32-bit model, for each
type without importance and with it (random, one value per column), and then on the model's matrices as a whole, as rows of 256.
The error is the sum of importance times the square of what quantizing changed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.convert.gguf_source import gguf_source
from yarn_edge.convert.kernels.choose import FAST, Kernels, choose_kernels
from yarn_edge.convert.kernels.layout import LAYOUTS, WEIGHTS
from yarn_edge.convert.one_pass import SourceTensor
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, type_named

from .race import Race, Results
from .turns import in_turns, markdown

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
    def name(self) -> str:
        """Its name in tables."""
        return self.kind.name + (", importance" if self.important else "")


def matrices(model: Path) -> Iterator[tuple[str, Floats]]:
    """(name, weights as rows of 256) of every matrix; the rest that does not fill a row is dropped."""
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


def _seconds(kernels: Kernels, case: KernelCase, rows: Floats) -> float:
    start = time.perf_counter()
    _made(kernels, case, rows)
    return time.perf_counter() - start


def kernel_rates(
    cases: Sequence[KernelCase], sample: Floats, sides: dict[str, Kernels], repeat: int
) -> list[dict[str, Any]]:
    """Million weights per second of one core: the median of `repeat` turns after a warm-up; ours / ggml's."""
    rows = []
    with bar("Speed", len(cases)) as advance:
        for case in cases:
            calls = {side: partial(_seconds, kernels, case, sample) for side, kernels in sides.items()}
            times = in_turns("Speed", calls, repeat, warm_up=True)
            rates = {side: sample.size / statistics.median(took) / 1e6 for side, took in times.items()}
            spread = {side: [sample.size / t / 1e6 for t in (max(took), min(took))] for side, took in times.items()}
            row = {"case": case.name, "million_per_s": rates, "range": spread, "ratio": rates["fast"] / rates["ggml"]}
            rows.append(row)
            advance(1, case.name)
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


def kernel_errors(
    cases: Sequence[KernelCase], model: Path, sides: dict[str, Kernels], threads: int
) -> list[dict[str, Any]]:
    """For each case: error of ours over ggml's, of all matrices and of the worst; the share of blocks that are the same."""
    tensors = list(matrices(model))
    names, all_rows = zip(*tensors, strict=True)
    compared = []
    with (
        bar("Errors", sum(rows.size for rows in all_rows) * len(cases)) as advance,
        ThreadPoolExecutor(threads) as pool,
    ):
        for case in cases:
            results = []
            for rows, result in zip(all_rows, pool.map(partial(_compared, case, sides=sides), all_rows), strict=True):
                results.append(result)
                advance(rows.size, case.name)
            worst, tensor = max((_ratio(*e), name) for (e, _same), name in zip(results, names, strict=True))
            ours, theirs = (sum(e[side] for e, _same in results) for side in range(2))
            same = sum(n for _e, n in results) / sum(len(rows) for rows in all_rows)
            row = {"case": case.name, "tensors": len(tensors), "error_ratio": _ratio(ours, theirs)}
            compared.append(row | {"worst_ratio": worst, "worst_tensor": tensor, "same_blocks": same})
    return compared


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float(ours > 0) + 1


def _sample(model: Path) -> Floats:
    """The first weights of the model's matrices after the embeddings, as rows of 2048."""
    wanted, parts = SAMPLE_ROWS * SAMPLE_WIDTH, []
    for name, rows in matrices(model):
        if name.startswith("blk."):
            parts.append(rows.reshape(-1))
            if sum(part.size for part in parts) >= wanted:
                return np.ascontiguousarray(np.concatenate(parts)[:wanted].reshape(SAMPLE_ROWS, SAMPLE_WIDTH))
    raise YarnEdgeError(f"{model}: has less than {wanted} weights in its blocks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add, types = parser.add_argument, ",".join(LAYOUTS)
    add("model", type=Path, metavar="MODEL.gguf", help="a file in F32, F16 or BF16")
    add("--types", default=types, metavar="TYPE[,TYPE…]", help=f"types to make (default: {types})")
    add("--only", choices=("speed", "errors"), help="measure one of the two (default: both)")


def run(args: argparse.Namespace, results: Results) -> None:
    """Speed, then errors."""
    names = args.types.upper().split(",")
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise YarnEdgeError(f"--types: {unknown[0]!r} is none of {', '.join(LAYOUTS)}")
    cases = [KernelCase(type_named(name), important) for name in names for important in (False, True)]
    sides = {"fast": choose_kernels(FAST, {type_named("Q4_K"): 1}), "ggml": Kernels()}
    if args.only != "errors":
        results["speed"] = kernel_rates(cases, _sample(args.model), sides, args.repeat)
    if args.only != "speed":
        results["errors"] = kernel_errors(cases, args.model, sides, args.threads)


def _tables(results: Results) -> str:
    tables = []
    if "speed" in results:
        rows = []
        for row in results["speed"]:
            rates, spread = row["million_per_s"], row["range"]
            shown = (f"{rates[s]:.1f} ({spread[s][0]:.1f}-{spread[s][1]:.1f})" for s in ("fast", "ggml"))
            rows.append([row["case"], *shown, f"{row['ratio']:.2f}"])
        tables.append(markdown(["million weights/s of a core (min-max)", "fast", "ggml", "ratio"], rows))
    if "errors" in results:
        rows = [
            [row["case"], f"{100 * row['same_blocks']:.4f} %", f"{row['error_ratio']:.7f}", f"{row['worst_ratio']:.7f}"]
            for row in results["errors"]
        ]
        tables.append(markdown(["all matrices", "same blocks", "error, fast / ggml", "worst matrix"], rows))
    return "\n".join(tables)


def _passed(results: Results) -> bool:
    return all(row["worst_ratio"] <= LIMIT for row in results.get("errors", []))


WHAT = "The fast kernels next to ggml's. Fails if the error of any matrix is more than 0.01 % above ggml's."
RACE = Race("kernels", WHAT, add_arguments, run, _tables, _passed, repeat=9)

if __name__ == "__main__":
    raise SystemExit(RACE.main())

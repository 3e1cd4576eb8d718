"""The error of every layer's attention: ggml's flash attention and our kernels next to float64.

`python -m yarn_edge.bench.evidence.attention_error FILE.gguf [--depth 4096]`: a context is filled, and behind it one token, eight and
512 are evaluated. At each FLASH_ATTN_EXT node ggml's result is read, our kernel computes the node again, and both are compared with
the exact result from the same queries and the same cached values.
"""

from __future__ import annotations

import argparse
import ctypes

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.compiled import kernel_of
from yarn_edge.attention.kernel_shapes import kernel_shapes, work_floats
from yarn_edge.attention.node import DATA, PARAMS, give_to_kernel
from yarn_edge.attention.self_check import exact_attention
from yarn_edge.attention.work import WorkArea
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count
from yarn_edge.graph.opening import open_context
from yarn_edge.graph.tap import GraphTap
from yarn_edge.progress import bar
from yarn_edge.report.report import Table
from yarn_edge.report.tables import table_text
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import TensorPointer, TensorStruct, op_number, read_tensor
from yarn_edge.runtime.model import Model
from yarn_edge.stdout import write_text

from ..standalone import run_module

QUERIES = (1, 8, 512)
_EXACT_ROWS = 8  # of which float64 is computed
_BYTES = ctypes.sizeof(TensorStruct)


class _Errors(GraphTap):
    """Compares each node while `on`: errors[n] has (ggml's, ours) for n queries."""

    def __init__(self, model: Model, settings: ContextSettings) -> None:
        self.on = False
        self.errors: dict[int, list[tuple[float, float]]] = {n: [] for n in QUERIES}
        self._op = op_number(b"FLASH_ATTN_EXT")
        shapes = {shape for _, shape in kernel_shapes(model.gguf, settings.kv_type)}
        if len(shapes) != 1:
            raise YarnEdgeError(f"{model.path}: has heads of several sizes")
        self._kernel = kernel_of(next(iter(shapes)))
        self._area = WorkArea(1, *work_floats(model.gguf, settings))

    def see(self, address: int, asking: bool) -> bool:
        """Asks for every node of flash attention, and compares it when it is computed."""
        if TensorStruct.from_address(address).op != self._op:
            return False
        if not asking:
            self._compare(address)
        return self.on if asking else True

    def _compare(self, address: int) -> None:
        node = ctypes.cast(address, TensorPointer)
        q, k, v, mask = (read_tensor(node.contents.src[i], kind) for i, kind in enumerate(("f4", "f2", "f2", "f2")))
        theirs = read_tensor(node, np.float32)[0]  # (queries, heads, d)
        ours = self._ours(address, theirs)
        n = theirs.shape[0]
        rows = np.unique(np.linspace(0, n - 1, _EXACT_ROWS).astype(int))
        scale = np.frombuffer(ctypes.string_at(address + PARAMS, 4), np.float32)[0]
        q, k, v = (x[0].swapaxes(0, 1) for x in (q[:, :, rows], k, v))
        exact = exact_attention(q, k, v, mask[0, 0][rows], float(scale))
        size = np.square(exact).sum()
        errors = [float(np.sqrt(np.square(one[rows] - exact).sum() / size)) for one in (theirs, ours)]
        self.errors[n].append((errors[0], errors[1]))

    def _ours(self, address: int, like: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Our kernel's result for a copy of the node."""
        copied = np.frombuffer(ctypes.string_at(address, _BYTES), np.uint8).copy()
        result = np.zeros_like(like)
        give_to_kernel(copied.ctypes.data, self._kernel.address, self._area.address)
        copied[DATA : DATA + 8].view(np.int64)[0] = result.ctypes.data
        self._kernel.ctypes(copied.ctypes.data, 0, 1, self._area.address)
        return result


def errors_of(path: str, depth: int, threads: int | None = None) -> dict[int, list[tuple[float, float]]]:
    """By number of queries: (ggml's error, ours) of each layer, root mean squares relative to the exact result's."""
    with Model(path) as model:
        settings = ContextSettings(n_ctx=depth + max(QUERIES), n_batch=max(QUERIES), threads=threads, attention="flash")
        tap = _Errors(model, settings)
        text = np.random.default_rng(0).integers(0, model.n_vocab, depth + max(QUERIES)).tolist()
        with open_context(model, settings, tap=tap) as context:
            with bar("reading", depth, "tokens") as advance:
                context.evaluate(text[:depth], 0, "none", advance)
            tap.on = True
            for n in QUERIES:
                context.keep(depth)
                context.evaluate(text[depth : depth + n], depth)
        return tap.errors


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FILE.gguf", help="a model with heads of one size")
    parser.add_argument(
        "--depth", type=count(64, 1 << 20), default=4096, metavar="N", help="cached tokens (default: 4096)"
    )


def _run(args: argparse.Namespace) -> int:
    rows = []
    for n, pairs in errors_of(args.model, args.depth).items():
        theirs, ours = np.array(pairs).T
        worse = int((ours > theirs).sum())
        rows.append(
            (n, len(pairs), float(np.median(theirs)), float(np.median(ours)), float((theirs / ours).min()), worse)
        )
    heads = ("queries", "layers", "flash", "ours", "least flash / ours", "layers where ours is worse")
    write_text(table_text(Table("", heads, tuple(rows), digits=3)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_module("evidence.attention_error", "Errors of attention.", _add_arguments, _run))

"""Sums of the squared inputs of every weight matrix, collected while a model is evaluated.

Which multiplications count, and how experts and 3-D weights are separated, follows llama.cpp (tools/imatrix/imatrix.cpp,
collect_imatrix). Three things differ: weights that share an input (q, k, v; gate, up) share its sums; sums are made in blocks
and added up in float64; and a graph is abandoned after the last multiplication that counts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.graph.tap import GraphTap
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.ggml import TYPE_F32, TYPE_I32, TensorStruct, function, op_number, read_tensor

from .matrix import Importance

MIN_ROWS = 16  # as in llama-imatrix: fewer rows are not a prompt
OUTPUT_WEIGHT = b"output.weight"
_LAST_NODE = b"result_norm"  # llama.cpp's name in nearly every graph; only the output matrix follows
_BLOCK_ROWS = 64  # rows that are summed in float32, with an error of 1e-7
_DTYPES = {TYPE_F32: np.float32, TYPE_I32: np.int32}


@dataclass(frozen=True)
class Squares:
    """sums: (n_mat, width) sums of squares, one row for each matrix of a weight. counts: (n_mat,) rows by expert, or (1,)."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


class ActivationTap(GraphTap):
    """Measures what is evaluated in the context that has its `callback`. with_output: include output.weight."""

    def __init__(self, *, with_output: bool = False) -> None:
        self.with_output = with_output
        self._squares: dict[str, Squares] = {}
        self._evaluated: Callable[[int], None] = lambda _n_tokens: None
        self._mul_mat, self._mul_mat_id = op_number(b"MUL_MAT"), op_number(b"MUL_MAT_ID")
        self._in_this_graph: set[bytes] = set()
        self._input: tuple[int, ...] = ()
        self._of_input: Squares

    def measure(
        self, context: Context, sequences: Sequence[Sequence[int]], advance: Callable[[float], None] = lambda _n: None
    ) -> dict[str, Squares]:
        """Evaluate sequences of equal length, each from position 0 on. Returns the squares of each weight by name.

        advance: called with the tokens of each finished graph. Raises YarnEdgeError, naming the weight, for inputs that are not
        finite.
        """
        left = [sum(map(len, sequences))]

        def evaluated(n_tokens: int) -> None:
            left[0] -= n_tokens
            advance(n_tokens)

        self._squares, self._evaluated = {}, evaluated
        self._new_graph()
        with self.watching(context):
            context.clear()
            context.evaluate_side_by_side(sequences)
        if left[0]:  # graphs without the node that marks their end
            advance(left[0])
        return self._squares

    def see(self, address: int, asking: bool) -> bool:
        """See `GraphTap`. It asks for the first multiplication with each input, and reuses its sums for the others."""
        node = TensorStruct.from_address(address)
        if node.op not in (self._mul_mat, self._mul_mat_id):
            return node.name == _LAST_NODE and (asking or self._end(node))
        weight, x = node.src[0].contents, node.src[1].contents
        name = weight_name(weight.name)
        if not self._counts(node.op, name, x):
            return False
        key = self._key(node, weight)
        if asking:
            if name in self._in_this_graph:  # the name comes again: a new graph
                self._new_graph()
            if key != self._input:
                return True
        else:
            squares = self.squares_of(node, name)
            if not np.isfinite(squares.sums).all():
                raise YarnEdgeError(
                    f"{weight_text(name)}: its input has values that are infinite, NaN, or too large to be squared"
                )
            self._input, self._of_input = key, squares
        self.add(name, self._of_input)
        return not asking

    def squares_of(self, node: Any, _name: bytes) -> Squares:
        """Sum the input of a multiplication that was computed."""
        return _expert_squares(node) if node.op == self._mul_mat_id else _dense_squares(node)

    def _counts(self, op: int, name: bytes, x: Any) -> bool:
        if op == self._mul_mat_id:
            return True
        if x.ne[1] < MIN_ROWS or x.type != TYPE_F32:
            return False
        return name.startswith(b"blk.") or (self.with_output and name == OUTPUT_WEIGHT)

    @staticmethod
    def _key(node: Any, weight: Any) -> tuple[int, ...]:
        """What the sums depend on: the input, which rows go to which expert, and the number of matrices."""
        inputs = (ctypes.cast(source, ctypes.c_void_p).value or 0 for source in node.src[1:3])
        return (*inputs, weight.ne[2], weight.ne[3])

    def add(self, name: bytes, new: Squares) -> None:
        """Add the sums of an input to those of one weight that is multiplied with it."""
        self._in_this_graph.add(name)
        weight = weight_text(name)
        held = self._squares.get(weight)
        if held is None:
            self._squares[weight] = new
        elif held.sums.shape != new.sums.shape or held.counts.shape != new.counts.shape:
            raise YarnEdgeError(f"{weight}: is multiplied with inputs of different shapes")
        else:
            self._squares[weight] = Squares(held.sums + new.sums, held.counts + new.counts)

    def _end(self, node: Any) -> bool:
        self._new_graph()
        self._evaluated(node.ne[1] * node.ne[2] * node.ne[3])
        return self.with_output  # without it, the multiplication with the output matrix can be skipped

    def _new_graph(self) -> None:
        """Forget the last input: tensors of another graph may have the same addresses."""
        self._in_this_graph.clear()
        self._input = ()


def importances(squares: Mapping[str, Squares]) -> dict[str, Importance]:
    """Squares in the form of an importance matrix."""
    return {name: Importance(s.sums.reshape(len(s.counts), -1), s.counts) for name, s in squares.items()}


def weight_name(name: bytes) -> bytes:
    """A weight's name without what ggml's scheduler adds, as in CUDA0#blk.0.attn_k.weight#0."""
    parts = name.split(b"#", 2)
    return parts[1] if len(parts) > 1 else name


def weight_text(name: bytes) -> str:
    return name.decode("utf-8", errors="surrogateescape")


def tensor_values(tensor: Any) -> npt.NDArray[Any]:
    """A tensor's values, shape (ne3, ne2, ne1, ne0): a view of main memory, or a copy from a device."""
    fields = tensor.contents
    dtype = _DTYPES.get(fields.type)
    if dtype is None or fields.nb[0] != np.dtype(dtype).itemsize:
        raise YarnEdgeError(f"the graph multiplies with {weight_text(fields.name)} of type {fields.type}")
    if not function("ggml_backend_buffer_name")(fields.buffer).startswith(b"CPU"):
        return read_tensor(tensor, dtype)
    ne, nb = list(fields.ne), list(fields.nb)
    span = sum((n - 1) * step for n, step in zip(ne, nb, strict=True)) + nb[0]
    raw = (ctypes.c_char * span).from_address(fields.data)
    return np.ndarray(tuple(reversed(ne)), dtype, raw, strides=tuple(reversed(nb)))


def _column_squares(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """rows (n, width) -> (width,) sums of squares."""
    total = np.zeros(rows.shape[1])
    with np.errstate(all="ignore"):
        for at in range(0, len(rows), _BLOCK_ROWS):
            block = rows[at : at + _BLOCK_ROWS]
            total += np.einsum("ij,ij->j", block, block)
    return total


def _dense_squares(node: Any) -> Squares:
    """The squares of a MUL_MAT: slice (i3, i2) of the input meets matrix (i3 % ne3, i2 % ne2) of the weight."""
    weight, x = node.src[0].contents, tensor_values(node.src[1])
    n2, n3 = weight.ne[2], weight.ne[3]
    sums = np.zeros((n3 * n2, x.shape[3]))
    for i3, i2 in np.ndindex(x.shape[:2]):
        sums[(i3 % n3) * n2 + i2 % n2] += _column_squares(x[i3, i2])
    return Squares(sums, np.array([x[..., 0].size // len(sums)], np.int64))


def _expert_squares(node: Any) -> Squares:
    """The squares of a MUL_MAT_ID."""
    n_expert, x = node.src[0].contents.ne[2], tensor_values(node.src[1])
    sums, counts = np.zeros((n_expert, x.shape[3])), np.zeros(n_expert, np.int64)
    for expert, rows in expert_rows(node):
        sums[expert], counts[expert] = _column_squares(rows), len(rows)
    return Squares(sums, counts)


def expert_rows(node: Any) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(expert, its rows of the input) of a MUL_MAT_ID, for those that have some.

    Row (token, slot) of the input goes to expert ids[token, slot]. One row may serve all slots.
    """
    n_expert = node.src[0].contents.ne[2]
    ids, x = tensor_values(node.src[2])[0, 0], tensor_values(node.src[1])
    if x.shape[0] != 1 or len(ids) != x.shape[1]:
        raise YarnEdgeError(
            f"{weight_text(weight_name(node.src[0].contents.name))}: experts with an input of shape {x.shape}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < n_expert:
        raise YarnEdgeError(f"there are {n_expert} experts, but the graph uses number {one_line(str(ids.max()))}")
    n_used = ids.shape[1]
    counts = np.bincount(ids.ravel(), minlength=n_expert)
    order = np.argsort(ids.ravel(), kind="stable")
    tokens, slots = order // n_used, order % x.shape[2]
    at = 0
    for expert in np.flatnonzero(counts):
        rows = slice(at, at := at + counts[expert])
        yield int(expert), x[0, tokens[rows], slots[rows]]

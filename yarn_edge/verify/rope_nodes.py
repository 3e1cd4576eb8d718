"""Reads the live graph: every ROPE node of a real evaluation, with its parameters, inputs and outputs.

A rope may overwrite its own input, so the input is copied in the asking call (`yarn_edge.graph.callback`). For the input to be
ready by then, every node is computed separately. That is slow, but does not matter for a few dozen tokens.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.graph.tap import GraphTap
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import TensorPointer, function, op_number, read_tensor
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.rope_kernel import RopeArguments

_NAME = re.compile(r"^(?P<which>[A-Za-z_]*)-(?P<layer>\d+)")


@dataclass(frozen=True)
class RopeNode:
    """One rope as it was computed. positions: (n,). x, y: input and output, (n, n_heads, head_dim) float32. factors: (D/2,).

    buffer: ggml's name for the memory that holds the result ("CPU", "CUDA0", …).
    """

    name: str
    layer: int
    arguments: RopeArguments
    positions: npt.NDArray[np.int32]
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32] | None
    buffer: str = ""


class _Recorder(GraphTap):
    def __init__(self) -> None:
        self.nodes: list[RopeNode] = []
        self.inputs: dict[int, Any] = {}
        self.rope_op = op_number(b"ROPE")

    def see(self, address: int, asking: bool) -> bool:
        tensor = ctypes.cast(address, TensorPointer)
        if tensor.contents.op == self.rope_op:
            if asking:
                self.inputs[address] = self._input(tensor)
            else:
                self._record(tensor, *self.inputs.pop(address))
        return True

    @staticmethod
    def _input(tensor: Any) -> tuple[Any, Any, Any]:
        source = tensor.contents.src
        factors = read_tensor(source[2], np.float32).ravel() if source[2] else None
        return read_tensor(source[0], np.float32)[0], read_tensor(source[1], np.int32).ravel(), factors

    def _record(self, tensor: Any, x: Any, positions: Any, factors: Any) -> None:
        name = tensor.contents.name.decode(errors="replace")
        match = _NAME.match(name)
        arguments = RopeArguments.from_node(tensor.contents.op_params)
        y = read_tensor(tensor, np.float32)[0]
        before = self.nodes[-1].layer if self.nodes else -1  # some K nodes have no name
        layer = int(match["layer"]) if match else before
        buffer = tensor.contents.buffer
        where = function("ggml_backend_buffer_name")(buffer).decode(errors="replace") if buffer else ""
        # Axes have positions of their own, one after another; text has those of the first.
        self.nodes.append(RopeNode(name, layer, arguments, positions[: len(x)], x, y, factors, where))


def record_ropes(
    model: Model,
    tokens: Sequence[int],
    starts: Sequence[int],
    arguments: RuntimeArguments | None = None,
    threads: int | None = None,
    at_least: int = 64,
) -> list[RopeNode]:
    """Evaluate `tokens` from each position of `starts` on, each time in an empty cache. Returns all ROPE nodes.

    arguments: scaling values for the context; by default the file's own, spelled out by our loader. at_least: the context's size.
    """
    recorder = _Recorder()
    n_ctx = max(at_least, len(tokens))
    settings = ContextSettings(
        n_ctx=n_ctx,
        n_batch=max(64, len(tokens)),
        kv_type="f32",
        arguments=arguments,
        threads=threads,
        attention="plain",
    )
    with open_context(model, settings, tap=recorder) as context:
        for start in starts:
            context.clear()
            with recorder.watching(context):
                context.evaluate(tokens, start, "last")
    if not recorder.nodes:
        raise YarnEdgeError(f"{model.path}: no ROPE node in the graph of architecture {model.gguf.architecture}")
    return recorder.nodes

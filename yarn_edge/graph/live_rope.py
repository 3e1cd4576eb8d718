"""Exact positions in the live graph: every ROPE node is given its frequencies, as divisors, and A.

llama.cpp builds a node from its own rules (`yarn_edge.llama_rules`), which cannot say everything. ggml's rope kernel can: with
ext_factor 0 and a table of divisors (src[2]) it computes any angles (ggml.c, ggml_rope_ext). Which layer a node belongs to is
known from its place, two for each rotated layer (queries, keys), and compared with its name.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.rope_edit import COUNT, ERROR, FOUND, HEAD, ROW_WIDTH, edit_node
from yarn_edge.llama_rules.effective import LivePositions
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.layers import layer_kinds
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.ggml import TensorStruct, function, op_number
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.rope_kernel import BY_AXES, ROPE_MODES, rope, rope_arguments

_WORDS = ctypes.sizeof(TensorStruct) // 4
_NODES_PER_LAYER = 2
_REASONS = {
    1: "rotates {found} dimensions, not {expected}",
    2: "pairs dimensions in mode {found}, not {expected}",
    3: "belongs to layer {found}, not {expected}",
}


class LiveRopes:
    """The edit of one context: puts `live` into the ROPE nodes of `model`. `close` frees its tables.

    compiled: use Numba where it is installed and the model is on the CPU.

    Raises YarnEdgeError if the model's device has no rope kernel that takes a table of divisors.
    """

    def __init__(self, model: Model, live: LivePositions, *, compiled: bool = True) -> None:
        self.live: LivePositions | None = live
        self.op = op_number(b"ROPE")
        self._model, file = model, model.positions.file
        by_kind: dict[str, RopeScaling | None] = {"full": live.full, "sliding": live.sliding}
        kinds = [(i, kind) for i, kind in enumerate(layer_kinds(file, model.n_layer)) if kind != "unrotated"]
        rules = honoured(file.architecture)
        self._mode = BY_AXES if rules.by_axes else ROPE_MODES[rules.pairing]
        scalings = [by_kind[kind] for _layer, kind in kinds]
        self._tables: dict[ggml.Device | None, _Tables] = {}
        # The type of a device's memory -> the table of each row there: llama.cpp may compute a layer's rotation on a neighbor's device.
        self._there: dict[int, list[int]] = {}
        try:
            self._tables[None] = _Tables(ggml.cpu_device())
            for device in model.devices:
                if device.kind != "cpu":
                    self._there[ggml.memory_type(device)] = self._tables_on(device, scalings)
            rows = [self._row(layer, scaling) for (layer, _kind), scaling in zip(kinds, scalings, strict=True)]
        except BaseException:
            self.close()
            raise
        self._nodes = _NODES_PER_LAYER * len(rows)
        head = [0] * HEAD
        self._state = np.array([*head, *(value for row in rows for value in row)], np.int64)
        self._state[HEAD - 2 : HEAD] = self.op, len(rows)
        callback = _compiled() if compiled and model.device is None else None
        self.compiled = None if callback is None else (callback, self._state.ctypes.data)

    def _row(self, layer: int, scaling: RopeScaling | None) -> list[int]:
        """What the nodes of a layer are given; a table of 0 leaves them as they are."""
        if scaling is None:
            return [layer, 0, 0, self._mode, 0, 0, 0]
        bits = _bits(scaling.rope_theta), _bits(scaling.attention_factor)
        return [layer, self._tables[None].of(scaling), 0, self._mode, scaling.dim, *bits]

    def _tables_on(self, device: ggml.Device, scalings: Sequence[RopeScaling | None]) -> list[int]:
        """Tables in a device's memory, 0 where there is no scaling. Raises YarnEdgeError if its kernel takes none."""
        self._tables[device] = _Tables(device)
        rules = honoured(self._model.gguf.architecture)
        for scaling in {s.frequency_factors: s for s in scalings if s is not None}.values():
            x = np.ones((1, 1, scaling.dim), np.float32)
            arguments = rope_arguments(scaling, rules.pairing, rules.sections(scaling.dim))
            rope(x, [0], arguments, device, scaling.frequency_factors)
        return [0 if scaling is None else self._tables[device].of(scaling) for scaling in scalings]

    def edit(self, address: int) -> bool:
        """See `GraphEdit`."""
        words = np.ctypeslib.as_array((ctypes.c_int32 * _WORDS).from_address(address))
        return edit_node(words, words.view(np.int64), words.view(np.int8), self._state, self._on_device(address))

    def _on_device(self, address: int) -> bool:
        """Whether a node is in a device's memory, whose table its row then has. Raises YarnEdgeError if there is none there."""
        if not self._there:
            return False
        buffer = TensorStruct.from_address(address).buffer
        if not buffer or function("ggml_backend_buffer_is_host")(buffer):
            return False
        tables = self._there.get(function("ggml_backend_buffer_get_type")(buffer))
        if tables is None:
            name = function("ggml_backend_buffer_name")(buffer).decode(errors="replace")
            raise YarnEdgeError(
                f"{self._model.path}: llama.cpp computes a rotation in {name}, where live positions have no table"
            )
        row = int(self._state[COUNT]) // _NODES_PER_LAYER % len(tables)
        self._state[HEAD + row * ROW_WIDTH + 2] = tables[row]
        return True

    def begin(self) -> None:
        """See `GraphEdit`."""
        self._state[COUNT] = self._state[ERROR] = 0

    def check(self, complete: bool) -> None:
        """See `GraphEdit`."""
        count, error = int(self._state[COUNT]), int(self._state[ERROR])
        shape = f"{self._model.path}: the graph of architecture {self._model.gguf.architecture} has another shape than expected"
        if error:
            found, expected = (int(v) for v in self._state[FOUND : FOUND + 2])
            raise YarnEdgeError(f"{shape}: ROPE node {count} {_REASONS[error].format(found=found, expected=expected)}")
        if complete and (count % self._nodes or not count):
            raise YarnEdgeError(f"{shape}: {count} ROPE nodes, expected {self._nodes} for each evaluation")

    def close(self) -> None:
        """Free the tables. The context must be closed first."""
        for tables in self._tables.values():
            tables.close()


class _Tables:
    """Tables of divisors in the memory of one device."""

    def __init__(self, device: ggml.Device) -> None:
        self._device = device
        self._tensors: dict[tuple[float, ...], int] = {}
        self._arenas: list[Any] = []
        self._buffers: list[Any] = []
        self._backend = function("ggml_backend_dev_init")(ggml.device_handle(device), None)
        if not self._backend:
            raise YarnEdgeError(f"device {device.name} cannot be started")

    def of(self, scaling: RopeScaling) -> int:
        """The address of the tensor that holds the divisors of `scaling`."""
        factors = scaling.frequency_factors
        assert factors is not None
        if factors not in self._tensors:
            self._tensors[factors] = self._made(np.asarray(factors, np.float32))
        return self._tensors[factors]

    def _made(self, values: npt.NDArray[np.float32]) -> int:
        self._arenas.append(ggml.new_arena(1))
        tensor = function("ggml_new_tensor_1d")(self._arenas[-1], ggml.TYPE_F32, len(values))
        buffer = function("ggml_backend_alloc_ctx_tensors")(self._arenas[-1], self._backend)
        if not buffer:
            raise YarnEdgeError(f"device {self._device.name} has no memory for a table of {len(values)} frequencies")
        self._buffers.append(buffer)
        function("ggml_backend_tensor_set")(tensor, values.ctypes.data, 0, values.nbytes)
        return ctypes.addressof(tensor.contents)

    def close(self) -> None:
        for buffer in self._buffers:
            function("ggml_backend_buffer_free")(buffer)
        for arena in self._arenas:
            function("ggml_free")(arena)
        if self._backend is not None:
            function("ggml_backend_free")(self._backend)
        self._buffers, self._arenas, self._backend = [], [], None


def _bits(value: float) -> int:
    """The bits of a float32, as an int32."""
    return int(np.float32(value).view(np.int32))


@cache
def _compiled() -> Any:
    """The callback without Python; None where Numba is not installed, or cannot be used, which a note says."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from yarn_edge.graph.compiled import compiled_callback

        return compiled_callback()
    except Exception as error:  # a broken installation of Numba, an unsupported processor, a disk error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note(f"note: Numba cannot be used here ({reason}): positions are put into the graph by Python, which is slower")
        return None

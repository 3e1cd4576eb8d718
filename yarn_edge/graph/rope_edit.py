"""What is done to one ROPE node, on arrays alone: Python runs it as it is, and Numba compiles it.

state (int64): HEAD values, then a row of ROW_WIDTH for each rotated layer: its number, the address of its table in ordinary
memory (0 leaves its nodes as they are) and on the device, the mode of the rotation, D, and the bits of the base and of A.
"""

from __future__ import annotations

from typing import Any

from yarn_edge.runtime.ggml import TensorStruct

HEAD, ROW_WIDTH = 6, 7
COUNT, ERROR, FOUND, EXPECTED, OP, N_ROWS = range(HEAD)
_ONE = 0x3F800000  # the bits of 1.0
# ggml.h: struct ggml_tensor, in units of the views; op_params as ggml_rope_impl fills them (ggml.c)
_PARAMS, _TABLE, _NAME = TensorStruct.op_params.offset // 4, TensorStruct.src.offset // 8 + 2, TensorStruct.name.offset
_NAME_END = _NAME + 64
_N_DIMS, _MODE, _BASE = _PARAMS + 1, _PARAMS + 2, _PARAMS + 5


def edit_node(words: Any, longs: Any, characters: Any, state: Any, on_device: bool) -> bool:
    """Give a node what its layer's row says. False, with the reason in the state, if it is not as the row expects.

    words, longs, characters: the node's memory as int32, int64 and int8.
    """
    row = HEAD + state[COUNT] // 2 % state[N_ROWS] * ROW_WIDTH
    state[COUNT] += 1
    layer = _layer_of(characters)
    if layer >= 0 and layer != state[row]:
        return _fault(state, 3, layer, state[row])
    if state[row + 1] == 0:
        return True
    if words[_MODE] != state[row + 3]:
        return _fault(state, 2, words[_MODE], state[row + 3])
    if words[_N_DIMS] != state[row + 4]:
        return _fault(state, 1, words[_N_DIMS], state[row + 4])
    longs[_TABLE] = state[row + 2] if on_device else state[row + 1]
    words[_BASE] = state[row + 5]
    words[_BASE + 1] = _ONE  # freq_scale
    words[_BASE + 2] = 0  # ext_factor
    words[_BASE + 3] = state[row + 6]  # A
    return True


def _fault(state: Any, error: int, found: int, expected: int) -> bool:
    state[ERROR], state[FOUND], state[EXPECTED] = error, found, expected
    return False


def _layer_of(characters: Any) -> int:
    """The number in a name such as "Qcur-3"; -1 without one, as with keys that llama.cpp does not name."""
    at = _NAME
    while at < _NAME_END and (characters[at] == 95 or 65 <= characters[at] <= 90 or 97 <= characters[at] <= 122):
        at += 1
    if at == _NAME_END or characters[at] != 45:
        return -1
    layer, at = -1, at + 1
    while at < _NAME_END and 48 <= characters[at] <= 57:
        layer = max(layer, 0) * 10 + characters[at] - 48
        at += 1
    return layer

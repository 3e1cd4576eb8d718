"""The functions of llama.cpp's RPC backend (ggml-rpc.h), where the library was built with it."""

from __future__ import annotations

import ctypes
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml import function
from yarn_edge.runtime.llama_api import llama

_P, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_TYPES: dict[str, Any] = {
    "ggml_backend_rpc_add_server": ctypes.CFUNCTYPE(_P, ctypes.c_char_p),
    "ggml_backend_rpc_start_server": ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, _SIZE, _SIZE, ctypes.POINTER(_P)
    ),
}


def rpc_function(name: str) -> Any:
    """A function of the RPC backend. Raises YarnEdgeError if this build has none."""
    llama()
    library = function("ggml_backend_reg_by_name")(b"RPC")
    address = library and function("ggml_backend_reg_get_proc_address")(library, name.encode())
    if not address:
        raise YarnEdgeError(
            "this llama-cpp-python was built without RPC: make engine BACKENDS=rpc builds one that has it (docs/machines.md)"
        )
    return _TYPES[name](address)

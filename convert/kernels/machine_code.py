"""Machine code that Numba made once, run without Numba: importing it and reading its cache take 0.3 s, llvmlite alone 0.03 s.

The code of a kernel is one object file that needs nothing of Numba or Python, kept in a folder under a name that changes with all
that it depends on, behind a digest of itself. So another version, another processor or a damaged file means compiling again.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from yarn_edge.cache_folder import user_cache_folder
from yarn_edge.writer import write_file

NAME = "yarn_edge_kernel"  # the function in the object file
_FORMAT = 1  # to be raised when `object_code` makes another file of the same sources
_engines: list[Any] = []  # they own the memory of the code
_DIGEST_BYTES = hashlib.sha256().digest_size
# What Numba's code calls when a counted object goes. A kernel that works on the caller's memory has none, but the compiler cannot
# know, and the name must stand for something.
_NEVER_CALLED = """
declare void @llvm.trap()
define void @NRT_MemInfo_call_dtor(ptr %object) {
  call void @llvm.trap()
  unreachable
}
"""


def folder() -> Path:
    """Where machine code is kept: NUMBA_CACHE_DIR, else this user's cache folder."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    return Path(named) if named else user_cache_folder() / "kernels"


def key(sources: Iterable[Path]) -> str:
    """A name that changes with the sources, the compilers, the processor and the settings that Numba takes from the environment."""
    import llvmlite.binding as llvm

    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR")
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy")]
    processor = llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    digest = hashlib.sha256(repr((_FORMAT, versions, platform.python_version(), processor, settings)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def kept(name: str) -> bytes | None:
    """The object code kept under this key; None if there is none, or if it is damaged."""
    try:
        data = (folder() / f"{name}.o").read_bytes()
    except OSError:
        return None
    code = data[_DIGEST_BYTES:]
    return code if data[:_DIGEST_BYTES] == hashlib.sha256(code).digest() else None


def keep(name: str, code: bytes) -> None:
    """Keep object code under this key. Raises OSError or YarnEdgeError if the folder cannot be written."""
    where = folder()
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(where / f"{name}.o", hashlib.sha256(code).digest() + code, force=True)


def object_code(assembly: str, function: str, processor: tuple[str, str, str]) -> bytes:
    """Object code with `function` as NAME, for (triple, processor, features). assembly: LLVM's, of a whole module made by Numba.

    Raises ValueError if the function needs anything that is not in the module.
    """
    import llvmlite.binding as llvm

    _initialize()
    module = llvm.parse_assembly(assembly)
    module.link_in(llvm.parse_assembly(_NEVER_CALLED))
    for made in module.functions:
        if not made.is_declaration:
            made.linkage = "external" if made.name == function else "internal"
    module.get_function(function).name = NAME
    machine = _machine(*processor)
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0)))
    needed = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if needed:
        raise ValueError(f"the compiled code needs {', '.join(needed)}, which only Numba has")
    return bytes(machine.emit_object(module))


def loaded(code: bytes, arguments: Sequence[Any]) -> Callable[..., int]:
    """The function NAME of object code. arguments: its own as ctypes types. It returns 0, and runs without Python's lock."""
    import llvmlite.binding as llvm

    _initialize()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm.get_default_triple(), "", ""))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *arguments)(engine.get_function_address(NAME))
    _engines.append(engine)
    return function


def compiled_object(function: Callable[..., Any], signature: Any) -> bytes:
    """The object code of a Python function for this processor. signature: Numba's, with nothing of Python in it.

    Raises whatever Numba raises if it cannot compile it.
    """
    import numba

    made = numba.njit(signature, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    (result,) = made.overloads.values()
    library = result.library
    return object_code(library.get_llvm_str(), result.fndesc.llvm_func_name, library.codegen.magic_tuple())


def kept_or_compiled(sources: Iterable[Path], compile_it: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
    """(the object code that was kept for these sources, or is compiled and kept now; why it could not be kept)."""
    name = key(sources)
    code, failure = kept(name), None
    if code is None:
        code = compile_it()
        try:
            keep(name, code)
        except Exception as error:  # no writable folder, a full disk
            failure = error
    return code, failure


def _initialize() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(triple: str, cpu: str, features: str) -> Any:
    """As Numba sets it: its parts may lie anywhere in memory."""
    import llvmlite.binding as llvm

    reloc = "static" if triple.startswith(("x86", "i686")) else "default"
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )

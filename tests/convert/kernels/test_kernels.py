"""The fast kernels: ggml's own blocks, read back alike by gguf-py and ggml; which kernel is chosen, told and recorded."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.imatrix.matrix import Importance, ImportanceMatrix, write_imatrix
from yarn_edge.convert.kernels import choose as selection
from yarn_edge.convert.kernels import machine_code
from yarn_edge.convert.kernels.choose import FAST, GGML, WORTH_IT, Kernels, choose_kernels
from yarn_edge.convert.kernels.kernel import SOURCES
from yarn_edge.convert.kernels.layout import LAYOUTS, WEIGHTS
from yarn_edge.convert.quantize import quantize
from yarn_edge.convert.recipe import QuantOptions
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.ggml_types import dequantize_into, quantize_into, type_named

from support import depth, tiny

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the fast kernels need Numba")
# ggml is compiled without fused multiply-adds here, so that sums are rounded as ours are.
SAME_BITS = platform.machine() in ("x86_64", "AMD64")
LIMIT = 1 + 1e-4  # ours / ggml's weighted squared error, of a whole tensor
Floats = np.ndarray[Any, np.dtype[np.float32]]
RNG = np.random.default_rng(7)


def rows_of(case: str) -> Floats:
    """Rows of the issue's kinds; their number is never a multiple of sixteen blocks but in one."""
    normal = RNG.standard_normal((5, 2048)).astype(np.float32)
    one = np.zeros((16, 256), np.float32)
    one[np.arange(16), RNG.integers(0, 256, 16)] = RNG.standard_normal(16)
    levels = np.repeat(-np.arange(1, 41, dtype=np.float32), 64).reshape(5, 512)
    made: dict[str, Any] = {
        "random": normal * 0.02,
        "narrow": normal[:, :256] * 0.02,
        "a single block": normal[:1, :256],
        "outliers": np.where(RNG.random(normal.shape) < 0.01, 50, 0.02) * normal,
        "heavy tails": RNG.standard_cauchy((7, 1024)),
        "zero": np.zeros((3, 512)),
        "zero in places": np.where(RNG.random((5, 64, 1)) < 0.4, 0, normal.reshape(5, 64, 32)).reshape(5, 2048),
        "constant": np.full((3, 512), 0.3),
        "constant, negative": np.full((3, 512), -0.3),
        "nearly constant": levels + normal[:, :512] * 1e-6,
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "one value": one,
        "two values": np.sign(normal) * 0.5,
        "ties": np.round(normal * 4) / 4,
        "denormal": normal * 1e-39,
        "deep denormal": RNG.integers(-3, 4, (5, 512)).astype(np.float32) * np.float32(1e-45),
        "scales around nothing": normal * (10.0 ** RNG.uniform(-18, -12, (5, 1))),
        "tiny": normal * 1e-12,
        "half's denormals": normal * 1e-6,
        "sub-blocks of many sizes": normal * np.repeat(10.0 ** RNG.uniform(-9, 1, (5, 128)), 16, 1),
        "large": normal * 1e4,
    }
    return np.ascontiguousarray(made[case], np.float32)


CASES = (
    "random",
    "narrow",
    "a single block",
    "outliers",
    "heavy tails",
    "zero",
    "zero in places",
    "constant",
    "constant, negative",
    "nearly constant",
    "positive",
    "negative",
    "one value",
    "two values",
    "ties",
    "denormal",
    "deep denormal",
    "scales around nothing",
    "tiny",
    "half's denormals",
    "sub-blocks of many sizes",
    "large",
)


@pytest.fixture(scope="module")
def fast() -> Kernels:
    """Ours, compiled."""
    return choose_kernels(FAST, {type_named("Q4_K"): 1})


def made_by(kernels: Kernels, name: str, rows: Floats, weights: Floats | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    kind = type_named(name)
    out = np.full((len(rows), kind.row_bytes(rows.shape[1])), 0xA5, np.uint8)
    kernels.quantize_into(kind, rows, out, weights)
    return out


def read_back(name: str, made: np.ndarray[Any, np.dtype[np.uint8]], shape: tuple[int, ...]) -> Floats:
    """By ggml; gguf-py must say the same."""
    again = np.empty(shape, np.float32)
    dequantize_into(type_named(name), made.reshape(-1), again.reshape(-1))
    theirs = dequantize(made, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(again, theirs, rtol=1e-6, atol=1e-30)
    return again


def assert_as_good(fast: Kernels, name: str, rows: Floats, weights: Floats | None) -> None:
    """Blocks of ours against ggml's: the error, and on x86 the bytes."""
    ours, theirs = (made_by(kernels, name, rows, weights) for kernels in (fast, Kernels()))
    errors = [
        float(
            (
                np.square(read_back(name, made, rows.shape).astype(np.float64) - rows)
                * (1 if weights is None else weights)
            ).sum()
        )
        for made in (ours, theirs)
    ]
    assert errors[0] <= errors[1] * LIMIT
    if SAME_BITS:
        np.testing.assert_array_equal(ours, theirs)


@needs_numba
@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_are_ggmls(name: str, case: str, importance: bool, fast: Kernels) -> None:
    rows = rows_of(case)
    weights = RNG.random(rows.shape[1]).astype(np.float32) ** 4 if importance else None
    assert_as_good(fast, name, rows, weights)


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_written_behind_the_last_block(name: str, fast: Kernels) -> None:
    kind, rows = type_named(name), RNG.standard_normal((17, 256)).astype(np.float32)
    held = np.full(40 * kind.block_bytes, 0xA5, np.uint8)
    fast.quantize_into(kind, rows, held[: 17 * kind.block_bytes])
    assert (held[17 * kind.block_bytes :] == 0xA5).all()
    np.testing.assert_array_equal(held[: 17 * kind.block_bytes].reshape(17, -1), made_by(fast, name, rows, None))


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS)
def test_importance_that_is_zero_or_of_one_column(name: str, fast: Kernels) -> None:
    for weights in (np.zeros(512, np.float32), np.eye(1, 512, 77, dtype=np.float32)[0] * 1e9):
        assert_as_good(fast, name, RNG.standard_normal((3, 512)).astype(np.float32), weights)


@needs_numba
@settings(max_examples=150, deadline=None)
@given(
    rows=arrays(
        np.float32, (2, 256), elements=st.floats(-65504, 65504, width=32), fill=st.sampled_from([0.0, 1.0, -0.25])
    ),
    name=st.sampled_from(list(LAYOUTS)),
    importance=st.booleans(),
)
def test_any_rows(rows: Floats, name: str, importance: bool) -> None:
    weights = np.linspace(0, 3, 256, dtype=np.float32) if importance else None
    assert_as_good(choose_kernels(FAST, {type_named("Q4_K"): 1}), name, np.ascontiguousarray(rows), weights)


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS if depth.full else ["Q3_K", "Q4_K"])
def test_real_weights(name: str, whole_smol_f32: Path, fast: Kernels) -> None:
    reader = gguf.GGUFReader(whole_smol_f32)
    tensors = {t.name: t.data for t in reader.tensors}
    for tensor in ("blk.0.ffn_down.weight", "blk.17.attn_q.weight", "blk.29.ffn_up.weight", "output_norm.weight"):
        values = np.ascontiguousarray(tensors[tensor]).reshape(-1)
        rows = values[: min(values.size, 1 << 15) // WEIGHTS * WEIGHTS].reshape(-1, WEIGHTS)
        for weights in (None, RNG.random(WEIGHTS).astype(np.float32)):
            assert_as_good(fast, name, rows, weights)


@needs_numba
def test_importance_makes_a_difference_and_belongs_to_its_column(fast: Kernels) -> None:
    rows = RNG.standard_normal((4, 512)).astype(np.float32)
    weights = np.where(np.arange(512) < 256, 1, np.geomspace(1e-4, 1e4, 512)).astype(np.float32)
    for name in LAYOUTS:
        made, plain = made_by(fast, name, rows, weights), made_by(fast, name, rows, None)
        assert (made != plain).any()
        errors = [(np.square(read_back(name, m, rows.shape) - rows) * weights)[:, 256:].sum() for m in (made, plain)]
        assert errors[0] < errors[1]


@needs_numba
@pytest.mark.parametrize(
    "rows, out_bytes, weights",
    [
        (np.zeros((2, 256), np.float32), 287, None),
        (np.zeros((2, 256), np.float32), 288, np.ones(255, np.float32)),
        (np.zeros((256, 2), np.float32).T, 288, None),
    ],
    ids=["bytes", "weights", "order"],
)
def test_wrong_sizes_are_errors(rows: Floats, out_bytes: int, weights: Floats | None, fast: Kernels) -> None:
    with pytest.raises(ValueError, match="do not fit into"):
        fast.quantize_into(type_named("Q4_K"), rows, np.zeros(out_bytes, np.uint8), weights)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows K-quants can hold."""
    folder = tmp_path_factory.mktemp("kernels") / "ck"
    return tiny.write_checkpoint(
        folder, dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )


@pytest.fixture(scope="module")
def wide_bf16(wide: Path) -> Path:
    return convert(wide, str(wide.parent / "BF16.gguf"), "BF16")[0]


def data_of(path: Path) -> dict[str, bytes]:
    file = read_gguf(path)
    held = path.read_bytes()
    return {name: held[t.offset : t.offset + t.n_bytes] for name, t in file.tensors.items()}


@needs_numba
@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("quant", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_L", "Q2_K"])
def test_files_of_both_kernels(quant: str, importance: bool, wide_bf16: Path, tmp_path: Path) -> None:
    matrix = None
    if importance:
        entries = {
            name: Importance(RNG.random((1, t.shape[0])) * 100, np.array([64]))
            for name, t in read_gguf(wide_bf16).tensors.items()
            if len(t.shape) > 1 and name.startswith("blk.")
        }
        matrix = tmp_path / "matrix.gguf"
        write_imatrix(ImportanceMatrix(matrix, entries, (), 4, 512), matrix)
    made = {}
    for kernels, threads in ((FAST, 1), (FAST, 5), (GGML, 2)):
        out = str(tmp_path / f"{kernels}-{threads}.gguf")
        made[kernels, threads] = quantize(
            wide_bf16, out, quant, options=QuantOptions(matrix, kernels), threads=threads
        )[0]
    assert made[FAST, 1].read_bytes() == made[FAST, 5].read_bytes()
    assert read_gguf(made[FAST, 1]).metadata["yarn_edge.quantizer"] == "yarn-edge fast 1"
    assert read_gguf(made[GGML, 2]).metadata["yarn_edge.quantizer"] == "ggml of llama-cpp-python 0.3.36"
    if SAME_BITS:
        assert data_of(made[FAST, 1]) == data_of(made[GGML, 2])


@needs_numba
def test_the_flag(wide: Path, wide_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, source in (("convert", wide), ("quantize", wide_bf16)):
        for kernels, told in ((FAST, "yarn-edge fast 1"), (GGML, "ggml of llama-cpp-python 0.3.36")):
            out = tmp_path / f"{command}-{kernels}.gguf"
            args = [command, str(source), "-o", str(out), "--quant", "Q4_K_M", "--kernels", kernels, "--json"]
            assert main([*args, "--dry-run"]) == 0
            assert json.loads(capsys.readouterr().out)["files"][0]["quantizer"] == told
            assert main(args) == 0
            assert json.loads(capsys.readouterr().out)["files"][0]["quantizer"] == told
            assert read_gguf(out).metadata["yarn_edge.quantizer"] == told


def test_what_is_no_k_quant_has_no_such_key(wide_bf16: Path, tmp_path: Path) -> None:
    for quant in ("Q8_0", "F16"):
        made = quantize(wide_bf16, str(tmp_path / f"{quant}.gguf"), quant)[0]
        assert "yarn_edge.quantizer" not in read_gguf(made).metadata


def test_copied_tensors_keep_what_made_them(wide_bf16: Path, tmp_path: Path) -> None:
    one = quantize(wide_bf16, str(tmp_path / "one.gguf"), "Q4_K_M", options=QuantOptions(kernels=GGML))[0]
    again = quantize(one, str(tmp_path / "again.gguf"), "Q4_K_M")[0]
    assert read_gguf(again).metadata["yarn_edge.quantizer"] == read_gguf(one).metadata["yarn_edge.quantizer"]


def test_the_key_tells_of_what_is_in_the_file(wide_bf16: Path, tmp_path: Path) -> None:
    one = quantize(wide_bf16, str(tmp_path / "one.gguf"), "Q4_K_M", options=QuantOptions(kernels=GGML))[0]
    none = quantize(one, str(tmp_path / "none.gguf"), "Q8_0", allow_requantize=True, options=QuantOptions(pure=True))[0]
    assert "yarn_edge.quantizer" not in read_gguf(none).metadata
    options = QuantOptions(kernels=GGML, tensor_types=((r"ffn_down", type_named("Q5_K")),))
    mixed = quantize(one, str(tmp_path / "mixed.gguf"), "Q4_K_M", allow_requantize=True, options=options)[0]
    assert read_gguf(mixed).metadata["yarn_edge.quantizer"].endswith(", others copied")


folder_of_kernels = Path(selection.__file__).parent
BIG = {type_named("Q4_K"): WORTH_IT}


@pytest.mark.parametrize("work", [{type_named("Q8_0"): 1 << 40}, {type_named("Q4_K"): WORTH_IT - 1}, {}])
def test_ggml_where_there_is_little_to_make(work: dict[Any, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_checked_kernel", lambda: pytest.fail("compiled for nothing"))
    assert choose_kernels(None, work) == Kernels()


@needs_numba
def test_ours_where_there_is_much_to_make(fast: Kernels) -> None:
    assert choose_kernels(None, BIG) == fast
    assert choose_kernels(GGML, BIG) == Kernels()


def test_without_numba(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wide_bf16: Path) -> None:
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda _name: None)
    assert choose_kernels(None, BIG) == Kernels()
    assert capsys.readouterr().err == ""
    out = wide_bf16.with_name("never.gguf")
    assert main(["quantize", str(wide_bf16), "-o", str(out), "--kernels", "fast"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "pip install 'yarn-edge[fast]'" in told
    assert not out.exists()


def test_unknown_kernels() -> None:
    with pytest.raises(YarnEdgeError, match="kernels 'cuda' are unknown; the kernels are ggml and fast"):
        choose_kernels("cuda", {})


def zeros(_x: Any, _importance: Any, _blocks: int, out: Any, _plan: Any) -> int:
    out[:] = 0
    return 0


def broken() -> Any:
    raise ImportError("Numba needs NumPy 2.4 or less")


@pytest.mark.parametrize(
    "compiled, told",
    [(broken, "ImportError: Numba needs NumPy 2.4 or less"), (lambda: zeros, "ValueError: Q2_K comes out wrong")],
    ids=["does not compile", "computes nonsense"],
)
def test_what_cannot_be_used_is_told(
    compiled: Any, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(selection, "_compiled_kernel", compiled)
    selection._checked_kernel.cache_clear()
    try:
        assert choose_kernels(None, BIG) == Kernels()
        assert f"note: Numba cannot be used here ({told}" in capsys.readouterr().err
        with pytest.raises(YarnEdgeError, match="--kernels fast: Numba cannot be used here"):
            choose_kernels(FAST, BIG)
    finally:
        selection._checked_kernel.cache_clear()


RUN = """
import hashlib, numpy as np
from yarn_edge.convert.kernels.choose import choose_kernels
from yarn_edge.runtime.ggml_types import type_named
kind, rows = type_named("Q5_K"), np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
out = np.empty((9, kind.block_bytes), np.uint8)
choose_kernels("fast", {kind: 1}).quantize_into(kind, rows, out)
print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def in_processes(folder: str, n: int) -> list[tuple[str, str]]:
    """(stdout, stderr) of n processes at once that keep what they compile in `folder`."""
    env = {**os.environ, "NUMBA_CACHE_DIR": folder}
    command = [sys.executable, "-c", RUN]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(n)]
    told = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * n, told
    return told


@needs_numba
def test_two_processes_compile_at_once_and_a_third_does_not(tmp_path: Path, fast: Kernels) -> None:
    kind, rows = type_named("Q5_K"), np.random.default_rng(1).standard_normal((9, 256)).astype(np.float32)
    import hashlib

    wanted = hashlib.sha256(made_by(fast, kind.name, rows, None).tobytes()).hexdigest()
    for out, _err in in_processes(str(tmp_path), 2):
        assert out.strip() == wanted
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")}
    assert kept
    broken = tmp_path / "broken" / "numba.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('nobody needs it')")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(broken.parent)}
    without_numba = partial(subprocess.run, [sys.executable, "-c", RUN], env=env, capture_output=True, text=True)
    assert without_numba().stdout.strip() == wanted
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")} == kept
    (path,) = kept
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert (
        "Numba cannot be used here (ImportError: nobody needs it)" in without_numba().stderr
    )  # it would compile again


def test_no_folder_to_keep_them_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: Kernels
) -> None:
    module = pytest.importorskip("yarn_edge.convert.kernels.kquant", exc_type=ImportError)
    name = machine_code.key(folder_of_kernels / source for source in SOURCES)
    code = machine_code.kept(name)
    monkeypatch.setattr(module, "compile_kernel", lambda: code)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_bytes(b"")
    rows = rows_of("random")
    made = made_by(Kernels(selection._compiled_kernel()), "Q4_K", rows, None)
    np.testing.assert_array_equal(made, made_by(fast, "Q4_K", rows, None))
    told = capsys.readouterr().err
    assert "cannot be cached ([Errno 20] Not a directory" in told
    assert "set NUMBA_CACHE_DIR" in told


def test_code_that_needs_numba_is_refused() -> None:
    pytest.importorskip("llvmlite.binding")
    import llvmlite.binding as llvm

    processor = llvm.get_default_triple(), llvm.get_host_cpu_name(), ""
    assembly = "declare void @numba_gil_ensure()\ndefine i32 @f() {\n  call void @numba_gil_ensure()\n  ret i32 0\n}\n"
    with pytest.raises(ValueError, match="needs numba_gil_ensure, which only Numba has"):
        machine_code.object_code(assembly, "f", processor)
    alone = assembly.replace("call void @numba_gil_ensure()", "")
    assert machine_code.loaded(machine_code.object_code(alone, "f", processor), ())() == 0


def test_the_key_of_what_is_kept_depends_on_all_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else machine code of a helper that was changed would run on."""
    seen, ahead = set(), ["kquant.py"]
    while ahead:
        name = ahead.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder_of_kernels / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                ahead += {f"{node.module}.py"} - seen
    assert seen == set(SOURCES)
    pytest.importorskip("llvmlite.binding")
    whole = machine_code.key(folder_of_kernels / source for source in SOURCES)
    assert machine_code.key(folder_of_kernels / source for source in SOURCES[1:]) != whole
    monkeypatch.setenv("NUMBA_CPU_NAME", "x86-64")
    assert machine_code.key(folder_of_kernels / source for source in SOURCES) != whole


def test_ggmls_kernels_are_ggmls() -> None:
    kind, rows = type_named("Q4_K"), rows_of("random")
    theirs = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    quantize_into(kind, rows, theirs)
    np.testing.assert_array_equal(made_by(Kernels(), "Q4_K", rows, None), theirs)

"""The importance matrix as a file: gguf-py and struct are the independent writers and readers, hostile bytes are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.convert.imatrix.matrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from yarn_edge.errors import YarnEdgeError

from support.gguf_bytes import ARRAY, BOOL, F32, STRING, U32, U64, array, image, kv, tensor, text

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def matrix(**changes: Any) -> ImportanceMatrix:
    random = np.random.default_rng(0)
    entries = {
        EXPERTS: Importance(random.random((3, 8)).astype(np.float32).astype(float) * 64, np.array([7, 0, 33])),
        DENSE: Importance(random.random((1, 16)).astype(np.float32).astype(float), np.array([40])),
    }
    return ImportanceMatrix(
        **{"path": None, "entries": entries, "datasets": ("a.txt",), "chunk_count": 4, "chunk_size": 10, **changes}
    )


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


# ---- GGUF


def test_bytes_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    """Order of keys and tensors, and which dimensions are there, after a file of llama-imatrix."""
    write_imatrix(matrix(), tmp_path / "m.gguf")
    dense, experts = matrix().entries[DENSE], matrix().entries[EXPERTS]
    keys = [
        kv("general.type", STRING, "imatrix"),
        kv("imatrix.datasets", ARRAY, array(STRING, 1, text("a.txt"))),
        kv("imatrix.chunk_count", U32, 4),
        kv("imatrix.chunk_size", U32, 10),
    ]
    parts = [f32(*dense.sums[0]), f32(40), f32(*experts.sums.ravel()), f32(7, 0, 33)]
    shapes = [
        (f"{DENSE}.in_sum2", (16,)),
        (f"{DENSE}.counts", (1,)),
        (f"{EXPERTS}.in_sum2", (8, 3)),
        (f"{EXPERTS}.counts", (1, 3)),
    ]
    infos, data = [], b""
    for (name, shape), part in zip(shapes, parts, strict=True):
        infos.append(tensor(name, shape, 0, len(data)))
        data += part + bytes(-len(part) % 32)
    assert (tmp_path / "m.gguf").read_bytes() == image(keys, infos, data)


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    write_imatrix(matrix(datasets=("a.txt", "b é.txt"), run={"ctx": 512, "whole": False}), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b é.txt"],
        "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 10,
        "yarn_edge.imatrix.ctx": 512,
        "yarn_edge.imatrix.whole": False,
    }
    values = {t.name: t.data for t in reader.tensors}
    assert list(values) == [f"{n}.{half}" for n in (DENSE, EXPERTS) for half in ("in_sum2", "counts")]
    for name, importance in matrix().entries.items():
        np.testing.assert_array_equal(values[f"{name}.in_sum2"].ravel(), importance.sums.ravel())
        np.testing.assert_array_equal(values[f"{name}.counts"].ravel(), importance.counts)


@pytest.mark.parametrize("datasets", [(), ("a.txt", "b.txt")], ids=["no name", "two names"])
def test_round_trip(datasets: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    written = matrix(datasets=datasets, run={"model": "abc", "batch": 2048, "process_output": True})
    write_imatrix(written, path)
    found = read_imatrix(path)
    assert found.path == path
    for name in ("datasets", "chunk_count", "chunk_size", "run"):
        assert getattr(found, name) == getattr(written, name)
    assert found.entries.keys() == written.entries.keys()
    for name, importance in written.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, importance.sums)
        np.testing.assert_array_equal(found.entries[name].counts, importance.counts)


def test_sums_that_float32_cannot_hold_are_not_written(tmp_path: Path) -> None:
    entries = {DENSE: Importance(np.array([[1.0, 1e39]]), np.array([1]))}
    with pytest.raises(YarnEdgeError, match=r"blk\.0\.attn_q\.weight has sums of squares that float32 cannot hold"):
        write_imatrix(matrix(entries=entries), tmp_path / "m.gguf")


# ---- what the kernels get


def by_the_book(sums: list[float], counts: list[float]) -> bytes:
    """quantize.cpp, load_imatrix, line by line, in C's floats."""
    per_expert = len(sums) // len(counts)
    found = []
    for j, read in enumerate(counts):
        count = np.float32(int(np.floor(np.float64(read) + 0.5)))
        for i in range(per_expert):
            found.append(np.float32(sums[j * per_expert + i]) / count if count > 0 else np.float32(1))
    return np.array(found, np.float32).tobytes()


@pytest.mark.parametrize(
    "counts",
    [[10240.0], [7.0, 0.0, 33.0, 1.0], [0.0, 0.0], [2.5, 3.49999, 16777217.0, 0.5]],
    ids=["dense", "experts", "no token at all", "odd counts"],
)
def test_weights_are_bit_for_bit_those_of_llama_quantize(counts: list[float], tmp_path: Path) -> None:
    sums = (10 ** np.random.default_rng(1).uniform(-12, 12, 16)).astype(np.float32).tolist()
    shapes = [("x.in_sum2", (16,)), ("x.counts", (len(counts),))]
    data = f32(*sums) + f32(*counts) + bytes(16)
    infos = [tensor(shapes[0][0], shapes[0][1]), tensor(shapes[1][0], shapes[1][1], 0, 64)]
    path = tmp_path / "m.gguf"
    path.write_bytes(image(GOOD_KEYS, infos, data))
    weights = read_imatrix(path).entries["x"].weights()
    assert weights.tobytes() == by_the_book(sums, counts)
    assert (weights.dtype, weights.shape) == (np.float32, (16,))


def test_adding_up() -> None:
    one = Importance(np.array([[1.0, 2.0]]), np.array([3]))
    both = one + Importance(np.array([[0.5, 0.25]]), np.array([4]))
    assert (both.sums.tolist(), both.counts.tolist()) == ([[1.5, 2.25]], [7])
    with pytest.raises(ValueError, match="do not add up"):
        one + Importance(np.ones((2, 2)), np.array([1, 1]))


# ---- the format of before GGUF


def legacy(
    *entries: tuple[str | bytes, int, list[float]],
    tail: bytes = struct.pack("<ii", 5, 3) + b"a.t",
    n: int | None = None,
) -> bytes:
    packed = struct.pack("<i", len(entries) if n is None else n)
    for name, calls, values in entries:
        name = name.encode() if isinstance(name, str) else name
        packed += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values)) + f32(*values)
    return packed + tail


def test_legacy(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    values = [3.0, 0.1, 0.0, 7.25]
    path.write_bytes(legacy((DENSE, 5, values), (EXPERTS, 0, values), ("é\0after", -3, values)))
    found = read_imatrix(path)
    assert (found.path, found.datasets, found.chunk_count, found.chunk_size) == (path, ("a.t",), 5, 0)
    assert found.entries[DENSE].weights().tobytes() == (np.float32(values) / np.float32(5)).tobytes()
    for name in (EXPERTS, "é"):  # without calls the values are taken as they are
        assert found.entries[name].weights().tobytes() == np.float32(values).tobytes()


@pytest.mark.parametrize(
    "tail, chunks, datasets",
    [(b"", 0, ()), (struct.pack("<i", 9), 9, ()), (struct.pack("<ii", 9, 0), 9, ())],
    ids=["nothing", "chunks alone", "no name"],
)
def test_what_a_legacy_file_may_leave_out(tail: bytes, chunks: int, datasets: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(legacy((DENSE, 5, [1.0]), tail=tail))
    found = read_imatrix(path)
    assert (found.chunk_count, found.datasets) == (chunks, datasets)


def test_a_legacy_file_written_as_gguf_weighs_the_same(tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(legacy((DENSE, 3, [3.0, 0.1]), (EXPERTS, 0, [0.7, 9.0])))
    old = read_imatrix(tmp_path / "m.dat")
    write_imatrix(old, tmp_path / "m.gguf")
    new = read_imatrix(tmp_path / "m.gguf")
    for name, importance in old.entries.items():
        assert new.entries[name].weights().tobytes() == importance.weights().tobytes()


# ---- hostile files

GOOD_KEYS = [
    kv("general.type", STRING, "imatrix"),
    kv("imatrix.datasets", ARRAY, array(STRING, 0)),
    kv("imatrix.chunk_count", U32, 1),
    kv("imatrix.chunk_size", U32, 512),
]
GOOD = [tensor("x.in_sum2", (8,)), tensor("x.counts", (1,), 0, 32)]
DATA = f32(*range(8)) + f32(512) + bytes(28)


def swapped(index: int, entry: bytes) -> list[bytes]:
    return [entry if i == index else key for i, key in enumerate(GOOD_KEYS)]


HOSTILE = {
    "no file": (None, "No such file"),
    "empty": (b"", "its 0 bytes are too few for one entry"),
    "GGUF, cut": (image(GOOD_KEYS, GOOD, DATA)[:-30], "truncated: tensor x.counts"),
    "GGUF, header alone": (b"GGUF" + bytes(8), "not a GGUF"),
    "a model": (image(swapped(0, kv("general.type", STRING, "model")), GOOD, DATA), "general.type is 'model'"),
    "no sums": (image(GOOD_KEYS, [tensor("x", (8,))], DATA), "0 of 1 tensors are sums"),
    "no tensors": (image(GOOD_KEYS), "0 of 0 tensors are sums"),
    "no datasets": (image([k for k in GOOD_KEYS if b"datasets" not in k], GOOD, DATA), "imatrix.datasets is missing"),
    "no chunk size": (image(GOOD_KEYS[:3], GOOD, DATA), "imatrix.chunk_size is missing"),
    "datasets are numbers": (
        image(swapped(1, kv("imatrix.datasets", ARRAY, array(U32, 1, bytes(4)))), GOOD, DATA), "imatrix.datasets is array",
    ),
    "chunks are no number": (image(swapped(2, kv("imatrix.chunk_count", BOOL, True)), GOOD, DATA), "chunk_count is True"),
    "chunks are a fraction": (image(swapped(2, kv("imatrix.chunk_count", F32, 1.5)), GOOD, DATA), "chunk_count is 1.5"),
    "too many chunks": (image(swapped(2, kv("imatrix.chunk_count", U64, 2**31)), GOOD, DATA), "chunk_count is 2147483648"),
    "sums alone": (image(GOOD_KEYS, GOOD[:1], DATA), "x has no tensor x.counts"),
    "counts alone": (image(GOOD_KEYS, [tensor("x.counts", (1,))], DATA), "x has no tensor x.in_sum2"),
    "half precision": (image(GOOD_KEYS, [tensor("x.in_sum2", (8,), 1), GOOD[1]], DATA), "x.in_sum2 is F16, not F32"),
    "counts do not fit": (
        image(GOOD_KEYS, [GOOD[0], tensor("x.counts", (3,), 0, 32)], DATA), "x has 8 sums for 3 experts",
    ),
    "more experts than sums": (
        image(GOOD_KEYS, [tensor("x.in_sum2", (1,)), tensor("x.counts", (8,), 0, 32)], DATA), "x has 1 sums for 8 experts",
    ),
    "negative sums": (image(GOOD_KEYS, GOOD, f32(*[-1] * 8) + DATA[32:]), "x has values that are negative"),
    "no number": (image(GOOD_KEYS, GOOD, f32(*[float("nan")] * 8) + DATA[32:]), "x has values that are negative"),
    "infinite count": (image(GOOD_KEYS, GOOD, DATA[:32] + f32(float("inf"))), "x has values that are negative"),
    "a count beyond int64": (image(GOOD_KEYS, GOOD, DATA[:32] + f32(1e19)), "x has a count of 1e+19 tokens"),
    "control characters": (
        image(GOOD_KEYS, [tensor("a\n\x1b[2Jb.counts", (1,))], DATA), "a  [2Jb has no tensor",
    ),
    "text": (b"The quick brown fox jumps over the lazy dog.", "neither GGUF nor .dat: number of entries"),
    ".dat, no entries": (legacy(tail=bytes(20)), "number of entries at byte 0 is 0"),
    ".dat, too many entries": (legacy((DENSE, 5, [1.0]), n=2**30), "number of entries at byte 0 is 1073741824"),
    ".dat, one entry too many": (legacy((DENSE, 5, [1.0] * 9), n=2, tail=b""), "it ends before the length of a name"),
    ".dat, a name beyond the end": (struct.pack("<ii", 1, 2**30) + bytes(30), "length of a name at byte 4 is 1073741824"),
    ".dat, a negative name": (struct.pack("<ii", 1, -5) + bytes(30), "length of a name at byte 4 is -5"),
    ".dat, no values": (legacy((DENSE, 5, [])), "number of values of blk.0.attn_q.weight at byte 31 is 0"),
    ".dat, values beyond the end": (
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 5, 2**29) + bytes(30), "number of values of x",
    ),
    ".dat, the same twice": (legacy((DENSE, 5, [1.0]), (DENSE, 5, [1.0])), "appears twice"),
    ".dat, negative": (legacy((DENSE, 5, [1.0, -1.0])), "has values that are negative"),
    ".dat, the text's name cut": (legacy((DENSE, 5, [1.0]), tail=struct.pack("<ii", 5, 9) + b"a"), "length of the text's name"),
    ".dat, more behind": (legacy((DENSE, 5, [1.0]), tail=struct.pack("<ii", 5, 1) + b"abc"), "2 bytes are left at the end"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line(case: str, tmp_path: Path) -> None:
    data, told = HOSTILE[case]
    path = tmp_path / "m.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(YarnEdgeError) as caught:
        read_imatrix(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(image(GOOD_KEYS, GOOD, DATA))
    assert read_imatrix(path).entries["x"].sums.tolist() == [list(range(8))]


def test_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(YarnEdgeError, match="is not a regular file"):
            read_imatrix(path)


@pytest.mark.parametrize("form", ["GGUF", ".dat"])
def test_every_cut_and_every_changed_byte_is_read_or_refused(
    form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = image(GOOD_KEYS, GOOD, DATA) if form == "GGUF" else legacy((DENSE, 5, [1.0, 2.0]), ("y", 5, [3.0]))
    path = tmp_path_factory.mktemp("cut") / "m"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            found = read_imatrix(path)
        except YarnEdgeError:
            return
        assert all(np.isfinite(entry.weights()).all() for entry in found.entries.values())

    for end in range(len(whole)):
        read(whole[:end])

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=8))
    def changed(at: int, new: bytes) -> None:
        read(whole[:at] + new + whole[at + len(new) :])

    changed()

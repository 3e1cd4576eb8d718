"""Bad input at the front door: one line on stderr, exit code 2, and no file that was not there before."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert

from support import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("good") / "ck", form="shards")


@pytest.fixture(scope="module")
def gguf_file(good: Path) -> Path:
    return convert(good, str(good.parent / "good.gguf"), "F32")[0]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**tiny.YARN["rope_scaling"], **changes}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for old in folder.glob("model*"):
        old.unlink()
    state = tiny.tensors(tiny.config())
    change(state)
    tiny.write_weights(folder, state)


def lie_about(path: Path, **changes: Any) -> None:
    """Change the first tensor's entry in a safetensors header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[next(k for k in header if k != "__metadata__")] |= changes
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def add_template(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


SHARD = "model-00002-of-00002.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
# name -> (what to do to a good checkpoint, what the message must say)
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), "the shard is missing"),
    "truncated shard": (lambda f: truncate(f / SHARD), "truncated: tensor"),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), "not a valid safetensors file"),
    "shard of text": (lambda f: (f / SHARD).write_text("hello " * 100), "truncated: its header claims"),
    "header not JSON": (lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 8) + b"{{{{{{{{" + b"x" * 64), "not JSON"),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map is missing"),
    "index leaves the folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'), "outside the folder"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "is missing"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no model*.safetensors"),
    "wrong shape": (lambda f: change_tensors(f, lambda s: s.update({Q: s[Q][:32].clone()})), f"{Q} has the shape [32, 64]"),
    "missing tensor": (lambda f: change_tensors(f, lambda s: s.__delitem__(Q)), f"tensor {Q} is missing"),
    "unknown tensor": (lambda f: change_tensors(f, lambda s: s.update({"model.extra": torch.ones(3)})), "model.extra has no place"),
    "integer tensor": (lambda f: change_tensors(f, lambda s: s.update({Q: s[Q].int()})), "dtype I32"),
    "not a number": (lambda f: change_tensors(f, lambda s: s.update({Q: s[Q] * float("nan")})), "not finite numbers"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("]"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'), "not valid JSON"),
    "config very deep": (lambda f: (f / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "unknown architecture": (lambda f: edit_config(f, architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
    "unknown rope type": (lambda f: edit_config(f, **yarn(rope_type="spiral")), "'spiral', which is unknown"),
    "dynamic": (lambda f: edit_config(f, **yarn(rope_type="dynamic")), "current length"),
    "factor below 1": (lambda f: edit_config(f, **yarn(factor=0.25)), "below 1"),
    "factor a string": (lambda f: edit_config(f, **yarn(factor="4")), "not a number"),
    "factor and context contradict": (lambda f: edit_config(f, max_position_embeddings=8192), "max_position_embeddings is 8192"),
    "betas crossed": (
        lambda f: edit_config(f, **yarn(mscale_all_dim=1, beta_fast=2, beta_slow=4)), "must not be below beta_slow"),
    "unknown key": (lambda f: edit_config(f, **yarn(swirl=1)), "swirl is unknown"),
    "per layer type": (
        lambda f: edit_config(f, rope_scaling=..., rope_parameters={"full_attention": {}, "sliding_attention": {}}), "layer type"),
    "a shard that Git LFS did not fetch": (
        lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "more dimensions than bytes": (lambda f: lie_about(f / SHARD, shape=[0, 2**62, 2**62]), "has the shape"),
    "dtype an object": (lambda f: lie_about(f / SHARD, dtype={}), "dtype {}"),
    "values that Q8_0 cannot scale": (lambda f: change_tensors(f, lambda s: s[Q].view(-1)[:1].fill_(1e8)), "which Q8_0 cannot hold"),
    "chat template not text": (lambda f: add_template(f, 3), "chat_template is a int, not text"),
    "chat template with half a character": (lambda f: add_template(f, "\ud800"), "lone surrogate"),
    "two families": (lambda f: edit_config(f, model_type="mistral"), "model_type is 'mistral', but architectures says"),
    "code of its own": (
        lambda f: edit_config(f, auto_map={"AutoModelForCausalLM": "modeling_mine.MyLlama"}), "own code modeling_mine"),
    "eps not a number": (lambda f: edit_config(f, rms_norm_eps="1e-5"), "rms_norm_eps"),
    "eps negative": (lambda f: edit_config(f, rms_norm_eps=-1e-5), "rms_norm_eps"),
    "layer types": (lambda f: edit_config(f, layer_types="sliding_attention"), "layer_types"),
    "two sets of weights": (
        lambda f: shutil.copy(f / SHARD, f / "model.safetensors"), "remove one of the two sets"),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=3), "num_key_value_heads"),
    "other activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act"),
    "quantized checkpoint": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "sliding window": (
        lambda f: edit_config(f, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=128), "sliding_window is 128, shorter"),
    "tied but different": (lambda f: edit_config(f, tie_word_embeddings=True), "lm_head.weight differs"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "an end that is no token": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [1, 320]}'), "eos_token_id holds 320"),
    "generation config not JSON": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: not valid JSON"),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{,"), "tokenizer.json"),
    "more tokens than embeddings": (lambda f: edit_config(f, vocab_size=100), "100"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr."""
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, told.err
    assert lines[0].startswith("yarn-edge: error: ")
    assert "bug" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoints(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CHECKPOINTS[case]
    folder = tmp_path / "ck"
    shutil.copytree(good, folder)
    change(folder)
    output = tmp_path / "out"
    output.mkdir()
    assert main(["convert", str(folder), "-o", str(output / "x.gguf"), "--quant", "Q8_0", "--quiet"]) == 2
    assert message in one_error(capsys)
    assert list(output.iterdir()) == []


def test_bad_outputs_and_flags(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    existing = tmp_path / "there.gguf"
    existing.write_text("mine")
    ck, out = str(good), str(tmp_path / "x.gguf")
    table: list[tuple[list[str], str]] = [
        (["convert", ck, "-o", str(tmp_path / "no" / "x.gguf")], "no such folder"),
        (["convert", ck, "-o", str(tmp_path)], "is a folder"),
        (["convert", ck, "-o", str(existing)], "exists already; --force"),
        (["convert", ck, "-o", out, "--quant", "Q4_KM"], "'Q4_KM' is unknown; the file types are BF16"),
        (["convert", ck, "-o", out, "--quant", "F16,F32"], "must hold {quant}"),
        (["convert", ck, "-o", out, "--threads", "0"], "0 is not from 1 to 512"),
        (["convert", ck, "-o", out, "--threads", "many"], "'many' is not a whole number"),
        (["convert", ck, "-o", out, "--threads", "1000000"], "1000000 is not from 1 to 512"),
        (["convert", ck, "-o", ""], "-o is empty"),
        (["verify", str(existing), "--tokens", "1000000"], "is not from 2 to 4096"),
        (["chat", str(existing), "-p", "hi", "--ctx", "4294967297"], "is not from 2 to"),
        (["convert", ck], "-o/--output"),
        (["convert", str(tmp_path / "nothing"), "-o", out], "no such checkpoint folder"),
        (["convert", str(existing), "-o", out], "is a file, expected a checkpoint folder"),
        (["convert", ck, "-o", out, "--yarn-factor", "0.5"], "below 1"),
        (["convert", ck, "-o", out, "--yarn-factor", "nan"], "not a finite number"),
        (["convert", ck, "-o", out, "--yarn-ext-factor", "4"], "a mix from 0 to 1"),
        (["verify", str(tmp_path / "no.gguf")], "No such file"),
        (["verify", ck], "is a folder"),
        (["verify", str(existing)], "not a GGUF"),
        (["inspect", str(existing)], "not a GGUF"),
        (["chat", str(existing), "-p", "hi"], "not a GGUF"),
        (["nonsense"], "unknown command 'nonsense'"),
        (["inspect"], "MODEL"),
        (["inspect", str(existing), "--swirl"], "--swirl"),
    ]
    (tmp_path / "link.gguf").symlink_to(existing)
    table += [
        (["convert", ck, "-o", str(good / SHARD), "--force"], "is one of the files that are read"),
        (["convert", ck, "-o", "/dev/null", "--force"], "is not a regular file"),
        (["convert", ck, "-o", str(tmp_path / "link.gguf")], "there.gguf: exists already"),
    ]
    for words, message in table:
        assert main(words) == 2, words
        assert message in one_error(capsys), words
    assert existing.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.gguf", "there.gguf"]


def test_a_type_that_needs_an_importance_matrix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256)
    words = ["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "IQ2_XXS", "--quiet"]
    assert main(words) == 2
    assert "IQ2_XXS needs an importance matrix" in one_error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


# The header: magic, version (4), tensor count (8), key count (16).
GGUFS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (cut, "truncated: tensor"),
    "truncated header": (lambda d: d[:200], "not a valid GGUF"),
    "lying tensor count": (lambda d: d[:8] + struct.pack("<Q", 2**60) + d[16:], "claims 1152921504606846976 tensors"),
    "lying key count": (lambda d: d[:16] + struct.pack("<Q", 2**60) + d[24:], "keys"),
    "one tensor too many": (lambda d: d[:8] + struct.pack("<Q", 22) + d[16:], "not a valid GGUF"),
    "lying offset": (lambda d: _edit_offset(d, 2**40), "truncated: tensor token_embd.weight"),
    "misaligned offset": (lambda d: _edit_offset(d, 4), "not aligned"),
    "version 9": (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "version 9"),
    "text": (lambda _d: b"once upon a time there was a model\n" * 10, "not a GGUF: it starts with b'once'"),
    "empty": (lambda _d: b"", "0 bytes"),
    "rope type that llama.cpp asserts": (
        lambda d: d.replace(b"\4\0\0\0\0\0\0\0yarn", b"\4\0\0\0\0\0\0\0narn", 1),
        "'narn'",
    ),
}


def _edit_offset(data: bytes, offset: int) -> bytes:
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16 + 4
    return data[:at] + struct.pack("<Q", offset) + data[at + 8 :]


@pytest.mark.parametrize("command", ["verify", "inspect", "chat"])
@pytest.mark.parametrize("case", GGUFS)
def test_bad_ggufs(
    case: str, command: str, gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = GGUFS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(gguf_file.read_bytes()))
    assert main([command, str(path), *(["-p", "hi"] if command == "chat" else [])]) == 2
    assert message in one_error(capsys)

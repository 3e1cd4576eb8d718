"""--kv-type, --kv-k and --kv-v in every command that has a cache: what they set, and what they refuse."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.bench.peers.llama_bench import llama_bench_line
from yarn_edge.bench.speed.command import add_arguments, chosen_kv_types
from yarn_edge.bench.speed.configuration import Configuration
from yarn_edge.cli import main
from yarn_edge.sample_text import sample_text

from support import tiny_gguf

COMMANDS: dict[str, list[str]] = {
    "chat": ["-p", "Hello"],
    "serve": ["--port", "0"],
    "verify": [],
    "perplexity": [],
    "compare": ["MODEL"],
    "passkey": [],
    "sweep": ["--over", "factor", "--values", "1,2"],
    "bench": [],
}
REFUSED = {
    "type": (["--kv-type", "q9"], "'q9' is unknown; known: f32, f16"),
    "K": (["--kv-k", "q9"], "'q9' is unknown; known: f32, f16"),
    "V": (["--kv-v", "q8_0/q4_0"], "'q8_0/q4_0' is unknown; known: f32, f16"),
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "m.gguf", "llama")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_types_are_refused(
    command: str, case: str, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    flags, message = REFUSED[case]
    words = [str(tiny_model) if word == "MODEL" else word for word in COMMANDS[command]]
    assert main([command, str(tiny_model), *words, *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert flags[0] in told.err.splitlines()[-1]
    assert message in told.err.splitlines()[-1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "t.txt"
    path.write_text(sample_text()[:400])
    return path


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--threads", "1", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_perplexity_runs_what_the_flags_say(smol_f32: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ("perplexity", str(smol_f32), "--text", str(text))
    split = answered(capsys, *usual, "--kv-k", "q8_0", "--kv-v", "q4_0")
    assert split["kv_type"] == "q8_0/q4_0"
    assert split["ppl"] == answered(capsys, *usual, "--kv-type", "q8_0/q4_0")["ppl"]
    assert split["ppl"] != answered(capsys, *usual, "--kv-k", "q4_0", "--kv-v", "q8_0")["ppl"]


def test_plain_attention_with_v_quantized_is_refused(
    smol_f32: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["perplexity", str(smol_f32), "--text", str(text), "--attention", "plain"]
    assert main([*usual, "--kv-v", "q8_0"]) == 2
    assert "plain attention needs V in one of f32, f16, bf16, not in q8_0" in capsys.readouterr().err
    assert answered(capsys, *usual, "--kv-k", "q8_0")["kv_type"] == "q8_0/f16"


def test_variants_may_say_one_part(smol_f32: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base takes its types from the flags, one candidate has the same from its words, one has them exchanged."""
    path, flags = str(smol_f32), ("--kv-type", "q4_0", "--kv-k", "q8_0")
    candidates = (f"{path}@kv-k=q8_0,kv-v=q4_0", f"{path}@kv-k=q4_0,kv-v=q8_0", f"{path}@kv-v=q8_0")
    found = answered(capsys, "compare", path, *candidates, "--text", str(text), *flags)["models"]
    same, exchanged, finer = (one["kld_mean"] for one in found)
    assert same == 0
    assert exchanged > 1e-6
    assert finer > 1e-6


def test_bench_measures_the_product(smol_f32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    listed = parser.parse_args(["m", "--kv-type", "f16,q4_0", "--kv-k", "q8_0,f16"])
    assert chosen_kv_types(listed) == ["q8_0/f16", "f16", "q8_0/q4_0", "f16/q4_0"]
    words = ("--kv-type", "q8_0/q4_0", "-p", "8", "-n", "0", "--repeat", "1", "--backend", "cpu")
    (row,) = answered(capsys, "bench", str(smol_f32), *words)["rows"]
    assert (row["status"], row["type_k"], row["type_v"]) == ("ok", "q8_0", "q4_0")


def test_llama_bench_is_told_both() -> None:
    line = llama_bench_line(Path("llama-bench"), Configuration("m", "cpu", "q8_0/q4_0", "flash", 512, 512, 1, 0))
    assert line[line.index("-ctk") + 1] == "q8_0"
    assert line[line.index("-ctv") + 1] == "q4_0"

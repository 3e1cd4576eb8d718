"""The header of a GGUF is parsed once in each process: what was read is handed on to whatever needs it next."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest

from yarn_edge.bench.speed import child
from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf import read

from support import gguf_files, tiny

Parsed = Counter[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `ck`, the GGUF `model.gguf` that convert makes of it, `text.txt`, and the GGUF in shards."""
    folder = tmp_path_factory.mktemp("once")
    model = convert(tiny.write_checkpoint(folder / "ck"), str(folder / "model.gguf"), "F32")[0]
    gguf_files.split(model, folder / "shards.gguf", 8)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    return folder


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """How often each file was parsed, counted below everything that has a name in another module. stdin is empty."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    counts: Parsed = Counter()
    parse = read._parse

    def counting(cursor: read._Cursor) -> read.GGUFFile:
        counts[cursor.path.name] += 1
        return parse(cursor)

    monkeypatch.setattr(read, "_parse", counting)
    return counts


COMMANDS = {
    "chat": "chat model.gguf --raw -p the --max-tokens 2 --backend cpu --threads 1",
    "chat with another factor": "chat model.gguf --raw -p the --max-tokens 2 --backend cpu --threads 1 --yarn-factor 2",
    "verify": "verify model.gguf --threads 1",
    "verify against a checkpoint": "verify model.gguf --against ck --tokens 16 --threads 1",
    "inspect": "inspect model.gguf",
    "inspect with a picture": "inspect model.gguf --plot OUT/p.png",
    "bench, the measuring apart": "bench model.gguf --backend cpu -p 4 -n 1 --repeat 1 --threads 1",
    "bench of another factor": "bench model.gguf@yarn-factor=2 --backend cpu -p 4 -n 1 --repeat 1 --threads 1",
    "perplexity": "perplexity model.gguf --text text.txt --ctx 64 --threads 1",
    "perplexity that is kept": "perplexity model.gguf@yarn-factor=2 --text text.txt --ctx 64 --threads 1 --save OUT/s",
    "sweep": "sweep model.gguf --over factor --values 2,4 --text text.txt --ctx 64 --threads 1",
    "patch": "patch model.gguf -o OUT/patched.gguf --yarn-factor 8",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_header_is_parsed_once(
    case: str, files: Path, parsed: Parsed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    words = COMMANDS[case].replace("OUT", str(tmp_path)).split()
    assert main(words) == 0
    assert parsed["model.gguf"] == 1, parsed


def test_bench_measures_with_one_reading(files: Path, parsed: Parsed) -> None:
    """The other process of bench: it is told the file's name, and reads it."""
    events: list[str] = []
    model = f"{files / 'model.gguf'}@yarn-factor=2"
    request = child.Request(model, "cpu", "f16", 0, 4, 1, 64, 1, 512, 512, "auto", 1)
    child.run_request(request, lambda event, **_values: events.append(event))
    assert events[-1] == "rope"
    assert parsed == {"model.gguf": 1}


def test_each_shard_is_parsed_once(files: Path, parsed: Parsed) -> None:
    shards = sorted(files.glob("shards-*.gguf"))
    assert len(shards) > 1
    assert main(COMMANDS["chat"].replace("model.gguf", str(shards[0])).split()) == 0
    assert parsed == {shard.name: 1 for shard in shards}

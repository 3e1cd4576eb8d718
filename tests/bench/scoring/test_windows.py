"""Texts and how they are cut: the authors' loop and llama-perplexity's, written down plainly, are the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yarn_edge.bench.scoring.documents import ScoredDocument, documents_of, tokenized, tokens_of
from yarn_edge.bench.scoring.windows import Cut, Window, tokens_needed, windows_of
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import lengths
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

from support import tiny_gguf

BOS = -1


def scored(windows: list[Window]) -> list[int]:
    return [token for w in windows for token in w.tokens[w.first :]]


def test_curve() -> None:
    tokens = list(range(10))
    assert windows_of("curve", [tokens], Cut(8)) == [Window(0, 0, tuple(range(8)), 1)]
    (first, second) = windows_of("curve", [tokens], Cut(6, chunks=5, bos=BOS))
    assert first == Window(0, 0, (BOS, 1, 2, 3, 4, 5), 1)
    assert second == Window(0, 6, (BOS, 7, 8, 9), 1)


def llama_perplexity(n_tokens: int, ctx: int, chunks: int) -> list[int]:
    """Which tokens tools/perplexity/perplexity.cpp scores."""
    first = ctx // 2
    n_chunk = min(chunks, n_tokens // ctx)
    return [i * ctx + first + 1 + k for i in range(n_chunk) for k in range(ctx - 1 - first)]


@pytest.mark.parametrize(("n", "ctx", "chunks"), [(100, 10, 99), (100, 11, 3), (64, 64, 1), (65, 2, 40)])
def test_llama_cpp(n: int, ctx: int, chunks: int) -> None:
    if wanted := llama_perplexity(n, ctx, chunks):
        found = windows_of("llama.cpp", [list(range(n))], Cut(ctx, chunks=chunks, bos=BOS))
        assert scored(found) == wanted
        assert all(w.tokens[0] == BOS and len(w.tokens) == ctx for w in found)
    else:
        with pytest.raises(YarnEdgeError):
            windows_of("llama.cpp", [list(range(n))], Cut(ctx, chunks=chunks))


def authors(n: int, max_length: int, stride: int, bos: bool) -> list[tuple[list[int], int]]:
    """(input, number of scored tokens at its end) of each window: eval/perplexity.py of jquesnelle/yarn."""
    room, found, previous = max_length - bos, [], 0
    for begin in range(0, n, stride):
        end = min(begin + room, n)
        part = ([BOS] if bos else []) + list(range(begin, end))
        found.append((part, min(end - previous, len(part) - 1)))
        previous = end
        if end == n:
            break
    return found


@given(n=st.integers(3, 200), ctx=st.integers(3, 64), stride=st.integers(1, 40), bos=st.booleans())
def test_sliding_is_the_authors_loop(n: int, ctx: int, stride: int, bos: bool) -> None:
    stride = min(stride, ctx - 1 - bos) or 1
    tokens = [BOS, *range(n)] if bos else list(range(n))
    found = windows_of("sliding", [tokens], Cut(ctx, stride, bos=BOS if bos else None))
    assert [(list(w.tokens), w.n_scored) for w in found] == authors(n, ctx, stride, bos)
    assert scored(found) == list(range(0 if bos else 1, n))  # each token once


def test_only_whole_chunks_count_for_llama_cpp() -> None:
    long, short = list(range(12)), list(range(7))
    assert [w.document for w in windows_of("llama.cpp", [short, long], Cut(8))] == [1]
    assert [w.document for w in windows_of("truncated", [short, long], Cut(8))] == [0, 1]
    with pytest.raises(YarnEdgeError, match="the longest text has 7 tokens"):
        windows_of("llama.cpp", [short], Cut(8))
    with pytest.raises(YarnEdgeError, match="it needs --ctx 3 or more"):
        windows_of("llama.cpp", [short], Cut(2))


def test_too_short_and_how_much_is_needed() -> None:
    with pytest.raises(YarnEdgeError, match="the minimum is 2"):
        windows_of("curve", [[1]], Cut(8))
    assert [tokens_needed(p, Cut(8, 2, 3)) for p in ("curve", "llama.cpp", "sliding", "truncated")] == [24, 24, 12, 8]
    assert [tokens_needed(p, Cut(8)) for p in ("curve", "llama.cpp", "sliding")] == [8, None, None]


# ---- documents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("documents") / "m.gguf", "llama"), vocab_only=True) as model:
        yield model


def test_a_long_file_is_read_as_far_as_needed(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.txt"
    path.write_text("größer " * 50_000, encoding="utf-8")
    whole = tokens_of(model, ScoredDocument("long", path))
    limits = []
    read = ScoredDocument.read
    monkeypatch.setattr(ScoredDocument, "read", lambda self, limit=None: (limits.append(limit), read(self, limit))[1])
    for wanted in (1, 100, 3000):
        assert tokens_of(model, ScoredDocument("long", path), wanted) == whole[:wanted]
    assert max(limits) < 100_000
    assert tokens_of(model, ScoredDocument("long", path), 10**6) == whole


def test_files_folders_and_json_lines(model: Model, tmp_path: Path) -> None:
    assert documents_of(None)[0].read() == (sample_text(), True)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.md", "a.txt", ".hidden"):
        (folder / name).write_text(f"text of {name}\n")
    assert [d.read()[0] for d in documents_of(folder)] == ["text of a.txt", "text of b.md"]
    lines = tmp_path / "d.jsonl"
    lines.write_text("".join(json.dumps({"body": f"document {i} ü", "n": i}) + "\n\n" for i in range(9)))
    found = documents_of(lines, field="body")
    assert [d.read() for d in found] == [(f"document {i} ü", True) for i in range(9)]
    sample = documents_of(lines, field="body", wanted=4, seed=7)
    assert sample == documents_of(lines, field="body", wanted=4, seed=7)
    assert sample != documents_of(lines, field="body", wanted=4, seed=8)
    assert [found.index(d) for d in sample] == sorted(found.index(d) for d in sample)
    assert sum(map(len, tokenized(model, found, max_tokens=20))) == 20


BAD = {
    "empty": (b" \n", "text", "contains no text"),
    "not UTF-8": (b"abc\xff\xfe", "text", "is not UTF-8: byte 3 is 0xff"),
    "cut in a character": ("abcü".encode()[:-1], "text", "is not UTF-8"),
}
BAD_LINES = {
    "no JSON": ("{", "is not JSON"),
    "another key": ('{"content": "x"}', "has no text under 'text'.*it has content.*--field"),
    "no object": ("[1]", "has no text under 'text'"),
    "no text": ('{"text": ""}', r"\.jsonl:1: contains no text"),
    "deep": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_texts(case: str, model: Model, tmp_path: Path) -> None:
    data, _, message = BAD[case]
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(YarnEdgeError, match=message):
        tokenized(model, documents_of(tmp_path / "t.txt"))


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines(case: str, model: Model, tmp_path: Path) -> None:
    line, message = BAD_LINES[case]
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(YarnEdgeError, match=message):
        tokenized(model, documents_of(tmp_path / "t.jsonl"))


def test_pipes_are_read_and_devices_are_not(tmp_path: Path) -> None:
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("some words\n"))
    writer.start()
    (document,) = documents_of(tmp_path / "pipe")
    writer.join()
    assert document.read() == ("some words", True)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(YarnEdgeError, match="is not a regular file but a device"):
            documents_of(device)


def test_no_documents(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for path in (tmp_path / "empty.jsonl", tmp_path / "none"):
        with pytest.raises(YarnEdgeError, match=r"contains no documents|No such file"):
            [d.read() for d in documents_of(path)]
    (tmp_path / "none").mkdir()
    with pytest.raises(YarnEdgeError, match="contains no documents"):
        documents_of(tmp_path / "none")


def test_lists_of_lengths() -> None:
    import argparse

    assert lengths("2k,512,4K") == [512, 2048, 4096]
    assert lengths("2k:4k:1k,2k") == [2048, 3072, 4096]
    for text in ("", "x", "2k:1k:1k", "1:2", "0", "2:9999999:1", "2k:4k:0"):
        with pytest.raises(argparse.ArgumentTypeError):
            lengths(text)

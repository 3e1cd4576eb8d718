"""Any text is tokenized: pieces have the ids of the whole, and no run of characters ends the process."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime import text_pieces, tokenizing
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.token_names import TokenNames

from support.gguf_files import byte_words
from support.vocabularies import BPE, PRE_TOKENIZERS, REGEX, SPM, write_vocabulary

WORDS = (
    [
        "a",
        "B",
        "word",
        "the",
        ".",
        ",",
        "!",
        "?",
        "'s",
        "'t",
        "-",
        "--",
        "(",
        ")",
        "1",
        "23",
        "456",
        "é",
        "д",
        "слово",
        "一",
        "他们",
        "，",
        "。",
        "は",
        "가",
        "🙂",
        "́",
        "_",
        "/",
        "<",
        "[",
        "]",
        "<s>",
        "</s>",
        "<u>",
        "<u",
        "<tool>",
        "'",
        '"',
        "…",
        "\u200b",
        "\u180e",
        "#",
        "//",
        "};",
        "e.g.",
        "ab",
        "abc",
    ]
    + [" "] * 8
    + ["\n"] * 6
    + ["  ", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "    ", "};\n", ".\n"]
)


@contextmanager
def vocabulary(folder: Path, keys: dict[str, Any]) -> Iterator[Model]:
    with Model(write_vocabulary(folder / "vocabulary.gguf", keys), vocab_only=True) as model:
        yield model


def texts(n: int) -> Iterator[str]:
    rng = random.Random(7)
    for _ in range(n):
        yield "".join(rng.choices(WORDS, k=rng.randint(30, 200)))


def assert_pieces_equal_wholes(model: Model, n_texts: int) -> int:
    """The number of cuts that were tried."""
    n_cuts = 0
    for text in texts(n_texts):
        for parse_special in (False, True):
            where = model.tokenizer._cuts_special if parse_special else model.tokenizer._cuts_plain
            n_cuts += len(list(where.pieces(text))) - 1
            whole = model.tokenizer._ids(text.encode(), True, parse_special)
            assert model.tokenize(text, add_special=True, parse_special=parse_special) == whole, text
    return n_cuts


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "PIECE_CHARS", 30)
    monkeypatch.setattr(text_pieces, "MAX_MARKUP", 3)
    monkeypatch.setattr(tokenizing, "_SHORT", 25)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pieces_have_the_ids_of_the_whole(tmp_path: Path, pre: str) -> None:
    with vocabulary(tmp_path, BPE | {"tokenizer.ggml.pre": pre}) as model:
        assert assert_pieces_equal_wholes(model, 20) > 10


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_of_a_sentencepiece_vocabulary(tmp_path: Path, prefix: bool) -> None:
    with vocabulary(tmp_path, SPM | {"tokenizer.ggml.add_space_prefix": prefix}) as model:
        assert assert_pieces_equal_wholes(model, 100) > 100


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("name", ["\n<x>", "a word", "。は"])
def test_pieces_beside_markup_with_white_space(tmp_path: Path, name: str) -> None:
    keys = {
        **BPE,
        "tokenizer.ggml.tokens": [*BPE["tokenizer.ggml.tokens"], name],
        "tokenizer.ggml.token_type": [*BPE["tokenizer.ggml.token_type"], 4],
    }
    with vocabulary(tmp_path, keys) as model:
        assert_pieces_equal_wholes(model, 60)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("word", ["e▁t", "the▁a"])
def test_no_cut_where_a_token_spans_it(tmp_path: Path, word: str) -> None:
    """Such a vocabulary is not cut at spaces, at markup only."""
    spanning = {
        **SPM,
        "tokenizer.ggml.tokens": [*SPM["tokenizer.ggml.tokens"], word],
        "tokenizer.ggml.token_type": [*SPM["tokenizer.ggml.token_type"], 1],
        "tokenizer.ggml.scores": [*SPM["tokenizer.ggml.scores"], 1.0],
    }
    with vocabulary(tmp_path, spanning) as model:
        assert_pieces_equal_wholes(model, 30)
        assert list(model.tokenizer._cuts_plain.pieces("the a " * 50)) == ["the a " * 50]


def test_no_cut_within_markup() -> None:
    names = TokenNames(["<a b>", "x\ny", "<u>", "<u>v"])
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    found = text_pieces.cuts(keys, names)
    assert found.places is not None
    assert not any(map(found.places.search, ("x\ny", "a b")))
    assert found.places.search("一，一")


@pytest.mark.parametrize(
    ("names", "apart"),
    [
        (["<a>", "<b>", "</b>"], {"<a>", "<b>", "</b>"}),
        (["<a>", "<a><b>"], set()),
        (["<a>", "b<"], set()),
        (["<a[", "[b]", "\n"], {"\n"}),
        (["\n", "\n\n"], set()),
        ([], set()),
    ],
)
def test_markup_that_nothing_overlaps(names: list[str], apart: set[str]) -> None:
    assert TokenNames(names).apart().names == apart


def test_markup_is_found_from_the_left_the_longest_first() -> None:
    markup = TokenNames(["<a>", "<a>b", "", "]"])
    assert list(markup.find("x<a>b<a>]]<a")) == [(1, "<a>b"), (5, "<a>"), (8, "]"), (9, "]")]
    assert list(markup.split("x<a>y")) == [("x", False), ("<a>", True), ("y", False)]
    assert not TokenNames([""])
    assert list(TokenNames([]).split("ab")) == [("ab", False)]


def test_a_million_names_are_no_burden() -> None:
    began = time.monotonic()
    markup = TokenNames(f"<|{i}|>" for i in range(1_000_000))
    assert sum(1 for _ in markup.find("<|3|> and <|nothing|> " * 20_000)) == 20_000
    assert time.monotonic() - began < 10


RUNS = {"dash": "-", "space": " ", "letter": "a", "newline": "\n", "Han": "一", "mark": "\u0301", "full-width": "！"}


@pytest.mark.parametrize("pre", REGEX)
def test_a_long_run_of_equal_characters_does_not_end_the_process(tmp_path: Path, pre: str) -> None:
    with vocabulary(tmp_path, BPE | {"tokenizer.ggml.pre": pre}) as model:
        for run in RUNS.values():
            assert len(model.tokenize(run * 32_000, add_special=False, parse_special=False)) >= 16_000


def test_such_a_run_does_end_it_without_a_deep_stack(tmp_path: Path) -> None:
    """That the stack is what the test above is about."""
    path = write_vocabulary(tmp_path / "tekken.gguf", BPE | {"tokenizer.ggml.pre": "tekken"})
    code = (
        "import sys, threading; from yarn_edge.runtime.model import Model; threading.stack_size(4 << 20)\n"
        "with Model(sys.argv[1], vocab_only=True) as m:\n"
        "    t = threading.Thread(target=m.tokenizer._ids, args=(b'-' * 40_000, False, False)); t.start(); t.join()"
    )
    if sys.platform == "linux":
        assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False).returncode < 0


@pytest.mark.parametrize(
    ("pre", "run"), [("superbpe", "1" * 9000), ("jais-2", " " * 40_000), ("gpt-2", "a" * (1 << 18))]
)
def test_runs_that_would_take_too_long_are_refused(tmp_path: Path, pre: str, run: str) -> None:
    with vocabulary(tmp_path, BPE | {"tokenizer.ggml.pre": pre}) as model:
        with pytest.raises(YarnEdgeError, match=r"in a row|without a line break") as refused:
            model.tokenize("x" + run, add_special=False, parse_special=False)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("keys", [BPE, SPM], ids=["BPE", "SentencePiece"])
@pytest.mark.parametrize("text", ["<s>", "<tool>", "<u></s>\n", "<s>a b"])
def test_much_markup_takes_linear_time(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    with vocabulary(tmp_path, keys) as model:
        began = time.monotonic()
        model.tokenize(text * 40_000, add_special=False, parse_special=True)
        assert time.monotonic() - began < 5  # a quadratic partition takes over 20


def test_at_most_ends_early(tmp_path: Path) -> None:
    with vocabulary(tmp_path, BPE) as model:
        ids = model.tokenize("some words " * 1_000_000, add_special=False, parse_special=False, at_most=1000)
        assert 1000 < len(ids) < 100_000
        assert byte_words()[ids[0]] == "s"


def test_time_can_be_up(tmp_path: Path) -> None:
    with (
        vocabulary(tmp_path, BPE | {"tokenizer.ggml.pre": "tekken"}) as model,
        pytest.raises(YarnEdgeError, match=r"takes too long to tokenize: after \d+ tokens"),
    ):
        model.tokenize("<tool>a" * 30_000, add_special=False, parse_special=True, until=time.monotonic() + 0.3)

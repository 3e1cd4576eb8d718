"""Passkey and needle retrieval: the prompts against the authors' words, reuse of the cache against fresh evaluation, outcomes."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.bench.quality.passkey_outcome import wilson_error
from yarn_edge.bench.quality.retrieval import Reader, Retrieval, is_hit, shared
from yarn_edge.bench.quality.retrieval_prompts import (
    Kind,
    Needle,
    Passkey,
    Prompt,
    Secret,
    draw_secrets,
    longest,
    make_prompts,
    midpoints,
    prompt_tokens,
)
from yarn_edge.bench.scoring.variants import Variant
from yarn_edge.cli import main
from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

THREADS = 1  # a token at a time on several waits for the slowest, which other work on the machine makes slow
STORY = "First one. Second is here! Third?\n\nA paragraph, 3.14 long. “Quoted.” And the last one ends."


@pytest.fixture(scope="module")
def smol(smol_quants: dict[str, Path]) -> Path:
    return smol_quants["Q8_0"]


@pytest.fixture(scope="module")
def words(smol: Path) -> Iterator[Model]:
    """The real tokenizer."""
    with Model(smol, vocab_only=True) as model:
        yield model


def text_of(model: Model, tokens: Sequence[int]) -> str:
    return b"".join(model.token_bytes(t) for t in tokens).decode()


def prompts_of(
    model: Model, kind: Kind, lengths: Sequence[int], depths: Sequence[float], seed: int = 0, trials: int = 1
) -> list[Prompt]:
    return make_prompts(model, kind, lengths, depths, draw_secrets(kind, random.Random(seed), len(depths), trials))


# ---- the prompts


@pytest.mark.parametrize("n_chars, depth", [(0, 0.5), (1, 0.0), (1000, 0.0), (1000, 1.0), (1000, 0.3), (777, 0.85)])
def test_passkey_prompts_are_the_authors(n_chars: int, depth: float) -> None:
    garbage = " ".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 20
    )
    cut = round(depth * n_chars)
    assert Passkey().text(Secret(4711), depth, n_chars).split("\n") == [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there.",
        garbage[:cut],
        "The pass key is 4711. Remember it. 4711 is the pass key.",
        garbage[: n_chars - cut],
        "What is the pass key? The pass key is",
    ]


@pytest.mark.parametrize(
    "at, expected",
    [
        (0.0, "NEEDLE First one. Second is here! Third?\n\nA paragraph, 3.14 long. “Quoted.” And the last one ends."),
        (0.08, "First one. NEEDLE Second is here! Third?\n\nA paragraph, 3.14 long. “Quoted.” And the last one ends."),
        (0.35, "First one. Second is here! Third?\n\nNEEDLE A paragraph, 3.14 long. “Quoted.” And the last one ends."),
        (0.75, "First one. Second is here! Third?\n\nA paragraph, 3.14 long. “Quoted.” NEEDLE And the last one ends."),
        (1.0, "First one. Second is here! Third?\n\nA paragraph, 3.14 long. “Quoted.” And the last one ends. NEEDLE"),
    ],
)
def test_needles_stand_between_sentences(at: float, expected: str) -> None:
    needle = "The special magic number for Lima is 1234567."
    task, *rest, question = Needle(STORY).text(Secret(1234567, "Lima"), at, len(STORY)).split("\n")
    assert "\n".join(rest) == expected.replace("NEEDLE", needle)
    assert "number" in task
    assert question == "What is the special magic number for Lima? The special magic number for Lima is"


@settings(deadline=None)
@given(
    n_chars=st.integers(0, 3000),
    depth=st.floats(0, 1),
    text=st.sampled_from([STORY, "Tiny.", "七。八九！十", sample_text()]),
)
def test_a_needle_is_all_that_is_added_and_near_its_depth(n_chars: int, depth: float, text: str) -> None:
    kind = Needle(text)
    lines = kind.text(Secret(7654321, "Oslo"), depth, n_chars).split("\n", 1)[1].rsplit("\n", 1)[0]
    before, after = lines.split("The special magic number for Oslo is 7654321.")
    filler = kind.filler(n_chars)
    # Between it and a text that ends with it, or in a text without spaces, stands one space of ours.
    assert "".join((before + after).split()) == "".join(filler.split())
    assert n_chars - 40 <= len(filler) <= n_chars or (n_chars < 41 and len(filler) <= n_chars)
    assert ((text.strip() + "\n\n") * 1000).startswith(filler)
    sentence = max(len(s) for s in re.split(r"(?<=[.!?。！])\s*", text)) + 2
    assert abs(len(before) - depth * len(filler)) <= max(sentence, 2)


@pytest.mark.parametrize(
    "text, place", [("word " * 4000, "between words"), ("x" * 20000, "anywhere"), ("漢字" * 9000, "anywhere")]
)
def test_a_text_without_sentences_gets_its_needle_at_the_depth_all_the_same(text: str, place: str) -> None:
    made = Needle(text).text(Secret(7654321, "Oslo"), 0.5, 10000)
    before, after = made.split("The special magic number for Oslo is 7654321.")
    assert abs(len(before) - 5100) < 60
    assert before[-1] == after[0] == " "
    if place == "between words":
        assert before.endswith("word ")
        assert after.startswith(" word")


@pytest.mark.parametrize("kind", [Passkey(), Needle(sample_text())], ids=["passkey", "needle"])
def test_prompts_have_their_length_and_depth(words: Model, kind: Kind) -> None:
    depths = [0.0, 0.1, 0.5, 0.95, 1.0]
    prompts = prompts_of(words, kind, (256, 1000), depths)
    assert [(p.length, p.depth) for p in prompts] == [(n, d) for n in (256, 1000) for d in reversed(depths)]
    for prompt in prompts:
        assert prompt.length - 14 <= len(prompt.tokens) <= prompt.length - 10
        text = text_of(words, prompt.tokens)
        assert list(prompt.tokens) == words.tokenize(text, add_special=True, parse_special=False)
        line = re.search(r"The (pass key|special magic number for \w+) is (\d+)\.", text)
        assert line is not None
        assert int(line[2]) == prompt.secret.number
        body = slice(text.index("\n") + 1, text.rindex("\n"))
        place = (line.start() - body.start) / (body.stop - body.start - len(line[0]))
        assert abs(place - prompt.depth) < (0.15 if prompt.length == 256 else 0.05)  # a sentence of the text
        assert text.endswith(f"? The {line[1]} is")


def test_a_short_text_is_repeated(words: Model) -> None:
    (prompt,) = prompts_of(words, Needle(STORY), (500,), [0.5])
    assert len(prompt.tokens) >= 486
    assert text_of(words, prompt.tokens).count("A paragraph, 3.14 long.") > 10


def test_prompts_follow_from_the_seed_alone(words: Model) -> None:
    def made(lengths: Sequence[int] = (256, 300), seed: int = 0, trials: int = 2) -> dict[tuple[int, float], list[Any]]:
        found: dict[tuple[int, float], list[Any]] = {}
        for p in prompts_of(words, Needle(STORY), lengths, midpoints(2), seed, trials):
            found.setdefault((p.length, p.depth), []).append((p.secret, list(p.tokens)))
        return found

    all_of_them = made()
    assert made() == all_of_them
    assert made(lengths=(300,)) == {key: those for key, those in all_of_them.items() if key[0] == 300}
    assert made(trials=1) == {key: those[:1] for key, those in all_of_them.items()}
    assert [s for s, _ in all_of_them[256, 0.25]] == [s for s, _ in all_of_them[300, 0.25]]
    assert all(made(seed=1)[key] != those for key, those in all_of_them.items())


def test_keys_have_the_authors_range() -> None:
    source = random.Random(0)
    keys = [Passkey().secret(source).number for _ in range(20000)]
    assert 1 <= min(keys) < 50
    assert 49950 < max(keys) <= 50000
    needles = [Needle("a").secret(source) for _ in range(2000)]
    assert {len(str(n.number)) for n in needles} == {7}
    assert len({n.subject for n in needles}) > 20


def test_depths_are_the_middles_of_equal_parts() -> None:
    assert midpoints(10) == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95])
    assert midpoints(1) == [0.5]


@given(room=st.integers(5, 400), guess=st.integers(0, 3000), per_token=st.integers(1, 9))
def test_the_longest_that_fits(room: int, guess: int, per_token: int) -> None:
    def make(n: int) -> list[int]:
        assert n >= 0
        return [0] * (5 + -(-n // per_token))

    found = longest(make, room, guess)
    assert len(found) == max(len(make(n)) for n in range(4000) if len(make(n)) <= room)


def test_no_eos_before_the_answer(words: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = words.tokenize("The key is", add_special=True, parse_special=False)
    monkeypatch.setattr(words, "add_eos", True)
    monkeypatch.setattr(words, "tokenize", lambda _text, **_flags: [*plain, words.eos])
    assert prompt_tokens(words, "The key is") == plain


# ---- answers


@pytest.mark.parametrize(
    "answer, hit",
    [
        (" 4711. Remember it.", True),
        ("4711", True),
        (" the key 4711", True),
        (" 04711", True),
        ("\n4711 4712", True),
        (" 47110", False),
        (" 4712", False),
        (" 1 4711", False),
        (" 471", False),
        ("", False),
        (" four", False),
        (" 4,711", False),
        (" 0", False),
    ],
)
def test_the_first_digits_count(answer: str, hit: bool) -> None:
    assert is_hit(answer, 4711) is hit


@pytest.mark.parametrize("hits, n", [(0, 1), (1, 1), (0, 10), (10, 10), (7, 10), (500, 1000)])
def test_standard_error(hits: int, n: int) -> None:
    """Wilson's interval: all rates p from which hits/n is at most one standard deviation away."""
    p = np.linspace(0, 1, 2_000_001)
    inside = p[np.abs(hits / n - p) <= np.sqrt(p * (1 - p) / n) + 1e-12]
    assert wilson_error(hits, n) == pytest.approx((inside.max() - inside.min()) / 2, abs=1e-5)


@pytest.mark.parametrize(
    "cached, tokens, n",
    [([], [1], 0), ([1, 2, 3], [1, 2, 4, 5], 2), ([1, 2], [1, 2], 1), ([1, 2, 3], [1, 2], 1), ([1], [1, 2], 1)],
)
def test_what_stays_in_the_cache(cached: list[int], tokens: list[int], n: int) -> None:
    assert shared(cached, tokens) == n


def test_reuse_of_the_cache_changes_nothing(smol_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt with what is left of those before it, and each from the beginning: same answers, same logits.

    In float32: with Q8_0 (activations in 8 bits) and flash attention, another cut into batches alone moves a logit by 0.5.
    """
    held: list[int] = []
    evaluate = Context.evaluate

    def followed(self: Context, tokens: Sequence[int], start: int, *rest: Any) -> None:
        held[start:] = tokens
        evaluate(self, tokens, start, *rest)

    exact: dict[str, Any] = {"n_ctx": 256, "n_batch": 64, "kv_type": "f32", "attention": "plain", "threads": THREADS}
    with Model(smol_f32) as model:
        prompts = prompts_of(model, Passkey(), (128, 192), midpoints(2))
        prompts += prompts_of(model, Passkey(), (192,), [0.4], trials=2)
        prompts += prompts_of(model, Needle(STORY), (160,), [0.5]) + prompts[-1:]
        with Context(model, ContextSettings(**exact)) as context, Context(model, ContextSettings(**exact)) as fresh:
            monkeypatch.setattr(Context, "evaluate", followed)
            reader = Reader(context)
            for prompt in prompts:
                answer = reader.answer(prompt.tokens)
                assert held[: len(prompt.tokens)] == list(prompt.tokens)
                again = Reader(fresh)  # knows of nothing in the cache
                assert again.answer(prompt.tokens) == answer
                fresh.keep(len(prompt.tokens) - 1)
                fresh.evaluate(prompt.tokens[-1:], len(prompt.tokens) - 1)
                context.keep(len(prompt.tokens) - 1)
                context.evaluate(prompt.tokens[-1:], len(prompt.tokens) - 1)
                np.testing.assert_allclose(context.logits(), fresh.logits(), atol=1e-3)
                assert again.n_evaluated == len(prompt.tokens)
    assert reader.n_evaluated < 0.85 * sum(len(p.tokens) for p in prompts)


def test_progress_knows_the_tokens_before(smol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[float, str]] = []
    totals: list[float] = []

    class Bar:
        def __init__(self, _label: str, total: float, _unit: str) -> None:
            totals.append(total)

        def __enter__(self) -> Callable[[float, str], None]:
            return lambda amount, what: moves.append((amount, what))

        def __exit__(self, *_: object) -> None:
            pass

    with Model(smol) as model:
        prompts = prompts_of(model, Passkey(), (128, 200), midpoints(2))
        monkeypatch.setattr("yarn_edge.bench.quality.retrieval.bar", Bar)
        with Context(model, ContextSettings(n_ctx=256, n_batch=64, threads=THREADS)) as context:
            test = Retrieval(context, prompts)
            assert test.answers == []
            assert test.tok_per_s is None
            test.go()
    assert totals == [sum(amount for amount, _ in moves)] == [test.reader.n_evaluated]
    assert moves[0][1] == "128 tokens, depth 75%, 0/0"
    assert re.fullmatch(r"200 tokens, depth 25%, [0-3]/3", moves[-1][1])


# ---- the command


def asked(smol: Path, *words: str) -> list[str]:
    return ["passkey", str(smol), "--lengths", "128,256", "--depths", "2", "--threads", str(THREADS), "--quiet", *words]


def test_json(whole_smol_quants: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    smol = whole_smol_quants["Q8_0"]
    assert main(asked(smol, "--trials", "2", "--seed", "3", "--json")) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["model"], told["variant"], told["seed"], told["lengths"]) == (str(smol), "passkey", 3, [128, 256])
    assert told["complete"] is True
    assert told["tok_per_s"] > 0
    assert [(c["length"], c["depth"]) for c in told["cells"]] == [(128, 0.25), (128, 0.75), (256, 0.25), (256, 0.75)]
    for cell in told["cells"]:
        assert cell["trials"] == len(cell["answers"]) == len(cell["expected"]) == 2
        assert cell["length"] - 14 <= cell["n_tokens"] <= cell["length"] - 10
        pairs = zip(cell["answers"], cell["expected"], strict=True)
        assert cell["hits"] == sum(re.findall(r"\d+", f"{answer} 0")[0] == str(key) for answer, key in pairs)
    for row in told["by_length"]:
        those = [c for c in told["cells"] if c["length"] == row["length"]]
        assert row["n"] == 4
        assert row["accuracy"] == sum(c["hits"] for c in those) / 4
        assert row["stderr"] == wilson_error(sum(c["hits"] for c in those), 4)
    assert told["accuracy"] == sum(c["hits"] for c in told["cells"]) / 8
    assert told["accuracy"] >= 0.5  # so near, a model with right positions finds it


def test_table_and_picture(smol: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "map.png"
    words = ["passkey", str(smol), "--lengths", "512", "--random", "2", "--variant", "needle", "--quiet"]
    assert main([*words, "--plot", str(picture)]) == 0
    out = capfd.readouterr().out
    assert "Needle in a haystack" in out
    assert "of 2 numbers" in out
    assert re.search(r"^ *512 +(50\d|49\d) +2 ", out, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--plot", str(picture)]) == 2  # before any work
    captured = capfd.readouterr()
    assert "--force" in captured.err
    assert not captured.out


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (Terminated(15), 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("answers", [0, 3])
def test_interrupted_work_is_told(
    smol: Path,
    answers: int,
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    answer, left = Reader.answer, [answers]

    def stopped(self: Reader, *words: Any) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return answer(self, *words)

    monkeypatch.setattr(Reader, "answer", stopped)
    assert main(asked(smol, "--json")) == code
    out = capfd.readouterr().out
    if not answers:
        assert not out
        return
    told = json.loads(out)
    assert told["complete"] is False
    assert [(c["length"], c["depth"], c["trials"]) for c in told["cells"]] == [
        (128, 0.25, 1),
        (128, 0.75, 1),
        (256, 0.75, 1),
    ]
    assert [row["n"] for row in told["by_length"]] == [2, 1]
    left[0] = answers
    assert main(asked(smol)) == code
    assert "stopped after 3 of 4 prompts" in capfd.readouterr().out


def test_logits_that_are_no_numbers(
    smol: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logits, calls = Context.logits, [0]

    def broken(self: Context) -> Any:
        calls[0] += 1
        found = logits(self)
        if calls[0] > 25:
            found[-1, 123] = math.nan
        return found

    monkeypatch.setattr(Context, "logits", broken)
    assert main(asked(smol, "--json")) == 2
    captured = capfd.readouterr()
    place = re.search(r"the logits at position (\d+) are nan", captured.err)
    assert place is not None
    assert 114 <= int(place[1]) < 256
    assert json.loads(captured.out)["complete"] is False  # what came before is measured


def test_lengths_beyond_the_context_are_what_it_is_for(
    smol: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = Variant.load

    def short(self: Variant) -> Model:
        model = load(self)
        model.n_ctx_train = 150
        return model

    monkeypatch.setattr(Variant, "load", short)
    assert main([w for w in asked(smol, "--depths", "1") if w != "--quiet"]) == 0
    captured = capfd.readouterr()
    assert "its context is 150 tokens: 256 lie beyond it" in captured.err
    assert "context is 150 tokens" in captured.out


@pytest.mark.parametrize(
    "words, error",
    [
        (["--lengths", "100k,2x"], "'2x' is not a number of tokens"),
        (["--lengths", "2k:1k:1k"], "neither a length nor first:last:step"),
        (["--lengths", "64,1k"], "--lengths 64: task, question and answer alone take"),
        (["--lengths", "1"], "is not from 2"),
        (["--lengths", "2000000k"], "GiB"),
        (["--depths", "0"], "0 is not from 1"),
        (["--depths", "2", "--random", "2"], "not allowed with"),
        (["--trials", "-1"], "-1 is not from 1"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--variant", "hay"], "invalid choice"),
        (["--text", "DIR/good.txt"], "it needs --variant needle"),
        (["--variant", "needle", "--text", "DIR/empty.txt"], "empty.txt: holds no text"),
        (["--variant", "needle", "--text", "DIR/latin.txt"], "latin.txt: is not UTF-8: byte 1 is 0xe9"),
        (["--variant", "needle", "--text", "DIR/missing.txt"], "missing.txt: No such file"),
        (["--variant", "needle", "--text", "DIR/mark.txt"], "mark.txt: holds no text"),
        (["--kv-type", "q3"], "--kv-type 'q3' is unknown"),
        (["--backend", "cuda"], "no cuda device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(smol: Path, tmp_path: Path, words: list[str], error: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name, data in (("good", b"Good."), ("empty", b" \n\n"), ("latin", b"h\xe9"), ("mark", b"\xef\xbb\xbf\n")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    assert main(["passkey", str(smol), *(w.replace("DIR", str(tmp_path)) for w in words)]) == 2
    captured = capfd.readouterr()
    assert error in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_the_shortest_length_that_is_told_is_enough(smol: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["passkey", str(smol), "--depths", "3", "--threads", str(THREADS), "--quiet", "--json", "--lengths"]
    assert main([*words, "20"]) == 2
    least = re.search(r"take (\d+) tokens", capfd.readouterr().err)
    assert least is not None
    assert main([*words, str(int(least[1]) - 1)]) == 2
    assert main([*words, least[1]]) == 0


def test_an_empty_text_hides_nothing() -> None:
    with pytest.raises(YarnEdgeError, match="empty"):
        Needle("\ufeff \n")

"""Several answers at once: each is what it is alone, documents are read once, nobody waits long, and room is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.engine import pace, sequences
from yarn_edge.engine.answer import AnswerRequest, RunningAnswer
from yarn_edge.engine.batching import Engine, at_least_two_rows
from yarn_edge.engine.chances import token_chance
from yarn_edge.engine.constraint import Constraint
from yarn_edge.engine.repeatable import why_not_repeatable
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny_gguf
from support.neighbors import differing, requests_of, run

GREEDY = Sampling(temperature=0)
SETTINGS = ContextSettings(n_ctx=1024, n_batch=64, n_seq=17, unified=True, threads=1, attention="fast", n_outputs=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")) as loaded:
        yield loaded


@pytest.fixture
def engine(tiny: Model) -> Iterator[Engine]:
    with open_context(tiny, SETTINGS) as context:
        yield Engine(context)


def answer_of(engine: Engine, tokens: list[int], max_tokens: int = 8, **more: object) -> RunningAnswer:
    request = AnswerRequest(tokens, GREEDY, max_tokens, **more)  # type: ignore[arg-type]
    one = RunningAnswer(request, engine.context.model, engine.n_ctx)
    engine.submit(one)
    return one


def text_of(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 250, n)]


def drained(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_neighbors_change_nothing(engine: Engine) -> None:
    assert why_not_repeatable(engine.context) is None
    requests = requests_of(24, 250, 120)
    alone = run(engine, requests, 1)
    assert differing(alone, run(engine, requests, 8, cancelled=0.2, seed=1)) == []
    assert len({tuple(answer) for answer in alone}) > 12


def test_an_answer_that_made_room_is_the_same(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "ANSWER_CELLS", 1)
    settings = ContextSettings(n_ctx=256, n_batch=64, n_seq=9, unified=True, threads=1, attention="fast", n_outputs=32)
    with open_context(tiny, settings) as context:
        engine = Engine(context)
        suspended, suspend = [], engine._suspend
        engine._suspend = lambda one: (suspended.append(one), suspend(one))  # type: ignore[method-assign,assignment,func-returns-value]
        monkeypatch.setattr(engine.pool, "goal", lambda one: len(one.tokens) + 1)
        alone = []
        for seed in range(4):
            alone.append(answer_of(engine, text_of(30, seed), 60))
            drained(engine)
        assert not suspended
        together = [answer_of(engine, text_of(30, seed), 60) for seed in range(4)]
        drained(engine)
        assert suspended
        assert [a.tokens for a in alone] == [b.tokens for b in together]


def test_a_document_of_several_is_read_once(engine: Engine) -> None:
    """Also by those who ask while it is read; and its cells are shared."""
    document = text_of(500)
    asked = [answer_of(engine, [*document, 7, 8, i], 4) for i in range(3)]
    for _ in range(2):
        engine.step()
    asked.append(answer_of(engine, [*document, 7, 9, 9], 4))
    drained(engine)
    load = engine.load()
    assert load.prompt_tokens_evaluated < 500 + 4 * 8
    assert load.prompt_tokens_shared > 3 * 490
    assert load.cells_used < 500 + 4 * 16
    assert load.generated_tokens == sum(one.generated for one in asked) > 0
    assert (load.running, load.waiting, load.requests_total, load.requests_cancelled) == (0, 0, 4, 0)


def test_a_short_question_does_not_wait_for_a_document(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace.Pace, "tokens", lambda _self, alone: 64 if alone else 32)
    long = answer_of(engine, text_of(800), 2)
    engine.step()
    before = engine.load().prompt_tokens_evaluated
    short = answer_of(engine, text_of(10, 1), 4)
    engine.step()
    assert short.generated == 1
    assert engine.load().prompt_tokens_evaluated == before + 32  # the slice in which it is read is a short one
    drained(engine)
    assert long.generated == 2 or long.reason == "stop"


def test_cancelled_in_the_queue_and_while_it_runs(engine: Engine) -> None:
    running = [answer_of(engine, text_of(40, i), 60) for i in range(9)]
    engine.step()
    assert (engine.load().running, engine.load().waiting) == (8, 1)
    engine.cancel(running[8])
    engine.cancel(running[0])
    engine.step()
    assert running[8].done
    assert running[0].done
    assert running[0].reason == "interrupted"
    for one in running[1:8]:
        engine.cancel(one)
    drained(engine)
    assert engine.load().requests_cancelled == 9


def test_an_answer_that_fails_ends_alone(engine: Engine) -> None:
    """Its form is refused, or nothing is allowed; who asked is told, and the others go on."""
    alone = answer_of(engine, text_of(40, 1), 12)
    drained(engine)
    beside = answer_of(engine, text_of(40, 1), 12)
    told: list[BaseException | None] = []
    for grammar in ('root ::= "x" nothing\nnothing ::= [\\x00]', "root ::= ("):
        request = AnswerRequest(text_of(40, 2), Sampling(seed=1, constraint=Constraint(grammar)), 8)
        engine.submit(RunningAnswer(request, engine.context.model, engine.n_ctx, ended=told.append))
    drained(engine)
    reasons = sorted(str(error) for error in told)
    assert [reason[:20] for reason in reasons] == ["llama.cpp refuses th", "the form asked for n"]
    assert (beside.error, beside.tokens) == (None, alone.tokens)
    assert engine.load().requests_cancelled == 0


def test_documents_on_disk_serve_every_sequence(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "KEEP_TOKENS", 64)
    document, texts = text_of(300), []
    for turn in range(2):
        with open_context(tiny, SETTINGS) as context:
            one = Engine(context, StateCache(tmp_path))
            if turn:  # the restored cells are neither the first nor in a row
                others = [answer_of(one, text_of(30, seed), 20) for seed in (3, 4)]
                drained(one)
                assert all(other.done for other in others)
            asked = [answer_of(one, [*document, *question], 6) for question in ((1, 1, 1), (2, 2), (3,))]
            drained(one)
            one.keep_on_disk()
            assert one.load().prompt_tokens_restored == (len(document) + 2 if turn else 0)
            assert len(list(tmp_path.glob("*.state"))) == 1  # the others have other questions
            texts.append([answer.tokens for answer in asked])
    assert texts[0] == texts[1]


def test_cached_tokens_are_the_clients_own(engine: Engine) -> None:
    first = answer_of(engine, text_of(100), 2, key="a")
    drained(engine)
    stranger, again = answer_of(engine, text_of(100), 2, key="b"), answer_of(engine, text_of(100), 2, key="a")
    drained(engine)
    assert (first.own, stranger.own, again.own) == (0, 0, 99)
    assert stranger.reused == 99


def test_probabilities_are_those_of_the_model(engine: Engine) -> None:
    told: list[object] = []
    request = AnswerRequest(text_of(20), Sampling(temperature=1.5, seed=3, top_k=3), 6, top_logprobs=5)
    one = RunningAnswer(request, engine.context.model, engine.n_ctx, lambda _text, tokens: told.extend(tokens))
    engine.submit(one)
    drained(engine)
    assert [chance.token for chance in told] == one.tokens[20 : 20 + len(told)]  # type: ignore[attr-defined]
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    expected = np.log(np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum())
    chance = token_chance(logits, 2, 2)
    assert chance.logprob == pytest.approx(expected[2], abs=1e-12)
    assert [token for token, _ in chance.top] == [1, 3]


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ([(0, [1], 5, 1)], [(1, 1), (1, 1)]),
        ([(0, [1, 2, 3], 5, 1)], [(3, 2)]),
        ([(0, [1], 5, 0)], [(1, 0), (1, 0)]),
        ([(0, [1, 2], 5, 0)], [(2, 0)]),
        ([(0, [1], 5, 1), (1, [1, 2], 0, 0)], [(1, 1), (2, 0), (1, 1)]),
        ([(0, [1], 5, 1), (1, [1], 0, 1)], [(1, 1), (1, 1)]),
    ],
    ids=["one", "slice", "one-read", "two-read", "beside-a-reader", "two"],
)
def test_no_row_is_alone(parts: list[tuple[int, list[int], int, int]], rows: list[tuple[int, int]]) -> None:
    made = at_least_two_rows([BatchPart(*part) for part in parts], 9)
    assert [(len(part.tokens), part.outputs) for part in made] == rows


def test_only_what_is_to_be_repeatable_gets_a_second_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, rows = engine.context.evaluate_parts, []
    monkeypatch.setattr(
        engine.context,
        "evaluate_parts",
        lambda parts: rows.append(sum(len(p.tokens) for p in parts)) or evaluate(parts),
    )
    for sampling in (GREEDY, Sampling(seed=1), Sampling()):
        engine.submit(RunningAnswer(AnswerRequest([5], sampling, 3), engine.context.model, engine.n_ctx))
        drained(engine)
    assert rows == [2, 2, 2, 2, 2, 2, 2, 1, 1]  # a prompt, then two tokens; others may reuse the prompt


def test_shares_of_a_step() -> None:
    assert pace.shared_out([], 64) == []
    assert pace.shared_out([1000], 64) == [64]
    assert pace.shared_out([1000, 20], 64) == [44, 20]
    assert pace.shared_out([1000, 500, 80], 64) == [16, 0, 48]

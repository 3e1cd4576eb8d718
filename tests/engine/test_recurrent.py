"""Prompts on a model with linear attention, whose state goes back only to copies: what is reused equals a fresh evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.lm_eval.requests import Requests
from yarn_edge.bench.quality.retrieval import Reader
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.engine import sequences
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache
from yarn_edge.errors import YarnEdgeError
from yarn_edge.likelihood import Rows
from yarn_edge.memory.placement import Wanted
from yarn_edge.memory.plan import Simulation
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.recurrent import EarlierStates

from support import tiny_families
from support.made_once import Shelf

BATCH = 32
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(400)]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def path(shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        convert(tiny_families.write(folder / "ck", "qwen3_5"), str(folder / "out.gguf"), "F32")

    return shelf.made_once("qwen3_5-f32", make) / "out.gguf"


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model(path) as found:
        yield found


def context_of(model: Model) -> Context:
    return Context(model, ContextSettings(256, n_batch=BATCH, kv_type="f16", attention="plain"))


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with context_of(model) as found:
        yield found


def asked(generation: Generation, tokens: Sequence[int], **how: Any) -> tuple[int, int, float]:
    """(tokens reused, tokens restored, the largest difference of the logits from those of a fresh context)."""
    for _piece in generation.generate(list(tokens), GREEDY, 2, **how):
        pass
    stats, seen = generation.stats, generation.context.logits()
    assert stats is not None
    with context_of(generation.context.model) as other:
        fresh = Generation(other)
        for _piece in fresh.generate(list(tokens), GREEDY, 2):
            pass
        assert fresh.cached.tokens == generation.cached.tokens
        return stats.prompt_tokens_reused, stats.prompt_tokens_restored, float(np.abs(seen - other.logits()).max())


def test_a_prompt_goes_back_to_the_last_whole_batch(context: Context) -> None:
    talk = Generation(context)
    assert asked(talk, TOKENS[:100]) == (0, 0, 0)
    assert asked(talk, [*TOKENS[:97], 5, 6, 7]) == (96, 0, 0)
    assert asked(talk, [*TOKENS[:97], 5, 6, 8], canonical=True) == (96, 0, 0)
    assert asked(talk, TOKENS[:50] + [9] * 30) == (0, 0, 0)
    assert asked(talk, TOKENS[:50] + [9] * 33) == (64, 0, 0)


def test_a_longer_prompt_goes_on_where_the_answer_ended(context: Context) -> None:
    talk = Generation(context)
    asked(talk, TOKENS[:100])
    reused, _restored, off = asked(talk, [*talk.cached.tokens, 3, 4])
    assert reused == 101
    assert off < 1e-5


def test_an_interrupted_evaluation_is_undone(context: Context) -> None:
    talk = Generation(context)
    asked(talk, TOKENS[:100])
    context.evaluate(TOKENS[:5], len(talk.cached))
    assert asked(talk, [*talk.cached.tokens, 3, 4]) == (96, 0, 0)
    talk.cached.earlier.forget()
    context.evaluate(TOKENS[:5], len(talk.cached))
    assert asked(talk, [*talk.cached.tokens, 3, 5]) == (0, 0, 0)


def test_states_on_disk_are_those_of_a_whole_batch(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "KEEP_TOKENS", BATCH)
    first = Generation(context, StateCache(tmp_path))
    asked(first, TOKENS[:100])
    first.keep_on_disk()
    assert asked(first, TOKENS[:100]) == (96, 0, 0)  # the state that was there is there again
    with context_of(context.model) as other:
        again = Generation(other, StateCache(tmp_path))
        assert asked(again, TOKENS[:60]) == (0, 0, 0)  # 96 tokens, or none
        assert asked(again, TOKENS[:98]) == (0, 96, 0)
        assert asked(again, [*TOKENS[:97], 1]) == (96, 0, 0)


def test_passkey_prompts_and_requests_of_the_harness_are_those_of_a_fresh_context(context: Context) -> None:
    reader, prompts = Reader(context), [TOKENS[:70], [*TOKENS[:60], 5, 6]]
    found = [reader.answer(prompt) for prompt in prompts]
    with Rows(1) as rows:
        requests = Requests(context, rows)
        scores = [requests.score(np.array(prompt, np.int32), 3) for prompt in prompts]
        texts = [requests.generate(np.array(prompt, np.int32), GREEDY, 4, []) for prompt in prompts]
        for prompt, answer, score, text in zip(prompts, found, scores, texts, strict=True):
            with context_of(context.model) as other:
                assert Reader(other).answer(prompt) == answer
                other.clear()
                fresh = Requests(other, rows)
                assert fresh.score(np.array(prompt, np.int32), 3) == score
                assert fresh.generate(np.array(prompt, np.int32), GREEDY, 4, []) == text


def test_copies_are_few_and_the_last_ones(context: Context) -> None:
    earlier = EarlierStates(context)
    for at in range(0, 96, BATCH):
        context.evaluate(TOKENS[at : at + BATCH], at)
        earlier.take(at + BATCH)
    assert [earlier.reachable(n, 96) for n in (96, 95, 64, 63)] == [96, 64, 64, 0]
    assert earlier.cut(70) == 64
    assert earlier.cut(10) == 0


def test_drafts_are_refused_when_asked_for(path: Path) -> None:
    with (
        pytest.raises(
            YarnEdgeError, match="--lookup on: the state of linear attention cannot go back to before a draft"
        ),
        opened(path, Wanted(ctx=256), EngineSettings(lookup="on")),
    ):
        pass
    with opened(path, Wanted(ctx=256)) as talk:
        assert talk.lookup is None


def test_the_copies_are_in_the_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Simulation(path) as simulation:
        sizes = simulation._sizes(simulation.settings(256))
        # 3 layers: 6 heads of 16 x 16 and 3 of 4 inputs of the convolution of 160 channels
        assert sizes.recurrent == pytest.approx(3 * 4 * (6 * 16 * 16 + 3 * 160), abs=2**20 / 200)
        with_two = simulation.plan(256).process_bytes
        monkeypatch.setattr("yarn_edge.memory.plan.COPIES", 0)
        assert with_two - simulation.plan(256).process_bytes == 2 * sizes.recurrent

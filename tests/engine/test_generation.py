"""Generation with drafts says what plain generation says; preloading and stopping leave a sound cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.engine.answer import RunningAnswer
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.prompt_lookup import PromptLookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import MAX_DRAFT, Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

from support import tiny_gguf

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.1, seed=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Random float32 layers, where batches do not matter, and greedy answers run in circles, which drafts like."""
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")) as loaded:
        yield loaded


@pytest.fixture
def context(tiny: Model) -> Iterator[Context]:
    with Context(
        tiny, ContextSettings(n_ctx=512, n_outputs=MAX_DRAFT + 1, n_batch=64, kv_type="f32", threads=1)
    ) as made:
        yield made


def text_of(n_tokens: int, seed: int = 0) -> list[int]:
    part = [int(t) for t in np.random.default_rng(seed).integers(3, 250, 20)]
    return (part * (n_tokens // 20 + 1))[:n_tokens]


def sampled(context: Context, tokens: Sequence[int], sampling: Sampling, n: int, **made: Any) -> list[int]:
    """Token by token; `sample` of the context is watched through the text's tokens in the cache."""
    one = Generation(context, **made)
    seen: list[int] = []
    take = one.engine._take

    def watched(answer: RunningAnswer, token: int, output: int) -> None:
        seen.append(token)
        take(answer, token, output)

    one.engine._take = watched  # type: ignore[method-assign]
    with closing(one.generate(tokens, sampling, n)) as pieces:
        for _piece in pieces:
            pass
    return seen


def test_greedy_is_the_choice_of_llama_cpps_sampler(context: Context) -> None:
    """Also of the first of equals, and of an output in the middle."""
    api, row = context.api, context.model.n_vocab
    chain = api.llama_sampler_init_greedy()
    try:
        token = 5
        for position in range(100):
            context.evaluate((token,), position)
            ours = context.sample(None)
            assert ours == context.sample(chain)
            token = ours
        context.evaluate(text_of(8), 100, "all")
        for output in (0, 3, 7):
            assert context.sample(None, output) == context.sample(chain, output)
        context.logits_in_place()[7, [9, row - 1]] = 1e6  # llama.cpp's own memory
        assert context.sample(None) == context.sample(chain) == 9
    finally:
        api.llama_sampler_free(chain)
    with (
        GREEDY.chain(context.model) as alone,
        Sampling(temperature=0, repeat_penalty=1.1).chain(context.model) as penalized,
    ):
        assert alone is None
        assert penalized is not None


def test_logits_are_those_of_the_last_evaluation(context: Context) -> None:
    """However many rows, with the view of them kept or made anew."""
    seen = []
    for step in (1, 1, 5, 1, 5, 5, 16, 1):
        context.clear()
        tokens = text_of(step, step + len(seen))
        context.evaluate(tokens, 0, "all")
        now = context.logits_in_place()
        assert now.shape == (step, context.model.n_vocab)
        seen.append((tokens, context.logits()))
    for tokens, logits in seen:
        context.clear()
        context.evaluate(tokens, 0, "all")
        np.testing.assert_array_equal(context.logits(), logits)


def test_one_token_is_evaluated_as_any_number(tiny: Model) -> None:
    """The short way to one token's logits, also behind sequences side by side."""
    with Context(tiny, ContextSettings(n_ctx=64, n_seq=2, n_batch=16, kv_type="f32", threads=1)) as context:
        for before in (lambda: None, lambda: context.evaluate_side_by_side([text_of(8), text_of(8, 1)])):
            made = []
            for outputs in ("last", 1):
                context.clear()
                before()
                context.evaluate((7,), 8, outputs)  # type: ignore[arg-type]
                made.append(context.logits())
                assert made[-1].shape == (1, tiny.n_vocab)
            np.testing.assert_array_equal(*made)
        assert not np.array_equal(made[0], by_itself(context))  # what lies before it counts


def by_itself(context: Context) -> np.ndarray[Any, Any]:
    context.clear()
    context.evaluate((7,), 8)
    return context.logits()


def test_greedy_answers_are_the_same_with_drafts(context: Context) -> None:
    """Where batches do not matter."""
    for seed in range(3):
        tokens = text_of(100, seed)
        context.clear()
        plain = sampled(context, tokens, GREEDY, 120)
        context.clear()
        lookup = PromptLookup(always=True)
        assert sampled(context, tokens, GREEDY, 120, lookup=lookup) == plain
        assert lookup.drafted > 0
        assert lookup.accepted > 0


def test_greedy_answers_have_no_drafts_that_nobody_asked_for(context: Context) -> None:
    """They are to be what they are without drafts, whose batches round otherwise; an answer that is sampled has drafts."""
    tokens = text_of(100)
    for sampling, drafts in ((GREEDY, False), (Sampling(temperature=0, repeat_penalty=1.1), False), (SAMPLED, True)):
        lookup = PromptLookup()
        context.clear()
        sampled(context, tokens, sampling, 60, lookup=lookup)
        assert (lookup.drafted > 0) is drafts


def test_sampled_answers_are_the_same_with_drafts_and_a_seed(context: Context) -> None:
    """A draft is taken where the sampler says the same, so each token costs one draw, as without."""
    tokens = text_of(100)
    for seed in range(4):
        sampling = Sampling(temperature=0.7, seed=seed)
        context.clear()
        plain = sampled(context, tokens, sampling, 60)
        context.clear()
        assert sampled(context, tokens, sampling, 60, lookup=PromptLookup(always=True)) == plain


class Told(PromptLookup):
    """Drafts that are told."""

    def __init__(self, drafts: list[list[int]]) -> None:
        super().__init__(always=True)
        self.drafts = drafts

    def draft(self, room: int) -> list[int]:
        return (self.drafts.pop(0) if self.drafts else [])[:room]


def test_a_wrong_draft_changes_nothing_and_a_right_one_is_taken_whole(context: Context) -> None:
    tokens = text_of(50)
    plain = sampled(context, tokens, GREEDY, 40)
    wrong = [(token + 1) % 250 for token in plain]
    drafts = [plain[1:5], wrong[6:9], [plain[7], wrong[8], plain[9]], []]
    context.clear()
    lookup = Told(drafts)
    assert sampled(context, tokens, GREEDY, 40, lookup=lookup) == plain
    assert lookup.accepted == 4 + 0 + 1
    assert lookup.drafted == 4 + 3 + 3


def test_drafts_end_with_the_context(tiny: Model) -> None:
    with Context(
        tiny, ContextSettings(n_ctx=256, n_outputs=MAX_DRAFT + 1, n_batch=64, kv_type="f32", threads=1)
    ) as small:
        tokens = text_of(230)
        one = Generation(small, lookup=PromptLookup(always=True))
        list(one.generate(tokens, GREEDY))
        assert one.stats is not None
        assert (one.stats.finish_reason, one.stats.context_used) == ("context", 256)
        assert one.stats.generated_tokens == 27
        assert one.stats.draft_accepted <= one.stats.draft_tokens


def test_preloading_is_the_same_beginning(context: Context) -> None:
    tokens = text_of(200)
    plain = sampled(context, tokens, GREEDY, 8)
    context.clear()
    one = Generation(context)
    one.preload(tokens[:128])
    one.preload(tokens[:64])  # is there already
    assert len(one.cached) == 128
    list(one.generate(tokens, GREEDY, 8))
    assert one.stats is not None
    assert (one.stats.prompt_tokens_reused, one.stats.prompt_tokens_evaluated) == (128, 72)
    assert one.cached.tokens[200:] == plain[:-1]


def test_stopped_from_another_thread(tiny: Model) -> None:
    with Context(tiny, ContextSettings(n_ctx=32768, n_batch=64, kv_type="f32", threads=1)) as long:
        one = Generation(long)
        tokens = text_of(30000)
        timer = threading.Timer(0.3, one.stop)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(one.generate(tokens, GREEDY, 4))
        timer.join()
        assert one.stats is not None
        assert one.stats.finish_reason == "interrupted"
        assert 0 < len(one.cached) < 30000
        done = len(one.cached)
        list(one.generate(tokens[: done + 10], GREEDY, 2))  # what was evaluated is sound
        assert one.stats.prompt_tokens_reused == done


def test_what_cannot_be_generated(context: Context) -> None:
    one = Generation(context)
    with pytest.raises(YarnEdgeError, match="the prompt is empty"):
        next(one.generate([], GREEDY))
    with pytest.raises(YarnEdgeError, match="has 600 tokens, the context holds 512"):
        next(one.generate(text_of(600), GREEDY))
    with pytest.raises(YarnEdgeError, match="--max-tokens is 0"):
        next(one.generate([5], GREEDY, 0))


def test_the_real_model_takes_drafts_and_says_the_same(smol_quants: dict[str, Path]) -> None:
    """In half precision; a quantized model rounds a batch otherwise than a token, and may say something else."""
    with Model(smol_quants["F16"]) as model:
        text = sample_text()[:1200]
        asked = f"{text}\n\nThe same text, word for word:\n\n{text[:300]}"
        prompt = model.tokenize(asked, add_special=False, parse_special=False)
        found = []
        for lookup in (None, PromptLookup(always=True)):
            with Context(
                model, ContextSettings(n_ctx=1024, n_outputs=MAX_DRAFT + 1, threads=2, attention="plain")
            ) as context:
                found.append(sampled(context, prompt, GREEDY, 80, lookup=lookup))
        assert lookup is not None
        assert found[0] == found[1]
        assert lookup.accepted > 30

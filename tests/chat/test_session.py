"""A conversation that reuses its cache says what a fresh evaluation of the same conversation says.

How tokens are batched changes a quantized model's logits (activations are rounded to 8 bits): by up to 0.9 on this one,
enough for another greedy token. So equality is shown twice: on the real model against a fresh cache filled in the same
batches, and on a tiny float32 YaRN model, where batches do not matter, against a fresh session.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.chat.conversation import Conversation, Document
from yarn_edge.chat.session import Session
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support.gguf_files import write_gguf

GREEDY = Sampling(temperature=0)
QUESTIONS = ("Explain gravity to a child.", "Why do the planets not fall into the sun?", "Name three planets.")
EMBEDDING, HEAD_DIM, HEADS, KV_HEADS, FEED_FORWARD = 64, 16, 4, 2, 128


def write_tiny_yarn(path: Path) -> Path:
    """Two random float32 layers with SmolLM2's tokenizer and YaRN factor 4 from 256: fast and exact, and it babbles."""
    real = read_gguf(package_gguf()).metadata
    rng = np.random.default_rng(5)
    n_vocab = len(real["tokenizer.ggml.tokens"])
    header = {
        "context_length": 1024,
        "embedding_length": EMBEDDING,
        "block_count": 2,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD_DIM,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 256,
        "vocab_size": n_vocab,
    }
    names = ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id")
    tokenizer = {f"tokenizer.ggml.{name}": real[f"tokenizer.ggml.{name}"] for name in names}
    tokenizer["tokenizer.ggml.token_type"] = real["tokenizer.ggml.token_type"].tolist()
    tokenizer |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": real["tokenizer.chat_template"]}
    norms: dict[str, Any] = {"output_norm.weight": np.ones(EMBEDDING, np.float32)}
    shapes = {"token_embd.weight": (n_vocab, EMBEDDING), "output.weight": (n_vocab, EMBEDDING)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, EMBEDDING),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, EMBEDDING),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, EMBEDDING),
            f"blk.{i}.attn_output.weight": (EMBEDDING, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_gate.weight": (FEED_FORWARD, EMBEDDING),
            f"blk.{i}.ffn_up.weight": (FEED_FORWARD, EMBEDDING),
            f"blk.{i}.ffn_down.weight": (EMBEDDING, FEED_FORWARD),
        }
        for norm in ("attn_norm", "ffn_norm"):
            norms[f"blk.{i}.{norm}.weight"] = np.ones(EMBEDDING, np.float32)
    drawn = {name: (rng.standard_normal(shape) * 0.25).astype(np.float32) for name, shape in shapes.items()}
    return write_gguf(path, "llama", {f"llama.{k}": v for k, v in header.items()} | tokenizer, norms | drawn)


@pytest.fixture(scope="module")
def real() -> Iterator[Model]:
    with Model(package_gguf()) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_yarn(tmp_path_factory.mktemp("tiny") / "tiny.gguf")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def template(tiny: Model) -> Iterator[ChatTemplate]:
    with ChatTemplate.of(tiny) as loaded:
        yield loaded


class Recorder(Context):
    """A context that records what is really evaluated, and samples a given script."""

    def __init__(self, model: Model, n_ctx: int) -> None:
        super().__init__(model, ContextSettings(n_ctx=n_ctx, kv_type="f32", threads=1))
        self.batches: list[int] = []
        self.sampled: list[int] = []
        self.script: list[int] = []

    def evaluate(self, tokens: Sequence[int], start: int, *args: Any, **kwargs: Any) -> None:
        super().evaluate(tokens, start, *args, **kwargs)
        self.batches.append(len(tokens))

    def sample(self, sampler: Any, output: int = -1) -> int:
        self.sampled.append(self.script.pop(0) if self.script else super().sample(sampler, output))
        return self.sampled[-1]


@pytest.fixture
def context(tiny: Model) -> Iterator[Recorder]:
    with closing(Recorder(tiny, 1024)) as made:
        yield made


@pytest.fixture
def small(tiny: Model) -> Iterator[Recorder]:
    with closing(Recorder(tiny, 256)) as made:
        yield made


def ask(session: Session, text: str, max_tokens: int | None = None) -> tuple[str, list[int]]:
    """The answer and the tokens that were sampled for it."""
    assert isinstance(session.context, Recorder)
    session.context.sampled = []
    return "".join(session.stream(text, max_tokens)), session.context.sampled


def fresh_answer(session: Session, history: Conversation, text: str, max_tokens: int) -> tuple[str, list[int]]:
    """The same question after the same history in an empty cache."""
    with Recorder(session.context.model, session.context.n_ctx) as context:
        fresh = Session(context, session.template, session.sampling)
        fresh.conversation = replace(history, turns=list(history.turns))
        return ask(fresh, text, max_tokens)


def greedy_in_batches(model: Model, tokens: Sequence[int], batches: Sequence[int], n_tokens: int) -> list[int]:
    """Greedy tokens after `tokens`, which an empty cache of 1024 gets in `batches`; argmax by NumPy."""
    assert sum(batches) == len(tokens)
    with closing(Recorder(model, 1024)) as context:
        at = 0
        for size in batches:
            context.evaluate(tokens[at : at + size], at)
            at += size
        found: list[int] = []
        while len(found) < n_tokens:
            found.append(int(context.logits()[-1].argmax()))
            if model.is_end(found[-1]):
                break
            context.evaluate(found[-1:], at)
            at += 1
    return found


def copy(session: Session) -> Conversation:
    return replace(session.conversation, turns=list(session.conversation.turns))


def test_real_model_evaluates_only_what_is_new(real: Model) -> None:
    """Three turns: each reuses all earlier turns, and answers as with a fresh cache."""
    with closing(Recorder(real, 1024)) as context, ChatTemplate.of(real) as template:
        session = Session(context, template, GREEDY)
        held = 0
        for turn, question in enumerate(QUESTIONS):
            prompt = session.prompt(session.conversation.asked(question).messages())
            before = len(context.batches)
            _text, sampled = ask(session, question, 20)
            stats = session.stats
            assert stats is not None
            assert stats.prompt_tokens_reused == held, f"turn {turn}"
            assert stats.prompt_tokens_evaluated == len(prompt) - held
            steps = stats.generated_tokens - (stats.finish_reason == "length")  # the last token needs no evaluation
            assert sum(context.batches[before:]) == len(prompt) - held + steps
            held = stats.context_used
            assert held == len(prompt) + steps
            assert sampled == greedy_in_batches(real, prompt, context.batches[: len(context.batches) - steps], 20)
    assert [m["role"] for m in session.conversation.messages()] == ["user", "assistant"] * 3


def test_reuse_equals_a_fresh_session(context: Recorder, template: ChatTemplate) -> None:
    """Babble is tokenized again into other tokens: the common prefix ends inside the answer, and that must work, too."""
    session = Session(context, template, GREEDY)
    for turn, question in enumerate(QUESTIONS * 2):
        history = copy(session)
        assert ask(session, question, 24) == fresh_answer(session, history, question, 24), f"turn {turn}"
        assert session.stats is not None
        assert (session.stats.prompt_tokens_reused > 30) == (turn > 0)


def test_statistics_and_the_end_of_an_answer(context: Recorder, template: ChatTemplate) -> None:
    session = Session(context, template, GREEDY)
    assert Session(context, template, GREEDY).stats is None
    _text, sampled = ask(session, "Say hello.", 5)
    assert session.stats is not None
    assert (session.stats.finish_reason, session.stats.generated_tokens, len(sampled)) == ("length", 5, 5)
    assert session.stats.ttft_s is not None
    assert session.stats.ttft_s > 0
    assert session.stats.tok_per_s is not None
    assert session.stats.tok_per_s > 0
    hello = context.model.tokenize("Hello", add_special=False, parse_special=False)
    context.script = [*hello, context.model.eos]
    assert ask(session, "Again.")[0] == "Hello"
    assert session.stats.finish_reason == "stop"
    assert session.stats.generated_tokens == len(hello)
    context.script = [context.model.eos]
    assert ask(session, "Again.")[0] == ""
    assert asdict(session.stats)["tok_per_s"] is None
    assert session.conversation.turns[-1].answer == ""


def test_full_context_drops_the_oldest_turns(small: Recorder, template: ChatTemplate) -> None:
    notices: list[str] = []
    session = Session(small, template, GREEDY, system="You answer in one sentence.", notice=notices.append)
    asked = [f"{question} Then tell me about number {i}." for i, question in enumerate(QUESTIONS * 3)]
    for question in asked:
        dropped_before = session.dropped_turns
        answer = ask(session, question, 32)
        assert session.stats is not None
        assert session.stats.context_used <= small.n_ctx == 256
        before = replace(session.conversation, turns=session.conversation.turns[:-1])
        assert answer == fresh_answer(session, before, question, 32)
        dropped = session.dropped_turns > dropped_before
        # If turns were dropped, it is evaluated as in a fresh session, from the last whole batch on: there is none here.
        assert (session.stats.prompt_tokens_reused >= 13) == (question != asked[0] and not dropped)
    n_kept = len(session.conversation.turns)
    assert n_kept < len(asked) - 3
    assert session.dropped_turns + n_kept == len(asked)
    assert [turn.question for turn in session.conversation.turns] == asked[-n_kept:]
    system = "<|im_start|>system\nYou answer in one sentence.<|im_end|>\n"
    markup = small.model.tokenize(system, add_special=False, parse_special=True)
    assert session.prompt(session.conversation.messages())[: len(markup)] == markup
    assert "dropped from the conversation" in notices[0]


def test_fifty_turns_about_a_document(small: Recorder, template: ChatTemplate) -> None:
    """The context overflows again and again: the document stays, and each answer is that of a fresh evaluation."""
    notices: list[str] = []
    session = Session(small, template, GREEDY, system="Be brief.", notice=notices.append)
    session.conversation.waiting = (Document("book", "The crow had cheese and the fox wanted it very much indeed."),)
    overflows = 0
    for number in range(50):
        dropped = session.dropped_turns
        answer = ask(session, f"What of number {number}?", 12)
        assert session.stats is not None
        assert session.stats.context_used <= 256
        assert [d.name for d in session.conversation.documents()] == ["book"]
        assert session.conversation.turns[0].documents
        if session.dropped_turns > dropped:
            overflows += 1
            before = replace(session.conversation, turns=session.conversation.turns[:-1])
            if len(session.conversation.turns) == 1:  # the document moved to the last question
                before = Conversation("Be brief.", waiting=session.conversation.turns[0].documents)
            assert answer == fresh_answer(session, before, f"What of number {number}?", 12)
    assert overflows > 5
    assert len(notices) == overflows
    assert all("the document stays" in line for line in notices)


def test_one_message_beyond_the_context(small: Recorder, template: ChatTemplate) -> None:
    session = Session(small, template, GREEDY)
    ask(session, "Say hello.", 4)
    before = copy(session)
    with pytest.raises(YarnEdgeError, match=r"needs \d{3,} tokens .* the context holds 256") as caught:
        ask(session, "word " * 400, 4)
    needed = len(session.prompt([{"role": "user", "content": "word " * 400}]))
    assert f"needs {needed} tokens" in str(caught.value)
    assert session.conversation == before
    assert ask(session, "Say it again.", 8) == fresh_answer(session, before, "Say it again.", 8)


def test_context_fills_during_an_answer(small: Recorder, template: ChatTemplate) -> None:
    session = Session(small, template, GREEDY)
    small.script = small.model.tokenize(" a", add_special=False, parse_special=False) * 300
    text, sampled = ask(session, "Never stop.")
    assert session.stats is not None
    assert (session.stats.finish_reason, session.stats.context_used) == ("context", 256)
    assert text == " a" * len(sampled)
    small.script = []
    assert ask(session, "Say hello.", 8) == fresh_answer(session, Conversation(), "Say hello.", 8)
    assert session.dropped_turns == 1


def test_split_characters_arrive_whole(context: Recorder, template: ChatTemplate) -> None:
    text = "Ja 🧵🦄 日本 é."
    pieces = context.model.tokenize(text, add_special=False, parse_special=False)
    assert len(pieces) > len(text)  # else the test shows nothing
    session = Session(context, template, GREEDY)
    context.script = [*pieces, context.model.eos]
    streamed = list(session.stream("Draw."))
    assert "".join(streamed) == text
    assert "\ufffd" not in "".join(streamed)
    context.script = list(pieces)
    cut = "".join(session.stream("Draw.", max_tokens=3))  # in the middle of the first emoji
    assert text.startswith(cut)
    assert len(cut) >= 2
    context.script = [pieces[2], pieces[0], context.model.eos]  # the model itself breaks a character
    assert "\ufffd" in "".join(session.stream("Draw."))


def test_closed_stream_keeps_what_was_said(context: Recorder, template: ChatTemplate) -> None:
    session = Session(context, template, GREEDY)
    with closing(session.stream(QUESTIONS[0])) as stream:
        said = "".join(next(stream) for _ in range(4))
        with pytest.raises(RuntimeError, match="is generating an answer"):
            next(session.stream("At the same time?"))
    assert session.conversation.turns[-1].answer == said
    assert session.stats is not None
    assert session.stats.finish_reason == "interrupted"
    history = copy(session)
    assert ask(session, QUESTIONS[1], 16) == fresh_answer(session, history, QUESTIONS[1], 16)
    assert session.stats.prompt_tokens_reused > 30


def test_ctrl_c_while_reading_the_prompt(real: Model, template: ChatTemplate) -> None:
    """The evaluation is stopped within its batch, and the question is removed."""
    with Recorder(real, 4096) as context:
        session = Session(context, template, GREEDY)
        ask(session, "Say hello.", 2)
        history = copy(session)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask(session, "The weather is fine. " * 700, 4)
        assert time.monotonic() - began < 4.0  # without a stop it takes over 20 s
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert session.conversation == history


def test_interrupted_evaluation_leaves_a_sound_cache(
    context: Recorder, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was evaluated but not yet recorded at Ctrl-C is evaluated again."""
    session = Session(context, template, GREEDY)
    ask(session, QUESTIONS[0], 8)
    history = copy(session)
    evaluate = context.evaluate

    def interrupted(tokens: Sequence[int], start: int, *args: Any) -> None:
        evaluate(tokens, start, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(session, QUESTIONS[1] * 3, 8)
    assert session.conversation == history
    assert ask(session, QUESTIONS[2], 16) == fresh_answer(session, history, QUESTIONS[2], 16)


def test_reset_forgets(context: Recorder, template: ChatTemplate) -> None:
    session = Session(context, template, GREEDY, system="You are brief.")
    first = ask(session, QUESTIONS[0], 8)
    session.reset()
    assert ask(session, QUESTIONS[0], 8) == first
    assert session.stats is not None
    assert session.stats.prompt_tokens_evaluated == 1  # all of the prompt is still in the cache


def test_seed_repeats_and_penalty_avoids(context: Recorder, template: ChatTemplate) -> None:
    def one(sampling: Sampling) -> list[int]:
        return ask(Session(context, template, sampling), "Tell me a story.", 12)[1]

    assert one(Sampling(temperature=1.5, seed=7)) == one(Sampling(temperature=1.5, seed=7))
    assert len({tuple(one(Sampling(temperature=1.5, seed=seed))) for seed in range(4)}) > 1
    avoided = one(Sampling(temperature=0, repeat_penalty=1e6))
    assert len(set(avoided)) == len(avoided)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1}, "--temperature is -1, must be from 0 up"),
        ({"temperature": float("nan")}, "--temperature is nan, not a finite number"),
        ({"top_k": -1}, "--top-k is -1"),
        ({"top_k": 1.5}, "--top-k is 1.5, not a whole number"),
        ({"top_p": 1.1}, "--top-p is 1.1, must be from 0 to 1"),
        ({"min_p": -0.1}, "--min-p is -0.1"),
        ({"repeat_penalty": 0}, "--repeat-penalty is 0, must be above 0"),
        ({"seed": 2**32 - 1}, "--seed is 4294967295"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_sampling_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(YarnEdgeError) as caught:
        Sampling(**values)
    assert str(caught.value).startswith(message)

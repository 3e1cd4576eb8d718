"""Shifting the cache of a YaRN model multiplies every key by A once more: the damage on the raw API, and its absence here."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

import yarn_edge
from yarn_edge.chat.session import Session
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.engine.sampling import Sampling
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.transformers_reference import divergence

N, MOVED = 256, 100


def next_logits(context: Context, tokens: list[int], start: int, shift: int) -> np.ndarray:
    """The last token's logits after the others were evaluated from `start` on, and moved back by `shift` in the cache."""
    context.clear()
    context.evaluate(tokens[:-1], start, "none")
    if shift:
        memory = context.api.llama_get_memory(context.handle)
        context.api.llama_memory_seq_add(memory, 0, -1, -1, -shift)
    context.evaluate(tokens[-1:], start + len(tokens) - 1 - shift, "last")
    return context.logits()


def shift_damage(path: Path, arguments: RuntimeArguments | None = None) -> tuple[float, float]:
    """(KL after one shift, KL of the same tokens evaluated elsewhere without one), against a fresh evaluation."""
    with Model(path) as model:
        tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[:N]
        with Context(
            model, ContextSettings(n_ctx=N + MOVED, kv_type="f32", attention="plain", arguments=arguments)
        ) as context:
            fresh = next_logits(context, tokens, 0, 0)
            shifted = next_logits(context, tokens, MOVED, MOVED)
            elsewhere = next_logits(context, tokens, MOVED, 0)
    return divergence(fresh, shifted).kl_mean, divergence(fresh, elsewhere).kl_mean


def test_a_shift_of_the_raw_cache_damages_a_yarn_model(smol_f32: Path) -> None:
    shifted, elsewhere = shift_damage(smol_f32)
    assert elsewhere <= 1e-6  # positions are relative: the same tokens anywhere
    assert shifted > 1e-4
    assert shifted > 100 * elsewhere


def test_without_yarn_the_same_shift_does_nothing(smol_f32: Path) -> None:
    """So it is A that does the damage, not the test's way of shifting."""
    shifted, elsewhere = shift_damage(smol_f32, RuntimeArguments(rope_scaling_type=0))
    assert shifted <= 1e-6
    assert elsewhere <= 1e-6


def test_our_conversation_that_outgrows_the_window_is_a_fresh_evaluation(smol_f32: Path) -> None:
    words = sample_text().split()
    with (
        Model(smol_f32) as model,
        ChatTemplate.of(model) as template,
        Context(model, ContextSettings(n_ctx=192, kv_type="f32", attention="plain")) as context,
    ):
        session = Session(context, template, Sampling(temperature=0.0))
        for turn in range(4):
            "".join(session.stream(" ".join(words[turn * 40 : turn * 40 + 40]), 8))
        assert session.dropped_turns > 0
        kept = list(session.generation.cached.tokens)
        context.keep(len(kept) - 1)
        context.evaluate(kept[-1:], len(kept) - 1, "last")
        ours = context.logits()
        context.clear()
        context.evaluate(kept, 0, "last")
        assert divergence(context.logits(), ours).kl_mean <= 1e-9


def test_nothing_of_ours_calls_a_shift() -> None:
    folder = Path(yarn_edge.__file__).parent
    names = {"llama_memory_seq_add", "llama_memory_seq_div", "llama_kv_self_seq_add", "llama_kv_cache_seq_add"}
    for path in [
        path for room in (folder, folder.parent / "convert", folder.parent / "bench") for path in room.rglob("*.py")
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & names, path

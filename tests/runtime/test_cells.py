"""The map of cells says what llama.cpp does: its own attention mask is the judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.unified import UnifiedContext

from support import tiny_gguf

SETTINGS = ContextSettings(n_ctx=512, n_batch=64, n_seq=5, unified=True, threads=1, attention="fast")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[UnifiedContext]:
    with Model(tiny_gguf.write(tmp_path / "tiny.gguf", "llama")) as model, open_context(model, SETTINGS) as made:
        assert isinstance(made, UnifiedContext)
        assert made.in_order
        yield made


def tokens_of(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 250, n)]


def test_the_map_follows_llama_cpp(context: UnifiedContext, tmp_path: Path) -> None:
    """The graph hook compares every batch's cells with the map, and raises where they differ."""
    rng, texts = np.random.default_rng(5), [tokens_of(512, seed) for seed in range(4)]
    saved: tuple[Path, int, np.ndarray] | None = None
    for step in range(120):
        one = int(rng.integers(4))
        length = context.cells.lengths[one]
        match int(rng.integers(8)):
            case 0:
                context.keep(int(rng.integers(length + 1)), one)
            case 1 if length:
                other = (one + 1) % 4
                context.share(one, other, int(rng.integers(1, length + 1)))
                texts[other] = list(texts[one])
            case 2 if length and saved is None:
                context.save_state(tmp_path / "state", texts[one][:length], one)
                saved = tmp_path / "state", one, context.saved_order(one)
                kept = texts[one][:length]
            case 3 if saved is not None and context.cells.free > len(saved[2]):
                assert context.load_state(saved[0], kept, one, saved[2])
                texts[one] = kept + tokens_of(512 - len(kept), step)
                saved = None
            case _:
                parts = []
                for sequence in rng.permutation(4)[: int(rng.integers(1, 4))].tolist():
                    start = context.cells.lengths[sequence]
                    some = texts[sequence][start : start + int(rng.integers(1, 6))]
                    if some and context.cells.free > 60:
                        parts.append(BatchPart(sequence, some, start, 1, bool(rng.random() < 0.5)))
                if parts:
                    context.evaluate_parts(parts)
    held = {int(cell) for sequence in range(5) for cell in context.cells.of(sequence)}
    assert context.cells.used == len(held) > 40


def test_an_answer_does_not_depend_on_where_its_cells_are(context: UnifiedContext) -> None:
    """To the bit: in one piece at the beginning of the cache, and scattered, in slices, and beside others."""
    text, logits = tokens_of(150, 1), []
    for scattered in (False, True):
        for sequence in range(5):
            context.clear(sequence)
        if scattered:
            for at in range(0, 100, 5):
                parts = [BatchPart(s, tokens_of(5, s), at, 1) for s in (1, 2, 3)]
                context.evaluate_parts(parts)
            context.clear(2)
        at = 0
        while at < len(text):
            part = text[at : at + (7 if scattered else 50)]
            beside = [BatchPart(1, [9], context.cells.lengths[1], 1, True)]
            context.evaluate_parts([*beside, BatchPart(0, part, at, 1)])
            at += len(part)
        logits.append(context.logits()[-1])
        context.evaluate_parts([BatchPart(0, [7], 150, 1, True), BatchPart(4, [0], 0, 1)])
        logits.append(context.logits()[0])
    assert np.any(np.diff(context.cells.of(0)) != 1)
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[1], logits[3])


def test_another_place_than_expected_is_an_error(context: UnifiedContext) -> None:
    context.cells._head = 64
    context.cells.used = 64
    with pytest.raises(YarnEdgeError, match="other cells of the cache than expected"):
        context.evaluate_parts([BatchPart(0, tokens_of(8, 0), 0, 1)])

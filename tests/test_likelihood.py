"""From logits to numbers: closed forms and plain float64 are the truth, also where logits are extreme, ruled out or broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from yarn_edge import likelihood
from yarn_edge.averages import Mean, blocks_of, edges_of, lengths_up_to, mean_of, paired
from yarn_edge.bench.quality.best_value import best_value
from yarn_edge.likelihood import Rows


def plain(logits: Any) -> Any:
    wide = np.asarray(logits, dtype=np.longdouble)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


CASES = {"usual": (1, 0.0), "peaked": (30, 0.0), "flat": (1e-4, 0.0), "far up": (3, 3e4), "far down": (3, -3e4)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_nll(case: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_BLOCK_BYTES", 1 << 14)  # several blocks
    width, offset = CASES[case]
    random = np.random.default_rng(1)
    logits = (random.standard_normal((37, 1003)) * width + offset).astype(np.float32)
    targets = random.integers(0, 1003, 37)
    wanted = -plain(logits)[np.arange(37), targets]
    with Rows(threads) as rows:
        np.testing.assert_allclose(rows.nll(logits, targets), wanted.astype(float), rtol=2e-6, atol=2e-6)
        normal = (logits.astype(np.longdouble) - plain(logits))[:, 0].astype(float)
        np.testing.assert_allclose(rows.log_normalizers(logits), normal, rtol=1e-12, atol=1e-9)


def test_what_is_not_finite_shows_and_stays_in_its_row() -> None:
    logits = np.zeros((4, 8), dtype=np.float32)
    logits[1, 3] = np.nan
    logits[2, 5] = -np.inf
    with Rows(2) as rows:
        found = rows.nll(logits, np.array([0, 0, 5, 0]))
        kept = rows.nll(logits, np.array([0, 0, 0, 0]))
    assert np.isnan(found[1])
    assert found[2] == np.inf
    assert found[[0, 3]] == pytest.approx([np.log(8)] * 2)
    assert kept[2] == pytest.approx(np.log(7))


def divergences(base: Any, other: Any, targets: Any) -> Any:
    with Rows(2) as rows:
        return rows.divergences(base, rows.log_normalizers(base), base.argmax(axis=1), other, targets)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_divergences(apart: float) -> None:
    random = np.random.default_rng(2)
    base = (random.standard_normal((19, 2001)) * 3).astype(np.float32)
    other = (base + apart * random.standard_normal(base.shape) + 7).astype(np.float32)
    targets = random.integers(0, 2001, 19)
    p, q = plain(base), plain(other)
    found = divergences(base, other, targets)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1).astype(float), rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(found.nll, -q[np.arange(19), targets].astype(float), rtol=1e-9)
    np.testing.assert_allclose(found.base_nll, -p[np.arange(19), targets].astype(float), rtol=1e-9)
    assert found.same_top.tolist() == (base.argmax(axis=1) == other.argmax(axis=1)).tolist()


def test_a_closed_form_and_the_same_distribution() -> None:
    base = np.log(np.array([[0.5, 0.25, 0.25]])).astype(np.float32)
    other = np.log(np.array([[0.25, 0.5, 0.25]])).astype(np.float32)
    found = divergences(base, other, np.array([0]))
    assert found.kl == pytest.approx([0.25 * np.log(2)])
    assert not found.same_top[0]
    assert divergences(base, base + np.float32(2), np.array([1])).kl == pytest.approx([0], abs=1e-7)


def test_tokens_that_are_ruled_out() -> None:
    base = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    assert divergences(base, base, np.array([0])).kl == pytest.approx([0])
    assert divergences(base, np.zeros((1, 3), np.float32), np.array([0])).kl == pytest.approx([np.log(1.5)])
    assert divergences(np.zeros((1, 3), np.float32), base, np.array([0])).kl[0] == np.inf


# ---- means


def test_means_and_pairs() -> None:
    assert mean_of(np.array([1.0, 3.0])) == Mean(2, 2.0, 1.0)
    assert np.isnan(mean_of(np.array([1.0])).stderr)
    assert mean_of(np.full(9, 800.0)).perplexity == np.inf
    a, b = [np.arange(600.0), np.arange(10.0)], [np.arange(600.0) - 1, np.arange(10.0) - 1]
    assert paired(a, b).mean == 1
    assert paired(a, b).stderr == 0
    assert blocks_of([np.arange(600.0)]).tolist() == [127.5, 383.5]  # 88 are less than half a block
    assert edges_of(1000) == [0, 256, 512, 768, 1000]
    assert len(edges_of(131072)) == 33
    assert lengths_up_to(4096) == [512, 1024, 2048, 4096]
    assert lengths_up_to(3000) == [512, 1024, 2048, 3000]
    assert lengths_up_to(100) == [100]


def noisy(values: list[float], lowest: float, noise: float) -> list[list[Any]]:
    shared = np.random.default_rng(3).standard_normal(20 * 256)
    own = np.random.default_rng(4).standard_normal((len(values), 20 * 256))
    return [[2 + (v - lowest) ** 2 + shared + noise * own[i]] for i, v in enumerate(values)]


def test_the_best_value_and_how_sure_it_is() -> None:
    values = [0.9, 1.0, 1.1, 1.2, 1.3]
    sure = best_value(values, noisy(values, 1.13, 1e-4))
    assert (sure.index, sure.next, sure.alike) == (2, 3, [])
    assert sure.fitted == pytest.approx(1.13, abs=1e-3)
    assert sure.low is not None
    assert sure.high is not None
    assert sure.low <= 1.13 <= sure.high
    assert sure.ahead is not None
    assert sure.ahead > 10
    unsure = best_value(values, noisy(values, 1.13, 1.0))
    assert unsure.alike
    assert best_value(values, noisy(values, 2.0, 1e-4)).fitted is None  # the best is at the end
    assert best_value([None, None, None], noisy(values[:3], 1.0, 1e-4)).fitted is None
    assert best_value([1.0], noisy([1.0], 1.0, 0.1)).next is None

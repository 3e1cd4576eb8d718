"""Every dialect on every architecture, on real weights: exact (mean KL <= 1e-7 nats at F32), or refused with the right message."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from yarn_edge.bench.evidence.dialect_oracles import nous
from yarn_edge.bench.evidence.matrix import CASES, KL_LIMIT, MatrixCase, Workshop, workshop
from yarn_edge.bench.evidence.smollm2 import FAMILIES

from support import depth

# Sorted, so that each family is loaded once.
# Of these families tests/convert/families/test_real_weights.py has shorter proofs.
SLOW = frozenset({"qwen3_moe", "smollm3", "ministral3", "mellum"})
ORDERED = sorted(
    (c for c in CASES if depth.full or c.family not in SLOW), key=lambda case: (case.family, bool(case.refused))
)


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    # Less than half of the table's tokens: the sums of many cases are long.
    with workshop(n_tokens=160, n_layers=depth.smol_layers()) as made:
        yield made


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 24
    assert {case.family for case in CASES} == {*FAMILIES}
    assert {case.form for case in CASES if not case.refused} == {"native", "baked", "arguments", "live"}


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_exact_or_refused(case: MatrixCase, shop: Workshop) -> None:
    result = shop.run(case)
    if case.refused:
        assert result.divergence is None
        assert case.refused in result.refusal
        return
    assert result.divergence is not None, result.refusal
    assert result.form == case.form
    assert 0 <= result.divergence.kl_mean <= KL_LIMIT
    assert result.divergence.top1 > 0.98  # two equally probable tokens may swap places


def test_the_matrix_can_fail(shop: Workshop) -> None:
    """The truth of another code (0.1 for 0.07) is far outside the limit on the same tokens."""
    right = next(case for case in CASES if case.dialect.startswith("Nous Mistral (0.07, betas"))
    wrong = MatrixCase(right.dialect, right.family, right.config, formula=nous(0.1, (128, 2)), siblings=right.siblings)
    apart = shop.run(wrong).divergence
    assert apart is not None
    assert apart.kl_mean > 1000 * KL_LIMIT


def test_the_authors_formulas_are_not_ours() -> None:
    """Worked out by hand for D = 4, base 10000, L = 4096, s = 16: pair 0 keeps 1 rad/token, pair 1 is divided by 16."""
    config = {"hidden_size": 4, "num_attention_heads": 1, "rope_theta": 10000.0}
    block = {"factor": 16.0, "original_max_position_embeddings": 4096}
    frequencies, magnitude = nous(0.07)(config | {"rope_scaling": block})
    # find(32) = 4 ln(4096 / (32 * 2 pi)) / (2 ln 1e4) = 0.655 -> 0; find(1) = 1.41 -> 2: pair 1 is halfway
    np.testing.assert_allclose(frequencies, [1.0, 0.01 / 16 * 0.5 + 0.01 * 0.5])
    assert magnitude == pytest.approx(1.19408, rel=1e-5)

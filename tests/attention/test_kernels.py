"""The attention kernels next to float64: every kind of node, alone and among neighbours, with any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from yarn_edge.attention.compiled import kernel_of
from yarn_edge.attention.kernel_shapes import KERNEL_TYPES

from support import depth
from support.attention_node import AttentionNode, random_node

# Root mean square of the error, relative. float32 has 6e-8; a dot product of 64 terms and a sum of thousands add to that.
LIMIT = 2e-6


def error(node: AttentionNode, found: npt.NDArray[Any]) -> float:
    exact = node.exact()
    return float(np.sqrt(np.square(found - exact).sum() / np.square(exact).sum()))


def kernel(node: AttentionNode) -> Any:
    return kernel_of(node.shape)


@pytest.mark.parametrize(
    "kind", ["f16", "q8_0", *([k for k in KERNEL_TYPES if k not in ("f16", "q8_0")] if depth.full else [])]
)
@pytest.mark.parametrize("queries", [1, 2, 7, 16, 17, 64, 100])
@pytest.mark.parametrize("cells", [64, 320, 1024])
def test_a_node_of_any_type(kind: str, queries: int, cells: int) -> None:
    node = random_node(kind, queries=queries, cells=cells)
    assert error(node, node.computed(kernel(node))) < LIMIT


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (16, 1), (32, 4), (40, 8)])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_heads_in_groups(heads: int, kv_heads: int, queries: int) -> None:
    node = random_node(queries=queries, cells=192, heads=heads, kv_heads=kv_heads)
    assert error(node, node.computed(kernel(node))) < LIMIT


@pytest.mark.parametrize("queries", [1, 16, 33])
def test_sinks(queries: int) -> None:
    """A sink takes weight and gives no value; a large one takes nearly all of it."""
    node = random_node(queries=queries, cells=256, sinks=True, seed=1)
    assert node.sinks is not None
    node.sinks[:2] = 30, -30
    assert error(node, node.computed(kernel(node))) < LIMIT


@pytest.mark.parametrize("queries", [1, 3, 20])
def test_sequences_beside_each_other(queries: int) -> None:
    """Each has its own cache and mask; what one holds changes no bit of another's answer."""
    node = random_node(queries=queries, cells=384, sequences=3, seed=2)
    found = node.computed(kernel(node), threads=2)
    assert error(node, found) < LIMIT
    for i in range(3):
        alone = AttentionNode("f16", node.q[i : i + 1], node.k[i : i + 1], node.v[i : i + 1], node.mask[i : i + 1])
        assert np.array_equal(alone.computed(kernel(node))[0], found[i])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    for queries in (1, 16, 70):
        node = random_node(queries=queries, cells=1280, seed=3)
        assert np.array_equal(node.computed(kernel(node)), node.computed(kernel(node), threads))


def test_a_row_is_the_same_alone_and_among_neighbours_and_in_a_longer_cache() -> None:
    """Up to 16 queries: no bit of an answer depends on what is asked beside it, or on empty cells behind it."""
    node = random_node(queries=16, cells=9216, heads=4, kv_heads=2, seed=4)
    together = node.computed(kernel(node), threads=2)
    for i in (0, 7, 15):
        mask = node.mask[:, i : i + 1]
        alone = AttentionNode("f16", node.q[:, i : i + 1], node.k, node.v, np.ascontiguousarray(mask))
        assert np.array_equal(alone.computed(kernel(node))[:, 0], together[:, i])
    cells = 8192  # nothing after these is seen
    node.mask[:, :, cells:] = -np.inf
    short = AttentionNode(
        "f16", node.q, node.k[:, :cells], node.v[:, :cells], np.ascontiguousarray(node.mask[:, :, :cells])
    )
    assert np.array_equal(node.computed(kernel(node)), short.computed(kernel(node)))


def test_queries_that_see_nothing_get_zeros() -> None:
    for queries in (2, 20):
        node = random_node(queries=queries, cells=128)
        node.mask[:, 1] = -np.inf
        found = node.computed(kernel(node))
        assert not found[:, 1].any()
        assert np.isfinite(found).all()


def test_what_is_hidden_is_not_read_into_a_row() -> None:
    """Hidden cells may hold anything finite: an old sequence's values, however large."""
    for queries in (1, 24):
        node = random_node(queries=queries, cells=256, seed=5)
        clean = node.computed(kernel(node))
        node._k.reshape(256, -1)[-10:].view(np.float16)[:] = 6e4
        node.mask[:, :, -30:] = -np.inf
        again = AttentionNode("f16", node.q, node.keys, node.values, node.mask)
        again._v.reshape(256, -1)[-10:].view(np.float16)[:] = 6e4
        found = again.computed(kernel(node))
        assert np.isfinite(found).all()
        assert found.shape == clean.shape
        assert error(again, found) < LIMIT


@settings(max_examples=10_000 if depth.full else 150, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 6)]),
    st.integers(1, 3),
    st.sampled_from(["f16", "q8_0"]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_masks_of_any_form(
    queries: int, tiles: int, heads: tuple[int, int], sequences: int, kind: str, seed: int, sinks: bool
) -> None:
    """Holes, windows, biases, several sequences, rows that see nothing."""
    random = np.random.default_rng(seed)
    queries = queries if queries < 20 or depth.full else 17 + queries % 40
    node = random_node(
        kind,
        queries=queries,
        cells=64 * tiles,
        heads=heads[0],
        kv_heads=heads[1],
        sequences=sequences,
        seed=seed,
        sinks=sinks,
    )
    shape = node.mask.shape
    hidden = random.random(shape) < random.random()
    window = np.abs(np.arange(shape[2]) - random.integers(0, shape[2], shape[:2])[..., None]) > random.integers(1, 200)
    node.mask[:] = np.where(hidden | window, -np.inf, random.choice([0.0, -1.5], shape)).astype(np.float16)
    found, exact = node.computed(kernel(node), threads=2), node.exact()
    assert np.abs(found - exact).max() <= 2e-5 * max(1.0, np.abs(exact).max())


def test_each_kernel_has_its_own_file_in_the_cache() -> None:
    """Of two kernels in one file of Numba's cache, compiled by two processes at once, one can end up under the other's name."""
    kernels = [kernel_of(random_node(kind, queries=1, cells=64).shape) for kind in ("f16", "q8_0")]
    assert len({kernel._cache._impl.filename_base for kernel in kernels}) == 2


@pytest.mark.parametrize("queries", [1, 4, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_so(queries: int, bad: float) -> None:
    """A cache that overflowed must not become a plausible answer."""
    node = random_node(queries=queries, cells=128, seed=7)
    node.k[:, 3] = bad
    again = AttentionNode("f16", node.q, node.k, node.v, node.mask)
    assert np.isnan(again.computed(kernel(node))).any(-1).all()

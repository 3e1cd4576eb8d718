"""RopeScaling: what it refuses, what counts as a difference, where values say they came from."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions.scaling import METHODS, TABLE_METHODS, RopeScaling, yarn_attention_factor

GOOD = {"method": "yarn", "rope_theta": 10000.0, "dim": 128, "original_context": 4096, "factor": 16.0}


def good(**changes) -> RopeScaling:
    return RopeScaling(**(GOOD | changes))


NUMBERS = ("rope_theta", "factor", "ext_factor", "beta_fast", "beta_slow", "attention_factor")
NOT_NUMBERS = [math.nan, math.inf, -math.inf, "4", None, True, [4.0], np.array([1.0, 2.0]), 1e300, 10**400]
BAD = (
    [("method", v) for v in ("Yarn", "", None, 1, "su", ["yarn"], np.array(["yarn", "none"]))]
    + [("ramp", v) for v in ("pair", "", None, np.array(["index", "turns"]))]
    + [(name, v) for name in NUMBERS for v in NOT_NUMBERS]
    + [(n, v) for n in ("rope_theta", "beta_fast", "beta_slow", "attention_factor") for v in (0, 0.0, -1.0, 1e-300)]
    + [("rope_theta", 1.0), ("rope_theta", 0.5)]
    + [("factor", v) for v in (0, 0.99, -16.0)]
    + [("ext_factor", v) for v in (-0.1, 1.01, 16.0)]
    + [("beta_fast", 0.99), ("beta_fast", 0.5), ("beta_slow", 32.1), ("beta_slow", 40.0)]
    + [("dim", v) for v in (0, -2, 1, 63, 128.0, "128", None, True, 1 << 40)]
    + [("original_context", v) for v in (0, -1, 4096.0, 4096.5, "4096", None, True, math.nan, [4096], 1 << 40, 10**400)]
    + [("truncate", v) for v in (None, 0, 1, "false")]
    + [("finetuned", v) for v in (0, 1, "true")]
    + [("declared_context", v) for v in (True, 4095, 65537, 5000.0, "5000")]
)


@pytest.mark.parametrize("field, value", BAD, ids=[f"{f}={v!r:.20}" for f, v in BAD])
def test_a_bad_value_is_named_with_its_source(field, value):
    with pytest.raises(YarnEdgeError) as caught:
        good(**{field: value}, provenance={field: f"c.json: block.{field}-key"})
    # A crossed pair of betas is told at beta_fast, with both values.
    crossed = (field, str(value)) in (("beta_slow", "32.1"), ("beta_slow", "40.0"))
    blamed = "beta_fast" if crossed else f"c.json: block.{field}-key"
    assert str(caught.value).startswith(blamed)
    assert field in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000


def test_a_factor_needs_a_method():
    with pytest.raises(YarnEdgeError, match=r"factor 4\.0 without a scaling method"):
        good(method="none", factor=4.0)


def test_an_ext_factor_that_is_the_factor_gets_a_hint():
    with pytest.raises(YarnEdgeError, match="looks like the factor itself"):
        good(ext_factor=16.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 1},
        {"rope_theta": 500000},
        {"ext_factor": 0},
        {"ext_factor": 1},
        {"dim": 2},
        {"original_context": 1},
        {"beta_fast": 1.5},
        {"attention_factor": 0.7},
        {"truncate": False},
        {"ramp": "turns"},
        {"finetuned": True},
        {"rope_theta": 1e11},
        {"original_context": 10_000_000},
        {"declared_context": 5000},
    ],
    ids=str,
)
def test_good_values_pass_unchanged(changes):
    assert dataclasses.asdict(good(**changes)).items() >= (GOOD | changes).items()


def test_frozen():
    described = good()
    with pytest.raises(dataclasses.FrozenInstanceError):
        described.factor = 2.0
    assert good(provenance={"factor": "a"}) == good(provenance={"factor": "b"})
    assert good() != good(factor=8.0)


@pytest.mark.parametrize(
    "factor, a",
    [
        (0.5, 1.0),
        (1, 1.0),
        (4, 1.1386294361119891),
        (16, 1.2772588722239781),
        (32, 1.3465735902799727),
        (40, 1.3688879454113936),
    ],
)
def test_attention_factor_of_the_paper(factor, a):
    assert yarn_attention_factor(factor) == pytest.approx(a, rel=1e-15)


def test_attention_factor_of_the_mistral_code():
    assert yarn_attention_factor(16, 0.07) == pytest.approx(1.1940812105567847, rel=1e-15)  # 0.07 * 2.772588722 + 1


@pytest.mark.parametrize("method", METHODS)
def test_derived_values(method):
    tables = {"frequency_factors": (1.0,) * (good().dim // 2)} if method in TABLE_METHODS else {}
    described = good(method=method, factor=1.0 if method == "none" else 16.0, **tables)
    assert described.extended_context == (4096 if method == "none" else 65536)
    assert described.is_static == (not method.startswith("dynamic"))
    assert described.default_attention_factor == pytest.approx(1.2772588722239781 if "yarn" in method else 1.0)


@pytest.mark.parametrize("context, factor, want", [(4096, 2.5, 10240), (1000, 1.0006, 1001), (3, 1.1, 3)])
def test_extended_context_is_rounded(context, factor, want):
    assert good(original_context=context, factor=factor).extended_context == want


def test_a_shorter_context_that_the_makers_state_changes_no_angle():
    stated = good(declared_context=5000)
    assert (stated.extended_context, good().extended_context) == (5000, 65536)
    assert stated != good()
    assert stated.differences(good()) == {}


NONE = {"method": "none", "factor": 1.0}
DIFFERENCES = {
    "the same": ({}, {}, {}),
    "only told otherwise": ({"finetuned": True}, {"finetuned": None}, {}),
    "int and float": ({"factor": 16}, {"factor": 16.0}, {}),
    "float32 of a float": ({"factor": 3.3}, {"factor": float(np.float32(3.3))}, {}),
    "float32 of an int": ({"rope_theta": 16777217}, {"rope_theta": 16777216.0}, {}),
    "factor": ({}, {"factor": 16.001}, {"factor": (16.0, 16.001)}),
    "just above float32": ({}, {"factor": 16.00004}, {"factor": (16.0, 16.00004)}),
    "context by one": (
        {"original_context": 1 << 21},
        {"original_context": (1 << 21) + 1},
        {"original_context": (1 << 21, (1 << 21) + 1)},
    ),
    "two at once": ({"beta_fast": 8.0}, {"truncate": False}, {"beta_fast": (8.0, 32.0), "truncate": (True, False)}),
    "ext_factor": ({}, {"ext_factor": 0.0}, {"ext_factor": (1.0, 0.0)}),
    "ramp": ({}, {"ramp": "turns"}, {"ramp": ("index", "turns")}),
    "A": ({}, {"attention_factor": 1.1}, {"attention_factor": (1.0, 1.1)}),
    "dim": ({}, {"dim": 64}, {"dim": (128, 64)}),
    "theta": ({}, {"rope_theta": 10001.0}, {"rope_theta": (10000.0, 10001.0)}),
    "plain ignores context and betas": (NONE, NONE | {"original_context": 1, "beta_fast": 9.0, "truncate": False}, {}),
    "plain keeps A": (NONE, NONE | {"attention_factor": 1.1}, {"attention_factor": (1.0, 1.1)}),
    "linear ignores the ramp": ({"method": "linear"}, {"method": "linear", "beta_fast": 9.0, "ramp": "turns"}, {}),
    "linear keeps the factor": ({"method": "linear"}, {"method": "linear", "factor": 2.0}, {"factor": (16.0, 2.0)}),
    "dynamic-ntk keeps the context": (
        {"method": "dynamic-ntk"},
        {"method": "dynamic-ntk", "original_context": 2048},
        {"original_context": (4096, 2048)},
    ),
}


@pytest.mark.parametrize("mine, other, want", DIFFERENCES.values(), ids=DIFFERENCES)
def test_differences(mine, other, want):
    mine, other = good(**mine), good(**other)
    assert mine.differences(other) == want
    assert other.differences(mine) == {name: (b, a) for name, (a, b) in want.items()}


def test_another_method_is_a_difference_with_its_fields():
    found = good().differences(good(**NONE))
    assert found["method"] == ("yarn", "none")
    assert found["factor"] == (16.0, None)


def test_with_overrides_records_where_the_value_came_from():
    first = good(provenance={"factor": "config.json: rope_scaling.factor", "dim": "config.json: head_dim"})
    second = first.with_overrides("--yarn-factor", factor=32.0)
    assert (first.factor, second.factor) == (16.0, 32.0)
    assert second.provenance == {"factor": "--yarn-factor", "dim": "config.json: head_dim"}
    assert first.source("factor") == "config.json: rope_scaling.factor"
    assert second.source("beta_fast") == "beta_fast"
    with pytest.raises(YarnEdgeError, match=r"^--yarn-factor: factor is 0\.5"):
        first.with_overrides("--yarn-factor", factor=0.5)


def test_as_dict_is_complete():
    told = {"finetuned": True, "frequency_factors": (2.0,) * 64, "softmax_factor": 1.5, "declared_context": 5000}
    described = good(provenance={"factor": "here"}, **told)
    plain = described.as_dict()
    assert plain.pop("provenance") == {"factor": "here"}
    assert good().as_dict().keys() == plain.keys() - told.keys() | {"provenance"}
    assert RopeScaling(**plain) == described
    assert plain.keys() == {f.name for f in dataclasses.fields(RopeScaling)} - {"provenance"}

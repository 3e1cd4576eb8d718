"""Flags on top of a scaling: what they change, where the values then come from, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import NO_OVERRIDES, ScalingOverrides
from yarn_edge.positions.overrides import apply_overrides
from yarn_edge.positions.scaling import RopeScaling

A4, A8 = 0.1 * math.log(4) + 1, 0.1 * math.log(8) + 1
PLAIN = RopeScaling("none", 1e4, 64, 1024, provenance={"dim": "config.json: head_dim"})
LINEAR = RopeScaling("linear", 1e4, 64, 1024, factor=2.0)
YARN = RopeScaling("yarn", 1e4, 64, 1024, factor=4.0, attention_factor=A4)
OWN_A = RopeScaling("yarn", 1e4, 64, 1024, factor=4.0, attention_factor=1.35)

CHANGES: dict[str, tuple[RopeScaling, dict[str, Any], dict[str, Any]]] = {
    "plain becomes YaRN": (PLAIN, {"factor": 4.0, "original_context": 256}, {"method": "yarn", "attention_factor": A4, "original_context": 256}),
    "linear becomes YaRN": (LINEAR, {"factor": 8.0, "original_context": 512}, {"method": "yarn", "factor": 8.0, "attention_factor": A8}),
    "linear keeps its method": (LINEAR, {"original_context": 512}, {"method": "linear", "factor": 2.0, "original_context": 512}),
    "another factor": (YARN, {"factor": 8.0}, {"factor": 8.0, "attention_factor": A8, "original_context": 1024}),
    "another factor and A": (OWN_A, {"factor": 8.0, "attention_factor": 1.5}, {"factor": 8.0, "attention_factor": 1.5}),
    "betas alone": (OWN_A, {"beta_fast": 8.0}, {"beta_fast": 8.0, "attention_factor": 1.35, "factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("base, fields, want", CHANGES.values(), ids=CHANGES)
def test_flags_change_what_they_name(base: RopeScaling, fields: dict[str, Any], want: dict[str, Any]) -> None:
    got = apply_overrides(base, ScalingOverrides(**fields), "x.gguf")
    assert {name: getattr(got, name) for name in want} == pytest.approx(want)
    assert all(got.provenance[name].startswith("--yarn-") for name in fields)
    assert got.provenance.get("dim") == base.provenance.get("dim")


@pytest.mark.parametrize("base", [PLAIN, LINEAR, OWN_A])
def test_no_flags_change_nothing(base: RopeScaling) -> None:
    assert apply_overrides(base, NO_OVERRIDES, "x.gguf") == base
    assert not NO_OVERRIDES
    assert ScalingOverrides(freeze_at=4096)
    assert ScalingOverrides(freeze_at=4096).fields == {}
    assert ScalingOverrides(attention_factor_reading="multiply")
    assert ScalingOverrides(attention_factor_reading="multiply").fields == {}


@pytest.mark.parametrize("fields", [{"factor": 2.0}, {"original_context": 512}], ids=str)
def test_a_context_that_the_makers_state_is_of_their_factor(fields: dict[str, Any]) -> None:
    stated = replace(YARN, declared_context=3000)
    assert apply_overrides(stated, ScalingOverrides(beta_fast=8.0), "x.gguf").extended_context == 3000
    got = apply_overrides(stated, ScalingOverrides(**fields), "x.gguf")
    assert (got.declared_context, got.extended_context) == (None, 2048)


REFUSALS = {
    "no origin": (PLAIN, {"factor": 4.0}, "--yarn-orig-ctx is needed too"),
    "no factor": (PLAIN, {"original_context": 256}, "--yarn-factor is needed too"),
    "linear with betas": (LINEAR, {"beta_fast": 8.0}, "has linear scaling"),
    "A of the old factor": (OWN_A, {"factor": 8.0}, "attention factor 1.35 was made for another factor"),
}


@pytest.mark.parametrize("base, fields, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_file_and_the_flag(base: RopeScaling, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(YarnEdgeError, match=rf"^x\.gguf: .*{message}"):
        apply_overrides(base, ScalingOverrides(**fields), "x.gguf")

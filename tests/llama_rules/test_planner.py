"""The planner: which form carries which scaling on which architecture, and what it refuses with which numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.effective import FROM_MODEL, frequency_divisors
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.llama_rules.rope_keys import in_keys
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling

APPROXIMATE = PlannerOptions(allow_approximate=True)
PORTABLE = PlannerOptions(positions="portable")

A4 = 1.1386294361119891


def scaled(method="yarn", **changes) -> RopeScaling:
    values = {"method": method, "rope_theta": 1e6, "dim": 64, "original_context": 8192, "factor": 4.0}
    if method == "none":
        values |= {"factor": 1.0, "original_context": 32768}
    if "yarn" in method:
        values["attention_factor"] = A4
    return RopeScaling(**{**values, **changes})


TABLE = tuple(float(f) for f in np.geomspace(1, 8, 32).astype(np.float32))
OWN = scaled(beta_fast=8.0, beta_slow=2.0, attention_factor=1.35)
# scaling -> the form on llama, on qwen2; None: refused
FORMS = {
    "plain": (scaled("none"), "native", "native"),
    "linear": (scaled("linear"), "native", "native"),
    "linear with A": (scaled("linear", attention_factor=0.9), "native", "native"),
    "yarn": (scaled(), "native", "native"),
    "yarn, own A": (scaled(attention_factor=1.35), "native", "native"),
    "yarn, A 1": (scaled(attention_factor=1.0), "native", "native"),
    "ext_factor 0 is linear": (scaled(ext_factor=0.0), "native", "native"),
    "ntk is another base": (scaled("ntk"), "native", "native"),
    "ntk-by-parts is yarn without A": (scaled("ntk-by-parts"), "native", "native"),
    "own betas": (OWN, "baked", "arguments"),
    "ext_factor 0.5": (scaled(ext_factor=0.5), "baked", "arguments"),
    "truncate": (scaled(truncate=False), "baked", "live"),
    "the paper's ramp": (scaled(ramp="turns"), "baked", "live"),
    "Llama 3": (scaled("llama3", factor=1.0, frequency_factors=TABLE), "baked", "live"),
    "a table on yarn": (scaled(frequency_factors=TABLE), "baked", "live"),
    "dynamic-ntk": (scaled("dynamic-ntk"), None, None),
    "dynamic-yarn": (scaled("dynamic-yarn"), None, None),
    "softmax": (scaled(softmax_factor=1.6), None, None),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, arch: str) -> None:
    scaling, on_llama, on_qwen2 = FORMS[name]
    want = on_llama if arch == "llama" else on_qwen2
    if want is None:
        with pytest.raises(YarnEdgeError):
            plan_rope(scaling, arch)
        return
    plan = plan_rope(scaling, arch)
    assert plan.form == want
    assert not plan.error.any_difference
    np.testing.assert_allclose(rope.inv_freq(plan.runs), rope.inv_freq(scaling), rtol=1e-6)
    assert plan.runs.attention_factor == pytest.approx(scaling.attention_factor, rel=1e-6)
    assert (plan.factors is not None) == (want == "baked")
    assert (plan.arguments == FROM_MODEL) == (want not in ("arguments", "live"))
    assert bool(plan.message) == (want != "native")


def test_the_baked_form_by_hand() -> None:
    """theta_d / theta'_d: 1 where the pair keeps its frequency, the factor where it is divided by it."""
    plan = plan_rope(scaled(truncate=False), "llama")
    assert plan.factors is not None
    assert plan.factors.dtype == np.float32
    assert plan.factors.shape == (32,)
    assert (plan.factors[0], plan.factors[-1]) == (1.0, 4.0)
    assert plan.keys == {
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 1e6,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": pytest.approx(A4),
        "llama.rope.scaling.original_context_length": 8192,
    }
    assert np.all(np.diff(frequency_divisors(scaled())) >= 0)


def test_bake_by_choice() -> None:
    assert plan_rope(scaled(), "llama", PlannerOptions("always")).form == "baked"
    assert plan_rope(OWN, "llama", PlannerOptions("never")).form == "arguments"
    with pytest.raises(YarnEdgeError, match="architecture qwen2 does not load rope_freqs"):
        plan_rope(scaled(), "qwen2", PlannerOptions("always"))
    assert plan_rope(scaled(truncate=False), "llama", PlannerOptions("never")).form == "live"
    with pytest.raises(YarnEdgeError, match="--positions portable: truncate"):
        plan_rope(scaled(truncate=False), "llama", PlannerOptions("never", positions="portable"))


@pytest.mark.parametrize("scaling", [OWN, scaled(truncate=False)], ids=["arguments", "live"])
def test_portable_refuses_what_other_programs_run_wrong(scaling: RopeScaling) -> None:
    """And by default the warning says how wrong that is."""
    plan = plan_rope(scaling, "qwen2")
    elsewhere = angle_error(scaled() if scaling != OWN else scaled(attention_factor=1.35), scaling)
    assert f"frequencies up to {elsewhere.frequency:.2%} off (pair {elsewhere.pair})" in plan.message
    with pytest.raises(YarnEdgeError, match="--positions portable"):
        plan_rope(scaling, "qwen2", PORTABLE)
    assert plan_rope(scaling, "llama", PORTABLE).form == "baked"


def test_a_refusal_tells_the_size_of_the_error() -> None:
    scaling = scaled(truncate=False, provenance={"truncate": "config.json: rope_scaling.truncate"})
    with pytest.raises(YarnEdgeError) as caught:
        plan_rope(scaling, "qwen3", PORTABLE)
    worst = np.abs(rope.inv_freq(scaled()) / rope.inv_freq(scaling) - 1)
    for part in (
        "config.json: rope_scaling.truncate is False, llama.cpp would use True",
        f"frequencies up to {worst.max():.2%} off (pair {worst.argmax()})",
        "--allow-approximate-rope",
    ):
        assert part in str(caught.value)


def test_approximate_is_the_nearest_and_says_so() -> None:
    plan = plan_rope(scaled(truncate=False), "qwen3", replace(APPROXIMATE, positions="portable"))
    assert plan.form == "approximate"
    assert "APPROXIMATE" in plan.message
    assert plan.error.frequency == pytest.approx(angle_error(scaled(), scaled(truncate=False)).frequency)
    assert plan_rope(scaled(truncate=False), "qwen3", APPROXIMATE).form == "live"
    assert plan_rope(scaled(), "qwen3", APPROXIMATE).form == "native"


def test_dynamic_scaling_names_the_way_out() -> None:
    with pytest.raises(YarnEdgeError, match="--freeze-at N"):
        plan_rope(scaled("dynamic-ntk"), "llama", APPROXIMATE)


def test_deepseek_carries_its_softmax_factor() -> None:
    """DeepSeek-V3: mscale = mscale_all_dim = 1, so A is 1 and the softmax scale gets (0.1 ln 40 + 1)^2."""
    m = 0.1 * math.log(40) + 1
    scaling = scaled(rope_theta=1e4, original_context=4096, factor=40.0, attention_factor=1.0, softmax_factor=m * m)
    plan = plan_rope(scaling, "deepseek2")
    assert plan.form == "native"
    assert plan.keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert plan.runs.softmax_factor == pytest.approx(m * m)
    with pytest.raises(YarnEdgeError, match="attention logits get an additional factor"):
        plan_rope(scaling, "llama")


def test_betas_that_llama_cpp_reads_and_llama_cpp_python_overrides() -> None:
    """mistral3 and grok read the betas, llama_cpp.Llama passes its own over them: baked where that is possible."""
    assert plan_rope(OWN, "mistral3").form == "baked"
    assert plan_rope(scaled(attention_factor=1.35), "mistral3").form == "native"
    grok = plan_rope(OWN, "grok")
    assert (grok.form, grok.in_llama_class) == ("native", False)
    assert "override the betas" in grok.message


def test_in_keys_keeps_the_angles() -> None:
    ntk = scaled("ntk", attention_factor=1.1)
    said = in_keys(ntk)
    assert said is not None
    assert (said.method, said.attention_factor, said.original_context) == ("none", 1.1, 32768)
    assert said.rope_theta == pytest.approx(1e6 * 4 ** (64 / 62))
    assert in_keys(scaled("llama3", factor=1.0, frequency_factors=TABLE)) is None
    parts = in_keys(replace(scaled("ntk-by-parts"), attention_factor=1.0))
    assert parts is not None
    assert (parts.method, parts.attention_factor) == ("yarn", 1.0)
    assert math.isclose(scaled().default_attention_factor, A4)

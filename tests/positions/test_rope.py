"""The NumPy reference against closed forms written out here, against transformers, and against complex numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling

torch = pytest.importorskip("torch")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
TIGHT = {"rtol": 1e-12, "atol": 0.0}
HALF_ULP = 2.0**-24  # of float32, relative

# (dim, theta, original context, factor, truncate): the published models, then shapes that reach the clamps.
MODELS = {
    "llama-2-64k": (128, 1e4, 4096, 16.0, True),
    "llama-2-128k": (128, 1e4, 4096, 32.0, True),
    "mistral-128k": (128, 1e4, 8192, 16.0, True),
    "qwen2.5": (128, 1e6, 32768, 4.0, True),
    "gpt-oss": (64, 150000.0, 4096, 32.0, False),
    "smollm2": (64, 1e5, 8192, 4.0, True),
    "low-clamped-at-0": (64, 1e4, 128, 8.0, True),
    "high-clamped-at-D-1": (16, 10.0, 2000, 4.0, True),
    "one-pair": (2, 1e4, 2048, 2.0, True),
}
models = pytest.mark.parametrize("dim, theta, context, factor, truncate", MODELS.values(), ids=MODELS)


def scaling(method, dim, theta, context, factor=1.0, **more) -> RopeScaling:
    return RopeScaling(method, theta, dim, context, factor, **more)


def plain(dim, theta):
    """RoPE, section 2.1: theta_d = b^(-2d/D)."""
    return [math.exp(-2 * d / dim * math.log(theta)) for d in range(dim // 2)]


def yarn(dim, theta, context, factor, truncate=True, fast=32.0, slow=1.0, ext=1.0):
    """The released ramp. Pair d turns n times in L tokens where L b^(-2d/D) = 2 pi n: d = D/2 * log_b(L / (2 pi n))."""
    low, high = (dim / 2 * math.log(context / (2 * math.pi * n), theta) for n in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    result = []
    for d, own in enumerate(plain(dim, theta)):
        progress = (d - low) / max(0.001, high - low)
        keep = ext * (1 - min(1.0, max(0.0, progress)))
        result.append(own * keep + own / factor * (1 - keep))
    return result


def by_turns(dim, theta, context, factor, fast=32.0, slow=1.0):
    """Paper 3.2: gamma(r) on r = L / lambda_d = L theta_d / 2 pi; h = (1 - gamma) theta/s + gamma theta."""
    result = []
    for own in plain(dim, theta):
        gamma = min(1.0, max(0.0, (context * own / (2 * math.pi) - slow) / (fast - slow)))
        result.append((1 - gamma) * own / factor + gamma * own)
    return result


@models
def test_static_methods_are_the_papers_closed_forms(dim, theta, context, factor, truncate):
    def ours(method, **more):
        return rope.inv_freq(scaling(method, dim, theta, context, factor, **more))

    np.testing.assert_allclose(rope.inv_freq(scaling("none", dim, theta, context)), plain(dim, theta), **TIGHT)
    np.testing.assert_allclose(ours("linear"), [f / factor for f in plain(dim, theta)], **TIGHT)
    want = yarn(dim, theta, context, factor, truncate)
    np.testing.assert_allclose(ours("yarn", truncate=truncate), want, **TIGHT)
    np.testing.assert_allclose(ours("ntk-by-parts", truncate=truncate), want, **TIGHT)
    np.testing.assert_allclose(ours("yarn", ramp="turns"), by_turns(dim, theta, context, factor), **TIGHT)
    if dim > 2:  # definition 1: b' = b s^(D/(D-2)), so the slowest pair is slowed by exactly s
        ntk = ours("ntk")
        np.testing.assert_allclose(ntk, plain(dim, theta * factor ** (dim / (dim - 2))), **TIGHT)
        assert ntk[-1] == pytest.approx(plain(dim, theta)[-1] / factor, rel=1e-12)
        assert ntk[0] == 1.0


@pytest.mark.parametrize(
    "more",
    [
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"beta_fast": 64.0, "beta_slow": 0.5},
        {"ext_factor": 0.5},
        {"ext_factor": 0.0},
        {"truncate": False},
        {"truncate": False, "beta_fast": 16.0, "ext_factor": 0.25},
    ],
    ids=str,
)
@models
def test_yarn_parameters(dim, theta, context, factor, truncate, more):
    names = {"beta_fast": "fast", "beta_slow": "slow", "ext_factor": "ext"}
    want = yarn(dim, theta, context, factor, **({"truncate": truncate} | {names.get(k, k): v for k, v in more.items()}))
    got = rope.inv_freq(scaling("yarn", dim, theta, context, factor, **({"truncate": truncate} | more)))
    np.testing.assert_allclose(got, want, **TIGHT)


@pytest.mark.parametrize(
    "model, low, high",
    [
        ("llama-2-64k", 20, 46),
        ("mistral-128k", 25, 50),
        ("qwen2.5", 23, 40),
        ("gpt-oss", 8.0928, 17.3980),
        ("smollm2", 10, 20),
        ("low-clamped-at-0", 0, 11),
        ("high-clamped-at-D-1", 7, 15),
    ],
)
def test_correction_range_worked_out_by_hand(model, low, high):
    """D ln(L / 2 pi n) / 2 ln b; Llama 2: 128 * 3.0141 / 18.4207 = 20.94 and 128 * 6.4799 / 18.4207 = 45.03."""
    dim, theta, context, factor, truncate = MODELS[model]
    got = rope.correction_range(scaling("yarn", dim, theta, context, factor, truncate=truncate))
    assert got == pytest.approx((low, high), abs=1e-4)


def test_wavelengths():
    assert rope.wavelengths(np.array([1.0, 0.001])) == pytest.approx([6.283185307, 6283.185307])


@pytest.mark.parametrize(
    "length, factor, s",
    [(1000, 1.0, 1.0), (4096, 1.0, 1.0), (8192, 1.0, 2.0), (40960, 1.0, 10.0), (8192, 4.0, 5.0), (4096, 4.0, 1.0)],
)
def test_dynamic_methods(length, factor, s):
    """Paper 3.3 and Nous' dynamic YaRN: s = max(1, l/L); transformers' dynamic NTK with a factor f: f l/L - (f - 1)."""
    ntk = rope.inv_freq(scaling("dynamic-ntk", 128, 1e4, 4096, factor), length)
    np.testing.assert_allclose(ntk, plain(128, 1e4 * s ** (128 / 126)), **TIGHT)
    dynamic = scaling("dynamic-yarn", 128, 1e4, 4096, factor)
    s = max(1.0, length / 4096)
    np.testing.assert_allclose(rope.inv_freq(dynamic, length), yarn(128, 1e4, 4096, s), **TIGHT)
    assert rope.attention_factor(dynamic, length) == pytest.approx(1 + math.log(s) / 10, rel=1e-12)
    cos, _sin = rope.cos_sin(dynamic, [0], length)
    assert cos == pytest.approx(np.full((1, 64), 1 + math.log(s) / 10))


@pytest.mark.parametrize("call", [rope.inv_freq, rope.attention_factor], ids=lambda f: f.__name__)
def test_dynamic_needs_a_length(call):
    with pytest.raises(YarnEdgeError, match="length in tokens"):
        call(scaling("dynamic-yarn", 128, 1e4, 4096))


def test_ntk_needs_more_than_one_pair():
    with pytest.raises(YarnEdgeError, match="2 rotated dimensions"):
        rope.inv_freq(scaling("ntk", 2, 1e4, 4096, 2.0))


def test_a_range_beyond_the_last_pair_keeps_every_frequency():
    """ggml's MAX(0.001f, high - low), where transformers' ramp runs backwards; no real model gets here."""
    fast = scaling("yarn", 16, 10.0, 100000, 4.0)
    assert rope.correction_range(fast) == (21, 15)
    np.testing.assert_allclose(rope.inv_freq(fast), plain(16, 10.0), **TIGHT)


# ---- transformers


def float32_budget(described: RopeScaling):
    """By how much transformers' float32 frequencies may be off, (D/2,) in radians per token.

    Five half-ulps of the result (pow is good to two, then the reciprocal, a product, a sum), and the mix, a number up
    to 1 that is off by up to two, blends theta with theta/s: where it is small it costs s times as much.
    """
    own = np.array(plain(described.dim, described.rope_theta))
    return HALF_ULP * (5 * rope.inv_freq(described) + 2 * (own - own / described.factor))


def hf_config(dim, context, **parameters):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize(
    "more",
    [{}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"beta_fast": 64, "truncate": False}],
    ids=str,
)
@models
def test_yarn_against_transformers(dim, theta, context, factor, truncate, more):
    more = {"truncate": truncate} | more
    config = hf_config(
        dim,
        round(context * factor),
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=context,
        **more,
    )
    theirs, factor_a = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = scaling("yarn", dim, theta, context, factor, **more)
    assert (abs(rope.inv_freq(ours) - theirs.double().numpy()) <= float32_budget(ours)).all()
    assert ours.default_attention_factor == pytest.approx(factor_a, rel=1e-12)


@pytest.mark.parametrize("dim, theta, context, factor", [m[:4] for m in MODELS.values()], ids=MODELS)
def test_linear_and_dynamic_ntk_against_transformers(dim, theta, context, factor):
    linear = hf_config(dim, context, rope_type="linear", rope_theta=theta, factor=factor)
    theirs, a = rope_utils.ROPE_INIT_FUNCTIONS["linear"](linear, "cpu")
    ours = rope.inv_freq(scaling("linear", dim, theta, context, factor))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=5 * HALF_ULP)
    assert a == 1.0
    if dim == 2:
        return
    dynamic = hf_config(dim, context, rope_type="dynamic", rope_theta=theta, factor=factor)
    for length in (context // 2, context, 3 * context):
        theirs, _a = rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](dynamic, "cpu", seq_len=length)
        ours = rope.inv_freq(scaling("dynamic-ntk", dim, theta, context, factor), length)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=5 * HALF_ULP)


def phase_errors(model: str, positions):
    """|phase of transformers' float32 cos/sin - our float64 angle| in radians, (n_positions, D/2), and its budget."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    dim, theta, context, factor, truncate = MODELS[model]
    config = hf_config(
        dim,
        round(context * factor),
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=context,
        truncate=truncate,
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), torch.tensor(positions)[None])
    assert cos.dtype == torch.float32
    theirs = np.arctan2(sin[0, :, : dim // 2].double().numpy(), cos[0, :, : dim // 2].double().numpy())
    described = scaling("yarn", dim, theta, context, factor, truncate=truncate)
    frequencies = rope.inv_freq(described)
    angles = np.outer(positions, frequencies)
    error = np.abs((theirs - angles + np.pi) % (2 * np.pi) - np.pi)
    # The frequency's error times the position, the rounded product, the roundings of cos and sin as atan2 sees them.
    return error, np.outer(positions, float32_budget(described) + HALF_ULP * frequencies) + 4 * HALF_ULP


@pytest.mark.parametrize("model", [m for m in MODELS if "clamped" not in m and m != "one-pair"])
def test_float32_phase_error_stays_in_its_budget(model):
    """Measured, worst model: 1.5e-4 radians up to 2047, 1.2e-3 to 16383, 9.4e-3 to 131071 (Qwen2.5's pair 3)"""
    positions = np.append(np.arange(0, 131072, 61), 131071)
    error, budget = phase_errors(model, positions)
    assert (error <= budget).all()
    assert error.max() < 0.0125


# ---- rotation


@pytest.fixture
def states():
    return np.random.default_rng(7).standard_normal((2, 5, 3, 32))  # q and k: (positions, heads, head_dim)


def turned(dim=32):
    described = scaling("yarn", dim, 1e4, 64, 8.0, attention_factor=1.25)
    return rope.cos_sin(described, [0, 1, 17, 63, 511])


def test_half_split_rotation_is_transformers(states):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = turned()
    both = [torch.tensor(np.concatenate([t, t], -1))[None] for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(*(torch.tensor(x).transpose(0, 1)[None] for x in states), *both)
    for x, want in zip(states, theirs, strict=True):
        np.testing.assert_allclose(rope.rotate(x, cos, sin, "half"), want[0].transpose(0, 1).numpy(), atol=1e-14)


def test_interleaved_rotation_is_transformers(states):
    """Cohere stores pairs interleaved; its function computes in float32."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    cos, sin = turned()
    both = [torch.tensor(np.repeat(t, 2, -1))[None] for t in (cos, sin)]
    theirs = apply_rotary_pos_emb(*(torch.tensor(x).transpose(0, 1)[None] for x in states), *both)
    for x, want in zip(states, theirs, strict=True):
        np.testing.assert_allclose(rope.rotate(x, cos, sin, "interleaved"), want[0].transpose(0, 1), atol=2e-6)


def test_rotation_is_complex_multiplication(states):
    positions = np.array([0, 1, 17, 63, 511])
    spin = 1.25 * np.exp(1j * np.outer(positions, yarn(32, 1e4, 64, 8.0)))[:, None, :]
    want = (states[0][..., 0::2] + 1j * states[0][..., 1::2]) * spin
    got = rope.rotate(states[0], *turned(), "interleaved")
    np.testing.assert_allclose(got[..., 0::2] + 1j * got[..., 1::2], want, atol=1e-12)


def test_partial_rotation_passes_the_rest_through_and_leaves_the_input_alone(states):
    before = states[0].copy()
    for pairing in ("half", "interleaved"):
        got = rope.rotate(states[0], *turned(16), pairing)
        np.testing.assert_array_equal(got[..., 16:], before[..., 16:])
        np.testing.assert_allclose(got[..., :16], rope.rotate(before[..., :16], *turned(16), pairing))
    np.testing.assert_array_equal(states[0], before)


# ---- properties

shapes = st.builds(
    scaling,
    st.sampled_from(["none", "linear", "ntk", "ntk-by-parts", "yarn"]),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(1.5, 1e7),
    st.integers(8, 1 << 20),
    st.just(1.0),
    truncate=st.booleans(),
    ramp=st.sampled_from(["index", "turns"]),
    ext_factor=st.floats(0, 1),
    attention_factor=st.floats(0.5, 2),
)
factors = st.floats(1, 128)
quick = settings(deadline=None, max_examples=80, database=None)


@quick
@given(shapes)
def test_factor_1_is_plain_rope(described):
    np.testing.assert_allclose(rope.inv_freq(described), plain(described.dim, described.rope_theta), rtol=1e-11)


@quick
@given(shapes, factors)
def test_every_pair_lies_between_interpolation_and_its_own_frequency(described, factor):
    described = described.with_overrides("here", factor=1.0 if described.method == "none" else factor)
    own = np.array(plain(described.dim, described.rope_theta))
    got = rope.inv_freq(described)
    assert (got <= own * (1 + 1e-11)).all()
    assert (got >= own / described.factor * (1 - 1e-11)).all()


@quick
@given(shapes, factors, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 100000), st.integers(0, 2**32))
def test_dot_products_know_relative_positions_only_and_norms_scale_by_a(described, factor, m, n, shift, seed):
    if described.method != "none":
        described = described.with_overrides("here", factor=factor)
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, described.dim))
    a, size = described.attention_factor, float(np.linalg.norm(q) * np.linalg.norm(k))

    def at(x, position):
        return rope.rotate(x, *rope.cos_sin(described, [position]), "half")

    near, far = (float((at(q, m + t) * at(k, n + t)).sum()) for t in (0, shift))
    assert near == pytest.approx(far, abs=1e-8 * size)
    assert float((at(q, m) * at(k, m)).sum()) == pytest.approx(a * a * float((q * k).sum()), abs=1e-8 * size)
    assert np.linalg.norm(at(q, m)) == pytest.approx(a * np.linalg.norm(q), rel=1e-12)


@quick
@given(shapes, st.integers(0, 5000), st.integers(0, 2**32))
def test_interleaved_is_half_split_permuted(described, position, seed):
    x = np.random.default_rng(seed).standard_normal((1, 2, described.dim))
    cos, sin = rope.cos_sin(described, [position])
    order = np.arange(described.dim).reshape(2, -1).T.ravel()  # 0, D/2, 1, D/2 + 1, …
    np.testing.assert_array_equal(
        rope.rotate(x[..., order], cos, sin, "interleaved"), rope.rotate(x, cos, sin, "half")[..., order]
    )

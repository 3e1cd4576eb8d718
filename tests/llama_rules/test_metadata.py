"""RopeScaling -> keys -> a real GGUF -> read back; llama.cpp's rules on hand-computed rows; what is never written."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.declared import declared
from yarn_edge.llama_rules.description import canonical, canonical_keys
from yarn_edge.llama_rules.effective import FROM_MODEL, LLAMA_CLASS_DEFAULTS, RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling

from support.gguf_files import write_gguf

A4 = 1.1386294361119891  # 0.1 ln 4 + 1


def scaled(method="yarn", **more) -> RopeScaling:
    factor = {"factor": 1.0} if method == "none" else {"factor": 4.0}
    a = {"attention_factor": A4} if method == "yarn" else {}
    return RopeScaling(**{"method": method, "rope_theta": 1e6, "dim": 64, "original_context": 8192} | factor | a | more)


def written(path: Path, keys: dict, arch: str = "llama", tensors: tuple[str, ...] = ()) -> GGUFFile:
    """A real GGUF with `keys` by Python type and the shape keys of a 64-dimensional head, read back."""
    shape = {f"{arch}.embedding_length": 128, f"{arch}.attention.head_count": 2, f"{arch}.context_length": 32768}
    ones = {name: np.ones(32, np.float32) for name in tensors}
    return read_gguf(write_gguf(path / "small.gguf", arch, shape | keys, ones))


CARRIED = {
    "plain": scaled("none"),
    "plain with A": scaled("none", attention_factor=1.25),
    "linear": scaled("linear"),
    "linear with A": scaled("linear", attention_factor=0.9),
    "yarn": scaled(),
    "yarn finetuned": scaled(finetuned=True),
    "yarn not finetuned": scaled(finetuned=False),
    "yarn with its own A": scaled(attention_factor=1.35),
    "yarn 0.07": scaled(factor=16.0, attention_factor=0.07 * math.log(16) + 1),
    "yarn A 1": scaled(attention_factor=1.0),
    "yarn odd factor": scaled(factor=3.3, attention_factor=0.1 * math.log(3.3) + 1),
    "yarn whole numbers": scaled(rope_theta=500000, factor=4),
    "yarn factor 1": scaled(factor=1.0, attention_factor=1.0),
    "truncate false where it changes nothing": scaled(dim=2, original_context=4, truncate=False),
}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("described", CARRIED.values(), ids=CARRIED)
def test_round_trip_through_a_file(tmp_path, described, arch):
    keys = plan_rope(described, arch).keys | canonical_keys(described, "native")
    file = written(tmp_path, keys, arch)
    back = canonical(file)
    assert back.differences(described) == {}
    assert (back.original_context, back.finetuned) == (described.original_context, described.finetuned)
    assert FilePositions(file).wanted == back
    assert json.loads(file.metadata["yarn_edge.rope.provenance"]) == {}
    for reading in (declared(file), FilePositions(file).effective()):
        assert reading.attention_factor == pytest.approx(described.attention_factor, rel=2e-7)
        found = reading.differences(described)
        assert found.keys() <= ({"truncate"} if not described.truncate else set())
    if described.method != "none":
        assert (
            declared(file).original_context
            == FilePositions(file).effective().original_context
            == described.original_context
        )
        assert declared(file).finetuned is described.finetuned


def test_the_keys_are_those_of_the_gguf_specification():
    """Spelled as in gguf-py's constants; the types are those that llama.cpp reads."""
    names = gguf.Keys.Rope
    want = {
        names.DIMENSION_COUNT: 64,
        names.FREQ_BASE: 1e6,
        names.SCALING_TYPE: "yarn",
        names.SCALING_FACTOR: 4.0,
        names.SCALING_ORIG_CTX_LEN: 8192,
        names.SCALING_FINETUNED: True,
        names.SCALING_YARN_EXT_FACTOR: 1.0,
        names.SCALING_YARN_ATTN_FACTOR: 1.0,
        names.SCALING_YARN_BETA_FAST: 32.0,
        names.SCALING_YARN_BETA_SLOW: 1.0,
        "{arch}.rope.scaling.attn_factor": pytest.approx(1.35 / A4),
    }
    keys = plan_rope(scaled(finetuned=True, attention_factor=1.35, rope_theta=1000000, factor=4), "llama").keys
    assert keys == {name.format(arch="llama"): value for name, value in want.items()}
    types = {name.rsplit(".", 1)[1]: type(value) for name, value in keys.items()}
    assert types.pop("finetuned") is bool
    assert types.pop("type") is str
    assert {types.pop(n) for n in ("dimension_count", "original_context_length")} == {int}
    assert set(types.values()) == {float}


def test_no_ratio_key_where_the_default_holds():
    assert "llama.rope.scaling.attn_factor" not in plan_rope(scaled(), "llama").keys
    assert plan_rope(scaled("none"), "llama").keys.keys() == {
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.rope.scaling.type",
    }


def test_an_unknown_architecture_is_refused():
    for call in (lambda: plan_rope(scaled(), "olmo3"), lambda: honoured("olmo3")):
        with pytest.raises(YarnEdgeError, match="'olmo3' is not known yet; known: llama, "):
            call()


# ---- what llama.cpp computes, worked out by hand from llama-context.cpp and llama-model.cpp

S = "llama.rope.scaling."
YARN = {S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 8192, "llama.rope.freq_base": 5e5}
PLAIN = {"method": "none", "factor": 1.0, "attention_factor": 1.0, "original_context": 32768}
IS_YARN = {"method": "yarn", "factor": 4.0, "attention_factor": A4, "original_context": 8192, "rope_theta": 5e5}
RUN = RuntimeArguments
EFFECTIVE = {
    "no keys at all": ({}, FROM_MODEL, PLAIN | {"rope_theta": 10000.0, "dim": 64}),
    "linear without factor": ({S + "type": "linear"}, FROM_MODEL, PLAIN),
    "linear is the default type": ({S + "factor": 4.0}, FROM_MODEL, {"method": "linear", "factor": 4.0}),
    "the old key": ({"llama.rope.scale_linear": 2.0}, FROM_MODEL, {"method": "linear", "factor": 2.0}),
    "the new key wins": ({"llama.rope.scale_linear": 2.0, S + "factor": 4.0}, FROM_MODEL, {"factor": 4.0}),
    "factor 0 is 1": ({S + "type": "yarn", S + "factor": 0.0}, FROM_MODEL, {"factor": 1.0, "attention_factor": 1.0}),
    "none ignores the factor": ({S + "type": "none", S + "factor": 4.0}, FROM_MODEL, PLAIN),
    "none keeps A": ({S + "type": "none", S + "attn_factor": 1.2}, FROM_MODEL, PLAIN | {"attention_factor": 1.2}),
    "yarn": (YARN, FROM_MODEL, IS_YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "ext_factor": 1.0, "truncate": True}),
    "attn_factor multiplies": (YARN | {S + "attn_factor": 1.5}, FROM_MODEL, IS_YARN | {"attention_factor": 1.5 * A4}),
    "yarn_attn_factor is not read": (YARN | {S + "yarn_attn_factor": 2.0}, FROM_MODEL, IS_YARN),
    "betas are not read": (YARN | {S + "yarn_beta_fast": 8.0, S + "yarn_beta_slow": 2.0}, FROM_MODEL,
                           IS_YARN | {"beta_fast": 32.0, "beta_slow": 1.0}),
    "ext_factor is not read": (YARN | {S + "yarn_ext_factor": 0.5}, FROM_MODEL, IS_YARN | {"ext_factor": 1.0}),
    "origin missing": ({S + "type": "yarn", S + "factor": 4.0}, FROM_MODEL, {"original_context": 32768}),
    "origin 0": (YARN | {S + "original_context_length": 0}, FROM_MODEL, {"original_context": 32768}),
    "Llama class": (YARN | {S + "attn_factor": 1.5}, LLAMA_CLASS_DEFAULTS, IS_YARN | {"attention_factor": 1.5 * A4}),
    "Llama class, plain": ({}, LLAMA_CLASS_DEFAULTS, PLAIN),
    "argument ext 0": (YARN, RUN(yarn_ext_factor=0.0), {"method": "linear", "factor": 4.0, "attention_factor": 1.0}),
    "argument ext 0 with attn": (YARN | {S + "attn_factor": 2.0}, RUN(yarn_ext_factor=0.0, yarn_attn_factor=1.3),
                                 {"method": "linear", "attention_factor": 2.6}),
    "argument ext 0.5": (YARN, RUN(yarn_ext_factor=0.5, yarn_attn_factor=9.0), IS_YARN | {"ext_factor": 0.5}),
    "argument attn alone": (YARN, RUN(yarn_attn_factor=9.0), IS_YARN),
    "argument attn, plain": ({}, RUN(yarn_attn_factor=1.3), PLAIN | {"attention_factor": 1.3}),
    "argument betas": (YARN, RUN(yarn_beta_fast=8.0, yarn_beta_slow=2.0), IS_YARN | {"beta_fast": 8.0,
        "beta_slow": 2.0}),
    "argument none": (YARN, RUN(rope_scaling_type=0), PLAIN | {"original_context": 8192}),
    "argument linear": (YARN, RUN(rope_scaling_type=1), {"method": "linear", "factor": 4.0, "attention_factor": 1.0}),
    "argument yarn on plain": ({}, RUN(rope_scaling_type=2, rope_freq_scale=0.25, yarn_orig_ctx=4096),
                               {"method": "yarn", "factor": 4.0, "attention_factor": A4, "original_context": 4096}),
    "argument scale": (YARN, RUN(rope_freq_scale=0.5), {"factor": 2.0, "attention_factor": 1.0693147180559945}),
    "argument base": (YARN, RUN(rope_freq_base=7e4), IS_YARN | {"rope_theta": 7e4}),
}  # fmt: skip


@pytest.mark.parametrize("keys, arguments, want", EFFECTIVE.values(), ids=EFFECTIVE)
def test_effective_by_hand(tmp_path, keys, arguments, want):
    got = asdict(FilePositions(written(tmp_path, keys)).effective(arguments))
    close = {n: pytest.approx(v, rel=2e-7) if isinstance(v, float) else v for n, v in want.items()}
    assert {n: v for n, v in got.items() if n in want} == close


def test_declared_takes_every_key_at_its_word(tmp_path):
    keys = {
        S + "attn_factor": 1.5,
        S + "yarn_attn_factor": 2.0,
        S + "yarn_beta_fast": 8.0,
        S + "yarn_beta_slow": 2.0,
        S + "yarn_ext_factor": 0.5,
        S + "finetuned": True,
    }
    got = declared(written(tmp_path, YARN | keys))
    assert (got.beta_fast, got.beta_slow, got.ext_factor, got.finetuned) == (8.0, 2.0, 0.5, True)
    assert got.attention_factor == pytest.approx(3 * A4)
    assert got.provenance["beta_fast"] == S + "yarn_beta_fast"
    assert got.provenance["dim"] == "llama.cpp's default for llama.rope.dimension_count"


FACTORS = np.ones(32, np.float32)


def test_frequency_factors_are_read_with_the_file(tmp_path):
    """The file's factors (1 in this helper's tensors) belong to what is declared and to what runs."""
    file = written(tmp_path, {}, tensors=("rope_freqs.weight",))
    for reading in (declared(file), FilePositions(file).effective()):
        assert reading.frequency_factors == tuple(FACTORS.tolist())
        assert not angle_error(reading, scaled("none", rope_theta=1e4)).any_difference


@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
def test_longrope_files_are_not_judged(tmp_path, name):
    file = written(tmp_path, {}, tensors=(name,))
    positions = FilePositions(file)
    for reading in (lambda: declared(file), positions.effective):
        with pytest.raises(YarnEdgeError, match="LongRoPE, whose frequencies depend on the requested context"):
            reading()
    assert positions.explicit_arguments == FROM_MODEL


def test_factors_where_the_architecture_loads_none(tmp_path):
    file = written(tmp_path, {}, "qwen2", tensors=("rope_freqs.weight",))
    with pytest.raises(YarnEdgeError, match="which architecture qwen2 does not load"):
        FilePositions(file).effective()


# ---- arguments for a plain llama_cpp.Llama

OWN = scaled(rope_theta=5e5, beta_fast=8.0, beta_slow=2.0)
OWN_KEYS = YARN | {S + "yarn_beta_fast": 8.0, S + "yarn_beta_slow": 2.0}
ARGUMENTS = {
    "plain": ({}, {}),
    "yarn": (YARN, {}),
    "yarn with its A": (YARN | {S + "attn_factor": 1.5}, {}),
    "own betas": (OWN_KEYS, {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}),
    "own betas, wanted": (OWN_KEYS | canonical_keys(OWN, "arguments"), {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}),
    "own ext_factor": (YARN | {S + "yarn_ext_factor": 0.5}, {"yarn_ext_factor": 0.5}),
    "ext_factor 0": (YARN | {S + "yarn_ext_factor": 0.0}, {"yarn_ext_factor": 0.0, "yarn_attn_factor": A4}),
    "another A is wanted": (
        YARN | canonical_keys(replace(OWN, beta_fast=32.0, beta_slow=1.0, attention_factor=2.0), "native"),
        None,
    ),
    "truncate false is wanted": (YARN | canonical_keys(scaled(rope_theta=5e5, truncate=False), "native"), None),
    "yarn_attn_factor is not read": (YARN | {S + "yarn_attn_factor": 2.0}, None),
}


@pytest.mark.parametrize("keys, want", ARGUMENTS.values(), ids=ARGUMENTS)
def test_llama_class_arguments(tmp_path, keys, want):
    positions = FilePositions(written(tmp_path, keys))
    got = positions.llama_class_arguments
    if want is None or want == {}:
        assert got == want
        return
    assert {n: got.get(n) for n in want} == pytest.approx(want)
    run = RuntimeArguments(**(asdict(LLAMA_CLASS_DEFAULTS) | got))
    assert not positions.error(run).any_difference
    assert positions.error(LLAMA_CLASS_DEFAULTS).any_difference


def test_explicit_arguments(tmp_path):
    want = RuntimeArguments(2, 5e5, 0.25, 1.0, A4, 32.0, 1.0, 8192)
    got = FilePositions(written(tmp_path, YARN)).explicit_arguments
    assert asdict(got) == pytest.approx(asdict(want))
    assert FilePositions(written(tmp_path, {}, "olmo3")).explicit_arguments == FROM_MODEL


def test_angle_error_by_hand():
    wrong = angle_error(scaled("linear", factor=2.0), scaled("linear"))
    assert (wrong.frequency, wrong.attention) == (pytest.approx(1.0), 0.0)
    a = angle_error(scaled("none", attention_factor=1.1), scaled("none"))
    assert (a.frequency, a.attention) == (0.0, pytest.approx(0.1))
    assert angle_error(scaled("none", dim=32), scaled("none")).any_difference
    assert not angle_error(scaled(), scaled()).any_difference
    assert angle_error(scaled(attention_factor=A4 * 1.00001), scaled()).any_difference
    assert not angle_error(scaled(attention_factor=A4 * 1.0000001), scaled()).any_difference


# ---- hostile values in a file that parses

ARRAY, NUMBERS = np.arange(3), [math.nan, math.inf, -1.0, 1e300, True, "4", np.arange(3), ["a", "b"]]
BAD = (
    [("llama.rope.scaling.factor", v) for v in [*NUMBERS, 0.5]]
    + [("llama.rope.freq_base", v) for v in [*NUMBERS, 0.0, 1.0]]
    + [("llama.rope.dimension_count", v) for v in [*NUMBERS, 63, 1 << 40, 0]]
    + [("llama.rope.scaling.original_context_length", v) for v in [*NUMBERS, 1 << 60]]
    + [("llama.rope.scaling.attn_factor", v) for v in [*NUMBERS, 0.0]]
    + [("llama.rope.scaling.type", v) for v in (1, True, ARRAY, ["yarn"], "Yarn", "longrope", "a\nb\x1b[31m")]
    + [("llama.attention.head_count", v) for v in (0, -1, "2", ARRAY, math.nan, None)]
    + [("llama.embedding_length", v) for v in (0, "a", ARRAY, 1e300, None)]
    + [("llama.context_length", v) for v in (0, 0.5, ARRAY, None)]
    + [("general.architecture", v) for v in (1, ARRAY, None, "a\nb")]
    + [("yarn_edge.rope.version", v) for v in (2, "1", ARRAY, 1)]
)


def in_memory(changes: dict) -> GGUFFile:
    meta = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 128,
        "llama.attention.head_count": 2,
        "llama.context_length": 32768,
        **YARN,
        **changes,
    }
    tensor = TensorInfo("a", (32,), "F32", 1024, 128)
    return GGUFFile(
        Path("bad.gguf"), 3, {k: v for k, v in meta.items() if v is not None}, {"a": tensor}, 32, 1024, 4096
    )


@pytest.mark.parametrize("key, value", BAD, ids=[f"{k}={v!r:.20}" for k, v in BAD])
def test_wrong_values_are_told_on_one_line(key, value):
    told = []
    file = in_memory({key: value})
    positions = FilePositions(file)
    names = ("declared", "wanted", "explicit_arguments", "llama_class_arguments")
    readings = [lambda name=name: getattr(positions, name) for name in names]
    for reading in (lambda: check_loadable(file), positions.effective, *readings):
        try:
            reading()
        except YarnEdgeError as error:
            told.append(str(error))
    assert told
    assert all(message.isprintable() for message in told)
    indirect = {
        "llama.embedding_length=1e+300": "rope.dimension_count",
        "yarn_edge.rope.version=1": "rope.form",
        "general.architecture='a\\nb'": "architecture 'a\\nb'",
    }
    assert any(indirect.get(f"{key}={value!r}", key) in message for message in told)

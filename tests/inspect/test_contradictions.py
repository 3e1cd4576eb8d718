"""Rope keys that contradict each other: told with the file's numbers, never repaired by a guess, healed by the flag that is named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType as Kind

from yarn_edge.cli import main
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.contradictions import RULES
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions import rope
from yarn_edge.verify.command import verify

from support import gguf_bytes, gguf_files, tiny_gguf

TYPES, NO_FACTOR, BELOW, TWO, BEYOND, ORIGIN, NOTHING, PREFIX, SENSELESS = RULES
A4 = 0.1 * math.log(4) + 1
S = "rope.scaling."
BASE = {"rope.freq_base": 12345.0}
SIZES = {S + "factor": 4.0, S + "original_context_length": 256}
YARN: dict[str, Any] = {**BASE, S + "type": "yarn", **SIZES}
LINEAR: dict[str, Any] = {**BASE, S + "type": "linear", **SIZES}
BETAS = {S + "yarn_beta_fast": 8.0, S + "yarn_beta_slow": 2.0}
STATED = {"factor": 4.0, "original_context": 256, "method": "yarn", "attention_factor": A4}


def but(keys: Mapping[str, Any], *gone: str, **scaling: Any) -> dict[str, Any]:
    """Keys without some of the scaling, and with others."""
    return {k: v for k, v in keys.items() if k.removeprefix(S) not in gone} | {S + k: v for k, v in scaling.items()}


def write(folder: Path, architecture: str, keys: Mapping[str, Any], kinds: Mapping[str, Kind] | None = None) -> Path:
    """Somebody else's file. keys: without the architecture's prefix, or after a colon as they are. kinds: other GGUF types."""
    own = tiny_gguf.model_keys(architecture) | dict(keys)

    def whole(key: str) -> str:
        return key[1:] if key.startswith(":") else f"{architecture}.{key}"

    return gguf_files.write_gguf(
        folder / "in.gguf",
        architecture,
        gguf_files.BYTE_TOKENIZER | {whole(k): v for k, v in own.items()},
        gguf_files.random_tensors(tiny_gguf.tensor_shapes(architecture)),
        kinds={whole(k): kind for k, kind in (kinds or {}).items()},
    )


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, str]]]:
    """Findings of `inspect --json` by name."""
    assert main(["inspect", str(path), "--json"]) == 0
    told: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        told.setdefault(finding["name"], []).append(finding)
    return told


# architecture, keys, finding, what finding and error must say, the flags that decide, what the file then wants
ASKED: dict[str, tuple[str, dict[str, Any], str, list[str], str, dict[str, Any]]] = {
    "YaRN without a factor": (
        "llama",
        but(YARN, "factor"),
        NO_FACTOR,
        [
            f"llama.{S}type = 'yarn' without llama.{S}factor, context_length = 1024, original_context_length = 256",
            "it runs plain RoPE",
            "context_length / original_context_length is 4",
        ],
        "--yarn-factor 4",
        STATED,
    ),
    "YaRN with a factor of 0": (
        "qwen2",
        but(YARN, factor=0.0),
        NO_FACTOR,
        [f"without qwen2.{S}factor"],
        "--yarn-factor 4",
        STATED,
    ),
    "YaRN with nothing else": (
        "llama",
        but(YARN, "factor", "original_context_length"),
        NO_FACTOR,
        ["context_length = 1024:"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "YaRN with betas alone": (
        "llama",
        but(YARN, "factor") | BETAS,
        NO_FACTOR,
        ["it runs plain RoPE"],
        "--yarn-factor 4",
        STATED | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "1 / factor": (
        "llama",
        but(YARN, factor=0.25),
        BELOW,
        [f"llama.{S}factor = 0.25", "multiplies positions by 4", "4 if the key holds 1 / factor"],
        "--yarn-factor 4",
        STATED,
    ),
    "a negative factor": (
        "qwen3",
        but(YARN, factor=-4.0),
        BELOW,
        [f"qwen3.{S}factor = -4", "multiplies positions by -0.25"],
        "--yarn-factor 4",
        STATED,
    ),
    "the old key says 1 / factor": (
        "llama",
        but(YARN, "factor") | {"rope.scale_linear": 0.25},
        BELOW,
        ["multiplies positions by 4"],
        "--yarn-factor 4",
        STATED,
    ),
    "a new and an old factor": (
        "llama",
        YARN | {"rope.scale_linear": 8.0},
        TWO,
        [f"llama.{S}factor = 4, llama.rope.scale_linear = 8", "llama.cpp takes 4 and ignores the old key"],
        "--yarn-factor 4",
        STATED,
    ),
    "a new and an old factor, linear": (
        "qwen2",
        LINEAR | {"rope.scale_linear": 2.0},
        TWO,
        ["where F is 4 or 2"],
        "--yarn-factor 4 --yarn-orig-ctx 256 --yarn-ext-factor 0 --yarn-attention-factor 1",
        {"factor": 4.0, "ext_factor": 0.0, "attention_factor": 1.0},
    ),
    "a longer context than the scaling": (
        "llama",
        YARN | {"context_length": 4096},
        BEYOND,
        [
            "llama.context_length = 4096, factor 4 * original 256 = 1024",
            "F is 4 if the scaling is right (the context becomes 1024), 16 if the context is",
        ],
        "--yarn-factor 16",
        {"factor": 16.0, "extended_context": 4096},
    ),
    "the same, and the scaling is right": (
        "qwen3",
        YARN | {"context_length": 4096},
        BEYOND,
        ["the scaling reaches 1024"],
        "--yarn-factor 4",
        STATED | {"extended_context": 1024},
    ),
    "YaRN with factor 1": (
        "llama",
        but(YARN, factor=1.0),
        BEYOND,
        ["factor 1 * original 256 = 256"],
        "--yarn-factor 4",
        STATED,
    ),
    "linear and longer": (
        "llama",
        LINEAR | {"context_length": 4096},
        BEYOND,
        ["N is 256 if the scaling is right", "1024 if the context is"],
        "--yarn-orig-ctx 1024",
        {"method": "linear", "factor": 4.0, "extended_context": 4096},
    ),
    "an original beyond the context": (
        "llama",
        but(YARN, original_context_length=4096),
        ORIGIN,
        [f"llama.{S}original_context_length = 4096, llama.context_length = 1024", "the context becomes 16384"],
        "--yarn-orig-ctx 256",
        STATED,
    ),
    "an original beyond the context, linear": (
        "qwen2",
        but(LINEAR, original_context_length=4096),
        ORIGIN,
        ["cannot be longer"],
        "--yarn-orig-ctx 256",
        {"method": "linear", "original_context": 256},
    ),
    "betas without a type": (
        "llama",
        but(YARN, "type") | BETAS,
        NOTHING,
        [
            f"no llama.{S}type, but llama.{S}yarn_beta_fast = 8, llama.{S}yarn_beta_slow = 2, llama.{S}original_context_length = 256",
            "llama.cpp runs linear scaling by 4, its default",
            "where F is 4 or whatever",
        ],
        "--yarn-factor 4",
        STATED | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "an original without a type": (
        "qwen2",
        but(YARN, "type"),
        NOTHING,
        [f"no qwen2.{S}type, but qwen2.{S}original_context_length = 256"],
        "--yarn-factor 4",
        STATED,
    ),
    "an original alone": (
        "llama",
        but(YARN, "type", "factor"),
        NOTHING,
        ["llama.cpp runs plain RoPE, its default", "/ original_context_length is 4"],
        "--yarn-factor 4",
        STATED,
    ),
    "ext_factor alone": (
        "llama",
        BASE | {S + "yarn_ext_factor": 0.5},
        NOTHING,
        [f"llama.{S}yarn_ext_factor = 0.5; context_length = 1024"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED | {"ext_factor": 0.5},
    ),
    "attn_factor without a type": (
        "llama",
        but(YARN, "type", yarn_attn_factor=1.35),
        NOTHING,
        [f"llama.{S}yarn_attn_factor = 1.35"],
        "--yarn-factor 4 --yarn-attention-factor 1.35",
        STATED | {"attention_factor": 1.35},
    ),
    "type none with a factor": (
        "llama",
        but(YARN, type="none"),
        NOTHING,
        [
            f"llama.{S}type = 'none', but llama.{S}factor = 4, llama.{S}original_context_length = 256; context_length = 1024",
            "llama.cpp runs plain RoPE:",
            "without scaling, F is 1 and --yarn-orig-ctx 1024",
        ],
        "--yarn-factor 4",
        STATED,
    ),
    "the same, without scaling": (
        "llama",
        but(YARN, type="none"),
        NOTHING,
        ["plain RoPE"],
        "--yarn-factor 1 --yarn-orig-ctx 1024",
        {"factor": 1.0, "extended_context": 1024},
    ),
    "type none with a factor alone": (
        "qwen3",
        but(YARN, "original_context_length", type="none"),
        NOTHING,
        [f"qwen3.{S}factor = 4; context_length"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "type none with the old factor": (
        "llama",
        BASE | {S + "type": "none", "rope.scale_linear": 4.0},
        NOTHING,
        ["llama.rope.scale_linear = 4"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "type none with an original": (
        "llama",
        but(YARN, "factor", type="none"),
        NOTHING,
        [f"llama.{S}original_context_length = 256"],
        "--yarn-factor 4",
        STATED,
    ),
    "linear by 1 with an original": (
        "llama",
        but(LINEAR, factor=1.0),
        NOTHING,
        [f"llama.{S}type = 'linear', but"],
        "--yarn-factor 4",
        STATED,
    ),
    "betas beside linear": (
        "llama",
        LINEAR | BETAS,
        NOTHING,
        [f"llama.{S}type = 'linear', but llama.{S}yarn_beta_fast = 8", "llama.cpp runs linear scaling by 4"],
        "--yarn-factor 4",
        STATED | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "ext_factor beside linear": (
        "qwen2",
        but(LINEAR, yarn_ext_factor=1.0),
        NOTHING,
        [f"qwen2.{S}type = 'linear', but qwen2.{S}yarn_ext_factor = 1"],
        "--yarn-factor 4",
        STATED,
    ),
    "another prefix": (
        "qwen2",
        BASE | {f":llama.{k}": v for k, v in YARN.items() if k.startswith(S)},
        PREFIX,
        [
            f"llama.{S}type = 'yarn', llama.{S}factor = 4.0, llama.{S}original_context_length = 256; context_length = 1024",
            "the architecture is qwen2: llama.cpp does not read that",
            "without scaling, F is 1 and N 1024",
        ],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "another prefix beside one's own": (
        "llama",
        YARN | {f":qwen2.{S}factor": 8.0},
        PREFIX,
        [f"qwen2.{S}factor = 8.0"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "a prefix nobody has": (
        "llama",
        BASE | {f":Llama.{S}factor": 4.0},
        PREFIX,
        [f"Llama.{S}factor = 4.0"],
        "--yarn-factor 4 --yarn-orig-ctx 256",
        STATED,
    ),
    "a base under another prefix": (
        "qwen2",
        {":llama.rope.freq_base": 12345.0},
        PREFIX,
        ["llama.rope.freq_base = 12345.0", "llama.cpp now runs 10000.0"],
        "--rope-theta 12345",
        {"rope_theta": 12345.0, "method": "none"},
    ),
    "another base under another prefix": (
        "qwen2",
        BASE | {":llama.rope.freq_base": 1e6},
        PREFIX,
        ["now runs 12345.0"],
        "--rope-theta 12345",
        {"rope_theta": 12345.0},
    ),
    "a base of 0": (
        "llama",
        YARN | {"rope.freq_base": 0.0},
        SENSELESS,
        ["llama.rope.freq_base = 0:", "no pair has a usable frequency"],
        "--rope-theta 12345",
        STATED | {"rope_theta": 12345.0},
    ),
    "a base of 1": (
        "qwen3",
        {"rope.freq_base": 1.0},
        SENSELESS,
        ["qwen3.rope.freq_base = 1:"],
        "--rope-theta 12345",
        {"rope_theta": 12345.0},
    ),
    "a factor in words": (
        "llama",
        but(YARN, factor="4.0"),
        TYPES,
        [f"llama.{S}factor = '4.0' is string", "expects float32"],
        "--yarn-factor 4",
        STATED,
    ),
    "a base in words": (
        "qwen2",
        YARN | {"rope.freq_base": "12345"},
        TYPES,
        ["qwen2.rope.freq_base = '12345' is string"],
        "--rope-theta 12345",
        STATED | {"rope_theta": 12345.0},
    ),
    "an original in words": (
        "llama",
        but(YARN, original_context_length="256"),
        TYPES,
        [f"llama.{S}original_context_length = '256' is string", "expects uint32"],
        "--yarn-orig-ctx 256",
        STATED,
    ),
}


def test_every_rule_is_tried() -> None:
    assert {row[2] for row in ASKED.values()} == RULES.keys()


def healed(out: Path, capsys: pytest.CaptureFixture[str]) -> FilePositions:
    """The patched file's positions: nothing is found in it, and llama.cpp runs what it describes."""
    told = inspected(out, capsys)
    assert not RULES.keys() & told.keys(), told
    positions = FilePositions(read_gguf(out))
    np.testing.assert_allclose(rope.inv_freq(positions.runs), rope.inv_freq(positions.wanted), rtol=1e-6)
    assert read_gguf(out).number("context_length") == positions.wanted.extended_context
    return positions


@pytest.mark.parametrize("case", ASKED)
def test_found_asked_and_healed(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture, keys, name, evidence, flags, want = ASKED[case]
    path, out = write(tmp_path, architecture, keys), tmp_path / "out.gguf"
    told = inspected(path, capsys)
    assert name in told, told
    assert flags.split()[0] in told[name][0]["remedy"]
    command = ["patch", str(path), "-o", str(out)]
    assert main([*command, "--repair"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"pass --(yarn|rope)-", line), line
    for part in evidence:
        assert part in line, line
        assert any(part.rstrip(":") in f"{f['evidence']}: {f['what']} {f['remedy']}" for f in told[name]), told
    assert not out.exists()
    assert main([*command, *flags.split()]) == 0, capsys.readouterr().err
    capsys.readouterr()
    wanted = healed(out, capsys).wanted
    for field, value in want.items():
        assert getattr(wanted, field) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), field


@pytest.mark.parametrize(
    "case", ["betas without a type", "another prefix", "a factor in words", "type none with a factor"]
)
def test_the_healed_file_verifies(case: str, tmp_path: Path) -> None:
    architecture, keys, _name, _evidence, flags, _want = ASKED[case]
    out = tmp_path / "out.gguf"
    assert main(["patch", str(write(tmp_path, architecture, keys)), "-o", str(out), *flags.split()]) == 0
    assert {c.status for c in verify(out, threads=1)} == {"pass", "skip"}


# Keys of another GGUF type, which llama.cpp does not load: what `inspect` says, and what --repair writes
RETYPED: dict[str, tuple[dict[str, Any], dict[str, Kind], str]] = {
    "factor": ({S + "factor": 4}, {}, f"llama.{S}factor = 4 is uint32"),
    "factor, wider": ({}, {S + "factor": Kind.FLOAT64}, f"llama.{S}factor = 4.0 is float64"),
    "original a float": (
        {S + "original_context_length": 256.0},
        {},
        f"llama.{S}original_context_length = 256.0 is float32",
    ),
    "original signed": ({}, {S + "original_context_length": Kind.INT32}, "= 256 is int32"),
    "base": ({"rope.freq_base": 12345}, {}, "llama.rope.freq_base = 12345 is uint32"),
    "context": ({"context_length": 1024.0}, {}, "llama.context_length = 1024.0 is float32"),
    "dimensions": ({"rope.dimension_count": 16}, {"rope.dimension_count": Kind.UINT64}, "is uint64"),
    "finetuned": ({S + "finetuned": 1}, {}, f"llama.{S}finetuned = 1 is uint32"),
}


@pytest.mark.parametrize("case", RETYPED)
def test_a_key_of_another_type_is_rewritten(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, kinds, evidence = RETYPED[case]
    path, out = write(tmp_path, "llama", YARN | keys, kinds), tmp_path / "out.gguf"
    (finding,) = inspected(path, capsys)[TYPES]
    assert evidence in finding["evidence"]
    assert "llama.cpp does not load the file" in finding["what"]
    assert finding["remedy"].endswith("--repair")
    assert main(["patch", str(path), "-o", str(out), "--repair"]) == 0
    capsys.readouterr()
    wanted = healed(out, capsys).wanted
    assert (wanted.factor, wanted.original_context, wanted.rope_theta) == (4.0, 256, 12345.0)
    assert {c.status for c in verify(out, threads=1)} == {"pass", "skip"}


@pytest.mark.parametrize("kind", ["dynamic", "YaRN", "narn"])
def test_a_type_that_llama_cpp_does_not_know(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, "llama", but(YARN, type=kind)), tmp_path / "out.gguf"
    for words in (["inspect", str(path)], ["patch", str(path), "-o", str(out), "--repair"]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"type is {kind!r}; llama.cpp knows none, linear, yarn, longrope" in line
        assert "--yarn-factor or --from CHECKPOINT" in line
    assert main(["patch", str(path), "-o", str(out), "--yarn-factor", "4"]) == 0
    capsys.readouterr()
    assert healed(out, capsys).wanted.method == "yarn"


def test_llama_cpp_does_not_load_another_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The claim of the finding, by llama.cpp itself."""
    path = write(tmp_path, "llama", YARN | {S + "factor": 4})
    assert main(["verify", str(path)]) == 2
    assert "wrong type u32 but expected type f32" in capsys.readouterr().err


# Right files, or harmless leftovers
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", BASE),
    "plain without a base": ("llama", {}),
    "YaRN": ("qwen2", YARN),
    "YaRN by the old key": ("llama", but(YARN, "factor") | {"rope.scale_linear": 4.0}),
    "the factor twice, alike": ("llama", YARN | {"rope.scale_linear": 4.0}),
    "YaRN by 1, and no longer context": ("llama", but(YARN, factor=1.0, original_context_length=1024)),
    "linear": ("llama", LINEAR),
    "linear, spelled out": ("llama", but(LINEAR, yarn_ext_factor=0.0, yarn_attn_factor=1.0)),
    "linear without a type": ("llama", BASE | {S + "factor": 4.0}),
    "linear by the oldest key": ("llama", BASE | {"rope.scale_linear": 4.0}),
    "linear by 1": ("llama", BASE | {S + "type": "linear", S + "factor": 1.0}),
    "none, spelled out (HunYuan)": (
        "hunyuan-dense",
        BASE | {S + "type": "none", S + "factor": 1.0, S + "original_context_length": 1024},
    ),
    "A beside type none": ("llama", BASE | {S + "type": "none", S + "attn_factor": 1.2}),
    "the original beside no scaling (Phi-3 4k)": ("phi3", BASE | {S + "original_context_length": 1024}),
    "keys of another prefix that say the same": ("qwen2", YARN | {f":llama.{k}": v for k, v in YARN.items()}),
    "keys of another prefix that say nothing": (
        "llama",
        {":qwen2.rope.freq_base": 10000.0, f":qwen2.{S}type": "linear", f":qwen2.{S}factor": 1.0},
    ),
    "a vision model's keys": ("llama", YARN | {":clip.vision.rope.freq_base": 100.0}),
    "a rounded factor": ("llama", but(YARN, factor=1.3333333, original_context_length=768)),
    "gpt-oss": ("gpt-oss", YARN),
    "grok": ("grok", YARN | BETAS | {S + "yarn_ext_factor": 0.5}),
    "deepseek2": ("deepseek2", YARN | {S + "yarn_log_multiplier": 0.1}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_nothing_is_found_in_right_files(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspected(write(tmp_path, *RIGHT[case]), capsys)
    assert not RULES.keys() & told.keys(), told


def test_longrope_keeps_its_original_without_a_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As llama.cpp's converter writes Phi-3 128k: two tables, the original context, no type."""
    tables = {f"rope_factors_{n}.weight": np.ones(8, np.float32) for n in ("long", "short")}
    path = tiny_gguf.write(tmp_path / "in.gguf", "phi3", BASE | {S + "original_context_length": 256}, tables)
    assert not RULES.keys() & inspected(path, capsys).keys()


def test_a_sweep_does_not_guess_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("in the beginning was the word " * 50)
    path = write(tmp_path, "llama", but(YARN, type="none"))
    words = ["sweep", str(path), "--over", "attention-factor", "--text", str(tmp_path / "t.txt")]
    assert main(words) == 2
    assert "llama.cpp runs plain RoPE: pass --yarn-factor F" in capsys.readouterr().err


def test_a_new_base_alone_scales_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, method in ((BASE, "none"), (LINEAR, "linear"), (YARN, "yarn")):
        path, out = write(tmp_path, "llama", keys), tmp_path / "out.gguf"
        assert main(["patch", str(path), "-o", str(out), "--rope-theta", "70000", "--force"]) == 0
        capsys.readouterr()
        wanted = healed(out, capsys).wanted
        assert (wanted.method, wanted.rope_theta, wanted.extended_context) == (method, 70000.0, 1024)


# a value that is no number, or makes no sense -> the flag that replaces it
SENSELESS_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "factor nan": (but(YARN, factor=math.nan), "--yarn-factor"),
    "factor infinite": (but(YARN, factor=math.inf), "--yarn-factor"),
    "factor in words": (but(YARN, factor="four"), "--yarn-factor"),
    "the old factor nan": (but(YARN, "factor") | {"rope.scale_linear": math.nan}, "--yarn-factor"),
    "linear by nan": (but(LINEAR, factor=math.nan), "--yarn-factor"),
    "a negative factor": (but(YARN, factor=-4.0), "--yarn-factor"),
    "a base of 0": (YARN | {"rope.freq_base": 0.0}, "--rope-theta"),
    "base nan": (YARN | {"rope.freq_base": math.nan}, "--rope-theta"),
}


@pytest.mark.parametrize("case", SENSELESS_VALUES)
def test_a_senseless_value_is_told_once_and_as_it_is(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, flag = SENSELESS_VALUES[case]
    path = write(tmp_path, "llama", keys)
    told = inspected(path, capsys)
    assert len(told["cannot be judged"]) == 1
    assert not {NO_FACTOR, NOTHING} & told.keys()
    assert main(["patch", str(path), "-o", str(tmp_path / "out.gguf"), "--repair"]) == 2
    assert f"pass {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [YARN, LINEAR, BASE], ids=["yarn", "linear", "none"])
def test_a_context_beyond_the_files_own_description(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ours, out = write(tmp_path, "llama", keys), tmp_path / "ours.gguf", tmp_path / "out.gguf"
    assert main(["patch", str(path), "-o", str(ours), "--rope-theta", "12345"]) == 0
    gguf_bytes.edit_key(ours, "llama.context_length", 65536)
    capsys.readouterr()
    told = inspected(ours, capsys)
    (finding,) = told["context beyond the description"]
    assert "llama.context_length = 65536" in finding["evidence"]
    assert finding["remedy"].endswith("--repair")
    assert main(["patch", str(ours), "-o", str(out), "--repair"]) == 0
    capsys.readouterr()
    assert healed(out, capsys).wanted.extended_context == 1024
    assert not inspected(out, capsys)

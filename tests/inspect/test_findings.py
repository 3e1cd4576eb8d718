"""The doctor of inspect: each illness is found with the values of the file, its remedy heals it, and the healthy are let go."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.command import inspect_gguf
from yarn_edge.inspect.findings import DOCTORS
from yarn_edge.llama_rules.contradictions import RULES
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.verify.command import verify

from support import tiny, tiny_gguf

S = "rope.scaling."
A4, MISTRAL_A4 = 0.1 * math.log(4) + 1, 0.07 * math.log(4) + 1
BASE = {"rope.freq_base": 12345.0}
YARN: dict[str, Any] = {**BASE, S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 256}
LINEAR: dict[str, Any] = {**BASE, S + "type": "linear", S + "factor": 4.0}
BETAS = {S + "yarn_beta_fast": 8.0, S + "yarn_beta_slow": 2.0}
MISTRAL = {"general.name": "nousresearch_Yarn-Mistral-7b-128k"}
RIGHT_A = {S + "attn_factor": MISTRAL_A4 / A4}
OWN_BETAS = {S + "yarn_beta_fast": 128.0, S + "yarn_beta_slow": 2.0}
FREQS = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k not in {S + n for n in names}}


NO_ORIGIN, NO_FACTOR = without(YARN, "original_context_length"), without(YARN, "factor")


def write(folder: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """Somebody else's file: keys of the architecture without its prefix, others as they are."""
    own = {k: v for k, v in keys.items() if not k.startswith("general.")}
    path = tiny_gguf.write(folder / "in.gguf", architecture, own, tensors)
    foreign = {k: v for k, v in keys.items() if k.startswith("general.")}
    if not foreign:
        return path
    edit_gguf_files(read_gguf(path), [folder / "named.gguf"], set_keys=foreign)
    return folder / "named.gguf"


def found(path: Path) -> dict[str, list[dict[str, str]]]:
    """Findings by name."""
    told: dict[str, list[dict[str, str]]] = {}
    for finding in inspect_gguf(FilePositions(read_gguf(path))).as_json()["findings"]:
        told.setdefault(finding["name"], []).append(finding)
    return told


COMMAND = re.compile(r"yarn-edge (patch MODEL\.gguf -o FIXED\.gguf(?: --[a-z-]+(?: [^ ,;(]+)?)+)")


def heal(remedy: str, path: Path, fill: dict[str, str]) -> Path:
    """Run the command that a remedy names, its letters replaced by what the user would know."""
    match = COMMAND.search(remedy)
    assert match, remedy
    out = path.with_name("fixed.gguf")
    known = {"MODEL.gguf": str(path), "FIXED.gguf": str(out), **fill}
    words = [word.rstrip(".") if word.startswith("CHECK") else word for word in match[1].split()]
    assert main([known.get(word, word) for word in words]) == 0, remedy
    return out


DEAD, EXT, ORIGIN, CAPPED = "dead key", "factor in ext_factor", "missing original context", "context capped"
OPEN, ROUNDED = "open attention factor", "trained without rounding"
YARN_MISTRAL, APPLY_SCALE = "Yarn-Mistral with Llama's parameters", "Mistral before apply_scale"
NEVER, CHANGED, OTHER = "YaRN where there was none", "keys were changed", "other positions"
N = {"N": "256"}
ONLY_GROK, ONLY_BOTH = "llama.cpp reads it for grok only", "llama.cpp reads it for mistral3, grok only"
# architecture, keys, finding, evidence, letters of the remedy, fields that the healed file wants
SICK: dict[str, tuple[str, dict[str, Any], str, list[str], dict[str, str], dict[str, Any]]] = {
    "betas on llama": (
        "llama", YARN | BETAS, DEAD, [f"llama.{S}yarn_beta_fast = 8; {ONLY_BOTH}", f"llama.{S}yarn_beta_slow = 2; {ONLY_BOTH}"],
        {}, {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": A4}),
    "ext_factor on llama": ("llama", YARN | {S + "yarn_ext_factor": 0.5}, DEAD, [f"llama.{S}yarn_ext_factor = 0.5; {ONLY_GROK}"],
        {}, {"ext_factor": 0.5}),
    "ext_factor on mistral3": ("mistral3", YARN | {S + "yarn_ext_factor": 0.5}, DEAD, [f"mistral3.{S}yarn_ext_factor = 0.5"],
        {}, {"ext_factor": 0.5}),
    "log multiplier on llama": (
        "llama", YARN | {S + "yarn_log_multiplier": 0.25}, DEAD,
        [f"llama.{S}yarn_log_multiplier = 0.25; llama.cpp reads it for mistral3, mistral4, deepseek2 only"],
        {}, {"attention_factor": A4}),
    "log multiplier on qwen2": ("qwen2", YARN | {S + "yarn_log_multiplier": 0.25}, DEAD, ["= 0.25"], {}, {"attention_factor": A4}),
    "betas without an origin": ("llama", NO_ORIGIN | BETAS, DEAD, ["yarn_beta_fast = 8"], N, {"beta_fast": 8.0, "original_context": 256}),
    "attn_factor of 1, which may be A (Laguna)": (
        "llama", YARN | {S + "yarn_attn_factor": 1.0}, OPEN, [f"llama.{S}yarn_attn_factor = 1"],
        {"A": "1"}, {"attention_factor": 1.0}),
    "attn_factor that is A": ("llama", YARN | {S + "yarn_attn_factor": 1.35}, DEAD, [f"yarn_attn_factor = 1.35; {ONLY_GROK}"],
        {"A": "1.35"}, {"attention_factor": 1.35}),
    "attn_factor that multiplies": ("qwen2", YARN | {S + "yarn_attn_factor": 1.35}, DEAD, [f"yarn_attn_factor = 1.35; {ONLY_GROK}"],
        {"A": f"{1.35 * A4}"}, {"attention_factor": 1.35 * A4}),
    "the factor twice": ("llama", YARN | {S + "yarn_ext_factor": 4.0}, EXT, [f"llama.{S}yarn_ext_factor = 4, the factor is 4"],
        {}, {"factor": 4.0, "ext_factor": 1.0}),
    "the factor in the wrong place": ("qwen2", NO_FACTOR | {S + "yarn_ext_factor": 4.0}, EXT, [f"qwen2.{S}yarn_ext_factor = 4, there is no factor"],
        {}, {"factor": 4.0, "ext_factor": 1.0}),
    "two factors": ("qwen3", YARN | {S + "yarn_ext_factor": 8.0}, EXT, [f"qwen3.{S}yarn_ext_factor = 8, the factor is 4"],
        {"F": "8"}, {"factor": 8.0, "ext_factor": 1.0}),
    "the factor on grok": ("grok", YARN | {S + "yarn_ext_factor": 4.0}, EXT, [f"grok.{S}yarn_ext_factor = 4, the factor is 4"],
        {}, {"factor": 4.0, "ext_factor": 1.0}),
    "the factor twice, no origin": ("llama", NO_ORIGIN | {S + "yarn_ext_factor": 4.0}, EXT, ["yarn_ext_factor = 4"], N,
        {"ext_factor": 1.0, "original_context": 256}),
    "no origin": ("llama", NO_ORIGIN, ORIGIN, [f"no llama.{S}original_context_length, context_length = 1024"], N, {"original_context": 256}),
    "no origin on mistral3": ("mistral3", NO_ORIGIN | {"context_length": 256}, ORIGIN, ["context_length = 256"], N, {"original_context": 256}),
    "no origin, an open factor": ("llama", NO_ORIGIN | {S + "yarn_attn_factor": 1.35}, ORIGIN, [f"no llama.{S}original_context_length"],
        N | {"A": "1.35"}, {"original_context": 256, "attention_factor": 1.35}),
    "capped at the origin": ("llama", YARN | {"context_length": 256}, CAPPED,
        ["llama.context_length = 256, factor 4 * original 256"], {}, {"factor": 4.0}),
    "capped between": ("olmo2", YARN | {"context_length": 512}, CAPPED, ["olmo2.context_length = 512"], {}, {"factor": 4.0}),
    "capped linear": ("llama", LINEAR | {S + "original_context_length": 256, "context_length": 256}, CAPPED, ["= 256, factor 4"], {}, {"factor": 4.0, "attention_factor": 1.0}),
    "Yarn-Mistral, nothing right": (
        "llama", YARN | MISTRAL, YARN_MISTRAL, ["'nousresearch_Yarn-Mistral-7b-128k', factor 4, A = 1.1386 (Yarn-Mistral 1.0970), "
        "beta_fast = 32 (128), beta_slow = 1 (2)"], {}, {"attention_factor": MISTRAL_A4, "beta_fast": 128.0, "beta_slow": 2.0}),
    "Yarn-Mistral, A right": (
        "llama", YARN | MISTRAL | RIGHT_A, YARN_MISTRAL, ["A = 1.0970 (Yarn-Mistral 1.0970), beta_fast = 32 (128)"],
        {}, {"attention_factor": MISTRAL_A4, "beta_fast": 128.0, "beta_slow": 2.0}),
    "Yarn-Mistral, betas right": ("llama", YARN | MISTRAL | OWN_BETAS, YARN_MISTRAL, ["A = 1.1386 (Yarn-Mistral 1.0970), beta_fast = 128 (128)"],
        {}, {"attention_factor": MISTRAL_A4, "beta_fast": 128.0, "beta_slow": 2.0}),
    "Yarn-Mistral by its base model": (
        "llama", NO_ORIGIN | {"general.name": "Mine", "general.base_model.0.name": "Yarn Mistral 7b 64k"}, YARN_MISTRAL,
        ["Yarn Mistral 7b 64k"], N, {"attention_factor": MISTRAL_A4, "beta_fast": 128.0, "original_context": 256}),
    "before apply_scale": (
        "mistral3", YARN | {S + "yarn_log_multiplier": 1.0}, APPLY_SCALE,
        [f"mistral3.{S}yarn_log_multiplier = 1 and no mistral3.attention.temperature_scale"], {}, {"attention_factor": A4}),
}  # fmt: skip


def test_every_doctor_has_a_patient() -> None:
    tried = {row[2] for row in SICK.values()} | {NEVER, CHANGED, OTHER, ROUNDED, "context beyond the description"}
    assert set(DOCTORS) - RULES.keys() == tried  # those, and the description's, are in test_contradictions


@pytest.mark.parametrize("case", SICK)
def test_the_sick_are_found_and_healed(case: str, tmp_path: Path) -> None:
    architecture, keys, name, evidence, letters, want = SICK[case]
    path = write(tmp_path, architecture, keys)
    told = found(path)
    assert name in told, told
    seen = [finding["evidence"] for finding in told[name]]
    assert all(any(words in line for line in seen) for words in evidence), seen
    assert all(finding["what"] and finding["remedy"] for finding in told[name])
    healed = heal(told[name][0]["remedy"], path, letters)
    assert name not in found(healed), found(healed)
    positions = FilePositions(read_gguf(healed))
    goal = positions.wanted
    assert {n: getattr(goal, n) for n in want} == pytest.approx(want, rel=1e-6)
    assert not positions.error().any_difference
    assert {c.status for c in verify(healed, threads=1)} == {"pass", "skip"}


# architecture, keys, and what must not be found
HEALTHY: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "betas on mistral3": ("mistral3", YARN | BETAS, set(DOCTORS)),
    "betas, ext_factor and attn_factor on grok": ("grok", YARN | BETAS | {S + "yarn_ext_factor": 0.5, S + "yarn_attn_factor": 1.3}, {DEAD, EXT}),
    "log multiplier on deepseek2": ("deepseek2", YARN | {S + "yarn_log_multiplier": 0.1}, set(DOCTORS)),
    "keys at their defaults": (
        "llama", YARN | {S + "yarn_beta_fast": 32.0, S + "yarn_beta_slow": 1.0, S + "yarn_ext_factor": 1.0,
                         S + "yarn_attn_factor": A4, S + "yarn_log_multiplier": 0.0}, set(DOCTORS)),
    "an attn_factor that spells the default out (OLMo 3)": ("llama", YARN | {S + "yarn_attn_factor": A4}, set(DOCTORS)),
    "half an ext_factor": ("llama", YARN | {S + "yarn_ext_factor": 0.5}, {EXT}),
    "linear without an origin": ("llama", LINEAR, {ORIGIN, CAPPED}),
    "linear gemma3": ("gemma3", LINEAR | {"context_length": 131072, S + "factor": 8.0}, set(DOCTORS)),
    "linear phi3": ("phi3", LINEAR, set(DOCTORS)),
    "plain": ("llama", BASE, set(DOCTORS)),
    "a longer context than asked for": ("llama", YARN | {"context_length": 4096}, {CAPPED}),
    "YaRN without an origin is not capped": ("llama", NO_ORIGIN, {CAPPED}),
    "YaRN": ("llama", YARN, set(DOCTORS)),
    "YaRN on qwen3": ("qwen3", YARN, set(DOCTORS)),
    "YaRN on gpt-oss": ("gpt-oss", YARN, set(DOCTORS) - {ROUNDED}),
    "an attention factor that is honoured": ("llama", YARN | {S + "attn_factor": 1.2}, set(DOCTORS)),
    "Yarn-Llama": ("llama", YARN | {"general.name": "Yarn-Llama-2-7b-128k"}, set(DOCTORS)),
    "Mistral without yarn in its name": ("llama", YARN | {"general.name": "Mistral-7B-v0.1"}, set(DOCTORS)),
    "Yarn-Mistral on another architecture": ("qwen2", YARN | MISTRAL, {YARN_MISTRAL}),
    "Yarn-Mistral, plain": ("llama", BASE | MISTRAL, set(DOCTORS)),
    "Yarn-Mistral with parameters of its own": (
        "llama", YARN | MISTRAL | {S + "attn_factor": 1.2, S + "yarn_beta_fast": 64.0}, {YARN_MISTRAL}),
    "Yarn-Mistral as it should be": ("llama", YARN | MISTRAL | RIGHT_A | OWN_BETAS, {YARN_MISTRAL}),
    "apply_scale": ("mistral3", YARN | {S + "yarn_log_multiplier": 0.0}, set(DOCTORS)),
    "with a temperature": ("mistral3", YARN | {S + "yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1}, set(DOCTORS)),
    "a log multiplier elsewhere": ("llama", YARN | {S + "yarn_log_multiplier": 1.0}, {APPLY_SCALE}),
}  # fmt: skip


@pytest.mark.parametrize("case", HEALTHY)
def test_the_healthy_are_let_go(case: str, tmp_path: Path) -> None:
    architecture, keys, silent = HEALTHY[case]
    told = found(write(tmp_path, architecture, keys))
    assert not silent & told.keys(), told
    assert not (silent == set(DOCTORS) and told), told


def test_linear_scaling_without_an_origin_verifies(tmp_path: Path) -> None:
    """gemma3: what the context was before is nowhere, so it cannot contradict."""
    path = write(tmp_path, "gemma3", LINEAR | {"context_length": 131072})
    assert {c.status for c in verify(path, threads=1)} == {"pass", "skip"}
    path = write(tmp_path, "llama", LINEAR | {"context_length": 256, S + "original_context_length": 256})
    assert {c.name for c in verify(path, threads=1) if c.status == "fail"} == {"metadata"}


NEVER_ARCHITECTURES = {
    "phi3": "LongRoPE",
    "gemma3": "linear scaling",
    "starcoder2": "plain RoPE",
    "falcon": "plain RoPE",
}


@pytest.mark.parametrize("architecture", NEVER_ARCHITECTURES)
def test_yarn_where_there_was_none(architecture: str, tmp_path: Path) -> None:
    (finding,) = found(write(tmp_path, architecture, YARN))[NEVER]
    assert f"checkpoints of architecture {architecture} use {NEVER_ARCHITECTURES[architecture]}" in finding["what"]
    assert finding["evidence"] == f"{architecture}.{S}type = 'yarn', factor 4.0"
    assert "--from CHECKPOINT" in finding["remedy"]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 262,
    "num_key_value_heads": None,
    "intermediate_size": None,
}
FROM: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama 3's own factors": (
        "llama",
        FREQS,
        {**tiny.config(), **SHAPE, "rope_scaling": LLAMA3, "max_position_embeddings": 2048},
    ),
    "plain StarCoder 2": (
        "starcoder2",
        {},
        {"model_type": "starcoder2", **SHAPE, "rope_theta": 12345.0, "max_position_embeddings": 1024},
    ),
}


@pytest.mark.parametrize("case", FROM)
def test_the_checkpoint_knows_better(case: str, tmp_path: Path) -> None:
    architecture, tensors, config = FROM[case]
    path = write(tmp_path, architecture, YARN, tensors)
    (finding,) = found(path)[NEVER]
    assert not tensors or "and tensor rope_freqs.weight" in finding["evidence"]
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config))
    healed = heal(finding["remedy"], path, {"CHECKPOINT": str(tmp_path / "ck")})
    assert found(healed) == {}
    assert {c.status for c in verify(healed, threads=1)} == {"pass", "skip"}


def test_factors_of_ones_scale_nothing(tmp_path: Path) -> None:
    """What patch leaves of a baked file that becomes plain YaRN again; and factors alone are no second scaling."""
    path = write(tmp_path, "llama", YARN, {"rope_freqs.weight": np.ones(8, np.float32)})
    assert found(path) == {}
    assert found(write(tmp_path, "llama", BASE, FREQS)) == {}


def own(folder: Path, architecture: str, keys: dict[str, Any], **overrides: float) -> Path:
    """A file with a description of ours."""
    patch(write(folder, architecture, keys), folder / "own.gguf", overrides=ScalingOverrides(**overrides))
    return folder / "own.gguf"


def ramp(fast: float, slow: float) -> Any:
    """YaRN's frequencies of the tiny files by hand."""
    low, high = (16 * math.log(256 / (n * 2 * math.pi)) / (2 * math.log(12345)) for n in (fast, slow))
    mix = 1 - np.clip((np.arange(8) - max(0, math.floor(low))) / (math.ceil(high) - max(0, math.floor(low))), 0, 1)
    plain = 12345.0 ** (-np.arange(8) / 8)
    return plain / 4 * (1 - mix) + plain * mix


def test_other_positions_in_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "llama", YARN | BETAS | {S + "yarn_attn_factor": 1.25})
    off = np.abs(ramp(32, 1) / ramp(8, 2) - 1)
    (finding,) = found(path)[OTHER]
    assert (
        f"frequencies up to {off.max():.2%} off (pair {off.argmax()}), attention factor 20.00% off"
        in finding["evidence"]
    )
    assert "beta_fast 8.0 is wanted, 32.0 runs" in finding["evidence"]
    healed = heal(finding["remedy"], path, {"A": str(1.25 * A4)})
    assert found(healed) == {}
    assert {c.status for c in verify(healed, threads=1)} == {"pass", "skip"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt-oss"])
def test_changed_keys(architecture: str, tmp_path: Path) -> None:
    path = own(tmp_path, architecture, YARN | {S + "attn_factor": 1.2})
    edit_gguf_files(read_gguf(path), [tmp_path / "changed.gguf"], set_keys={f"{architecture}.{S}attn_factor": 1.0})
    told = found(tmp_path / "changed.gguf")
    assert set(told) == {CHANGED, OTHER}
    assert "attention_factor: keys 1.138" in told[CHANGED][0]["evidence"]
    assert "attention factor 16.67% off" in told[OTHER][0]["evidence"]
    for name in told:
        healed = heal(told[name][0]["remedy"], tmp_path / "changed.gguf", {})
        assert found(healed) == {}
        assert {c.status for c in verify(healed, threads=1)} == {"pass", "skip"}
        healed.unlink()


@pytest.mark.parametrize(
    "form, family", [("native", f) for f in tiny.CLASSES] + [("baked", "llama"), ("baked", "mistral")]
)
def test_our_own_files_are_healthy(form: str, family: str, tmp_path: Path) -> None:
    betas = {"beta_fast": 8, "beta_slow": 2} if form == "baked" else {}
    scaling = {**tiny.YARN["rope_scaling"], "attention_factor": 1.2, **betas}
    folder = tiny.write_checkpoint(tmp_path / "ck", family, rope_scaling=scaling)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert inspect_gguf(FilePositions(read_gguf(path))).as_json()["form"] == form
    assert found(path) == {}


@pytest.mark.parametrize("architecture", ["qwen2", "gpt-oss"])
def test_the_arguments_form_has_the_one_finding_that_helps(architecture: str, tmp_path: Path) -> None:
    path = own(tmp_path, architecture, YARN, beta_fast=8.0, beta_slow=2.0)
    report = inspect_gguf(FilePositions(read_gguf(path))).as_json()
    assert report["form"] == "arguments"
    (finding,) = report["findings"]
    assert finding["name"] == OTHER
    assert "yarn-edge passes it by itself" in finding["remedy"]
    call = re.search(r"llama_cpp\.Llama\(path, (.*)\)", finding["remedy"])
    assert call
    told = dict(re.findall(r"(\w+)=([-\d.e]+)", call[1]))
    passed = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_attn_factor": 1.0} | {
        k: float(v) for k, v in told.items()
    }
    whole = {k: int(v) if k in ("rope_scaling_type", "yarn_orig_ctx") else v for k, v in passed.items()}
    assert not FilePositions(read_gguf(path)).error(RuntimeArguments(**whole)).any_difference  # type: ignore[arg-type]
    assert {c.status for c in verify(path, threads=1)} == {"pass", "skip"}


def test_an_approximate_file_is_told_what_would_be_exact(tmp_path: Path) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "truncate": False}
    folder = tiny.write_checkpoint(tmp_path / "ck", "qwen2", rope_scaling=scaling)
    path = convert(
        folder, str(tmp_path / "out.gguf"), "F32", planner=PlannerOptions(allow_approximate=True, positions="portable")
    )[0]
    told = found(path)
    assert set(told) == {OTHER}
    assert "yarn-edge then puts them into the running graph" in told[OTHER][0]["remedy"]


def test_a_live_file_says_how_far_other_programs_are_off(tmp_path: Path) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "truncate": False}
    folder = tiny.write_checkpoint(tmp_path / "ck", "qwen2", rope_scaling=scaling)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    told = found(path)
    assert set(told) == {OTHER}
    assert "frequencies up to" in told[OTHER][0]["evidence"]
    assert "puts the file's own positions into the running graph" in told[OTHER][0]["remedy"]
    assert not COMMAND.search(told[OTHER][0]["remedy"])


def test_people_read_findings_with_their_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write(tmp_path, "llama", NO_ORIGIN))]) == 0
    out = capsys.readouterr().out
    assert "! missing original context: llama.cpp takes context_length in its place" in out
    assert "    remedy:   yarn-edge patch MODEL.gguf -o FIXED.gguf --yarn-orig-ctx N, where N is" in out


def test_gpt_oss_is_told_of_truncate_false(tmp_path: Path) -> None:
    """Factor 32, origin 4096, base 150000 and heads of 64 are 76 % off in one pair (yarn.md, section 4)."""
    keys = YARN | {S + "factor": 32.0, S + "original_context_length": 4096, "rope.freq_base": 150000.0}
    told = found(write(tmp_path, "gpt-oss", keys | {"attention.key_length": 64, "attention.value_length": 64}))
    assert "truncate" in told[ROUNDED][0]["what"]
    assert ROUNDED not in found(write(tmp_path, "llama", YARN))

"""The proof itself: what must pass on the real model does, and whatever is changed in the file is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.bench.demo import YARN
from yarn_edge.bench.evidence.smollm2 import write_checkpoint
from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import FROM_MODEL, LLAMA_CLASS_DEFAULTS, RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions.error_budget import rotation_error
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.rope_kernel import rope_arguments
from yarn_edge.verify.command import Check, check_kernel, check_logits, verify
from yarn_edge.verify.rope_nodes import record_ropes
from yarn_edge.verify.tokenizer import reference_encoder
from yarn_edge.verify.transformers_reference import divergence, log_softmax
from yarn_edge.verify.vocabulary import check_tokenizer

from support import depth, tiny
from support.build_note import without_build_note
from support.gguf_bytes import edit_key


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def test_float32_is_the_checkpoint(whole_smol_f32: Path, whole_smol_checkpoint: Path) -> None:
    """The numbers of the product: mean KL <= 1e-8 nats and top-1 100 % over 768 tokens of English, factor 4."""
    checks = by_name(verify(whole_smol_f32, whole_smol_checkpoint))
    assert {c.status for c in checks.values()} == {"pass"}, checks
    assert checks["logits"].value is not None
    assert 0 <= checks["logits"].value <= 1e-8
    assert "over 768 tokens" in checks["logits"].detail
    assert "top-1 100.00%" in checks["logits"].detail
    assert "180 nodes, in batches from positions 0, 8184, 32752" in checks["live-graph"].detail


def test_float16_is_rounding_only(smol_quants: dict[str, Path], smol_checkpoint: Path) -> None:
    with Model(smol_quants["F16"]) as model:
        check = check_logits(model, smol_checkpoint, None, 768)
    assert check.value is not None
    assert check.value <= 2e-5
    assert check.status == "pass"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_other_families_with_real_attention(family: str, tmp_path: Path) -> None:
    scaling = {**YARN["rope_scaling"], "attention_factor": 1.2}
    config = {**YARN, "rope_scaling": scaling}
    folder = write_checkpoint(tmp_path / "ck", family=family, dtype="F32", config=config, n_layers=depth.smol_layers())
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    checks = by_name(verify(path, folder, n_tokens=512))
    assert {c.status for c in checks.values()} == {"pass"}, checks
    assert checks["logits"].value is not None
    assert checks["logits"].value <= 1e-8


NATIVE = "llama.rope."
CHANGES: dict[str, float | str | bool] = {
    NATIVE + "freq_base": 10010.0,
    NATIVE + "scaling.type": "none",
    NATIVE + "scaling.factor": 4.01,
    NATIVE + "scaling.original_context_length": 255,
    NATIVE + "scaling.yarn_ext_factor": 0.9,
    NATIVE + "scaling.yarn_attn_factor": 1.01,
    NATIVE + "scaling.yarn_beta_fast": 16.0,
    NATIVE + "scaling.yarn_beta_slow": 2.0,
    NATIVE + "scaling.attn_factor": 1.0,
    NATIVE + "dimension_count": 62,
    "yarn_edge.rope.rope_theta": 10010.0,
    "yarn_edge.rope.method": "none",
    "yarn_edge.rope.factor": 4.01,
    "yarn_edge.rope.original_context": 255,
    "yarn_edge.rope.ext_factor": 0.9,
    "yarn_edge.rope.beta_fast": 16.0,
    "yarn_edge.rope.beta_slow": 2.0,
    "yarn_edge.rope.attention_factor": 1.34,
    "yarn_edge.rope.truncate": False,
    "yarn_edge.rope.ramp": "turns",
    "yarn_edge.rope.dim": 62,
}


def test_the_unchanged_file_passes(rich_file: Path) -> None:
    checks = verify(rich_file)
    assert [(c.name, c.status) for c in checks] == [
        ("metadata", "pass"),
        ("kernel", "pass"),
        ("live-graph", "pass"),
        ("tokenizer", "skip"),
        ("ends", "skip"),
        ("bos", "skip"),
        ("template", "skip"),
        ("logits", "skip"),
    ]


@pytest.mark.parametrize("key", CHANGES)
def test_any_changed_parameter_fails_the_live_graph(key: str, rich_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.gguf"
    shutil.copy(rich_file, path)
    edit_key(path, key, CHANGES[key])
    refused = {"yarn_edge.rope.method": "without a scaling method", NATIVE + "dimension_count": "heads have|only if"}
    if key in refused:  # it contradicts itself, or llama.cpp would abort
        with pytest.raises(YarnEdgeError, match=refused[key]):
            verify(path)
        return
    checks = by_name(verify(path))
    assert checks["live-graph"].status == "fail", checks
    assert checks["metadata"].status == "fail", checks


def test_a_context_length_that_caps_the_model_fails(rich_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "capped.gguf"
    shutil.copy(rich_file, path)
    edit_key(path, "llama.context_length", 256)
    check = by_name(verify(path))["metadata"]
    assert (check.status, check.value) == ("fail", 1.0)
    assert "context_length is 256" in check.detail


def test_the_tap_sees_every_layer_and_what_was_really_passed(whole_smol_f32: Path) -> None:
    arguments = RuntimeArguments(yarn_beta_fast=8.0)
    with Model(whole_smol_f32) as model:
        tokens = model.tokenize("In the beginning", add_special=False, parse_special=False)
        nodes = record_ropes(model, tokens, [5], arguments)
    assert sorted({n.layer for n in nodes}) == list(range(30))
    assert {n.x.shape[1] for n in nodes} == {9, 3}
    assert {n.arguments.beta_fast for n in nodes} == {8.0}
    np.testing.assert_array_equal(nodes[0].positions, np.arange(5, 5 + len(tokens)))


ARGUMENTS = {
    "from the model": FROM_MODEL,
    "llama_cpp.Llama's defaults": LLAMA_CLASS_DEFAULTS,
    "own betas": RuntimeArguments(yarn_beta_fast=8.0, yarn_beta_slow=2.0),
    "no ext": RuntimeArguments(yarn_ext_factor=0.0, yarn_attn_factor=1.7),
    "half ext": RuntimeArguments(yarn_ext_factor=0.5, yarn_attn_factor=1.7),
    "type none": RuntimeArguments(rope_scaling_type=0),
    "type linear": RuntimeArguments(rope_scaling_type=1),
    "other factor and origin": RuntimeArguments(rope_freq_scale=0.125, yarn_orig_ctx=128),
    "other base": RuntimeArguments(rope_freq_base=5e5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_simulated_rules_are_those_of_the_running_library(name: str, rich_file: Path) -> None:
    """FilePositions.effective against what llama.cpp really put into its graph, for a file with every key."""
    with Model(rich_file) as model:
        said = model.positions.effective(ARGUMENTS[name])
        nodes = record_ropes(model, list(range(5, 13)), [700], ARGUMENTS[name])
    wanted, seen = rope_arguments(said, "interleaved").numbers, nodes[0].arguments.numbers
    if wanted["ext_factor"] == 0:  # the ramp is not used
        for unused in ("beta_fast", "beta_slow", "n_ctx_orig"):
            del wanted[unused], seen[unused]
    assert seen == pytest.approx(wanted, rel=1e-6)
    assert max(rotation_error(n.x, n.y, n.positions, said, "interleaved").of_budget for n in nodes) <= 1


def test_the_kernel_check_fails_for_another_goal(smol_f32: Path) -> None:
    goal = FilePositions(read_gguf(smol_f32)).wanted
    assert check_kernel(goal, goal, "llama").status == "pass"
    for wrong in ({"factor": 4.001}, {"beta_fast": 16.0}, {"attention_factor": 1.14}):
        assert check_kernel(goal.with_overrides("test", **wrong), goal, "llama").status == "fail"


def test_another_checkpoint_fails(rich_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, head_dim=64)  # no attention factor of its own
    assert main(["verify", str(rich_file), "--against", str(other), "--json", "--tokens", "64"]) == 1
    report = json.loads(capsys.readouterr().out)
    status = {c["name"]: c["status"] for c in report["checks"]}
    assert report["ok"] is False
    del status["logits"]  # a tiny random model's attention is flat: its logits may hide positions
    same = dict.fromkeys(("kernel", "tokenizer", "ends", "bos", "template"), "pass")
    assert status == {"metadata": "fail", "live-graph": "fail"} | same
    metadata_check = report["checks"][0]
    assert set(metadata_check) == {"name", "status", "value", "limit", "detail", "data"}
    assert "attention_factor is 1.35" in metadata_check["detail"]


def test_another_tokenizer_fails(rich_file: Path, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(values))
    with Model(rich_file) as model:
        assert check_tokenizer(model, folder, reference_encoder(folder)).status == "fail"


def test_flags_are_told_to_verify_too(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", "qwen2", rope_scaling=..., max_position_embeddings=256)
    flags = ScalingOverrides(factor=4.0, original_context=256)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=flags)[0]
    assert {c.status for c in verify(path, folder, overrides=flags, n_tokens=64)} == {"pass"}
    assert by_name(verify(path, folder, n_tokens=64))["metadata"].status == "fail"


def test_divergence_against_a_hand_computed_case() -> None:
    truth = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]], dtype=np.float32)) + 7
    found = divergence(truth, other)
    assert found.kl_max == pytest.approx(0.25 * np.log(2), rel=1e-6)
    assert found.kl_mean == pytest.approx(0.125 * np.log(2), rel=1e-6)
    assert (found.n_tokens, found.top1) == (2, 0.5)
    np.testing.assert_allclose(np.exp(log_softmax(truth)).sum(axis=1), 1)


def test_a_checkpoint_of_another_shape_is_a_failed_check(rich_file: Path, smol_checkpoint: Path) -> None:
    checks = by_name(verify(rich_file, smol_checkpoint))
    assert checks["live-graph"].status == "fail"
    assert "320 tokens, the checkpoint 49152 embeddings" in checks["logits"].detail


def test_ctrl_c_in_the_live_graph_is_no_verdict(smol_f32: Path) -> None:
    """The signal comes while nodes are being recorded, inside a callback from C."""
    code = (
        "import os, signal, sys\nfrom yarn_edge.verify import rope_nodes as tap\nfrom yarn_edge.cli import main\n"
        "record = tap._Recorder._record\n"
        "def pressed(self, *rest):\n    os.kill(os.getpid(), signal.SIGINT)\n    return record(self, *rest)\n"
        f"tap._Recorder._record = pressed\nsys.exit(main(['verify', {str(smol_f32)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "live-graph" not in done.stdout
    assert without_build_note(done.stderr) == "yarn-edge: error: interrupted\n"

"""patch: what the file shall run, from its own words, a checkpoint or flags; the weights stay; the outcome verifies."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.declared import declared
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions import rope
from yarn_edge.verify.command import verify

from support import tiny

A4 = 1.1386294361119891
S = "llama.rope.scaling."
PLAIN: dict[str, Any] = {"rope_scaling": ..., "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small GGUFs without YaRN, Q8_0, by family."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for family in ("llama", "qwen2"):
        checkpoint = tiny.write_checkpoint(folder / family, family, **PLAIN)
        found[family] = convert(checkpoint, str(folder / f"{family}.gguf"), "Q8_0")[0]
    return found


def weights(path: Path) -> dict[str, bytes]:
    """Tensor data by gguf's own reader."""
    return {t.name: np.asarray(t.data).tobytes() for t in GGUFReader(path).tensors if t.name != "rope_freqs.weight"}


def foreign(path: Path, source: Path, **keys: Any) -> Path:
    """A file as somebody else's converter would leave it: no description of ours, with these rope scaling keys."""
    file = read_gguf(source)
    gone = [k for k in file.metadata if k.startswith(("yarn_edge.", "llama.rope.scaling."))]
    edit_gguf_files(file, [path], set_keys={S + name: value for name, value in keys.items()}, remove_keys=gone)
    return path


YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_context_length": 256}


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_yarn_is_added_to_a_plain_quantized_file(
    family: str, plain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    flags = ["--yarn-factor", "4", "--yarn-orig-ctx", "256"]
    code, told, _ = run(["patch", str(plain[family]), "-o", str(out), *flags], capsys)
    assert code == 0
    assert f"{family}.rope.scaling.factor: absent -> 4.0" in told
    assert f"{family}.context_length: 256 -> 1024" in told
    assert weights(out) == weights(plain[family])
    runs = FilePositions(read_gguf(out)).effective()
    assert (runs.method, runs.factor, runs.original_context) == ("yarn", 4.0, 256)
    assert runs.attention_factor == pytest.approx(A4)
    assert {c.status for c in verify(out)} == {"pass", "skip"}


def test_own_betas_are_baked_into_a_llama_file(plain: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    flags = {"factor": 4.0, "original_context": 256, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.35}
    _files, plan, changes = patch(plain["llama"], out, overrides=ScalingOverrides(**flags))
    assert plan.form == "baked"
    assert any("rope_freqs.weight" in change for change in changes)
    assert weights(out) == weights(plain["llama"])
    positions = FilePositions(read_gguf(out))
    goal, runs = positions.wanted, positions.effective()
    assert (goal.beta_fast, goal.attention_factor) == (8.0, 1.35)
    np.testing.assert_allclose(rope.inv_freq(runs), rope.inv_freq(goal), rtol=1e-6)
    assert {c.status for c in verify(out)} == {"pass", "skip"}


def test_a_baked_file_becomes_plain_yarn_again(plain: dict[str, Path], tmp_path: Path) -> None:
    """The tensor cannot be taken out; it is set to ones."""
    flags = {"factor": 4.0, "original_context": 256}
    patch(
        plain["llama"], tmp_path / "baked.gguf", overrides=ScalingOverrides(**flags), planner=PlannerOptions("always")
    )
    patch(tmp_path / "baked.gguf", tmp_path / "native.gguf")
    file = read_gguf(tmp_path / "native.gguf")
    assert set(file.float32_tensor("rope_freqs.weight", 64)) == {1.0}
    assert FilePositions(file).effective().method == "yarn"
    assert {c.status for c in verify(tmp_path / "native.gguf")} == {"pass", "skip"}


def test_from_a_checkpoint(plain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "attention_factor": 1.3}
    checkpoint = tiny.write_checkpoint(tmp_path / "ck", rope_scaling=scaling)
    out = tmp_path / "out.gguf"
    code, told, _ = run(["patch", str(plain["llama"]), "-o", str(out), "--from", str(checkpoint), "--json"], capsys)
    assert code == 0
    report = json.loads(told)
    assert report["form"] == "native"
    assert any(S + "attn_factor" in change for change in report["changes"])
    assert {c.status for c in verify(out, checkpoint, n_tokens=64) if c.name != "logits"} == {"pass"}


def test_from_another_models_checkpoint(plain: dict[str, Path], tmp_path: Path) -> None:
    for changes, message in (
        ({"family": "qwen2"}, "model_type is 'qwen2'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
    ):
        folder = tiny.write_checkpoint(tmp_path / message[:12], **changes)  # type: ignore[arg-type]
        with pytest.raises(YarnEdgeError, match=message):
            patch(plain["llama"], tmp_path / "out.gguf", checkpoint=folder)
    assert not (tmp_path / "out.gguf").exists()


# What somebody's file says -> (what --repair makes of it, or the refusal), further flags
REPAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | str]] = {
    "dead betas": (YARN | {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}, {}, {"beta_fast": 8.0, "beta_slow": 2.0}),
    "dead ext_factor": (YARN | {"yarn_ext_factor": 0.5}, {}, {"ext_factor": 0.5}),
    "the factor in ext_factor": (YARN | {"yarn_ext_factor": 4.0}, {}, {"ext_factor": 1.0, "factor": 4.0}),
    "the factor in ext_factor alone": (
        {"type": "yarn", "original_context_length": 256, "yarn_ext_factor": 4.0}, {}, {"ext_factor": 1.0, "factor": 4.0}),
    "an open attention factor": (YARN | {"yarn_attn_factor": 1.35}, {}, "yarn_attn_factor is 1.35, and its meaning is open"),
    "an attention factor, decided": (YARN | {"yarn_attn_factor": 1.35}, {"attention_factor": 1.35}, {"attention_factor": 1.35}),
    "no origin": ({"type": "yarn", "factor": 4.0}, {}, "original_context_length is missing"),
    "no origin, told": ({"type": "yarn", "factor": 4.0}, {"original_context": 256}, {"original_context": 256}),
    "another factor": (YARN, {"factor": 8.0}, {"factor": 8.0, "attention_factor": 1.2079441541679836}),
    "another factor with an own A": (YARN | {"attn_factor": 1.5}, {"factor": 8.0}, "made for another factor"),
    "linear without origin": ({"type": "linear", "factor": 2.0}, {}, "pass --yarn-orig-ctx"),
    "linear, origin told": ({"type": "linear", "factor": 2.0}, {"original_context": 128}, {"factor": 2.0, "original_context": 128}),
    "linear": ({"type": "linear", "factor": 2.0, "original_context_length": 128}, {"beta_fast": 8.0}, "need --yarn-factor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPAIRS)
def test_repair(case: str, plain: dict[str, Path], tmp_path: Path) -> None:
    keys, flags, want = REPAIRS[case]
    source, out = foreign(tmp_path / "in.gguf", plain["llama"], **keys), tmp_path / "out.gguf"
    if isinstance(want, str):
        with pytest.raises(YarnEdgeError, match=want):
            patch(source, out, overrides=ScalingOverrides(**flags))
        assert not out.exists()
        return
    patch(source, out, overrides=ScalingOverrides(**flags))
    file = read_gguf(out)
    positions = FilePositions(file)
    goal, runs = positions.wanted, positions.effective()
    assert {n: getattr(goal, n) for n in want} == pytest.approx(want)
    assert file.required_int("context_length") == goal.extended_context
    np.testing.assert_allclose(rope.inv_freq(runs), rope.inv_freq(goal), rtol=1e-6)
    assert runs.attention_factor == pytest.approx(goal.attention_factor, rel=1e-6)
    assert {c.status for c in verify(out)} == {"pass", "skip"}


def test_repair_of_a_qwen2_file_says_that_arguments_remain(
    plain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--yarn-factor", "4", "--yarn-orig-ctx", "256", "--yarn-beta-fast", "8"]
    code, _, notes = run(["patch", str(plain["qwen2"]), "-o", str(tmp_path / "out.gguf"), *flags], capsys)
    assert code == 0
    assert "need runtime arguments" in notes
    file = read_gguf(tmp_path / "out.gguf")
    assert FilePositions(file).effective().beta_fast == 32.0
    assert FilePositions(file).runs.beta_fast == 8.0
    assert declared(file).beta_fast == 8.0


WRONG: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "nothing to do": (lambda _i, o: ["-o", str(o)], "nothing to do"),
    "onto itself": (lambda i, _o: ["-o", str(i), "--repair", "--force"], "is one of the files that are read"),
    "two origins": (lambda i, o: ["-o", str(o), "--repair", "--from", str(i)], "not allowed with"),
    "freeze": (lambda _i, o: ["-o", str(o), "--repair", "--freeze-at", "9"], "--freeze-at needs --from"),
    "reading": (
        lambda _i, o: ["-o", str(o), "--repair", "--attention-factor-reading", "multiply"],
        "--attention-factor-reading needs --from",
    ),
    "bake on qwen2": (lambda _i, o: ["-o", str(o), "--repair", "--bake-rope", "always"], "does not load rope_freqs"),
    "a folder": (lambda _i, o: ["-o", str(o.parent), "--repair"], "is a folder"),
    "half of YaRN": (lambda _i, o: ["-o", str(o), "--yarn-factor", "4"], "--yarn-orig-ctx is needed too"),
    "factor below 1": (lambda _i, o: ["-o", str(o), "--yarn-factor", "0.5", "--yarn-orig-ctx", "256"], "factor is 0.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags(case: str, plain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.gguf"
    shutil.copy(plain["qwen2"], source)
    before = source.read_bytes()
    flags, message = WRONG[case]
    code, out, err = run(["patch", str(source), *flags(source, tmp_path / "out.gguf")], capsys)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf"]


def test_an_existing_output_stays(plain: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(YarnEdgeError, match="--force"):
        patch(plain["llama"], out)
    assert out.read_bytes() == b"precious"
    patch(plain["llama"], out, force=True)
    assert out.stat().st_size > 1000

"""inspect: the contract of its JSON, and the findings on files that run otherwise than they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.cli import main
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import kv_bytes
from yarn_edge.runtime.model import Model

from support import tiny
from support.gguf_bytes import edit_key


def report_on(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_our_own_file_has_no_findings(rich_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_on(rich_file, capsys)
    assert {"declared", "effective", "findings", "runtime_arguments"} <= report.keys()
    assert (report["findings"], report["runtime_arguments"], report["canonical"]) == ([], {}, True)
    for side in ("declared", "effective", "wanted"):
        assert report[side]["method"] == "yarn"
        assert report[side]["attention_factor"] == pytest.approx(1.35, rel=1e-6)
        assert report[side]["extended_context"] == 1024


CHANGES: dict[str, tuple[dict[str, float | str], str, dict[str, float] | None]] = {
    "beta ignored": (
        {"llama.rope.scaling.yarn_beta_fast": 4.0, "yarn_edge.rope.beta_fast": 4.0},
        "beta_fast",
        {"yarn_beta_fast": 4.0},
    ),
    "ext ignored": (
        {"llama.rope.scaling.yarn_ext_factor": 0.5, "yarn_edge.rope.ext_factor": 0.5},
        "ext_factor",
        {"yarn_ext_factor": 0.5},
    ),
    "attention factor lost": ({"llama.rope.scaling.attn_factor": 1.0}, "attention_factor", None),
    "context capped": ({"llama.context_length": 256}, "context capped", {}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_findings(case: str, rich_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message, arguments = CHANGES[case]
    path = tmp_path / "changed.gguf"
    shutil.copy(rich_file, path)
    for key, value in changes.items():
        edit_key(path, key, value)
    report = report_on(path, capsys)
    told = [f"{f['name']}: {f['what']} {f['evidence']}" for f in report["findings"]]
    assert any(message in t for t in told), told
    assert all(f["remedy"] for f in report["findings"])
    if arguments is None:
        assert report["runtime_arguments"] is None
    else:
        assert arguments.items() <= report["runtime_arguments"].items()


def test_a_plain_foreign_file(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_on(package_gguf(), capsys)
    assert (report["declared"]["method"], report["effective"]["method"], report["canonical"]) == ("none", "none", False)
    assert report["findings"] == []
    assert report["tensor_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_on(tiny.write_checkpoint(tmp_path / "ck"), capsys)
    assert (report["kind"], report["dialect"], report["declared"]["factor"]) == ("checkpoint", "transformers v4", 4.0)
    assert report["declared"]["provenance"]["factor"] == "config.json: rope_scaling.factor"
    assert main(["inspect", str(tmp_path / "ck")]) == 0
    assert "config.json: rope_scaling.factor" in capsys.readouterr().out


def test_how_a_checkpoint_could_be_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Own betas are baked for llama, need arguments on qwen2; truncate false needs the live graph there."""
    own = {**tiny.YARN["rope_scaling"], "beta_fast": 8, "beta_slow": 4}
    for family, form in (("llama", "baked"), ("qwen2", "arguments")):
        report = report_on(tiny.write_checkpoint(tmp_path / family, family, rope_scaling=own), capsys)
        assert report["declared"]["beta_fast"] == 8
        assert report["plans"][""]["form"] == form
    folder = tiny.write_checkpoint(tmp_path / "none", "qwen2", rope_scaling={**own, "truncate": False})
    plan = report_on(folder, capsys)["plans"][""]
    assert plan["form"] == "live"
    assert "other programs run frequencies up to" in plan["message"]


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_kv_bytes_are_what_llama_cpp_saves(kv_type: str) -> None:
    """The state of a full context is the cache and little else."""
    path = package_gguf()
    with Model(path) as model, Context(model, ContextSettings(n_ctx=256, n_batch=256, kv_type=kv_type)) as context:
        context.evaluate([1] * 256, 0, "none")
        saved = model.api.llama_state_seq_get_size(context.handle, 0)
    predicted = kv_bytes(read_gguf(path), 256, kv_type)
    assert predicted <= saved <= predicted * 1.02


def test_people_can_read_it(rich_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(rich_file)]) == 0
    out = capsys.readouterr().out
    assert "attention_factor  1.35" in out
    assert "no findings" in out

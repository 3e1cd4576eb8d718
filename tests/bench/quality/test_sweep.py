"""`yarn-edge sweep`: each value is the run that a file with that scaling would give; recommendations say how sure they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.quality import sweep as sweeping
from yarn_edge.bench.quality.perplexity import score_text
from yarn_edge.bench.quality.sweep import SweepSettings, sweep
from yarn_edge.bench.quality.text_settings import TextSettings
from yarn_edge.bench.scoring.variants import parse_variant
from yarn_edge.cli import main
from yarn_edge.flags import ScalingOverrides

from support import tiny_gguf


def nll(found: sweeping.Sweep) -> dict[str, Any]:
    return {s.value.label: np.concatenate(s.nll) for s in found.values}


def test_factors_are_variants(smol_quants: dict[str, Path]) -> None:
    path = smol_quants["Q8_0"]
    found = nll(sweep(parse_variant(str(path)), SweepSettings("factor", ["4", "2"]), TextSettings(ctx=150)))
    for label, suffix in (("2", "@yarn-factor=2"), ("4", "")):
        alone = score_text(parse_variant(f"{path}{suffix}"), TextSettings(ctx=150))
        np.testing.assert_allclose(found[label], alone.scores.nll[0], atol=1e-9)
    assert list(found) == ["2", "4"]


def test_dynamic_is_plain_up_to_the_original_context_and_static_at_the_end(smol_quants: dict[str, Path]) -> None:
    found = nll(
        sweep(
            parse_variant(str(smol_quants["F16"])),
            SweepSettings(
                "method",
                ["plain", "yarn", "dynamic-yarn"],
                overrides=ScalingOverrides(factor=2.0, original_context=150),
                step=75,
            ),
            TextSettings(ctx=300),
        )
    )
    np.testing.assert_allclose(found["dynamic-yarn"][:149], found["plain"][:149], atol=1e-3)
    np.testing.assert_allclose(found["dynamic-yarn"][224:], found["yarn"][224:], atol=1e-3)
    assert np.abs(found["dynamic-yarn"][149:224] - found["yarn"][149:224]).max() > 0.01


def test_the_attention_factor_that_text_prefers(
    whole_smol_quants: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the trained context, SmolLM2 was made for A = 1."""
    words = [
        "sweep",
        str(whole_smol_quants["Q8_0"]),
        "--over",
        "attention-factor",
        "--yarn-factor",
        "1",
        "--values",
        "0.7,1,1.4",
    ]
    outputs = ["--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html")]
    assert main([*words, "--ctx", "400", *outputs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["value"] == 1
    assert found["recommended"]["not_distinguishable"] == []
    assert found["recommended"]["standard_errors_ahead"] > 3
    assert [v["value"] for v in found["values"]] == [0.7, 1, 1.4]
    assert found["values"][1]["behind_best"] == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_from_plain_rope(whole_smol_quants: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sweep",
        str(whole_smol_quants["Q8_0"]),
        "--over",
        "factor",
        "--values",
        "1,4",
        "--metric",
        "divergence",
        "--ctx",
        "200",
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "plain RoPE"
    assert found["values"][0]["kld_mean"] < 1e-9
    assert found["values"][1]["kld_mean"] > 0.05
    assert main(words) == 0
    assert "perplexity within the original context, relative to plain RoPE: factor 4 +" in capsys.readouterr().out


def test_ctrl_c_keeps_the_values_that_are_done(
    smol_quants: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = sweeping.score, [0]

    def stop(*rest: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        score(*rest, **named)

    monkeypatch.setattr(sweeping, "score", stop)
    assert main(["sweep", str(smol_quants["Q8_0"]), "--over", "factor", "--ctx", "100", "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False
    assert [v["value"] for v in found["values"]] == [1, 2]


BAD = {
    "no numbers": (["--over", "factor", "--values", "a"], "are not numbers"),
    "a factor below 1": (["--over", "factor", "--values", "0.5,2"], "is below 1, which is plain RoPE"),
    "below 1": (["--over", "attention-factor", "--values", "-1", "--yarn-factor", "2"], "must be above 0"),
    "no method": (["--over", "method", "--values", "yam", "--yarn-factor", "2"], "'yam' is unknown"),
    "no YaRN": (["--over", "attention-factor"], "the file has none, so pass --yarn-factor"),
    "no need": (["--over", "method", "--ctx", "64"], "is not beyond the original 1024"),
    "protocol": (["--over", "factor", "--protocol", "sliding"], "sweep supports curve and llama.cpp"),
    "freeze": (["--over", "factor", "--freeze-at", "64"], "a GGUF's scaling is static"),
    "dynamic divergence": (
        [
            "--over",
            "method",
            "--values",
            "dynamic-ntk",
            "--metric",
            "divergence",
            "--yarn-orig-ctx",
            "64",
            "--ctx",
            "200",
        ],
        "use perplexity",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD[case]
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama")
    assert main(["sweep", str(path), *flags]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_a_variant_with_a_scaling_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama")
    assert main(["sweep", f"{path}@yarn-factor=2,yarn-orig-ctx=512", "--over", "factor"]) == 2
    assert "give the scaling to sweep around by --yarn-… flags" in capsys.readouterr().err
    assert replace(parse_variant(f"{path}@kv=q8_0"), label="").arguments is None

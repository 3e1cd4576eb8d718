"""`yarn-edge compare`: divergences of logits collected plainly are the truth, side by side and with the base on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.quality import compare as divergence
from yarn_edge.bench.quality import side_by_side as stepping
from yarn_edge.bench.quality import stored_distributions as distributions
from yarn_edge.bench.quality.compare import compare
from yarn_edge.bench.quality.compare_outcome import ComparisonOutcome
from yarn_edge.bench.quality.text_settings import TextSettings
from yarn_edge.bench.scoring.variants import Variant, parse_variant
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory import together
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.transformers_reference import log_softmax

from support import tiny_gguf

CTX = 192


def logits_of(path: Path, kv_type: str) -> tuple[Any, Any]:
    with Model(path) as model:
        tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[:CTX]
        with Context(model, ContextSettings(n_ctx=CTX, n_batch=CTX, kv_type=kv_type, attention="flash")) as context:
            context.evaluate(tokens[:-1], 0, "all")
            return tokens, log_softmax(context.logits())


@pytest.fixture(scope="module")
def truth(smol_quants: dict[str, Path]) -> dict[str, Any]:
    """Figures of Q4_K_M and of F16 with a q8_0 cache against F16."""
    tokens, base = logits_of(smol_quants["F16"], "f16")
    found = {}
    at = (np.arange(CTX - 1), tokens[1:])
    for name, path, kv in (("Q4_K_M", smol_quants["Q4_K_M"], "f16"), ("@kv=q8_0", smol_quants["F16"], "q8_0")):
        other = logits_of(path, kv)[1]
        kl = (np.exp(base) * (base - other)).sum(axis=1)
        delta = np.exp(other[at]) - np.exp(base[at])
        found[name] = {
            "kld_mean": kl.mean(),
            "kld_median": np.median(kl),
            "kld_max": kl.max(),
            "kld_p99": np.quantile(kl, 0.99),
            "top1": (base.argmax(1) == other.argmax(1)).mean(),
            "delta_p_mean": delta.mean(),
            "delta_p_rms": np.sqrt((delta**2).mean()),
            "ppl": np.exp(-other[at].mean()),
            "ppl_ratio": np.exp((base[at] - other[at]).mean()),
            "kld_stderr": kl.std(ddof=1) / np.sqrt(CTX - 1),
        }
    return found


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_figures(keep: str, truth: dict[str, Any], smol_quants: dict[str, Path], tmp_path: Path) -> None:
    base = parse_variant(str(smol_quants["F16"]))
    others = [parse_variant(str(smol_quants["Q4_K_M"])), parse_variant(f"{smol_quants['F16']}@kv=q8_0")]
    settings = TextSettings(ctx=CTX)
    comparison, ctx = compare(base, others, settings, attention="flash", keep=keep, scratch=tmp_path)
    data = ComparisonOutcome.of(comparison, ctx, settings, 64).as_json()
    assert data["complete"] is True
    for found, wanted in zip(data["models"], truth.values(), strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
        assert [(b["start"], b["end"], b["n_tokens"]) for b in found["buckets"]] == [
            (0, 64, 63),
            (64, 128, 64),
            (128, 192, 64),
        ]
        pooled = sum(b["kld_mean"] * b["n_tokens"] for b in found["buckets"]) / (CTX - 1)
        assert pooled == pytest.approx(found["kld_mean"])
    kept = data["base_on_disk"]
    assert (kept is None) == (keep == "memory")
    if kept:
        assert kept["tokens"] == CTX - 1
        assert kept["bytes"] < (CTX - 1) * 49152  # half of 16 bits for each token of the vocabulary
        for loss in kept["loss"].values():
            assert loss["kld_stored"] == pytest.approx(loss["kld_true"], rel=1e-3)
    assert not list(tmp_path.iterdir())


def test_a_model_against_itself(smol_quants: dict[str, Path]) -> None:
    same = parse_variant(str(smol_quants["Q8_0"]))
    settings = TextSettings(ctx=100)
    found = ComparisonOutcome.of(*compare(same, [same], settings), settings).as_json()["models"][0]
    assert found["kld_max"] < 1e-12
    assert (found["top1"], found["ppl_ratio"]) == (1.0, pytest.approx(1.0, abs=1e-12))


def test_stored_distributions_keep_what_matters() -> None:
    """Rows of every kind: flat, peaked, with tokens ruled out."""
    from yarn_edge.bench.scoring.evaluate import ScoredBatch
    from yarn_edge.likelihood import Rows

    random = np.random.default_rng(0)
    base = (random.standard_normal((40, 5000)) * np.linspace(0, 12, 40)[:, None]).astype(np.float32)
    base[7, :100] = -np.inf
    other = base + random.standard_normal(base.shape).astype(np.float32) / 10
    targets = base.argmax(axis=1)
    with distributions.Distributions(None) as kept, Rows(2) as rows:
        nll = kept.add(ScoredBatch(1, targets, base), rows)
        for _ in range(2):  # for two candidates
            kept.rewind()
            found = kept.compare(ScoredBatch(1, targets, other), rows)
            exact = kept.exact(ScoredBatch(1, targets, other), 0, rows)
            np.testing.assert_allclose(found.kl, exact, rtol=5e-3, atol=1e-6)
            np.testing.assert_array_equal(found.base_nll, nll)
            np.testing.assert_array_equal(found.same_top, base.argmax(axis=1) == other.argmax(axis=1))


def test_stored_distributions_in_odd_forms() -> None:
    """Ties, a rest that the candidate all but rules out, and what is not a number."""
    from yarn_edge.bench.scoring.evaluate import ScoredBatch
    from yarn_edge.likelihood import Rows

    flat = np.zeros((1, 20000), dtype=np.float32)
    peak = np.full((1, 32000), -22, dtype=np.float32)
    peak[0, 0] = 0
    lower = peak - np.float32(40)
    lower[0, 0] = 0
    tilted = np.linspace(-1, 1, 20000, dtype=np.float32)[None]
    at = np.array([0])
    for base, other in ((flat, flat), (flat, tilted), (peak, lower), (tilted, flat)):
        with distributions.Distributions(None) as kept, Rows(1) as rows:
            kept.add(ScoredBatch(1, at, base), rows)
            kept.rewind()
            stored = kept.compare(ScoredBatch(1, at, other), rows).kl[0]
            exact = kept.exact(ScoredBatch(1, at, other), 0, rows)[0]
        assert stored == pytest.approx(exact, rel=2e-3, abs=1e-7)
    with distributions.Distributions(None) as kept, Rows(1) as rows:
        assert np.isnan(kept.add(ScoredBatch(1, at, np.full((1, 9), np.nan, np.float32)), rows)).all()


def test_what_fits_together(whole_smol_quants: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        Variant("a", read_gguf(whole_smol_quants["F16"])),
        Variant("b", read_gguf(whole_smol_quants["F16"]), "q4_0"),
        Variant("c", read_gguf(whole_smol_quants["Q8_0"])),
    ]
    size = {name: path.stat().st_size for name, path in whole_smol_quants.items()}
    caches = 8192 * 30 * 2 * 3 * 64 * (2 + 18 / 32 + 2)
    needed = size["F16"] + size["Q8_0"] + caches + 3 * 2 * 4 * 512 * 49152  # the logits, in the graph and behind it
    for free, fits in ((needed * 0.95, False), (needed * 1.2, True)):
        monkeypatch.setattr(together, "available_bytes", lambda free=free: free)
        assert stepping.fit_in_memory(variants, 8192, "auto") is fits


# ---- the command


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "m.gguf", "llama")


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(sample_text()[:800])
    words = [
        "compare",
        str(tiny_model),
        str(tiny_model),
        f"{tiny_model}@kv=f32",
        "--text",
        str(tmp_path / "t.txt"),
        "--ctx",
        "256",
    ]
    outputs = ["--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html")]
    assert main([*words, "--chunks", "2", *outputs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == str(tiny_model)
    assert [m["model"] for m in found["models"]] == [str(tiny_model), f"{tiny_model}@kv=f32"]
    needed = {"kld_mean", "kld_stderr", "kld_p99", "top1", "ppl", "ppl_ratio", "buckets"}
    assert all(needed <= m.keys() for m in found["models"])
    assert found["models"][0]["n_tokens"] == 2 * 255
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--keep-base", "disk"]) == 0
    told = capsys.readouterr().out
    assert "@kv=f32" in told
    assert "kB per token on disk" in told


def test_bad_input(
    tiny_model: Path, smol_quants: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "has a different vocabulary": ["compare", str(smol_quants["Q8_0"]), str(tiny_model), "--ctx", "64"],
        "no such folder": ["compare", str(tiny_model), str(tiny_model), "--scratch", str(tmp_path / "no")],
        "No such file": ["compare", str(tiny_model), str(tmp_path / "no.gguf")],
        "the following arguments are required": ["compare", str(tiny_model)],
        "must be from 1 to": ["compare", str(tiny_model), f"{tiny_model}@yarn-factor=2,yarn-orig-ctx=0"],
        "appears twice": ["compare", str(tiny_model), f"{tiny_model}@kv=f32", f"{tiny_model}@kv=f32"],
    }
    for message, words in cases.items():
        assert main(words) == 2
        told = capsys.readouterr()
        assert told.err.startswith("yarn-edge: error: ")
        assert told.err.count("\n") == 1
        assert told.out == ""
        assert message in told.err


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_ctrl_c_tells_what_there_is(
    keep: str, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yarn_edge.bench.scoring.evaluate.MAX_BATCH", 64)
    calls = [0]
    evaluate = Context.evaluate

    def stop(self: Context, *rest: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == {"memory": 5, "disk": 10}[keep]:
            raise KeyboardInterrupt
        evaluate(self, *rest, **named)

    monkeypatch.setattr(Context, "evaluate", stop)
    words = ["compare", str(tiny_model), str(tiny_model), "--ctx", "400", "--keep-base", keep, "--json", "--text"]
    assert main([*words, str(_text(tiny_model.parent))]) == 130
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["complete"] is False
    assert found["models"][0]["n_tokens"] == 128
    assert "interrupted" in told.err


def _text(folder: Path) -> Path:
    (folder / "text.txt").write_text(sample_text()[:1200])
    return folder / "text.txt"


def test_nothing_measured_is_the_error_itself(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(divergence, "side_by_side", stop)
    variant = parse_variant(str(tiny_model))
    with pytest.raises(KeyboardInterrupt):
        compare(variant, [variant], TextSettings(ctx=64), keep="memory")


def test_a_full_disk_for_the_base(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        return Path("/dev/full").open("r+b")

    monkeypatch.setattr(distributions.tempfile, "TemporaryFile", full)
    variant = parse_variant(str(tiny_model))
    with pytest.raises(YarnEdgeError, match=r"cannot be stored: .*No space left"):
        compare(variant, [variant], TextSettings(ctx=512), keep="disk")

"""`yarn-edge perplexity`: transformers' log-likelihoods are the truth; one pass gives what a pass for each length gives; runs go on."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.averages import perplexity_by_position
from yarn_edge.bench.quality import perplexity, score_file
from yarn_edge.bench.quality.perplexity import score_text
from yarn_edge.bench.quality.perplexity_outcome import summarize
from yarn_edge.bench.quality.text_settings import TextSettings
from yarn_edge.bench.scoring.evaluate import Scores, batch_settings, token_nll
from yarn_edge.bench.scoring.variants import Variant, parse_variant
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.llama_api import captured_log
from yarn_edge.runtime.load_log import flash_attention_in
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.transformers_reference import log_softmax, reference_logits

from support import tiny_gguf


@pytest.fixture(scope="module")
def truth(whole_smol_checkpoint: Path, whole_smol_f32: Path) -> tuple[list[int], Any]:
    """Tokens, and transformers' negative log-likelihoods of all but the first."""
    with Model(whole_smol_f32, vocab_only=True) as model:
        tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[:700]
    logits = log_softmax(reference_logits(whole_smol_checkpoint, tokens)[:-1])
    return tokens, -logits[np.arange(699), tokens[1:]]


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_nll_equals_transformers(whole_smol_f32: Path, truth: tuple[list[int], Any], kv_type: str) -> None:
    tokens, wanted = truth
    with Model(whole_smol_f32) as model:
        ours = token_nll(model, tokens, kv_type=kv_type)
        part = token_nll(model, tokens, kv_type=kv_type, score_from=600)
    np.testing.assert_allclose(ours, wanted, atol=1e-3 if kv_type == "f32" else 2e-2)
    assert abs(ours.mean() - wanted.mean()) < 1e-4
    assert np.isnan(part[:599]).all()
    np.testing.assert_allclose(part[599:], ours[599:], atol=1e-5)


def test_flash_attention_only_rounds(whole_smol_f32: Path, truth: tuple[list[int], Any]) -> None:
    tokens, wanted = truth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yarn_edge.attention.policy.SCORE_BYTES", 0)
        with Model(whole_smol_f32) as model:
            variant = Variant("m", read_gguf(whole_smol_f32), "f32")
            assert batch_settings(model.gguf, model.n_vocab, variant, 700).attention == "ggml"
            with captured_log() as log:
                ours = token_nll(model, tokens, kv_type="f32")
            assert flash_attention_in("".join(log)) is True
    np.testing.assert_allclose(ours, wanted, atol=2e-2)
    assert abs(ours.mean() - wanted.mean()) < 1e-3


def text_file(folder: Path, model: Path, n_tokens: int) -> Path:
    with Model(model, vocab_only=True) as loaded:
        tokens = loaded.tokenize(sample_text(), add_special=False, parse_special=False)[:n_tokens]
        words = b"".join(loaded.token_bytes(t) for t in tokens)
    (folder / "t.txt").write_bytes(words)
    return folder / "t.txt"


def test_protocol_of_llama_cpp(smol_f32: Path, smol_checkpoint: Path, tmp_path: Path) -> None:
    """Two chunks, each by itself, of each the tokens that llama-perplexity scores."""
    text = text_file(tmp_path, smol_f32, 420)
    measured = score_text(parse_variant(str(smol_f32), kv_type="f32"), TextSettings(str(text), "llama.cpp", ctx=200))
    with Model(smol_f32, vocab_only=True) as model:
        tokens = model.tokenize(text.read_text(), add_special=False, parse_special=False)
    values = []
    for at in (0, 200):
        chunk = tokens[at : at + 200]
        logits = log_softmax(reference_logits(smol_checkpoint, chunk))
        values.append(-logits[np.arange(100, 199), chunk[101:]])
    outcome = summarize(measured.scores, "llama.cpp", 200, None, None)
    assert outcome.total.n == 198
    assert outcome.total.mean == pytest.approx(np.concatenate(values).mean(), rel=1e-4)
    assert outcome.total.stderr == pytest.approx(np.concatenate(values).std(ddof=1) / math.sqrt(198), rel=1e-3)
    assert outcome.curve == []


def test_one_pass_gives_what_a_pass_for_each_length_gives(smol_quants: dict[str, Path]) -> None:
    """By causality, also where batches are cut differently."""
    variant = parse_variant(str(smol_quants["F16"]))
    points = [300, 512, 700, 1000]
    whole = score_text(variant, TextSettings(ctx=1000))
    curve = {n: m.perplexity for n, m, _ in summarize(whole.scores, "curve", 1000, points, None).curve}
    for length in points:
        alone = summarize(score_text(variant, TextSettings(ctx=length)).scores, "curve", length, [length], None)
        assert curve[length] == pytest.approx(alone.total.perplexity, rel=1e-3)


def test_truncated_counts_whole_documents_alone_and_equally() -> None:
    from yarn_edge.bench.scoring.windows import Window

    windows = [Window(0, 0, tuple(range(5)), 1), Window(1, 0, tuple(range(5)), 1), Window(2, 0, tuple(range(3)), 1)]
    scores = Scores(windows, [np.array([1.0, 1, 3, 3]), np.array([2.0, 2, 2, 2]), np.array([9.0, 9])])
    cut = {n: (m.mean, docs) for n, m, docs in summarize(scores, "truncated", 5, [3, 5], None).curve}
    assert cut == {3: ((1 + 2 + 9) / 3, 3), 5: (2.0, 2)}
    errors = [m.stderr for _, m, _ in summarize(scores, "truncated", 5, [3], None).curve]
    assert errors == pytest.approx([np.std([1, 2, 9], ddof=1) / math.sqrt(3)])  # over documents
    stopped = Scores(windows, [scores.nll[0], np.array([2.0, 2, np.nan, np.nan]), scores.nll[2]])
    assert [(n, docs) for n, _, docs in summarize(stopped, "truncated", 5, [3, 5], None).curve] == [(3, 3), (5, 1)]
    pooled = {n: (m.mean, docs) for n, m, docs in summarize(scores, "curve", 5, [3, 5], None).curve}
    assert pooled == {3: (24 / 6, 3), 5: (pytest.approx(34 / 10), 3)}


def test_buckets() -> None:
    nll = np.log(np.array([2.0, 2.0, 8.0, 8.0, 8.0]))  # of the tokens at positions 1 to 5
    buckets = perplexity_by_position(nll, [0, 3, 6])
    assert [(b.start, b.end, b.n_tokens) for b in buckets] == [(0, 3, 2), (3, 6, 3)]
    assert [b.perplexity for b in buckets] == pytest.approx([2, 8])


@pytest.mark.parametrize(
    ("n_vocab", "n_ctx", "kv", "device", "wanted", "batch"),
    [
        (49152, 8192, "f16", "cpu", "ggml", (512, "plain")),
        (49152, 16384, "f16", "cpu", "ggml", (256, "plain")),
        (49152, 131072, "f16", "cpu", "ggml", (32, "plain")),
        (49152, 262144, "f16", "cpu", "ggml", (512, "ggml")),
        (49152, 8192, "q8_0", "cpu", "ggml", (512, "ggml")),
        (49152, 8192, "f16", "cuda", "ggml", (512, "ggml")),
        (49152, 262144, "f16", "cpu", "plain", (32, "plain")),
        (152064, 4096, "f16", "cpu", "flash", (128, "flash")),
    ],
)
def test_the_batch_follows_vocabulary_and_length(
    smol_f32: Path, n_vocab: int, n_ctx: int, kv: str, device: str, wanted: Any, batch: tuple[int, str]
) -> None:
    variant = Variant("m", smol_f32, kv, device)
    settings = batch_settings(read_gguf(smol_f32), n_vocab, variant, n_ctx, attention=wanted)
    assert (settings.n_batch, settings.attention) == batch


# ---- the command


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "m.gguf", "llama")


def test_the_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(sample_text()[:600])
    words = ["perplexity", str(tiny_model), "--text", str(tmp_path / "t.txt"), "--ctx", "400", "--lengths", "100,400"]
    outputs = ["--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html")]
    assert main([*words, *outputs, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model", "n_tokens", "ppl", "stderr", "curve", "buckets", "tok_per_s"} <= found.keys()
    assert [(p["ctx"], p["n_tokens"]) for p in found["curve"]] == [(100, 99), (400, 399)]
    assert found["curve"][1]["ppl"] == pytest.approx(found["ppl"])
    assert found["n_tokens"] == sum(b["n_tokens"] for b in found["buckets"]) == 399
    assert found["complete"] is True
    assert found["command"].startswith("yarn-edge perplexity")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "m.gguf" in (tmp_path / "r.html").read_text()
    assert main([*words, *outputs]) == 2
    assert "exists already; --force" in capsys.readouterr().err
    assert main(words) == 0
    assert "Perplexity by position" in capsys.readouterr().out


def test_beyond_the_context_and_shorter_than_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(sample_text()[:1500])
    words = ["perplexity", str(tiny_model), "--text", str(tmp_path / "t.txt"), "--json"]
    assert main([*words, "--ctx", "4096"]) == 0
    told = capsys.readouterr()
    assert "fewer than the context of 4096" in told.err
    assert "declares a context of 1024 tokens" in told.err
    assert json.loads(told.out)["n_tokens"] > 1024


BAD: dict[str, tuple[list[str], str]] = {
    "empty text": (["--text", "empty.txt"], "contains no text"),
    "no text": (["--text", "none.txt"], "No such file"),
    "too short for the protocol": (["--protocol", "llama.cpp", "--ctx", "1000"], "scores windows of 1000 tokens"),
    "stride": (["--protocol", "sliding", "--ctx", "64", "--stride", "64"], "--stride 64 must be below the context"),
    "resume without save": (["--resume"], "--resume continues from the file of --save"),
    "save is the text": (["--save", "t.txt", "--force"], "is one of the files that are read"),
    "save is the report": (["--save", "r.html", "--report", "r.html"], "name the same file"),
    "its cache is there": (["--save", "old"], "old.cache: exists already"),
    "save in the folder of texts": (["--text", "texts", "--save", "texts/s.npz"], "would become one of the documents"),
    "save nowhere": (["--save", "/proc/s.npz"], "/proc"),
    "ctx": (["--ctx", "1"], "is not from 2"),
    "lengths": (["--lengths", "2k:1k:1k"], "is neither a length nor first:last:step"),
    "unknown cache": (["--kv-type", "q9"], "--kv-type 'q9' is unknown"),
    "no such backend": (["--backend", "cuda"], "no cuda device"),
    "variant key": (["@kv=q9"], "'q9' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(sample_text()[:600])
    Path("empty.txt").write_text("")
    Path("old.cache").write_text("somebody's")
    Path("texts").mkdir()
    Path("texts/t.txt").write_text(sample_text()[:600])
    flags, message = BAD[case]
    suffix = flags.pop(0) if flags[0].startswith("@") else ""
    words = ["perplexity", str(tiny_model) + suffix, *(["--text", "t.txt"] if "--text" not in flags else []), *flags]
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    error = told.err.splitlines()[-1]
    assert error.startswith("yarn-edge: error: ")
    assert message in error
    assert "Traceback" not in told.err


def test_what_is_not_a_number_is_an_error_and_what_was_scored_is_told(
    smol_f32: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Context.logits_in_place
    calls = [0]

    def logits(self: Context) -> Any:
        calls[0] += 1
        found = broken(self).copy()
        if calls[0] == 2:
            found[3, 17] = np.nan
        return found

    monkeypatch.setattr(Context, "logits_in_place", logits)
    monkeypatch.setattr("yarn_edge.bench.scoring.evaluate.MAX_BATCH", 64)
    assert main(["perplexity", str(smol_f32), "--ctx", "200", "--json"]) == 2
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["complete"], found["n_tokens"]) == (False, 64)
    assert "the prediction at position 67 of window 1 is not a number" in told.err


def test_a_model_whose_tokens_see_the_next_ones_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", {"attention.causal": False})
    assert main(["perplexity", str(path), "--ctx", "64"]) == 2
    assert "is not a causal language model" in capsys.readouterr().err


def test_scores_that_cannot_be_kept_are_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise YarnEdgeError("the disk is full")

    monkeypatch.setattr(score_file.ScoreFile, "finish", full)
    assert main(["perplexity", str(tiny_model), "--ctx", "64", "--save", str(tmp_path / "s.npz"), "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["n_tokens"] == 63
    assert "the disk is full" in told.err


def test_broken_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write(tmp_path / "nan.gguf", "llama", tensors={})
    data = bytearray(path.read_bytes())
    at = read_gguf(path).tensors["output.weight"].offset
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    assert main(["perplexity", str(path), "--ctx", "64"]) == 2
    told = capsys.readouterr()
    assert "is not a number" in told.err
    assert told.out == ""


# ---- going on


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C after so many batches, and a saving of everything after each."""
    calls = [0]
    monkeypatch.setattr("yarn_edge.bench.scoring.evaluate.MAX_BATCH", 64)

    def advance(*_: object) -> None:
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(score_file.ScoreFile, "now_and_then", advance)


SETTINGS = TextSettings(ctx=300, chunks=2)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "whole": (lambda _path: None, ""),
    "no cache": (lambda path: path.unlink(), "is missing or has changed"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is missing or has changed"),
    "a bit": (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x01" + path.read_bytes()[-8:]), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_in_the_middle_of_a_document(
    damage: str,
    smol_quants: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variant, save = parse_variant(str(smol_quants["Q8_0"])), tmp_path / "s.npz"
    with monkeypatch.context() as patch:
        interrupted(patch, 7)  # in the second window
        stopped = score_text(variant, SETTINGS, save=save)
        whole = score_text(variant, SETTINGS)
    assert isinstance(stopped.ended, KeyboardInterrupt)
    assert (stopped.scores.done, stopped.scores.inside) == (1, 128)
    act, message = DAMAGE[damage]
    act(tmp_path / "s.npz.cache")
    monkeypatch.setattr("yarn_edge.bench.scoring.evaluate.MAX_BATCH", 64)
    gone_on = score_text(variant, SETTINGS, save=save, resume=True)
    assert (message in capsys.readouterr().err) if message else True
    assert gone_on.scores.tokens == (299 - 128 if damage == "whole" else 299)
    np.testing.assert_array_equal(np.concatenate(gone_on.scores.nll), np.concatenate(whole.scores.nll))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz"]
    assert score_text(variant, SETTINGS, save=save, resume=True).scores.tokens == 0  # all is there


def test_another_run_or_a_damaged_file_is_not_gone_on_with(
    smol_quants: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "s.npz"
    variant = parse_variant(str(smol_quants["Q8_0"]))
    score_text(variant, TextSettings(ctx=100), save=save)
    others = {
        "the text": (variant, TextSettings(ctx=120)),
        "the model": (parse_variant(str(smol_quants["Q4_K_M"])), TextSettings(ctx=100)),
        "the cache type": (parse_variant(str(smol_quants["Q8_0"]), kv_type="f32"), TextSettings(ctx=100)),
        "the scaling": (parse_variant(f"{smol_quants['Q8_0']}@yarn-factor=2"), TextSettings(ctx=100)),
    }
    for what, (other, settings) in others.items():
        with pytest.raises(YarnEdgeError, match=f"saved by another run \\({what}"):
            score_text(other, settings, save=save, resume=True)
    whole = save.read_bytes()
    for data in (
        b"",
        b"PK\x03\x04",
        whole[:-40],
        whole.replace(*("done".encode("utf-32-le"), "d0ne".encode("utf-32-le"))),
        whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
    ):
        save.write_bytes(data)
        with pytest.raises(YarnEdgeError, match="damaged"):
            score_text(variant, TextSettings(ctx=100), save=save, resume=True)
    words = ["perplexity", str(variant.path), "--ctx", "100", "--save", str(save)]
    assert main(words) == 2
    assert "exists already; --force" in capsys.readouterr().err


def test_a_disk_without_room_for_the_cache(
    smol_quants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise YarnEdgeError("no room")

    monkeypatch.setattr(score_file, "check_space", full)
    interrupted(monkeypatch, 7)
    score_text(parse_variant(str(smol_quants["Q8_0"])), SETTINGS, save=tmp_path / "s.npz")
    assert "the cache was not saved (no room)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals, smol_quants: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C and the like stop a batch midway, tell what there is, and keep it; kill -9 leaves what was saved before."""
    program = (
        "import sys; from yarn_edge.bench.quality import score_file; from yarn_edge.bench.scoring import evaluate\n"
        "from yarn_edge.cli import main\n"
        "score_file.SAVE_SECONDS = score_file.CACHE_SECONDS = 0.0; score_file._CACHE_SHARE = 0; evaluate.MAX_BATCH = 64\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    save = tmp_path / "s.npz"
    words = [
        sys.executable,
        "-c",
        program,
        "perplexity",
        str(smol_quants["Q8_0"]),
        "--ctx",
        "4096",
        "--save",
        str(save),
        "--json",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "s.npz.cache").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # left running, it would be reported as unclosed in whichever test collects garbage next
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], err
    kept = np.load(save)
    assert np.isfinite(kept["nll"]).sum() >= 64
    if number != signal.SIGKILL:
        found = json.loads(out)
        assert found["complete"] is False
        assert found["n_tokens"] == np.isfinite(kept["nll"]).sum()
        assert "--resume continues from there" in err
        assert not list(tmp_path.glob("*.partial"))


def test_scoring_raises_when_nothing_was_scored(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(perplexity, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        score_text(parse_variant(str(tiny_model)), TextSettings(ctx=64))

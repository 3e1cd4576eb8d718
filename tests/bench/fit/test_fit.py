"""`yarn-edge fit`: what it recommends, and how it says no."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.attention import policy
from yarn_edge.bench.fit.accuracy import main as accuracy
from yarn_edge.bench.fit.speed import Speed
from yarn_edge.cli import main
from yarn_edge.flags import memory_size
from yarn_edge.memory.plan import Simulation

from support import tiny, tiny_gguf
from support.processes import run_timed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth and a process as they may be: this one has torch in it. One test below has both in earnest."""
    monkeypatch.setattr("yarn_edge.memory.plan.resident_bytes", lambda: 75 * 2**20)
    monkeypatch.setattr("yarn_edge.bench.fit.speed._PROGRAM", "print(1e10)")


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> dict[str, Any]:
    assert main(["fit", *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16GiB", 16 * 2**30),
        ("16G", 16 * 2**30),
        ("16g", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("800MiB", 800 * 2**20),
        ("1.5T", 3 * 2**39),
        ("512k", 2**19),
        ("700 MB", 7 * 10**8),
        ("1000000000", 10**9),
        ("12345B", 12345),
    ],
)
def test_amounts_of_memory(text: str, n_bytes: int) -> None:
    assert memory_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1e9", "0", "99999999T", "1GiBB", "nan"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        memory_size(text)


def test_a_quantized_file_has_its_own_row_for_each_cache(
    whole_smol_quants: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole_smol_quants["Q8_0"]
    found = answer(capsys, path, "--memory", "16GiB")
    assert [(r["quant"], r["kv_type"], r["exists"]) for r in found["rows"]] == [
        ("Q8_0", kv_type, True) for kv_type in ("f16", "q8_0", "q4_0")
    ]
    assert {r["longest_ctx"] for r in found["rows"]} == {32768}
    choice = found["choice"]
    assert (choice["n_ctx"], choice["kv_type"]) == (32768, "f16")
    with Simulation(path) as simulation:
        assert choice["kv_bytes"] == simulation.plan(32768).kv_bytes
    parts = ("weights", "repacked", "kv", "compute", "output", "process")
    assert choice["total_bytes"] == sum(choice[f"{name}_bytes"] for name in parts)
    assert found["commands"] == [["yarn-edge", "chat", str(path), "--ctx", "32768", "--kv-type", "f16"]]
    bytes_per_token = 1e10 / found["tok_per_s_estimate"]
    assert bytes_per_token == pytest.approx(found["rows"][0]["weights_bytes"] + choice["kv_bytes"], rel=0.01)
    assert found["machine"]["free_bytes"] > 0
    assert [p["ctx"] for p in found["memory_by_ctx"]["f16"]][-1] == 32768


def test_a_16_bit_file_is_compared_with_its_quantizations(
    whole_smol_quants: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        policy, "fastest_attention", lambda *_: "ggml"
    )  # our kernels take 125 MiB, where they are faster
    found = answer(capsys, whole_smol_quants["F16"], "--memory", "580MiB", "--ctx", "16k")
    sizes = {r["quant"]: r["weights_bytes"] for r in found["rows"]}
    assert list(sizes) == ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"]
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    with Simulation(whole_smol_quants["Q8_0"]) as real:  # what is planned is what quantize makes
        assert sizes["Q8_0"] == real.file.weight_bytes
        row = next(r for r in found["rows"] if (r["quant"], r["kv_type"]) == ("Q8_0", "q8_0"))
        assert row["repacked_bytes"] == real.weights.repacked
    assert (found["choice"]["quant"], found["choice"]["kv_type"]) == ("F16", "q8_0")
    smaller = answer(capsys, whole_smol_quants["F16"], "--memory", "490MiB", "--ctx", "16k")
    quantizing, chatting = smaller["commands"]
    assert smaller["choice"]["quant"] == "Q8_0"
    assert quantizing[:2] == ["yarn-edge", "quantize"]
    assert quantizing[quantizing.index("--quant") + 1] == "Q8_0"
    assert chatting[2] == quantizing[quantizing.index("-o") + 1]
    assert "F16" in smaller["why"]
    assert smaller["choice"]["total_bytes"] <= 490 * 2**20


def test_a_checkpoint_is_converted_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "my model", hidden_size=256, intermediate_size=512, head_dim=64)
    found = answer(capsys, folder, "--memory", "8GiB")
    assert [r["quant"] for r in found["rows"]][::3] == ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"]
    assert not any(r["exists"] for r in found["rows"])
    assert found["commands"][0] == ["yarn-edge", "convert", str(folder), "-o", "my model-Q8_0.gguf", "--quant", "Q8_0"]
    assert found["commands"][1][:3] == ["yarn-edge", "chat", "my model-Q8_0.gguf"]
    assert found["choice"]["n_ctx"] == 1024
    assert list(tmp_path.iterdir()) == [folder]  # nothing is written


def test_the_tables_tell_and_the_command_can_be_pasted(
    whole_smol_quants: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(whole_smol_quants["Q4_K_M"]), "--memory", "300MiB"]) == 0
    out = capsys.readouterr().out
    assert "what fits into 300 MiB on the CPU (given)" in out
    assert "would take" in out  # why not all of the context
    words = shlex.split(next(line for line in out.splitlines() if "yarn-edge chat" in line))
    n_ctx, kv_type = int(words[words.index("--ctx") + 1]), words[words.index("--kv-type") + 1]
    assert kv_type == "q8_0"
    with Simulation(whole_smol_quants["Q4_K_M"]) as simulation:
        assert simulation.plan(n_ctx, kv_type).kv_bytes < 300 * 2**20
    assert "estimate" in out


def test_a_cache_that_the_heads_do_not_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", "phi3")
    found = answer(capsys, path)
    refused = {r["kv_type"]: r["refused"] for r in found["rows"]}
    assert refused["f16"] is None
    assert "does not divide" in refused["q8_0"]
    assert main(["fit", str(path)]) == 0
    assert "no q8_0 cache: K cache type q8_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--memory", "50MiB"], "even 512 tokens"),
        (["--ctx", "16k", "--memory", "350MiB"], "the longest are"),
        (["--ctx", "2147483647"], "the longest are"),
    ],
)
def test_what_does_not_fit_fails_with_the_reason(
    whole_smol_quants: dict[str, Path], words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(whole_smol_quants["Q8_0"]), *words]) == 1
    out = capsys.readouterr().out
    assert told in out
    assert "yarn-edge chat" not in out
    found = answer(capsys, whole_smol_quants["Q8_0"], *words, code=1)
    assert found["choice"] is None
    assert found["commands"] == []


def test_bad_input_is_one_line(
    whole_smol_quants: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_weights = tmp_path / "vocabulary.gguf"
    with whole_smol_quants["Q8_0"].open("rb") as file:
        header = file.read(3_000_000)
    (tmp_path / "cut.gguf").write_bytes(header)
    (tmp_path / "text.gguf").write_text("no model at all, just some text")
    from support.gguf_bytes import STRING, image, kv

    no_weights.write_bytes(image([kv("general.architecture", STRING, "llama")], []))
    cases = [
        ("cut.gguf", "truncated"),
        ("text.gguf", "not a GGUF"),
        ("vocabulary.gguf", "no weights"),
        ("nothing", "No such"),
    ]
    for name, told in cases:
        assert main(["fit", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert told in printed.err
        assert len(printed.err.splitlines()) == 1
    assert main(["fit", str(whole_smol_quants["Q8_0"]), "--memory", "lots"]) == 2
    assert "--memory" in capsys.readouterr().err


def test_without_bandwidth_there_is_no_estimate(
    whole_smol_quants: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("yarn_edge.bench.fit.speed._PROGRAM", "raise SystemExit('no memory for it')")
    assert main(["fit", str(whole_smol_quants["Q8_0"]), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tok_per_s_estimate"] is None
    assert "no memory for it" in printed.err


def test_a_measurement_that_takes_too_long_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process is waited for: else a warning of it comes up later, wherever garbage is collected."""
    monkeypatch.setattr("yarn_edge.bench.fit.speed._PROGRAM", "import time; time.sleep(600)")
    monkeypatch.setattr("yarn_edge.bench.fit.speed.LIMIT_S", 0.05)
    with Speed(1) as speed:
        process = speed._process
        assert process is not None
        assert speed.bandwidth is None
    assert process.returncode is not None
    assert "timed out" in capsys.readouterr().err


def test_a_picture(whole_smol_quants: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "fit.png"
    assert main(["fit", str(whole_smol_quants["Q8_0"]), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_is_quick_and_measures_the_bandwidth(whole_smol_quants: dict[str, Path]) -> None:
    words = [sys.executable, "-m", "yarn_edge", "fit", str(whole_smol_quants["Q8_0"]), "--json"]
    ran, seconds = run_timed(words)
    assert 0.1 < json.loads(ran.stdout)["tok_per_s_estimate"] < 1e6
    assert seconds < 5  # about 1
    # Planning quantizations is not counted as memory of the process that will run.
    words[4] = str(whole_smol_quants["F16"])
    planned = json.loads(run_timed(words)[0].stdout)["choice"]["process_bytes"]
    alone = json.loads(ran.stdout)["choice"]["process_bytes"]
    assert planned == pytest.approx(alone, abs=6 * 2**20)


def test_accuracy_refuses_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy([str(tmp_path / "none.gguf"), "--ctx", "512"]) == 2
    assert "none.gguf" in capsys.readouterr().err


def test_accuracy_reports_and_fails_below_the_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = {"taken_bytes": 100, "peak_bytes": 101}
    monkeypatch.setattr("yarn_edge.bench.fit.accuracy.in_a_process", lambda *_args: predicted)
    assert accuracy([str(tmp_path / "a.gguf"), "--ctx", "512", "--kv-type", "f16"]) == 1
    assert "FAILS" in capsys.readouterr().out
    predicted |= {"taken_bytes": 104}
    assert accuracy([str(tmp_path / "a.gguf"), "--ctx", "512", "--kv-type", "f16"]) == 0

"""bench: what is measured (on a tiny model), what becomes of children that crash, hang or are stopped, what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from yarn_edge.bench.speed import child as speed_child
from yarn_edge.bench.speed import command as speed
from yarn_edge.bench.speed import process as speed_process
from yarn_edge.bench.speed import session as speed_session
from yarn_edge.bench.speed.ceilings import Ceilings
from yarn_edge.bench.speed.child import Bench, Request
from yarn_edge.bench.speed.configuration import (
    Configuration,
    buffer_places,
    device_bytes,
    misplaced,
    name_of_test,
    product_of,
)
from yarn_edge.bench.speed.outcome import SpeedOutcome
from yarn_edge.bench.speed.results import OK, SpeedRow, TimedRuns, empty_rows
from yarn_edge.cli import main
from yarn_edge.report import environment
from yarn_edge.report.environment import machine_state
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.load_log import buffers_in, flash_attention_in, offloaded_in
from yarn_edge.runtime.machine import peak_resident_bytes
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import judge

from support import tiny_gguf
from support.processes import state_of

SHORT = ["-p", "16", "-n", "4", "--repeat", "3", "--quiet"]
REAL = [*SHORT, "--threads", "1"]  # two that wait for each other are slow where others compute
# llama-bench -o json of the pinned llama.cpp: its columns that we tell too.
LLAMA_BENCH = [
    "build_commit",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "flash_attn",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("speed") / "tiny.gguf", "llama")


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ceilings, "look", lambda self, threads: self.bytes_per_s.setdefault(threads, 1e9))


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Children that do `body` instead: `tell(event, …)` is there, and the request."""
    script = folder / "child.py"
    script.write_text(
        "import json, os, signal, sys, time\n"
        "request = json.loads(sys.stdin.readline())\n"
        "def tell(event, **values): print(json.dumps({'event': event, **values}), flush=True)\n"
        "def test(name): tell('test', test=name, samples_ns=[10**9] * request['samples'], peak_rss_bytes=2**20)\n"
        + body
    )
    monkeypatch.setattr(speed_process, "CHILD", (sys.executable, "-S", str(script)))


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return list(json.loads(capsys.readouterr().out)["rows"])


def test_a_real_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, page = tmp_path / "rows.csv", tmp_path / "page.html"
    words = ["--depth", "0,32", "--kv-type", "f16,q8_0", "--csv", str(table), "--report", str(page), "--json"]
    assert main(["bench", str(tiny), *REAL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    names = [(row["type_k"], name_of_test(row["test"], row["n"], row["depth"])) for row in rows]
    at_0, at_32 = ["pp16", "tg4", "tg4+s"], ["pp16 @ d32", "tg4 @ d32", "tg4+s @ d32", "ttft @ d32"]
    assert names == [("f16", n) for n in at_0 + at_32] + [("q8_0", n) for n in at_0 + at_32]
    # 16 dimensions a head: no q8_0 cache is possible, and that is a row, not the end
    assert {row["status"].split(":")[0] for row in rows if row["type_k"] == "q8_0"} == {"failed"}
    assert all(
        row["tok_per_s"] is None and "does not divide" in row["status"] for row in rows if row["type_k"] == "q8_0"
    )
    for row in rows[:7]:
        assert row["status"] == "ok"
        assert set(LLAMA_BENCH) <= row.keys()
        assert row["model_filename"] == str(tiny)
        assert row["model_n_params"] == sum(np.prod(s) for s in tiny_gguf.tensor_shapes("llama").values())
        assert (row["n_gpu_layers"], row["backends"], row["device"]) == (0, "CPU", "CPU")
        assert row["weights_on"].startswith("CPU")
        assert row["cache_on"].startswith("CPU")
        assert row["rope_check"]["status"] == "pass"
        assert row["peak_rss_bytes"] > 1 << 20
        assert len(row["samples_ns"]) == (1 if row["test"] == "ttft" else 3)
        assert row["tok_per_s"] == pytest.approx(row["n"] * 1e9 / statistics.median(row["samples_ns"]))
        assert (row["bytes_per_token"] is not None) == (row["test"] in ("tg", "tg+s"))
    ttft = rows[6]
    assert (ttft["n"], ttft["depth"], ttft["n_prompt"], ttft["n_depth"]) == (32, 32, 32, 0)
    assert found["env"]["read_bytes_per_s"]
    with table.open(newline="") as file:
        told = list(csv.DictReader(file))
    assert [row["test"] for row in told] == [row["test"] for row in rows]
    assert json.loads(told[0]["samples_ns"]) == rows[0]["samples_ns"]
    assert page.read_text().count("<img") == 2


def test_the_tests_are_those_of_llama_bench(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation as it reaches the context: which tokens, where, which outputs."""
    calls: list[tuple[str, int, int, object]] = []
    evaluate, keep = Context.evaluate, Context.keep

    def seen(self: Context, tokens: Any, start: int, outputs: Any = "last", advance: Any = None) -> None:
        calls.append((f"evaluate {tokens[0]}", start, len(tokens), outputs))
        evaluate(self, tokens, start, outputs, advance)

    def kept(self: Context, n_tokens: int) -> None:
        calls.append(("keep", n_tokens, 0, None))
        keep(self, n_tokens)

    monkeypatch.setattr(Context, "evaluate", seen)
    monkeypatch.setattr(Context, "keep", kept)
    request = Request(str(tiny), "cpu", "f16", 32, 20, 3, 64, 1, 16, 16, "auto", 2)
    told: list[tuple[str, dict[str, Any]]] = []
    with Model(tiny) as model, Context(model, ContextSettings(n_ctx=64, n_batch=16, threads=1)) as context:
        monkeypatch.setattr(model, "add_bos", True)
        bench = Bench(request, model, context, lambda event, **values: told.append((event, values)))
        calls.clear()
        bench.run()
        first, bos = f"evaluate {bench.tokens[0]}", model.bos
    assert bench.tokens[0] == bos  # BOS, then random tokens
    assert len(set(bench.tokens)) > 10
    pp = [(first, 0, 16, "last"), (f"evaluate {bench.tokens[16]}", 16, 4, "last")]
    deep = [(name, at + 32, n, outputs) for name, at, n, outputs in pp]
    assert calls[:2] == pp  # warm-up, empty cache
    assert calls[2] == (first, 0, 1, "last")
    assert calls[3] == (first, 0, 32, "last")  # the document
    assert calls[4:10] == 2 * [("keep", 32, 0, None), *deep]
    tg = [("keep", 32, 0, None), *((f"evaluate {bench.tokens[i]}", 32 + i, 1, "last") for i in range(3))]
    assert calls[10:18] == 2 * tg
    sampled = [(at, n, outputs) for name, at, n, outputs in calls[18:] if name != "keep"]
    assert sampled == 2 * [(32 + i, 1, "last") for i in range(3)]
    results = [(values["test"], len(values["samples_ns"])) for event, values in told if event == "test"]
    assert results == [("ttft", 1), ("pp", 2), ("tg", 2), ("tg+s", 2)]
    assert all(t > 0 for event, values in told if event == "test" for t in values["samples_ns"])


def test_a_cache_that_forgets_is_filled_anew(tmp_path: Path) -> None:
    """A sliding window's cache cannot be cut back to what it was: each run begins with a document of its own."""
    path = tiny_gguf.write(tmp_path / "gemma3.gguf", "gemma3")
    request = Request(str(path), "cpu", "f16", 32, 16, 0, 64, 1, 16, 16, "auto", 3)
    told: list[str] = []
    with Model(path) as model, Context(model, ContextSettings(n_ctx=64, n_batch=16, threads=1)) as context:
        bench = Bench(request, model, context, lambda event, **values: told.append(values.get("what", event)))
        assert not bench.cut_back
        bench.run()
    batches = 32 // 16
    assert told.count("ttft") == 3 * batches  # the first is used for the first run


def test_measured_is_what_llama_bench_computes() -> None:
    samples = (10**9, 2 * 10**9, 4 * 10**9)
    row = TimedRuns(128, samples).as_json()
    speeds = 128e9 / np.array(samples)
    assert row["avg_ts"] == pytest.approx(speeds.mean())
    assert row["stddev_ts"] == pytest.approx(speeds.std(ddof=1))
    assert (row["avg_ns"], row["stddev_ns"]) == (round(np.mean(samples)), round(np.std(samples, ddof=1)))
    assert row["tok_per_s"] == 64.0
    assert row["spread"] == pytest.approx({"stddev": speeds.std(ddof=1), "min": 32.0, "max": 128.0})
    assert TimedRuns(128, samples[:1]).as_json()["stddev_ts"] == 0.0


CUDA_LOG = """load_tensors: offloading 32 repeating layers to GPU
load_tensors: offloaded 33/33 layers to GPU
load_tensors:   CPU_Mapped model buffer size =    70.31 MiB
load_tensors:        CUDA0 model buffer size =  4095.05 MiB
llama_context: flash_attn            = auto
llama_context:  CUDA_Host  output buffer size =     0.12 MiB
llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB
resolve_fused_ops: Flash Attention enabled
sched_reserve:      CUDA0 compute buffer size =   200.00 MiB
sched_reserve:      CUDA0 compute buffer size =   164.00 MiB
"""
CPU_LOG = """load_tensors:   CPU_Mapped model buffer size =    98.87 MiB
load_tensors:   CPU_REPACK model buffer size =     7.59 MiB
llama_context: flash_attn            = disabled
llama_kv_cache:        CPU KV buffer size =    22.50 MiB
~llama_context:        CPU compute buffer size is  98.2520 MiB, matches expectation of  98.2520 MiB
"""


@pytest.mark.parametrize(
    "log, device, told",
    [
        (CPU_LOG, None, None),
        (CUDA_LOG, "CUDA0", None),
        (CPU_LOG, "CUDA0", "in CPU, not on CUDA0|no layers are on CUDA0"),
        (CUDA_LOG, None, "in CUDA0"),
        (CUDA_LOG.replace("33/33", "20/33"), "CUDA0", "20 of 33 layers are on CUDA0"),
        (CUDA_LOG.replace("CUDA0 KV", "CPU KV"), "CUDA0", "in CPU, not on CUDA0"),
        (CUDA_LOG.replace("CUDA0 KV", "CUDA1 KV"), "CUDA0", "in CUDA1, not on CUDA0"),
        (CPU_LOG.replace("CPU KV", "CUDA0 KV"), None, "in CUDA0, not on CPU"),
        (CPU_LOG.replace("CPU_Mapped", "CUDA_Host"), None, None),
        ("", None, "does not say"),
    ],
)
def test_what_lies_elsewhere_is_found(log: str, device: str | None, told: str | None) -> None:
    import re

    found = misplaced(buffers_in(log), device, offloaded_in(log))
    assert (found is None) == (told is None)
    assert told is None or re.search(told, str(found))


def test_the_log_is_read() -> None:
    buffers = buffers_in(CUDA_LOG)
    assert buffer_places(buffers, "model") == "CPU_Mapped 70 MiB, CUDA0 4095 MiB"
    assert device_bytes(buffers, "CUDA0") == round((4095.05 + 512 + 164) * 2**20)  # the graph's buffer is made anew
    assert [flash_attention_in(log) for log in (CUDA_LOG, CPU_LOG, "")] == [True, False, None]


def test_the_product_has_each_configuration_once() -> None:
    found = list(
        product_of(
            "m",
            backends=["cpu"],
            kv_types=["f16", "q8_0"],
            attention=["auto"],
            batches=[256, 512],
            ubatches=[512, 256],
            threads=[1],
            depths=[0, 64],
            n_prompt=8,
            n_gen=0,
            samples=1,
            n_ctx=None,
        )
    )
    assert len(found) == len(set(found)) == 2 * 3 * 2
    assert all(c.n_ubatch <= c.n_batch for c in found)
    assert found[1].tests == [("pp", 8), ("ttft", 64)]
    assert found[1].needed_ctx == 72


ENDS = {
    "abort": (
        "sys.stderr.write('ggml.c:1: GGML_ASSERT(x) failed\\nlater\\n'); sys.stderr.flush(); os.abort()",
        "SIGABRT: ggml.c:1: GGML_ASSERT",
    ),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "memory runs out"),
    "hangs": ("time.sleep(600)", "not done within 1 s"),
    "closes stdout and hangs": ("os.close(1); time.sleep(600)", "closed its output"),
    "tells": ("tell('failed', reason='out of memory')", "out of memory"),
    "exits": ("sys.stderr.write('words\\n'); sys.exit(3)", "ended with 3: words"),
    "exits in silence": ("sys.exit(0)", "ended with 0"),
}


@pytest.mark.usefixtures("no_bandwidth")
@pytest.mark.parametrize("body, told", ENDS.values(), ids=ENDS)
def test_a_child_that_fails_is_a_row_and_the_others_go_on(
    body: str,
    told: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With two threads it fails midway, behind its first test; with one it does not."""
    monkeypatch.setattr(speed_process, "PATIENCE_S", 0.5)
    whole = "tell('step', what='pp', number=1); test('pp')\n"
    child(monkeypatch, tmp_path, f"{whole}if request['threads'] == 2: {body}\ntest('tg'); test('tg+s'); tell('done')\n")
    assert main(["bench", str(tiny), *SHORT, "--threads", "2,1", "--timeout", "1", "--json"]) == 0
    rows = rows_of(capsys)
    assert [(r["n_threads"], r["test"]) for r in rows] == [(n, t) for n in (2, 1) for t in ("pp", "tg", "tg+s")]
    assert [r["status"] == "ok" for r in rows] == [True, False, False, True, True, True]
    assert rows[0]["tok_per_s"] == 16.0
    for row in rows[1:3]:
        assert told in row["status"]
        assert row["tok_per_s"] is None


@pytest.mark.usefixtures("no_bandwidth")
def test_nothing_measured_is_1(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, tmp_path, "sys.exit(1)")
    assert main(["bench", str(tiny), *SHORT]) == 1


@pytest.mark.usefixtures("no_bandwidth")
def test_a_wrong_rope_kernel_is_1(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "test('pp'); test('tg'); test('tg+s'); tell('rope', status='fail', value=3.0, limit=1.0, detail='CPU: worst'); tell('done')"
    child(monkeypatch, tmp_path, body)
    assert main(["bench", str(tiny), *SHORT[:-1]]) == 1
    out, err = capsys.readouterr()
    assert "fail 3" in out
    assert "rope kernel is wrong: CPU: worst" in err


@pytest.mark.usefixtures("no_bandwidth")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_measured_is_kept_when_it_is_stopped(
    number: signal.Signals,
    code: int,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = signal.getsignal(signal.SIGTERM)
    (tmp_path / "pid").touch()
    child(
        monkeypatch,
        tmp_path,
        f"test('pp'); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"os.kill(os.getppid(), {int(number)}); time.sleep(600)",
    )
    try:
        assert main(["bench", str(tiny), *SHORT, "--json", "--csv", str(tmp_path / "rows.csv")]) == code
    finally:
        signal.signal(signal.SIGTERM, usual)
    found = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in found["rows"]] == ["pp"]
    assert not found["complete"]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2
    assert state_of(int((tmp_path / "pid").read_text())) == "gone"


def test_of_several_devices_the_one_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if what it computes is not a number."""
    values = {"a": 0.5, "b": float("nan"), "c": 0.9}

    def check(_runs: object, _goal: object, _architecture: str, device: Any, name: str) -> Any:
        return judge("kernel", values[device.name], 1.0, name)

    monkeypatch.setattr(speed_child, "check_kernel", check)
    positions = SimpleNamespace(effective=lambda _arguments: None, explicit_arguments=None)
    devices = [SimpleNamespace(name=name) for name in values]
    model = SimpleNamespace(gguf=SimpleNamespace(architecture="llama"), positions=positions, devices=devices)
    found = speed_child._rope(cast("Any", SimpleNamespace(arguments=None)), cast("Any", model))
    assert (found["status"], found["detail"]) == ("fail", "b")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the child in /proc")
def test_the_child_does_not_outlive_a_parent_that_is_killed(tiny: Path) -> None:
    code = f"""
from yarn_edge.bench.speed.configuration import Configuration
from yarn_edge.bench.speed.process import run_child
c = Configuration({str(tiny)!r}, "cpu", "f16", "auto", 64, 64, 1, 0, 64, 64, 1000000)
run_child(c.request(), 600, lambda event: print(event, flush=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        while b"number" not in parent.stdout.readline():  # it measures
            assert parent.poll() is None
        (pid,) = (
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/stat")
            if path.exists() and path.read_text().rpartition(")")[2].split()[1] == str(parent.pid)
        )
        assert state_of(pid) != "gone"
    finally:
        parent.kill()
        parent.communicate()
    for _ in range(600):
        if state_of(pid) == "gone":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child goes on")


def test_backends_that_are_not_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "devices_of", lambda _name: [])
    monkeypatch.setattr(speed, "is_built", lambda name: name == "vulkan")
    assert main(["bench", str(tiny), "--backend", "cuda,vulkan", "--json"]) == 1
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert [(row["backend"], row["status"], row["tok_per_s"]) for row in rows] == [
        ("cuda", "not built", None),
        ("vulkan", "no device", None),
    ]
    assert 'CMAKE_ARGS="-DGGML_CUDA=on" pip install' in err
    assert "--force-reinstall" in rows[0]["remedy"]
    assert main(["bench", str(tiny), "--backend", "all"]) == 1
    out = capsys.readouterr().out
    assert "vulkan" in out
    assert "cuda" not in out  # all that the build knows


@pytest.mark.usefixtures("no_bandwidth")
def test_a_variant_says_its_own_cache(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child(monkeypatch, tmp_path, "test('pp'); test('tg'); test('tg+s'); tell('done')")
    models = [str(tiny), f"{tiny}@kv=f32"]
    assert main(["bench", *models, *SHORT, "--kv-type", "f16,bf16", "--json"]) == 0
    told = {(row["model"], row["type_k"]) for row in rows_of(capsys)}
    assert told == {(models[0], "f16"), (models[0], "bf16"), (models[1], "f32")}


@pytest.mark.usefixtures("no_bandwidth")
def test_ceilings_are_bandwidth_over_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("yarn_edge.bench.speed.ceilings.last_level_cache_bytes", lambda: 0)
    child(monkeypatch, tmp_path, "test('pp'); test('tg'); test('tg+s'); tell('done')")
    assert main(["bench", str(tiny), *SHORT, "--json"]) == 0
    pp, tg, _ = rows_of(capsys)
    assert (pp["ceiling_tok_per_s"], pp["fraction"]) == (None, None)
    assert tg["ceiling_tok_per_s"] == pytest.approx(1e9 / tg["bytes_per_token"])
    assert tg["fraction"] == pytest.approx(4.0 / tg["ceiling_tok_per_s"])


REFUSED = {
    "no file": (["nope.gguf"], "nope.gguf: No such file"),
    "one of two": (["MODEL", "nope.gguf"], "nope.gguf: No such file"),
    "no GGUF": ([__file__], "not a GGUF"),
    "nothing asked": (["MODEL", "-p", "0", "-n", "0"], "nothing to measure"),
    "beyond --ctx": (["MODEL", "--depth", "1k", "--ctx", "1100", "-p", "100"], "it must be 1152"),
    "too deep": (["MODEL", "--depth", "2000000000", "-p", "2000000000"], "llama.cpp takes at most"),
    "backend": (["MODEL", "--backend", "tpu"], "'tpu' is unknown; known: cpu"),
    "cache": (["MODEL", "--kv-type", "f16,q9"], "'q9' is unknown"),
    "depth": (["MODEL", "--depth", "0,many"], "'many' is not a number of tokens"),
    "empty list": (["MODEL", "--depth", ""], "is not a number of tokens"),
    "threads": (["MODEL", "--threads", "0"], "not from 1"),
    "variant": (["MODEL@kv=f16,size=3"], "'size' is unknown after @"),
    "no folder": (["MODEL", "--csv", "no/such/folder.csv"], "no such folder"),
    "suffix": (["MODEL", "--plot", "x.pdf"], "must end in .png"),
}


@pytest.mark.parametrize("words, told", REFUSED.values(), ids=REFUSED)
def test_refused(words: list[str], told: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *(word.replace("MODEL", str(tiny)) for word in words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert told in said[-1]


def test_an_existing_csv_is_left_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mine")
    assert main(["bench", str(tiny), "--csv", str(path)]) == 2
    assert "--force overwrites" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.usefixtures("no_bandwidth")
def test_names_that_are_no_utf_8(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    path.symlink_to(tiny)
    table = tmp_path / "rows.csv"
    assert main(["bench", str(path), *REAL, "--csv", str(table)]) == 0
    assert "status" not in capsys.readouterr().out  # no column of failures
    assert os.fsencode(path) in table.read_bytes()


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    from yarn_edge.report.pictures import png

    def outcome(depths: list[int], complete: bool) -> SpeedOutcome:
        rows: list[SpeedRow] = []
        for kv in ("f16", "q8_0"):
            for depth in depths:
                c = Configuration("m.gguf", "cpu", kv, "auto", 512, 512, 2, depth)
                rows += empty_rows(c, Path("m.gguf"), "CPU").values()
        for row in rows:
            assert row.test is not None
            row.status, row.times = OK, TimedRuns(row.n, (10**9, 2 * 10**9))
            row.ceiling_tok_per_s = 300.0 - row.depth / 100 if "tg" in row.test else None
        return SpeedOutcome(rows, {}, {}, {}, complete)

    several, one = outcome([0, 4096], True).report(), outcome([4096], False).report()
    assert [[line.label for line in picture.lines] for picture in several.pictures if hasattr(picture, "lines")] == [
        ["cpu f16 pp512", "cpu q8_0 pp512", "cpu f16 ttft", "cpu q8_0 ttft"],
        ["cpu f16 tg128", "cpu f16 tg128+s", "cpu q8_0 tg128", "cpu q8_0 tg128+s", "ceiling of cpu f16 tg128"],
    ]
    assert len(png(several.pictures)) > 10_000
    assert len(png(one.pictures)) > 10_000
    assert one.summary == ("Incomplete: stopped before everything was measured.",)


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    assert machine_state() == {"load_average": [0.1, 0.0, 0.0], "busy": ""}
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    assert "load average 2.0 on 4 cores" in machine_state()["busy"]
    monkeypatch.delattr(os, "getloadavg")
    assert machine_state() == {"load_average": None, "busy": ""}


def test_the_power_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "POWER", tmp_path / "power")
    assert environment.environment()["power source"] == "unknown"
    for name, files in (
        ("AC", {"type": "Mains", "online": "0"}),
        ("BAT0", {"type": "Battery", "status": "Discharging"}),
    ):
        (tmp_path / "power" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "power" / name / file).write_text(f"{text}\n")
    assert environment.environment()["power source"] == "battery"
    (tmp_path / "power" / "AC" / "online").write_text("1\n")
    assert environment.environment()["power source"] == "mains"


def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    before = peak_resident_bytes()
    block = np.ones(64 << 20, np.uint8)
    after = peak_resident_bytes()
    assert after >= max(before, block.nbytes)


def test_progress_comes_to_its_end() -> None:
    """Whatever a child told, its part of the bar is done exactly once."""
    c = Configuration("m", "cpu", "f16", "auto", 512, 512, 2, 1024)
    for told in (0, 3, 400):
        amounts: list[float] = []

        def advance(amount: float, _what: str = "", amounts: list[float] = amounts) -> None:
            amounts.append(amount)

        progress = speed_session._Progress(c, advance)
        for number in range(told):
            progress.step({"what": ("ttft", "pp", "tg", "tg+s")[number % 4], "number": number, "tokens": 64})
        progress.end()
        assert sum(amounts) == pytest.approx(c.cost)
        assert min(amounts) >= 0

"""The measuring commands and imatrix on workers: every digit of one process, whatever is a unit and whoever dies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.quality.prompts_on_workers import pieces_of
from yarn_edge.bench.quality.retrieval_prompts import Prompt, Secret
from yarn_edge.bench.scoring.sent import SentVariant
from yarn_edge.bench.scoring.variants import Variant
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.jobs.crew import Crew
from yarn_edge.jobs.local import LocalExecutor
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.sample_text import sample_text

from support import depth, tiny_gguf

TIMES = ("seconds", "tok_per_s", "forward_s", "base_forward_s", "environment", "command")


class Shared(LocalExecutor):
    """Workers that outlive a command. kill: one of them dies when the next call is made, as by kill -9."""

    kill = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        if self.kill and self._workers:
            self.kill = False
            os.kill(next(iter(self._workers)).process.pid, signal.SIGKILL)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Not now."""

    def end(self) -> None:
        super().shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def workers() -> Iterator[Shared]:
    shared = Shared(2)
    yield shared
    shared.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(
        tmp_path_factory.mktemp("jobs") / "m.gguf",
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256},
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, text = tmp_path_factory.mktemp("texts"), sample_text()
    for n in range(4):
        (folder / f"{n}.txt").write_text(text[700 * n : 700 * n + 300 + 60 * n])
    return folder


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


COMMANDS = {
    "perplexity": ["perplexity", "{model}", "--text", "{texts}", "--ctx", "256"],
    "perplexity in chunks": ["perplexity", "{model}", "--text", "{texts}", "--ctx", "64", "--protocol", "llama.cpp"],
    "compare windows": ["compare", "{model}", "{model}@kv=f32", "--text", "{texts}", "--ctx", "128"],
    "compare candidates": [
        "compare",
        "{model}",
        "{model}@kv=f32",
        "{model}@kv=bf16",
        "--text",
        "{texts}",
        "--ctx",
        "128",
        "--documents",
        "1",
    ],
    "sweep": [
        "sweep",
        "{model}",
        "--over",
        "attention-factor",
        "--values",
        "1,1.2",
        "--text",
        "{texts}",
        "--ctx",
        "128",
    ],
    "sweep of dynamic methods": [
        "sweep",
        "{model}",
        "--over",
        "method",
        "--values",
        "plain,dynamic-yarn",
        "--text",
        "{texts}",
        "--ctx",
        "400",
        "--dynamic-step",
        "64",
    ],
    "sweep of divergences": [
        "sweep",
        "{model}",
        "--over",
        "factor",
        "--values",
        "1,2",
        "--metric",
        "divergence",
        "--text",
        "{texts}",
        "--ctx",
        "128",
    ],
    "passkey": ["passkey", "{model}", "--lengths", "700,900", "--depths", "3"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_the_digits_of_one_process(
    words: list[str],
    model: Path,
    texts: Path,
    workers: Shared,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [word.format(model=model, texts=texts) for word in words] + ["--json", "--threads", "1"]
    assert main(command) == 0
    alone = without_times(json.loads(capfd.readouterr().out))
    monkeypatch.setattr(Crew, "open", lambda _crew: workers)
    workers.kill = words[0] in ("perplexity", "compare")  # each costs a new worker
    assert main([*command, "--on", "local", "--workers", "2"]) == 0
    out, err = capfd.readouterr()
    assert without_times(json.loads(out)) == alone
    assert " units in " in err


def test_an_importance_matrix_has_the_same_bytes(
    model: Path, workers: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text(sample_text()[:1500])
    command = ["imatrix", str(model), "--text", str(text), "--ctx", "64", "--batch", "128", "--threads", "1", "-o"]
    assert main([*command, str(tmp_path / "alone.gguf")]) == 0
    monkeypatch.setattr(Crew, "open", lambda _crew: workers)
    workers.kill = True
    assert main([*command, str(tmp_path / "on.gguf"), "--on", "local", "--workers", "2"]) == 0
    assert (tmp_path / "on.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_second_run_continues(
    model: Path,
    texts: Path,
    workers: Shared,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """What one document gave is there when all of them are measured; --save has the scores of all."""
    monkeypatch.setattr(Crew, "open", lambda _crew: workers)
    on = [
        "--on",
        "local",
        "--workers",
        "2",
        "--results",
        str(tmp_path / "r"),
        "--json",
        "--ctx",
        "256",
        "--threads",
        "1",
    ]
    assert main(["perplexity", str(model), "--text", str(texts), "--documents", "3", *on]) == 0
    capfd.readouterr()
    assert main(["perplexity", str(model), "--text", str(texts), "--save", str(tmp_path / "s.npz"), *on]) == 0
    out, err = capfd.readouterr()
    assert "has the results of" in err
    with np.load(tmp_path / "s.npz") as stored:
        assert np.isfinite(stored["nll"]).all()
        assert len(stored["nll"]) == json.loads(out)["n_tokens"]
    assert (
        main(["perplexity", str(model), "--text", str(texts), "--save", str(tmp_path / "s.npz"), "--resume", *on]) == 2
    )


def test_a_split_model_stays_in_one_process(model: Path) -> None:
    with pytest.raises(YarnEdgeError, match=r"^it: --rpc and --layers-on are for a run in one process, without --on$"):
        SentVariant.of(Variant("it", read_gguf(model), split=LayerSplit(4, ())))


def test_pieces_are_neighbors_and_the_longest_come_first() -> None:
    prompts = [Prompt(length, d / 10, Secret(1), (1,)) for length in (100, 200) for d in range(5)]
    assert [list(piece) for piece in pieces_of(prompts, 2)] == [[5, 6, 7], [8, 9], [0, 1, 2], [3, 4]]
    assert [list(piece) for piece in pieces_of(prompts, 1)] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


CLUSTERS = {"ray": "ray", "dask": "dask", "slurm:cluster=local": "submitit"}


@pytest.mark.skipif(not depth.full, reason="starts clusters: pytest --full")
@pytest.mark.parametrize("place, package", CLUSTERS.items(), ids=CLUSTERS)
def test_clusters_on_this_machine(place: str, package: str, model: Path, texts: Path, tmp_path: Path) -> None:
    """In a process of their own, as a user starts them; submitit's jobs run without Slurm."""
    pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "yarn_edge",
        "perplexity",
        str(model),
        "--text",
        str(texts),
        "--json",
        "--threads",
        "1",
    ]
    outs = []
    left = Path(tempfile.gettempdir()) / f"yarn-edge-{package}.{secrets.token_hex(4)}.partial"  # of a killed run
    if package != "submitit":
        left.mkdir()
    for words in ([], ["--on", place, "--workers", "2"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        outs.append(without_times(json.loads(done.stdout)))
    assert outs[0] == outs[1]
    assert list(tmp_path.iterdir()) == []
    assert not left.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", ":"], ids=["nobody there", "no address"])
def test_a_ray_cluster_that_is_not_there(address: str) -> None:
    """At once: Ray itself would try for minutes."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(YarnEdgeError, match=r"cannot reach 127.0.0.1:\d+: Connection refused|not HOST:PORT"):
        Crew("ray", address.format(port=port)).open()

"""A file that is new here is tried in another process first: what that process meets is one line, and what it passed is remembered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import TRUST
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime import first_load, known_files
from yarn_edge.runtime.child import start_child
from yarn_edge.runtime.first_load import check_first_load
from yarn_edge.runtime.model import Model

from support import tiny_gguf
from support.gguf_bytes import edit_key
from support.gguf_files import BYTE_TOKENIZER, random_tensors, write_gguf
from support.processes import state_of

VERSION = "0.0.1"


@pytest.fixture(autouse=True)
def untrusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest of the suite trusts its files. Every test here has a cache folder of its own, in which nothing is known."""
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(known_files, "_known", set())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "tiny.gguf", "llama")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started."""
    found: list[subprocess.Popen[bytes]] = []

    def start(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        found.append(start_child(*words, **options))
        return found[-1]

    monkeypatch.setattr(first_load, "start_child", start)
    return found


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Another program in place of the one that loads the file."""

    def put(code: str) -> None:
        def start(_module: str, _words: list[str], *, stderr: Any, env: Any) -> subprocess.Popen[bytes]:
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", textwrap.dedent(code)]
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, env={**os.environ, **env})

        monkeypatch.setattr(first_load, "start_child", start)

    return put


def asserts(path: Path) -> Path:
    """A file for which llama.cpp ends with an assertion that `check_loadable` has no row for."""
    own = tiny_gguf.model_keys("llama") | {"attention.key_length": 8, "rope.dimension_count": 8}
    keys = BYTE_TOKENIZER | {f"baichuan.{key}": value for key, value in own.items()}
    return write_gguf(path, "baichuan", keys, random_tensors(tiny_gguf.tensor_shapes("llama")))


def test_an_assertion_is_one_line(tmp_path: Path) -> None:
    path = asserts(tmp_path / "m.gguf")
    with pytest.raises(YarnEdgeError) as refusal:
        Model(path)
    assert str(refusal.value) == (
        f"{path}: llama.cpp ends with an assertion when it loads this file: "
        "baichuan.cpp:49: GGML_ASSERT(n_embd_head == hparams.n_embd_head_k()) failed; --trust skips this check"
    )
    assert list((tmp_path / "cache").rglob("*")) == []


@pytest.mark.parametrize(
    "words", [["chat", "-p", "Hi", "--raw"], ["perplexity"], ["imatrix", "-o", "m", "--text", "t"]]
)
def test_trust_lets_the_command_end_with_it(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("some text " * 400)
    path = asserts(tmp_path / "m.gguf")
    command = [sys.executable, "-m", "yarn_edge", words[0], str(path), *words[1:]]
    for trust, code in (([], 2), (["--trust"], -signal.SIGABRT)):
        done = subprocess.run([*command, *trust], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stderr
        assert ("--trust skips this check" in done.stderr) == (not trust)


def test_a_good_file_is_tried_once(model: Path, started: list[subprocess.Popen[bytes]]) -> None:
    for _ in range(2):
        with Model(model) as loaded:
            assert loaded.n_vocab == 262
    assert len(started) == 1
    known_files._known.clear()  # as in another process
    with Model(model, no_alloc=True):
        pass
    assert len(started) == 1


def test_a_file_is_known_by_its_content(model: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    check_first_load(read_gguf(model), VERSION)
    copy = shutil.copyfile(model, tmp_path / "copy.gguf")
    check_first_load(read_gguf(copy), VERSION)
    renamed = copy.rename(tmp_path / "renamed.gguf")
    check_first_load(read_gguf(renamed), VERSION)
    assert len(started) == 1


def test_a_changed_file_is_new(model: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """Even if its size and its time are as before."""
    before = model.stat()
    check_first_load(read_gguf(model), VERSION)
    edit_key(model, "llama.context_length", 512)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_first_load(read_gguf(model), VERSION)
    assert len(started) == 2


def test_another_llama_cpp_tries_again(model: Path, started: list[subprocess.Popen[bytes]]) -> None:
    for version in (VERSION, "0.0.2", VERSION):
        check_first_load(read_gguf(model), version)
    assert len(started) == 2


def test_a_vocabulary_alone_does_not_make_the_weights_known(
    model: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    for vocab_only in (True, True, False, True, False):
        check_first_load(read_gguf(model), VERSION, vocab_only=vocab_only)
    assert len(started) == 2


def test_a_known_model_has_a_known_vocabulary(model: Path, started: list[subprocess.Popen[bytes]]) -> None:
    check_first_load(read_gguf(model), VERSION)
    check_first_load(read_gguf(model), VERSION, vocab_only=True)
    assert len(started) == 1


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(known_files, "MAX_RECORDS", 4)
    for number in range(4):
        known_files.remember(read_gguf(model), "model", f"version {number}")
    assert len(list((tmp_path / "cache" / "yarn-edge" / "loaded").iterdir())) == 4
    known_files._known.clear()
    known = [known_files.is_known(read_gguf(model), "model", f"version {number}") for number in range(4)]
    assert known == [False, False, True, True]


def test_overrides_are_tried_with_it(model: Path) -> None:
    with pytest.raises(YarnEdgeError, match="unknown pre-tokenizer type: 'nobody'"):
        Model(model, vocab_only=True, overrides={"tokenizer.ggml.pre": "nobody"})
    with Model(model, vocab_only=True, overrides={"tokenizer.ggml.pre": "llama-bpe"}) as loaded:
        assert loaded.add_bos


def test_what_llama_cpp_reports_is_reported_as_without_the_check(model: Path, tmp_path: Path) -> None:
    edit_key(model, "llama.feed_forward_length", 33)
    with pytest.raises(YarnEdgeError) as first:
        Model(model)
    with pytest.raises(YarnEdgeError) as trusted:
        Model(model, trust=True)
    assert str(first.value) == str(trusted.value)
    assert "has wrong shape" in str(first.value)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_noted(
    model: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    for _ in range(2):
        with Model(model):
            pass
    assert len(started) == 1  # this process knows it
    assert capsys.readouterr().err.count("not remembered, so the next start checks the file again") == 1


ENDS = {
    "abort": ("os.abort()", "ends with an assertion when it loads this file: it said nothing; --trust"),
    "SIGSEGV": ("os.kill(os.getpid(), signal.SIGSEGV)", r"crashes \(SIGSEGV\) when it loads this file; --trust"),
    "SIGFPE": ("os.kill(os.getpid(), signal.SIGFPE)", r"divides by zero \(SIGFPE\)"),
    "SIGBUS": ("os.kill(os.getpid(), signal.SIGBUS)", "it may be truncated"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL, from outside or because memory ran out"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "was ended by SIGTERM, from outside or because memory ran out"),
    "another code": ("print('  last\\nwords ', file=sys.stderr); sys.exit(7)", "ended with 7: words; --trust"),
    "an exception": ("raise ImportError('no llama_cpp')", "ended with 1: ImportError: no llama_cpp; --trust"),
    "no memory": (
        "first_load_process._limit(1 << 28, 60); bytes(1 << 29)",
        "needs more memory to load this file than its size and 2 GiB; --trust",
    ),
    "no memory for C++": (
        'print("  what():  std::bad_alloc", file=sys.stderr, flush=True); os.abort()',
        "needs more memory to load",
    ),
    "no end": (
        "first_load_process._limit(1 << 30, 1)\nwhile True: pass",
        "does not finish loading this file within 30 s of processor",
    ),
}


@pytest.mark.parametrize("code, said", ENDS.values(), ids=ENDS)
def test_every_end_is_reported_as_what_it_is(code: str, said: str, model: Path, instead: Callable[[str], None]) -> None:
    instead("import os, signal, sys\nfrom yarn_edge.runtime import first_load_process\n" + code)
    for _ in range(2):  # nothing is remembered
        with pytest.raises(YarnEdgeError, match=said) as refusal:
            check_first_load(read_gguf(model), VERSION)
        assert str(refusal.value).startswith(f"{model}: ")


def test_no_process_at_all_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(
        YarnEdgeError, match="no process can be started to check it: No such file or directory; --trust"
    ):
        check_first_load(read_gguf(model), VERSION)


def test_a_long_check_is_announced(
    model: Path, instead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_load, "SILENT_S", 0.05)
    instead("import time; time.sleep(0.3)")
    check_first_load(read_gguf(model), VERSION)
    assert "loading tiny.gguf for the first time" in capsys.readouterr().err


def test_a_check_without_an_end_is_given_up(
    model: Path, instead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_load, "SILENT_S", 0.05)
    monkeypatch.setattr(first_load, "WALL_TIMES", 0.01)
    instead("import time; time.sleep(60)")
    with pytest.raises(YarnEdgeError, match=r"does not finish loading this file within 0\.3 s; --trust"):
        check_first_load(read_gguf(model), VERSION)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while state_of(pid) != "gone":
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.02)


def test_ctrl_c_ends_the_process_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is interrupted, and is no verdict on the file."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*_words: Any, **_options: Any) -> subprocess.Popen[bytes]:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        processes.append(subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True))
        return processes[-1]

    monkeypatch.setattr(first_load, "start_child", start)
    usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            check_first_load(read_gguf(model), VERSION)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert processes[0].returncode == -signal.SIGKILL


def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = """
        import sys, time
        from yarn_edge.runtime import first_load_process
        from yarn_edge.runtime.child import start_child
        child = start_child("yarn_edge.runtime.first_load_process", [sys.argv[1]])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    hang = tmp_path / "hang.json"  # opening a FIFO waits for a writer
    os.mkfifo(hang)
    request = f'{{"path": "{hang}", "part": "model", "overrides": {{}}, "memory_bytes": 4294967296, "processor_s": 60}}'
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), request], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pid)


def test_trust_in_python_and_in_the_environment(
    model: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(model, trust=True):
        pass
    monkeypatch.setenv(TRUST, "1")
    with Model(model):
        pass
    assert started == []
    for off in ("", "0"):
        monkeypatch.setenv(TRUST, off)
        assert not first_load.trusted()


def test_the_flag_sets_the_variable_that_children_inherit(
    model: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST, "0")  # so that it is as before after the test
    assert main(["verify", str(model), "--trust", "--json", "--threads", "1"]) in (0, 1)
    assert os.environ[TRUST] == "1"
    assert started == []

"""`python -m yarn_edge.chat`: only the answer on stdout, errors in one line, a conversation in a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.chat import command as chat
from yarn_edge.chat.conversation import Conversation
from yarn_edge.chat.documents import read_document
from yarn_edge.convert.hf_to_gguf import convert

from support import tiny
from support.build_note import without_build_note
from support.gguf_bytes import edit_key
from support.templates import with_template
from support.terminals import READY, ChatProcess, in_a_terminal

MODEL = str(package_gguf())
GREEDY = ("--temperature", "0", "--ctx", "512", "--threads", "1")


def run(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "yarn_edge.chat", *args], input=stdin, capture_output=True, timeout=120
    )


def test_prompt_and_piped_input_answer_alike_on_stdout() -> None:
    asked = run(MODEL, "-p", "Explain gravity to a child.", *GREEDY, "--max-tokens", "12")
    assert asked.returncode == 0, asked.stderr
    answer = asked.stdout.decode()
    assert len(answer.split()) > 4
    assert answer.endswith("\n")
    assert answer.count("\n") == 1
    assert re.fullmatch(
        r"SmolLM2-135M-Instruct.Q4_1.gguf: llama, no position scaling, context 512 of 8192, f16 cache\n",
        without_build_note(asked.stderr.decode()),
    )
    piped = run(MODEL, *GREEDY, "--max-tokens", "12", "--json", "--quiet", stdin=b"Explain gravity to a child.\n")
    assert piped.stderr == b""
    result = json.loads(piped.stdout)
    assert result["answer"] + "\n" == answer
    assert (result["finish_reason"], result["generated_tokens"], result["prompt_tokens_reused"]) == ("length", 12, 0)


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        ((MODEL,), b"", "the prompt is empty"),
        ((MODEL, "-p", "  "), b"\n", "the prompt is empty"),
        ((MODEL,), b"abc\xff", "standard input: is not UTF-8: byte 3 is 0xff"),
        ((MODEL, "-p", "x", "--file", "no/such.txt"), b"", "no/such.txt: No such file or directory"),
        ((MODEL, "-p", "x", "--file", "."), b"", ".: is not a regular file but a folder"),
        ((MODEL, "-p", "x", "--ctx", "0"), b"", "--ctx: 0 is not from 2"),
        ((MODEL, "-p", "x", "--max-tokens", "0"), b"", "--max-tokens: 0 is not from 1"),
        ((MODEL, "-p", "x", "--top-p", "2"), b"", "--top-p is 2.0, must be from 0 to 1"),
        ((MODEL, "-p", "x", "--kv-type", "f8"), b"", "--kv-type 'f8' is unknown"),
        ((MODEL, "-p", "x", "--raw", "--system", "y"), b"", "--system cannot be used with --raw"),
        ((MODEL, "-p", "a \udcff"), b"", "-p/--prompt is not valid UTF-8 (character 2)"),
        (("no.gguf", "-p", "x"), b"", "no.gguf: No such file or directory"),
        ((__file__, "-p", "x"), b"", "not a GGUF"),
        ((MODEL, "-p", "word " * 600, "--ctx", "256"), b"", "tokens and room for an answer, but the context holds 256"),
    ],
    ids=lambda value: " ".join(value[1:])[:24] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(args: tuple[str, ...], stdin: bytes, message: str) -> None:
    done = run(*args, "--quiet", stdin=stdin)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("yarn-edge: error: ")
    assert message in done.stderr.decode()
    assert without_build_note(done.stderr.decode()).count("\n") == 1


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model without its template: the key has another name of the same length."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    data = Path(MODEL).read_bytes()
    assert data.count(b"tokenizer.chat_template") == 1
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_TEMPLATE"))
    return path


def test_base_model_wants_raw(base_model: Path) -> None:
    refused = run(str(base_model), "-p", "x")
    assert refused.returncode == 2
    assert b"has no tokenizer.chat_template (a base model?); use --raw" in refused.stderr
    done = run(str(base_model), "-p", "The capital of France is", "--raw", "--max-tokens", "1", *GREEDY)
    assert (done.returncode, done.stdout) == (0, b" Paris\n")


def test_a_template_reads_parts_or_says_what_it_loses(tmp_path: Path) -> None:
    path = with_template(
        tmp_path / "parts.gguf", "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    done = run(str(path), "-p", "The capital of France is", "--max-tokens", "1", "--json", *GREEDY)
    answer = json.loads(done.stdout)
    assert (answer["answer"], answer["prompt_tokens_evaluated"]) == (" Paris", 5)
    path = with_template(tmp_path / "lost.gguf", "{% for m in messages %}{{ m.role }}: {{ m.text }}{% endfor %}")
    lost = run(str(path), "-p", "The capital of France is", "--quiet")
    assert (lost.returncode, lost.stdout) == (2, b"")
    assert without_build_note(lost.stderr.decode()) == (
        f"yarn-edge: error: {path}: tokenizer.chat_template: makes a prompt without all of the user's last message; "
        "use --raw to do without it\n"
    )


@pytest.mark.parametrize(
    "words, notes",
    [
        (
            ("--max-tokens", "4"),
            ["37 tokens fit into", "context 256 of 8192, f16 cache"],
        ),  # template, prompt and answer
        (("--max-tokens", "4", "--ctx", "1k"), ["context 1024 of 8192, f16 cache"]),
        (("--max-tokens", "4", "--kv-type", "q4_0"), ["with a cache of type q4_0", "context 256 of 8192, q4_0 cache"]),
        (("--max-tokens", "4", "--kv-k", "q8_0"), ["with a cache of type q8_0/f16", "q8_0/f16 cache"]),
        (
            ("--max-tokens", "4", "--backend", "cpu", "--ctx", "9000"),
            ["warning: --ctx 9000 exceeds", "context 9216 of"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_given_is_chosen_and_reported(words: tuple[str, ...], notes: list[str]) -> None:
    done = run(MODEL, "-p", "Say hello.", "--temperature", "0", *words)
    assert done.returncode == 0
    assert all(text in done.stderr.decode() for text in notes), done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (("--memory", "100MiB"), "even 512 tokens with a cache of type q4_0 take"),
        (
            ("--memory", "300MiB", "--ctx", "32k"),
            "a context of 32768 tokens does not fit into 300 MiB; the longest are",
        ),
        (("--backend", "vulkan"), "no vulkan device: this build of llama-cpp-python on this machine has CPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_with_what_would(words: tuple[str, ...], message: str) -> None:
    done = run(MODEL, "-p", "Say hello.", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert without_build_note(done.stderr.decode()).count("\n") == 1


def test_file_then_pipe_then_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfdocument \xc3\xa9\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("gepiped ü\n".encode())))
    documents = (read_document(file),)
    question = chat._one_shot_prompt(documents, "Why?")
    (turn,) = Conversation(waiting=documents).asked(question).turns
    assert turn.said == "document é\n\ngepiped ü\n\nWhy?"


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "yarn_edge.chat", MODEL, "-p", "Hi", *GREEDY, "--max-tokens", "8", "--quiet"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_importing_costs_little() -> None:
    heavy = "{'numpy', 'llama_cpp', 'jinja2', 'prompt_toolkit', 'rich', 'gguf'}"
    code = f"import sys, yarn_edge.chat; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stderr == b""


def test_conversation_in_a_terminal(tmp_path: Path) -> None:
    with in_a_terminal(MODEL, *GREEDY) as terminal:
        converse(terminal, tmp_path)


def converse(terminal: ChatProcess, tmp_path: Path) -> None:
    """Every command, and the errors."""
    terminal.until("no position scaling, context 512 of 8192.*Ctrl-D quits" + READY)
    terminal.send("Write a very long story about a dragon.\r")
    terminal.until(r"\x1b\[\?2004l.*(\w+ ){8}")  # an answer has begun
    terminal.send("\x03")
    terminal.until(r"\d+ tokens, .*tok/s, first token after .* s, context \d+ of 512, stopped" + READY, 10)
    terminal.send("/stats\r")
    terminal.until("finish_reason: interrupted" + READY)
    terminal.send("\x03")
    terminal.until("Ctrl-D or /exit quits" + READY)
    terminal.send("/reset\r")
    terminal.until("started a new conversation" + READY)
    terminal.send("\x1b[200~Say\nhello.\x1b[201~")  # pasted, two lines
    terminal.until(r"hello\.")
    terminal.send("\r")
    terminal.until(r"\w.*\d+ tokens, .*context \d+ of 512" + READY)
    terminal.send("/help\r")
    terminal.until(r"/system \[TEXT\]" + READY)
    terminal.send("/context\r")
    terminal.until(r"1 turn\s+\d+ .*free\s+\d+ .*context\s+512" + READY)
    terminal.send(f"/save {tmp_path / 'talk.json'}\r")
    terminal.until("1 turn" + READY)
    terminal.send("/undo\r")
    terminal.until("removed: Say" + READY)
    terminal.send("/undo\r")
    terminal.until("nothing to undo" + READY)
    terminal.send("/retry\r")
    terminal.until("no question to ask again" + READY)
    (tmp_path / "story.txt").write_text("A fox met a crow. The crow had cheese. The fox wanted it.")
    terminal.send(f"/file {tmp_path / 'story.txt'}\r")
    terminal.until(r"story.txt: \d+ tokens, added to your next question" + READY)
    terminal.send("What did the crow have?\r")
    terminal.until(r"\d+ tokens, .*context \d+ of 512" + READY)
    terminal.send(f"/file {tmp_path / 'story.txt'}\r")
    terminal.until("story.txt is already in the conversation" + READY)
    terminal.send("/retry Who wanted it?\r")
    terminal.until(r"\d+ tokens, .*context \d+ of 512" + READY)
    terminal.send("/context\r")
    terminal.until(r"story.txt\s+\d+ .*1 turn" + READY)
    terminal.send(f"/load {tmp_path / 'talk.json'}\r")
    terminal.until("1 turn; the last question was: Say" + READY)
    (tmp_path / "long.txt").write_text("word " * 600)
    terminal.send(f"/file {tmp_path / 'long.txt'}\r")
    terminal.until(r"long.txt has \d+ tokens, but the context holds 512" + READY)
    terminal.send(f"/file {tmp_path / 'none.txt'}\r")
    terminal.until("No such file" + READY)
    terminal.send(f"/save {tmp_path / 'story.txt'}\r")
    terminal.until("is not a saved conversation" + READY)
    terminal.send("/nonsense\r")
    terminal.until("/nonsense is not a command" + READY)
    terminal.send("\x04")
    assert terminal.child.wait(20) == 0
    assert len(json.loads((tmp_path / "talk.json").read_text())["turns"]) == 1


def test_what_is_typed_during_an_answer_waits_for_the_next_line() -> None:
    with in_a_terminal(MODEL, *GREEDY, "--max-tokens", "60") as terminal:
        terminal.until("Ctrl-D quits" + READY)
        terminal.send("Write a very long story about a dragon.\r")
        terminal.until(r"\x1b\[\?2004l.*(\w+ ){4}")
        terminal.send("/stats\r")
        assert "/stats" not in terminal.until(r"60 tokens, .*cut off at --max-tokens")
        terminal.until("finish_reason: length" + READY)


def test_a_file_that_runs_otherwise_than_it_says_is_reported(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    path = convert(folder, str(tmp_path / "tiny.gguf"), "F32")[0]
    words = (str(path), "--raw", "-p", "the", "--max-tokens", "2", "--threads", "1")
    assert b"warning" not in run(*words).stderr
    edit_key(path, "yarn_edge.rope.attention_factor", 1.5)
    warned = run(*words)
    assert warned.returncode == 0
    assert b"declares other positions than llama.cpp runs" in warned.stderr

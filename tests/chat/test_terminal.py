"""An error costs a turn, never the conversation; and what strangers wrote is shown harmless. The engine is a script."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.chat import documents, screen, terminal
from yarn_edge.chat.conversation import FORMAT, MAX_QUOTES, MAX_STRUCTURE_BYTES, Conversation, Document, Turn
from yarn_edge.chat.session import Session
from yarn_edge.chat.terminal import Terminal
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError

from support import tiny
from support.fuzz.terminals import leaks
from support.scripted_chat import N_CTX, Joined, Scripted
from support.terminals import READY, in_a_terminal

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
ESCAPES = "\x1b[777m\x9b777m\x1b]0;t\x07\r\x08\u202e"


@pytest.fixture
def session() -> Session:
    made = Session(Scripted(), Joined(), Sampling())
    made.conversation.turns.append(Turn("Before?", "Yes."))
    return made


@pytest.fixture
def talk(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Types lines, and lets the engine say what is given for each. Returns stdout and stderr."""

    def run(
        *lines: str | BaseException, answers: Sequence[Sequence[str | BaseException]] = (), debug: bool = False
    ) -> tuple[str, str]:
        typed, said = iter(lines), iter(answers)

        def read(_prompt: str) -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            engine = session.generation
            assert isinstance(engine, Scripted)
            if not line.startswith("/") or line.startswith("/retry"):
                engine.script = list(next(said, ["An", "swer."]))
            return line

        monkeypatch.setattr(terminal, "line_reader", lambda _words: read)
        monkeypatch.setattr(terminal, "typing_unseen", nullcontext)
        capsys.readouterr()
        Terminal(session, debug=debug).converse()
        out, err = capsys.readouterr()
        assert OBEYED.search(out) is None
        assert OBEYED.search(err) is None
        return out, err.removeprefix("/help lists the commands, Ctrl-D quits\n")

    return run


# what is typed, and the line that answers it
REFUSED = {
    "nobody's folder": ("/file ~nosuchuser/x", "error: ~nosuchuser/x: the folder of that user is not known; ./~nosuchuser/x is"),
    "nobody's file to save": ("/save ~nosuchuser/x", "error: ~nosuchuser/x: the folder of that user"),
    "nobody's file to load": ("/load ~nosuchuser/x", "error: ~nosuchuser/x: the folder of that user"),
    "no path": ("/file", "error: /file needs a path"),
    "a NUL": ("/save a\0b", "error: /save: a path cannot hold a NUL"),
    "a path too long": ("/file " + "y" * 5000, "File name too long"),
    "a path too long to save": ("/save " + "y" * 5000, "File name too long"),
    "a path too long to load": ("/load " + "y" * 5000, "File name too long"),
    "a folder": ("/file /", "error: /: is not a regular file but a folder"),
    "a folder to save": ("/save .", "error: .: is not a regular file but a folder"),
    "a device": ("/file /dev/zero", "error: /dev/zero: is not a regular file but a device"),
    "a device to load": ("/load /dev/zero", "error: /dev/zero: is not a regular file but a device"),
    "a device to save": ("/save /dev/full", "error: /dev/full: is not a regular file"),
    "a pipe": ("/file pipe", "error: pipe: is a pipe that no program writes to"),
    "memory": ("/file /proc/self/mem", "error: /proc/self/mem: Input/output error"),
    "a folder that is not there": ("/save none/x.json", "error: none: no such folder for the output"),
    "not UTF-8": ("half \udcff", "error: the question is not valid UTF-8 (character 5)"),
    "not UTF-8 in the system prompt": ("/system \udcff", "error: the system prompt is not valid UTF-8 (character 0)"),
    "half a character": ("\ud800", "error: the question is not valid UTF-8 (character 0)"),
    "too long": ("x" * N_CTX, "error: the message needs"),
    "escapes": (f"/load {ESCAPES}", "error:  [777m 777m ]0;t    : No such file or directory"),
    "no command": (f"/nonsense {ESCAPES}", "/nonsense is not a command; /help lists the commands"),
}  # fmt: skip


@pytest.mark.parametrize("line, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_one_line(
    line: str,
    message: str,
    session: Session,
    talk: Callable[..., tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    out, err = talk(line, "And now?")
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) == 2  # the other is the statistics of the answer
    assert out == "Answer.\n"
    assert [turn.question for turn in session.conversation.turns] == ["Before?", "And now?"]


@pytest.mark.parametrize(
    "error, message",
    [
        (YarnEdgeError(f"refused {ESCAPES}"), "error: refused"),
        (OSError(errno.ENOSPC, "No space left on device", f"a\n{ESCAPES}"), "No space left on device"),
        (MemoryError(), "error: out of memory"),
        (KeyError(ESCAPES), "error: a bug in yarn-edge, please report it: KeyError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), "error: a bug in yarn-edge, please report it: Unicode"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("said", [(), ("Half an ",)], ids=["at once", "within the answer"])
def test_an_error_of_any_kind_costs_a_turn(
    error: Exception, message: str, said: tuple[str, ...], session: Session, talk: Callable[..., tuple[str, str]]
) -> None:
    out, err = talk("One?", "Two?", answers=[(*said, error), ("Two.",)])
    assert message in err.splitlines()[0]
    assert ("the conversation goes on; /save PATH keeps it" in err) == ("a bug" in message)
    assert out == "".join(f"{text}\n" for text in (*said, "Two."))
    assert session.conversation.turns[-1] == Turn("Two?", "Two.")
    assert len(session.conversation.turns) == 2 + len(said)


def test_debug_shows_where_a_bug_is(talk: Callable[..., tuple[str, str]]) -> None:
    _out, err = talk("One?", answers=[(KeyError(ESCAPES),)], debug=True)
    assert "Traceback (most recent call last)" in err
    assert "Traceback" not in talk("One?", answers=[(KeyError("x"),)])[1]


def test_a_question_that_fails_again_keeps_its_answer(session: Session, talk: Callable[..., tuple[str, str]]) -> None:
    _out, err = talk("/retry", answers=[(YarnEdgeError("no"),)])
    assert err == "error: no\n"
    assert session.conversation.turns == [Turn("Before?", "Yes.")]
    talk("/retry")
    assert session.conversation.turns == [Turn("Before?", "Answer.")]


def test_ctrl_c_at_any_time(
    session: Session, talk: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _err = talk(KeyboardInterrupt(), "One?", "Two?", answers=[("Half", KeyboardInterrupt())])
    assert out == "Half\nAnswer.\n"
    show, pressed = terminal.dim, []

    def pressed_again(text: str) -> None:
        if not pressed and text != "/help lists the commands, Ctrl-D quits":
            pressed.append(text)
            raise KeyboardInterrupt
        show(text)

    monkeypatch.setattr(terminal, "dim", pressed_again)
    monkeypatch.setattr(session, "preload", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    out, _err = talk(f"/file {__file__}", "Three?")
    assert pressed
    assert out == "Answer.\n"
    assert session.conversation.waiting == ()


def test_a_line_editor_that_fails_once(talk: Callable[..., tuple[str, str]]) -> None:
    out, err = talk(ValueError("not enough values"), "One?", ValueError("again"), "Two?")
    assert out == "Answer.\nAnswer.\n"
    assert err.count("error: a bug in yarn-edge, please report it: ValueError") == 2
    with pytest.raises(ValueError, match="second"):
        talk(ValueError("first"), ValueError("second"))
    with pytest.raises(OSError, match="Input/output error"):
        talk(OSError(errno.EIO, "Input/output error"))  # the terminal is gone


def test_a_reader_that_left_ends_the_conversation(talk: Callable[..., tuple[str, str]]) -> None:
    with pytest.raises(BrokenPipeError):
        talk("One?", answers=[(BrokenPipeError(),)])


def test_a_full_disk(session: Session, talk: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    session.conversation.turns[0] = Turn("x" * 9000, "Yes.")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        _out, err = talk(f"/save {tmp_path / 'a.json'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert err == f"error: {tmp_path / 'a.json'}: File too large\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [b"caf\xe9.txt", "umlaut-ü.txt".encode(), b"esc-\x1b[777m\x9b.txt", "c1-\x9b.txt".encode()]
)
def test_documents_of_every_name(
    name: bytes, session: Session, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    path, saved = tmp_path / os.fsdecode(name), tmp_path / f"{os.fsdecode(name)}.json"
    path.write_text("words")
    _out, err = talk(f"/file {path}", "Why?", "/context", f"/file {path}", f"/save {saved}", "/undo", f"/load {saved}")
    assert "5 tokens, added to your next question" in err
    assert "is already in the conversation" in err
    assert "; the last question was: Why?" in err
    assert session.conversation.turns[-1].documents[0].text == "words"
    assert session.conversation.turns[-1].documents[0].name.isprintable()


def test_bytes_of_a_name_are_found_whatever_the_locale(tmp_path: Path, talk: Callable[..., tuple[str, str]]) -> None:
    (tmp_path / "ü.txt").write_text("words")
    typed = "/file " + os.fsencode(tmp_path / "ü.txt").decode("ascii", "surrogateescape")  # as LC_ALL=C has them
    assert "5 tokens, added" in talk(typed)[1] or sys.getfilesystemencoding() != "utf-8"


def test_questions_typed_under_another_locale(session: Session, talk: Callable[..., tuple[str, str]]) -> None:
    talk("Grüße".encode().decode("ascii", "surrogateescape"))
    assert session.conversation.turns[-1].question == "Grüße"


def conversation(**changes: Any) -> dict[str, Any]:
    turn = {"question": "Q", "answer": "A", "documents": [{"name": "d", "text": "t"}]}
    return {"format": FORMAT, "system": None, "turns": [turn], "waiting": []} | changes


def test_texts_of_every_kind_are_saved_and_replayed(
    session: Session, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    """Half a character is replaced where it is loaded, so that what is loaded can be asked about and saved again."""
    path, again = tmp_path / "a.json", tmp_path / "b.json"
    for text in ("\ud800", f"{ESCAPES}\0 \u2028", "\udcff", "😀 é"):
        values = conversation(system=text, waiting=[{"name": f"{text}\nd", "text": text}])
        values["turns"][0] |= {"question": text, "answer": text}
        path.write_text(json.dumps(values))
        _out, err = talk(f"/load {path}", "/context", f"/save {again}", "/undo", f"/load {again}", "And?")
        assert "error" not in err
        assert Conversation.load(again) == Conversation.load(path)
    session.conversation = Conversation("\ud800", [Turn("\udcff", "A")], (Document("n\ud800", "t"),))
    session.conversation.save(path)  # as `session.stream` may have been given them in Python
    assert Conversation.load(path).system == "\ufffd"


# the bytes of a file, and what /load says of it
DAMAGED: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a saved conversation (not JSON)"),
    "not UTF-8": (b"\xff\xfe\xff", "is not a saved conversation (not JSON)"),
    "deep": (b"[" * 200_000, "is not a saved conversation"),
    "deep objects": (b'{"a":' * 200_000, "is not a saved conversation"),
    "a long number": (b"9" * 5000, "is not a saved conversation (not JSON)"),
    "NaN": (b"NaN", "its format is not"),
    "no format": (b"{}", "its format is not"),
    "turns as an object": (json.dumps(conversation(turns={})).encode(), "is a damaged conversation file"),
    "turns as text": (json.dumps(conversation(turns="ab")).encode(), "is a damaged conversation file"),
    "documents as text": (json.dumps(conversation(waiting="")).encode(), "is a damaged conversation file"),
    "a system of numbers": (json.dumps(conversation(system=1e308)).encode(), "is a damaged conversation file"),
    "no answer": (json.dumps(conversation(turns=[{"question": "Q", "documents": []}])).encode(), "is a damaged"),
    "brackets": (b"[" + b"[]," * (MAX_STRUCTURE_BYTES // 3 + 1), "(too much besides its texts)"),
    "quotes": (b'"",' * MAX_QUOTES, "(too much besides its texts)"),
    "an open string of escapes": (b'"' + rb"\"" * 2_000_000 + b"\\", "is not a saved conversation"),
}


@pytest.mark.parametrize("data, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_hostile_conversations(
    data: bytes, message: str, session: Session, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    _out, err = talk(f"/load {path}", f"/save {path}")
    assert [message in line for line in err.splitlines()] == [True, True]
    assert path.read_bytes() == data
    assert session.conversation.turns == [Turn("Before?", "Yes.")]


def test_a_long_text_is_no_structure(tmp_path: Path) -> None:
    """A document of code, brackets and quotes may be as long as a context."""
    document = Document("code.js", '[{"a": "b\\"c"}],' * (MAX_STRUCTURE_BYTES // 8))
    Conversation(waiting=(document,)).save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json").waiting == (document,)


def test_a_model_told_by_a_document_to_write_escapes(talk: Callable[..., tuple[str, str]]) -> None:
    """The clipboard sequence is split, as tokens split it."""
    out, _err = talk(
        "Repeat it.", answers=[["ok \x1b", "]5", "2;c;aGk=", "\x07", "\x9b", "777m", "\rgone", " **b", "**"]]
    )
    assert out == "ok ]52;c;aGk=777mgone b\n"


def test_piped_text_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_BYTES", 1 << 20)
    with (
        Path("/dev/zero").open("rb") as endless,
        pytest.raises(YarnEdgeError, match="standard input: is larger than 1 MiB"),
    ):
        documents.read_stream(endless, "standard input")


def test_warnings_of_the_pdf_library_are_not_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(
        b"%PDF-1.4 \x1b[777m\n1 0 obj << /A /\x9b777m >> \x1b]0;t\x07 endobj\ntrailer << /Root 1 0 R >>\n%%EOF"
    )
    with pytest.raises(YarnEdgeError, match="pypdf cannot read it"):
        documents.read_document(path)
    assert capfd.readouterr().err == ""


def test_notes_are_seen_at_any_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for width in ("0", "1", "x"):
        monkeypatch.setenv("COLUMNS", width)
        screen.dim("a note that is longer than the terminal is wide, and stays a line " * 3)
        assert capsys.readouterr().err.count("\n") == 1


@contextmanager
def _tiny_chat(folder: Path, *words: str, **settings: Any) -> Iterator[Any]:
    checkpoint = tiny.write_checkpoint(folder / "ck")
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = convert(checkpoint, str(folder / "tiny.gguf"), "F32")[0]
    with in_a_terminal(str(model), "--threads", "1", "--max-tokens", "4", *words, **settings) as made:
        yield made


@pytest.mark.parametrize(
    "env",
    [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii", "COLUMNS": "0"}],
    ids=["usual", "C", "ascii"],
)
def test_a_real_terminal(env: dict[str, str], tmp_path: Path) -> None:
    """What is typed arrives as bytes: Latin-1, a mouse report that is none, a name in UTF-8."""
    with _tiny_chat(tmp_path, env=env) as chat:
        seen = chat.until("Ctrl-D quits" + READY)
        for typed, answer in (
            ("/file ~nosuchuser/x", "the folder of that user is not known"),
            (b"the \xfc", "the question is not valid UTF-8"),
            ("the ü", "4 tokens|context 1?[0-9]+ of"),
            (f"/save {tmp_path}/ü.json", "json: 1 turn"),
            (os.fsencode(tmp_path) + b"/\xfc.json", "4 tokens|not valid UTF-8"),
            (b"/save " + os.fsencode(tmp_path) + b"/\xfc.json", r"json: \d turn"),
            (b"\x1b[777mthe", "4 tokens|context 1?[0-9]+ of"),
        ):
            chat.send(typed if isinstance(typed, bytes) else typed.encode())
            chat.send("\r")
            seen += chat.until(answer)
            seen += chat.until(READY)
        chat.send("\x04")
        assert chat.child.wait(20) == 0
    assert leaks(seen.encode("utf-8", "replace")) is None
    assert {path.name for path in tmp_path.glob("*.json")} == {"ü.json", os.fsdecode(b"\xfc.json")}


def test_a_dumb_terminal_gets_no_sequences(tmp_path: Path) -> None:
    with _tiny_chat(tmp_path, env={"TERM": "dumb"}) as chat:
        seen = chat.until("Ctrl-D quits.*> ")
        chat.send("the **fox**\r")
        seen += chat.until(r"4 tokens.*> ")
        time.sleep(0.5)  # nothing shows that the line editor reads now
        chat.send("\x04")
        assert chat.child.wait(20) == 0
    assert "\x1b" not in seen.partition("quits")[2]

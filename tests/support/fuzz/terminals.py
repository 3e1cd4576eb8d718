"""Hostile sessions of the chat terminal on a pseudo-terminal: typed bytes, named files and answers are all hostile."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yarn_edge.chat.conversation import FORMAT, Conversation
from yarn_edge.chat.session import Session
from yarn_edge.chat.terminal import COMMANDS, Terminal
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note

from support.fuzz import runner
from support.fuzz.mutations import mutate_bytes, mutate_json
from support.fuzz.runner import Case
from support.scripted_chat import Joined, Scripted

_NEW_LINE, _LINE_READ = b"\x1b[?2004h", b"\x1b[?2004l"  # prompt_toolkit asks for bracketed paste, and no longer
_PASTE, _PASTED = b"\x1b[200~", b"\x1b[201~"

# What a terminal must never get from a stranger. 777 marks the sequences that look like ours.
HOSTILE = (
    "\x1b]52;c;aGVsbG8=\x07",
    "\x1b]8;;http://example.org\x1b\\here\x1b]8;;\x1b\\",
    "\x1b]0;a title\x07",
    "\x1b[777m",
    "\x1b[777;1H",
    "\x1b[2J\x1b[H",
    "\x1b[6n",
    "\x1bP1$r\x1b\\",
    "\x1b[?1049h",
    "\x1b",
    "\x9b777m",
    "\x9d52;c;aGk=\x9c",
    "\x85",
    "\x90",
    "\r",
    "\r\n",
    "\x08\x08\x08",
    "\x07",
    "\x0b\x0c",
    "\x0e",
    "\x00",
    "\x7f",
    "\u202e",
    "\u2066\u2069",
    "\u2028",
    "\u2029",
    "\u200b\u200d",
    "\ufeff",
    "a" + "\u0301" * 50,
)
PLAIN = (
    "Hello",
    "world",
    "**bold**",
    "`code`",
    "```\n",
    "# Heading\n",
    "~~~~\n",
    "日本語",
    "é",
    "👩‍🚀",
    "\t",
    "\n",
    " ",
    "x" * 300,
    "<think>",
)
PLAIN += ("</think>", "| a | b |\n", "ß", "*", "\n\n", "/help", "<|im_end|>")
_OURS = re.compile(r"\x1b\[(?:0|1|2|3|22|23|36|2;36|2;3|3;2|1;36)m")  # rich's styles: dim, bold, italic, cyan, none
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKED = re.compile(r"(?:\x1b\[|\x9b)[^A-Za-z]*777|\x1b[\]PX^_]|[\x80-\x9f]")


def text(rng: random.Random, most: int = 8) -> str:
    """Words, Markdown and hostile sequences."""
    return "".join(rng.choice(HOSTILE if rng.random() < 0.4 else PLAIN) for _ in range(rng.randint(0, most)))


def pieces(rng: random.Random) -> list[str]:
    """An answer as it is streamed: sequences are split anywhere."""
    left, found = text(rng, 30), []
    while left:
        at = rng.choice((1, 1, 2, 3, 8, 40))
        found.append(left[:at])
        left = left[at:]
    return found


RAISED: tuple[Callable[[], BaseException], ...] = (
    KeyboardInterrupt,
    MemoryError,
    lambda: YarnEdgeError("refused: \x1b[777m \u202e"),
    lambda: OSError(28, "No space left on device", "a\x1b[777m\nb"),
    lambda: OSError(5, "Input/output error"),
)
# An exception that is no error of ours costs a turn too, but it is a bug: it must be called one.
UNEXPECTED: tuple[Callable[[], BaseException], ...] = (
    lambda: KeyError("\x1b[777m"),
    lambda: UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    lambda: RecursionError("\x9b777m"),
)


def write_files(rng: random.Random, folder: Path) -> list[bytes]:
    """Documents, conversations and other things to name, made anew. Returns what may be typed as a path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [
        b"plain.txt",
        b"latin-\xe9.txt",
        "umlaut-ü.md".encode(),
        b"esc-\x1b[777m.txt",
        b"osc-\x1b]52;c;aGk=\x07.txt",
    ]
    names += ["rtl-\u202etxt.exe".encode(), b"line\nbreak.txt", "c1-\x9b777m.txt".encode(), b" spaces .txt", b"x" * 255]
    for name in names:
        content = text(rng, 40).replace("\0", "").encode() + b"words"
        if rng.random() < 0.2:
            content = mutate_bytes(rng, content, len(content))
        (folder / os.fsdecode(name)).write_bytes(content)
    turn = {"question": text(rng), "answer": text(rng), "documents": [{"name": text(rng), "text": text(rng)}]}
    talk: dict[str, Any] = {"format": FORMAT, "system": text(rng), "turns": [turn] * rng.randint(0, 4), "waiting": []}
    for number in range(4):
        data = json.dumps(mutate_json(rng, talk) if number > 1 else talk, ensure_ascii=rng.random() < 0.5).encode()
        if rng.random() < 0.4:
            data = data.replace(
                b"e", rng.choice((b"\\ud800", b"\xed\xa0\x80", b"\\u001b[777m", b"\\u0000", b"\xff")), 3
            )
        if number == 3:
            data = mutate_bytes(rng, data, len(data))
        (folder / f"talk{number}.json").write_bytes(data)
        names.append(f"talk{number}.json".encode())
    (folder / "deep.json").write_bytes(b"[" * 100_000)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    places = [
        os.fsencode(folder) + b"/" + name for name in (*names, b"deep.json", b"loop", b"pipe", b"folder", b"none/x")
    ]
    new = [os.fsencode(folder) + b"/new" + text(rng, 3).encode().replace(b"\n", b"") + b".json" for _ in range(6)]
    odd = [b"~nosuchuser/x", b"~", b"~root", b"", b".", b"..", b"/", b"a\0b", b"/dev/full", b"/dev/tty", b"/dev/stdin"]
    odd += [b"y" * 5000, b"//", b"~/\xff", b"~\xff", b"-", b"'a b'", b"/proc/self/mem", b"\xed\xa0\x80", b"$HOME", b"*"]
    return [*places, *new, *odd]


@dataclass
class Script:
    """What is typed, line by line, and what the engine says to each line that asks."""

    lines: list[bytes] = field(default_factory=list)
    answers: list[list[str | BaseException]] = field(default_factory=list)
    bugs: bool = False


def script(rng: random.Random, paths: Sequence[bytes]) -> Script:
    """A session of some lines: commands with arguments of every kind, questions, keys."""
    made = Script(bugs=rng.random() < 0.1)
    for _ in range(rng.randint(2, 8)):
        kind = rng.random()
        if kind < 0.6:
            word = rng.choice([*COMMANDS, "/nonsense", "/SAVE", "/file\t"]).encode()
            takes_path = word.lower() in (b"/file", b"/save", b"/load")
            argument = rng.choice(paths) if takes_path else text(rng).encode()
            typed = word + rng.choice((b" ", b" ", b" ", b"  ", b"")) + argument
        else:
            typed = text(rng).encode()
        if rng.random() < 0.15:
            at = rng.randint(0, len(typed))
            typed = (
                typed[:at] + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xfc", b"\xf4\x90\x80\x80")) + typed[at:]
            )
        keys = rng.random() < 0.2
        typed = typed.replace(b"\x0c", b"") if keys else typed  # which clears the screen
        made.lines.append(typed if keys else _PASTE + typed.replace(_PASTED, b"") + _PASTED)
        answer: list[str | BaseException] = [*pieces(rng)]
        if rng.random() < 0.25:
            answer.insert(rng.randint(0, len(answer)), rng.choice(UNEXPECTED if made.bugs else RAISED)())
        made.answers.append(answer)
    return made


class PseudoTerminal:
    """This process's standard streams on a pseudo-terminal. The worker process of the fuzz target has it for good."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        modes = termios.tcgetattr(slave)
        modes[0] &= ~(termios.IXON | termios.IMAXBEL)
        modes[3] &= ~termios.ECHO  # what is typed too early is the user's, and would be shown by the kernel
        self._modes = modes
        for descriptor in range(3):
            os.dup2(slave, descriptor)
        for name in ("SIGTSTP", "SIGQUIT", "SIGTTOU", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        os.environ.update(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
        # As `yarn_edge.cli` sets them.
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        self.seen = bytearray()
        self._lines: Iterator[bytes] = iter(())
        self._over = False

    def run(self, terminal: Terminal, lines: Sequence[bytes]) -> bytes:
        """Let it converse, and type a line whenever one is read. Returns what it wrote. Raises what ended it."""
        self.seen, self._lines, self._over = bytearray(), iter(lines), False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        termios.tcsetattr(0, termios.TCSAFLUSH, self._modes)
        feeder = threading.Thread(target=self._feed)
        feeder.start()
        try:
            terminal.converse()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that was meant for the line editor
            self._over = True
            feeder.join()
        return bytes(self.seen)

    def _feed(self) -> None:
        asked, since, nudged, quitting = 0, time.monotonic(), 0, False
        while (ready := select.select([self.master], [], [], 0.02)[0]) or not self._over:
            if ready:
                self.seen += os.read(self.master, 1 << 16)
            if (opened := self.seen.count(_NEW_LINE)) > asked and not self.seen.endswith(b"\x1b[?25l"):
                asked, since, nudged = opened, time.monotonic(), 0
                signal.setitimer(signal.ITIMER_REAL, runner.HANG_S)  # for each line
                line = next(self._lines, None)
                if line is None:
                    quitting = True
                    os.write(self.master, b"\x05\x15\x04")  # end of line, delete it, quit
                else:
                    self._type(line + b"\r")
            waited = time.monotonic() - since
            if waited > 0.4 * (nudged + 1) and not self._over and self._reads():
                nudged += 1  # keys that left a search or an unfinished line
                os.write(self.master, b"\x03" if nudged % 2 or not quitting else b"\x04")

    def _reads(self) -> bool:
        """Whether the last line is still being edited."""
        return self.seen.rfind(_NEW_LINE) > self.seen.rfind(_LINE_READ)

    def _type(self, line: bytes) -> None:
        while line:  # the kernel's buffer holds 4 KiB, and the editor's echo has to be read meanwhile
            line = line[os.write(self.master, line[:512]) :]
            time.sleep(0)


def leaks(seen: bytes) -> str | None:
    """What a stranger's text had the terminal do, None if nothing. Between the lines that are edited only our styles may be seen."""
    if (found := _MARKED.search(seen.decode("utf-8", "replace"))) is not None:
        return f"{found[0]!r} in {_around(seen.decode('utf-8', 'replace'), found.start())}"
    for part in re.split(
        re.escape(_NEW_LINE) + rb".*?" + re.escape(_LINE_READ), seen.split(_NEW_LINE, 1)[-1], flags=re.DOTALL
    )[1:]:
        shown = _OURS.sub("", part.partition(_NEW_LINE)[0].decode("utf-8", "replace").replace("\r\n", "\n")).replace(
            "\t", ""
        )
        if (found := OBEYED.search(shown)) is not None:
            return f"{found[0]!r} in {_around(shown, found.start())}"
    return None


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 60) : at + 20])


_save = Conversation.save


def _saved_here(conversation: Conversation, path: Path) -> None:
    """`Conversation.save`, but not outside of the session's folder: hostile paths are paths."""
    if not Path(os.path.abspath(path)).is_relative_to(Path.cwd()):  # noqa: PTH100 - as typed, links are not followed
        raise YarnEdgeError(f"{path}: is outside of the session's folder")
    _save(conversation, path)


class Terminals:
    """Sessions: commands with arguments of every kind, questions, keys; documents, conversations and answers of strangers.

    The terminal, its line editor and its looks are the real ones; the engine only says what a script has it say, or raises. A session
    may not end by an error, may not call one a bug, and may not show what a terminal obeys; what is left must be saved and loaded.
    """

    name, in_process = "terminals", False

    def __init__(self) -> None:
        self._terminal: PseudoTerminal | None = None

    def case(self, rng: random.Random, scratch: Path) -> Case:
        if self._terminal is None:
            self._terminal = PseudoTerminal()
            Conversation.save = _saved_here  # type: ignore[method-assign]
        folder = scratch / "files"
        paths = write_files(rng, folder)
        os.chdir(folder)
        os.environ["HOME"] = str(folder)
        planned = script(rng, paths)
        engine = Scripted()
        session = Session(engine, Joined(), Sampling(), notice=note)
        stream, on = session.stream, self._terminal

        def streamed(question: str, max_tokens: int | None = None) -> Generator[str, None, None]:
            engine.script = planned.answers.pop(0) if planned.answers else ["done"]
            return stream(question, max_tokens)

        session.stream = streamed  # type: ignore[method-assign]

        def converse() -> str:
            seen = on.run(Terminal(session), planned.lines)
            keys = any(not line.startswith(_PASTE) for line in planned.lines)
            leaked = leaks(seen.replace(b"\x07", b"") if keys else seen)
            assert leaked is None, leaked
            at = max(seen.find(b"Traceback"), seen.find(b"a bug in yarn-edge") if not planned.bugs else -1)
            assert at < 0, seen[at : at + 200]
            session.conversation.save(folder / "at the end.json")
            assert Conversation.load(folder / "at the end.json") == session.conversation, "saved otherwise than it was"
            return "went on"

        return Case(sum(path.lstat().st_size for path in folder.iterdir()), converse)

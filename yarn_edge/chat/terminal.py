"""The conversation in a terminal: a line to type in, commands, answers as they come, a quiet line with the numbers after each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yarn_edge.chat.answer_view import REASONING, AnswerView, without_controls
from yarn_edge.chat.conversation import Conversation
from yarn_edge.chat.documents import read_document
from yarn_edge.chat.reasoning import split
from yarn_edge.chat.session import Session
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note, show
from yarn_edge.stdout import write_text

_BAR_WIDTH = 40


@dataclass
class Terminal:
    """A session and its user. max_tokens: of an answer, None for no limit of their own."""

    session: Session
    max_tokens: int | None = None

    def converse(self) -> None:
        """Until the user leaves."""
        reader = _reader()
        dim("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                text = reader("> ").strip()
            except KeyboardInterrupt:
                dim("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return
            word, _, rest = text.partition(" ")
            if word.lower() in ("/exit", "/quit"):
                return
            with _typing_unseen():
                if word.lower() in COMMANDS:
                    self._command(word.lower(), rest.strip())
                elif word.startswith("/") and word[1:].isalpha():
                    note(f"{word} is no command; /help lists them")
                elif text:
                    self.turn(text)

    def _command(self, word: str, rest: str) -> None:
        try:
            COMMANDS[word][2](self, rest)
        except YarnEdgeError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            dim("stopped")

    def turn(self, text: str) -> None:
        """One question and its answer; errors are a line, and the question is taken back."""
        view = AnswerView(_styled_output())
        try:
            with closing(self.session.stream(text, self.max_tokens)) as pieces:
                for kind, piece in split(pieces, lambda: self.session.opened):
                    (view.answer if kind == "answer" else view.reasoning)(piece)
        except KeyboardInterrupt:
            pass
        except YarnEdgeError as error:
            note(f"error: {error}")
            return
        view.end()
        write_text("\n")
        dim(summary(self.session))
        self.session.generation.keep_on_disk()

    def help(self, _rest: str) -> None:
        """This list."""
        lines = [f"{f'{word} {argument}'.strip():<14}{told}" for word, (argument, told, _act) in COMMANDS.items()]
        lines.append("/exit         leave (also Ctrl-D)")
        lines.append("Esc Enter starts a new line; pasted text keeps its lines. Ctrl-C stops an answer.")
        dim("\n".join(lines))

    def file(self, rest: str) -> None:
        """Read a document; it goes in front of the next question."""
        if not rest:
            raise YarnEdgeError("/file needs a path")
        document = read_document(Path(rest).expanduser())
        n_tokens, n_ctx = self._count(document.text), self.session.context.n_ctx
        if n_tokens >= n_ctx:
            raise YarnEdgeError(
                f"{document.name} has {n_tokens} tokens, the context holds {n_ctx}: start with a larger --ctx "
                "(yarn-edge fit tells what the memory allows)"
            )
        conversation = self.session.conversation
        if document in conversation.documents():
            dim(f"{document.name} is in the conversation already")
            return
        before = conversation.waiting
        conversation.waiting = (*before, document)
        try:
            self.preload()
        except (YarnEdgeError, KeyboardInterrupt):
            conversation.waiting = before
            raise
        dim(f"{document.name}: {n_tokens} tokens, in front of your next question")

    def preload(self) -> None:
        """Read the documents that wait, before there is a question."""
        self.session.preload()
        self.session.generation.keep_on_disk()

    def context(self, _rest: str) -> None:
        """What fills the window."""
        conversation, n_ctx = self.session.conversation, self.session.context.n_ctx
        documents = [(d.name, self._count(d.text)) for d in conversation.documents()]
        system = self._count(conversation.system) if conversation.system else 0
        waiting = sum(self._count(d.text) for d in conversation.waiting)
        used = len(self.session.prompt(conversation.messages())) if conversation.turns else system
        turns = max(0, used - system - sum(n for _name, n in documents) + waiting)
        rows = [("system prompt", system), *documents, (f"{len(conversation.turns)} turns", turns)]
        rows.append(("free", max(0, n_ctx - used - waiting)))
        lines = [
            f"{name[:28]:<30}{n:>8}  {'█' * round(_BAR_WIDTH * n / n_ctx)}" for name, n in rows if n or name == "free"
        ]
        dim("\n".join([*lines, f"{'context':<30}{n_ctx:>8}"]))

    def _count(self, text: str) -> int:
        return len(self.session.context.model.tokenize(text, add_special=False, parse_special=False))

    def undo(self, _rest: str) -> None:
        """Take the last question and its answer back."""
        turn = self.session.conversation.undo()
        dim("there is nothing to take back" if turn is None else f"taken back: {turn.question[:60]}")

    def retry(self, rest: str) -> None:
        """Ask the last question again, or another one in its place."""
        turn = self.session.conversation.undo()
        if turn is None:
            raise YarnEdgeError("there is no question to ask again")
        self.turn(rest or turn.question)

    def save(self, rest: str) -> None:
        """Write the conversation to a file."""
        if not rest:
            raise YarnEdgeError("/save needs a path")
        path = Path(rest).expanduser()
        if path.exists():
            Conversation.load(path)  # anything else is not overwritten
        self.session.conversation.save(path)
        dim(f"{path}: {len(self.session.conversation.turns)} turns")

    def load(self, rest: str) -> None:
        """Go on with a conversation from a file."""
        if not rest:
            raise YarnEdgeError("/load needs a path")
        self.session.conversation = Conversation.load(Path(rest).expanduser())
        self.session.dropped_turns = 0
        turns, waiting = self.session.conversation.turns, self.session.conversation.waiting
        told = [f"{len(turns)} turns"]
        told += [f"{document.name}: in front of your next question" for document in waiting]
        dim("; ".join([*told, *(f"the last question was: {turn.question[:60]}" for turn in turns[-1:])]))

    def system(self, rest: str) -> None:
        """Set the system prompt; without TEXT, remove it."""
        self.session.conversation.system = rest or None
        dim("the system prompt is set" if rest else "the system prompt is removed")

    def reset(self, _rest: str) -> None:
        """Forget the conversation; the system prompt stays."""
        self.session.reset()
        dim("the conversation starts anew")

    def stats(self, _rest: str) -> None:
        """What the last answer took."""
        known: dict[str, Any] = asdict(self.session.stats) if self.session.stats else {"no answer": "yet"}
        dim("\n".join(f"{name}: {value}" for name, value in known.items()))


# word -> (its argument, what it does, the method)
COMMANDS: dict[str, tuple[str, str, Callable[[Terminal, str], None]]] = {
    "/help": ("", "this list", Terminal.help),
    "/file": ("PATH", "read a document in front of the next question: text, Markdown, source, PDF", Terminal.file),
    "/context": ("", "what fills the window", Terminal.context),
    "/undo": ("", "take the last question and its answer back", Terminal.undo),
    "/retry": ("[TEXT]", "ask the last question again, or TEXT in its place", Terminal.retry),
    "/save": ("PATH", "write the conversation to a file", Terminal.save),
    "/load": ("PATH", "go on with a saved conversation", Terminal.load),
    "/system": ("TEXT", "set the system prompt; without TEXT, remove it", Terminal.system),
    "/reset": ("", "forget the conversation; the system prompt stays", Terminal.reset),
    "/stats": ("", "what the last answer took", Terminal.stats),
}


def summary(session: Session) -> str:
    """One line: tokens, speed, time to the first of them, and how full the context is."""
    stats = session.stats
    if stats is None:
        return "stopped"
    told = [f"{stats.generated_tokens} tokens"]
    if stats.tok_per_s is not None:
        told.append(f"{stats.tok_per_s:.1f} tok/s")
    if stats.ttft_s is not None:
        told.append(f"first after {stats.ttft_s:.2f} s")
    if stats.prompt_tokens_restored:
        told.append(f"{stats.prompt_tokens_restored} read from the cache on the disk")
    told.append(f"context {stats.context_used} of {stats.n_ctx}")
    ends = {"length": "cut at --max-tokens", "context": "cut: the context is full", "interrupted": "stopped"}
    if stats.finish_reason in ends:
        told.append(ends[stats.finish_reason])
    return ", ".join(told)


def dim(text: str) -> None:
    """On stderr, for a person."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.capture() as capture:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    show(capture.get().rstrip("\n"))


def faint(text: str) -> None:
    """A piece of reasoning, on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(without_controls(text), REASONING), end="")


def _styled_output() -> Callable[[str, str], None]:
    """To stdout: with styles on a terminal, as it is elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def styled(text: str, style: str) -> None:
        console.print(Text(text, style), end="")

    def plain(text: str, _style: str) -> None:
        write_text(text)

    return styled if sys.stdout.isatty() else plain


@contextmanager
def _typing_unseen() -> Iterator[None]:
    """What is typed meanwhile does not get into the answer; it waits for the next line."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    unseen = [*before]
    unseen[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, unseen)
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _reader() -> Callable[[str], str]:
    """A line editor with history; Esc Enter and pastes make several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    words = WordCompleter([*COMMANDS, "/exit"], sentence=True)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(),
        key_bindings=keys,
        output=create_output(always_prefer_tty=True),
        completer=words,
        complete_while_typing=False,
    )
    return lambda prompt: session.prompt(prompt, prompt_continuation="  ")

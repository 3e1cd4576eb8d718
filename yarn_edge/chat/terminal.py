"""The conversation in a terminal: an input line, commands, answers as they are generated, and a dim line of statistics after each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """A session and its user. max_tokens: maximum length of an answer in tokens, None for no limit but the context."""

    session: Session
    max_tokens: int | None = None

    def converse(self) -> None:
        """Read questions and commands until the user leaves."""
        reader = _reader()
        dim("/help lists the commands, Ctrl-D quits")
        while True:
            try:
                text = reader("> ").strip()
            except KeyboardInterrupt:
                dim("Ctrl-D or /exit quits")
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
                    note(f"{word} is not a command; /help lists the commands")
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
        """Ask a question and show its answer. An error is shown as one line, and the question is removed."""
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
        """List the commands."""
        lines = [f"{f'{word} {argument}'.strip():<14}{what}" for word, (argument, what, _act) in COMMANDS.items()]
        lines.append("/exit         quit (also Ctrl-D)")
        lines.append("Esc Enter starts a new line. Pasted text keeps its line breaks. Ctrl-C stops an answer.")
        dim("\n".join(lines))

    def file(self, rest: str) -> None:
        """Read a document for the next question."""
        if not rest:
            raise YarnEdgeError("/file needs a path")
        document = read_document(Path(rest).expanduser())
        n_tokens, n_ctx = self._count(document.text), self.session.context.n_ctx
        if n_tokens >= n_ctx:
            raise YarnEdgeError(
                f"{document.name} has {n_tokens} tokens, but the context holds {n_ctx}: start with a larger --ctx "
                "(yarn-edge fit shows what fits in memory)"
            )
        conversation = self.session.conversation
        if document in conversation.documents():
            dim(f"{document.name} is already in the conversation")
            return
        before = conversation.waiting
        conversation.waiting = (*before, document)
        try:
            self.preload()
        except (YarnEdgeError, KeyboardInterrupt):
            conversation.waiting = before
            raise
        dim(f"{document.name}: {n_tokens} tokens, added to your next question")

    def preload(self) -> None:
        """Evaluate the waiting documents before there is a question."""
        self.session.preload()
        self.session.generation.keep_on_disk()

    def context(self, _rest: str) -> None:
        """Show what fills the context."""
        conversation, n_ctx = self.session.conversation, self.session.context.n_ctx
        documents = [(d.name, self._count(d.text)) for d in conversation.documents()]
        system = self._count(conversation.system) if conversation.system else 0
        waiting = sum(self._count(d.text) for d in conversation.waiting)
        used = len(self.session.prompt(conversation.messages())) if conversation.turns else system
        turns = max(0, used - system - sum(n for _name, n in documents) + waiting)
        rows = [("system prompt", system), *documents, (_turns(len(conversation.turns)), turns)]
        rows.append(("free", max(0, n_ctx - used - waiting)))
        lines = [
            f"{name[:28]:<30}{n:>8}  {'█' * round(_BAR_WIDTH * n / n_ctx)}" for name, n in rows if n or name == "free"
        ]
        dim("\n".join([*lines, f"{'context':<30}{n_ctx:>8}"]))

    def _count(self, text: str) -> int:
        return len(self.session.context.model.tokenize(text, add_special=False, parse_special=False))

    def undo(self, _rest: str) -> None:
        """Remove the last question and its answer."""
        turn = self.session.conversation.undo()
        dim("there is nothing to undo" if turn is None else f"removed: {turn.question[:60]}")

    def retry(self, rest: str) -> None:
        """Ask the last question again, or another one instead."""
        turn = self.session.conversation.undo()
        if turn is None:
            raise YarnEdgeError("there is no question to ask again")
        self.turn(rest or turn.question)

    def save(self, rest: str) -> None:
        """Save the conversation to a file."""
        if not rest:
            raise YarnEdgeError("/save needs a path")
        path = Path(rest).expanduser()
        if path.exists():
            Conversation.load(path)  # only a saved conversation is overwritten
        self.session.conversation.save(path)
        dim(f"{path}: {_turns(len(self.session.conversation.turns))}")

    def load(self, rest: str) -> None:
        """Continue a saved conversation."""
        if not rest:
            raise YarnEdgeError("/load needs a path")
        self.session.conversation = Conversation.load(Path(rest).expanduser())
        self.session.dropped_turns = 0
        turns, waiting = self.session.conversation.turns, self.session.conversation.waiting
        parts = [_turns(len(turns)), *(f"{document.name}: added to your next question" for document in waiting)]
        dim("; ".join([*parts, *(f"the last question was: {turn.question[:60]}" for turn in turns[-1:])]))

    def system(self, rest: str) -> None:
        """Set the system prompt, or remove it."""
        self.session.conversation.system = rest or None
        dim("the system prompt is set" if rest else "the system prompt is removed")

    def reset(self, _rest: str) -> None:
        """Start a new conversation; the system prompt stays."""
        self.session.reset()
        dim("started a new conversation")

    def stats(self, _rest: str) -> None:
        """Show the statistics of the last answer."""
        stats = self.session.stats
        dim("there is no answer yet" if stats is None else "\n".join(f"{k}: {v}" for k, v in asdict(stats).items()))


def _turns(n: int) -> str:
    return f"{n} turn" if n == 1 else f"{n} turns"


# command -> (its argument, what it does, the method)
COMMANDS: dict[str, tuple[str, str, Callable[[Terminal, str], None]]] = {
    "/help": ("", "list the commands", Terminal.help),
    "/file": ("PATH", "add a document to your next question: text, Markdown, source code, PDF", Terminal.file),
    "/context": ("", "show what fills the context", Terminal.context),
    "/undo": ("", "remove the last question and its answer", Terminal.undo),
    "/retry": ("[TEXT]", "ask the last question again, or TEXT instead", Terminal.retry),
    "/save": ("PATH", "save the conversation to a file", Terminal.save),
    "/load": ("PATH", "continue a saved conversation", Terminal.load),
    "/system": ("[TEXT]", "set the system prompt to TEXT, or remove it", Terminal.system),
    "/reset": ("", "start a new conversation with the same system prompt", Terminal.reset),
    "/stats": ("", "show the statistics of the last answer", Terminal.stats),
}


def summary(session: Session) -> str:
    """One line: number of tokens, speed, time to the first token, and how full the context is."""
    stats = session.stats
    if stats is None:
        return "stopped"
    parts = [f"{stats.generated_tokens} tokens"]
    if stats.tok_per_s is not None:
        parts.append(f"{stats.tok_per_s:.1f} tok/s")
    if stats.ttft_s is not None:
        parts.append(f"first token after {stats.ttft_s:.2f} s")
    if stats.prompt_tokens_restored:
        parts.append(f"{stats.prompt_tokens_restored} from the disk cache")
    parts.append(f"context {stats.context_used} of {stats.n_ctx}")
    ends = {"length": "cut off at --max-tokens", "context": "cut off: the context is full", "interrupted": "stopped"}
    if stats.finish_reason in ends:
        parts.append(ends[stats.finish_reason])
    return ", ".join(parts)


def dim(text: str) -> None:
    """Show dim text on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.capture() as capture:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    show(capture.get().rstrip("\n"))


def faint(text: str) -> None:
    """Show a piece of reasoning on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(without_controls(text), REASONING), end="")


def _styled_output() -> Callable[[str, str], None]:
    """Writes to stdout: styled on a terminal, plain elsewhere."""
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
    """Do not echo what is typed during an answer; it stays in the input for the next line."""
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
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _reader() -> Callable[[str], str]:
    """A line editor with history; Esc Enter and pasted text make several lines."""
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

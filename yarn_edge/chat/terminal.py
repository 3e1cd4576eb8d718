"""The conversation in a terminal: an input line, commands, answers as they are generated, and a dim line of statistics after each."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from yarn_edge.chat.answer_view import AnswerView
from yarn_edge.chat.conversation import Conversation
from yarn_edge.chat.documents import read_document
from yarn_edge.chat.reasoning import split
from yarn_edge.chat.screen import dim, line_reader, styled_output, typing_unseen
from yarn_edge.chat.session import Session
from yarn_edge.errors import YarnEdgeBug, YarnEdgeError, as_ours, one_line
from yarn_edge.foreign_text import harmless
from yarn_edge.progress import note, show
from yarn_edge.stdout import write_text
from yarn_edge.text_file import given_text

_BAR_WIDTH = 40


@dataclass
class Terminal:
    """A session and its user. max_tokens: maximum length of an answer in tokens, None for no limit but the context.

    debug: show where an error came from.
    """

    session: Session
    max_tokens: int | None = None
    debug: bool = False
    _unread: bool = field(default=False, init=False)  # whether the line editor failed at the last line

    def converse(self) -> None:
        """Read questions and commands until the user leaves. An error costs a turn, never the conversation."""
        reader = line_reader([*COMMANDS, "/exit"])
        dim("/help lists the commands, Ctrl-D quits")
        goes_on = True
        while goes_on:
            with suppress(KeyboardInterrupt):  # pressed again while the first one is answered
                goes_on = self._line(reader)

    def _line(self, reader: Callable[[str], str]) -> bool:
        """Read one line and do what it says. False if the user leaves."""
        try:
            text = reader("> ").strip()
            self._unread = False
        except KeyboardInterrupt:
            dim("Ctrl-D or /exit quits")
            return True
        except EOFError:
            return False
        except Exception as error:
            if self._unread or isinstance(error, OSError):  # the line editor is broken, or the terminal is gone
                raise
            self._unread = True
            self._failed(as_ours(error))
            return True
        word, _, rest = text.partition(" ")
        if word.lower() in ("/exit", "/quit"):
            return False
        try:
            with typing_unseen():
                self._do(text, word.lower(), rest.strip())
        except KeyboardInterrupt:
            dim("stopped")
        except BrokenPipeError:  # whoever read the answers has left
            raise
        except Exception as error:
            self._failed(as_ours(error))
        return True

    def _do(self, text: str, word: str, rest: str) -> None:
        if word in COMMANDS:
            COMMANDS[word][2](self, rest)
        elif word.startswith("/") and word[1:].isalpha():
            note(f"{word} is not a command; /help lists the commands")
        elif text:
            self.turn(text)

    def _failed(self, error: YarnEdgeError) -> None:
        if self.debug:
            show(harmless(traceback.format_exc()))
        note(f"error: {error}")
        if isinstance(error, YarnEdgeBug):
            dim("the conversation goes on; /save PATH keeps it")

    def turn(self, text: str) -> None:
        """Ask a question and show its answer. The question is removed if it gets none: YarnEdgeError says why."""
        view = AnswerView(styled_output())
        try:
            with closing(self.session.stream(given_text(text, "the question"), self.max_tokens)) as pieces:
                for kind, piece in split(pieces, lambda: self.session.opened):
                    (view.answer if kind == "answer" else view.reasoning)(piece)
        except KeyboardInterrupt:
            pass
        except Exception:
            if view.begun:
                view.end()
                write_text("\n")
            raise
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
        document = read_document(_path("/file", rest))
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
        except BaseException:
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
            f"{one_line(name, 28):<30}{n:>8}  {'█' * round(_BAR_WIDTH * min(n, n_ctx) / n_ctx)}"
            for name, n in rows
            if n or name == "free"
        ]
        dim("\n".join([*lines, f"{'context':<30}{n_ctx:>8}"]))

    def _count(self, text: str) -> int:
        return len(self.session.context.model.tokenize(text, add_special=False, parse_special=False))

    def undo(self, _rest: str) -> None:
        """Remove the last question and its answer."""
        turn = self.session.conversation.undo()
        dim("there is nothing to undo" if turn is None else f"removed: {one_line(turn.question, 60)}")

    def retry(self, rest: str) -> None:
        """Ask the last question again, or another one instead."""
        before = self.session.conversation
        before = replace(before, turns=list(before.turns))
        turn = self.session.conversation.undo()
        if turn is None:
            raise YarnEdgeError("there is no question to ask again")
        try:
            self.turn(rest or turn.question)
        except Exception:  # the answer that was to be replaced stays
            self.session.conversation = before
            raise

    def save(self, rest: str) -> None:
        """Save the conversation to a file."""
        path = _path("/save", rest)
        if path.exists():
            Conversation.load(path)  # only a saved conversation is overwritten
        self.session.conversation.save(path)
        dim(one_line(f"{path}: {_turns(len(self.session.conversation.turns))}"))

    def load(self, rest: str) -> None:
        """Continue a saved conversation."""
        self.session.conversation = Conversation.load(_path("/load", rest))
        self.session.dropped_turns = 0
        turns, waiting = self.session.conversation.turns, self.session.conversation.waiting
        parts = [_turns(len(turns)), *(f"{document.name}: added to your next question" for document in waiting)]
        dim("; ".join([*parts, *(f"the last question was: {one_line(turn.question, 60)}" for turn in turns[-1:])]))

    def system(self, rest: str) -> None:
        """Set the system prompt, or remove it."""
        self.session.conversation.system = given_text(rest, "the system prompt") or None
        dim("the system prompt is set" if rest else "the system prompt is removed")

    def reset(self, _rest: str) -> None:
        """Start a new conversation; the system prompt stays."""
        self.session.reset()
        dim("started a new conversation")

    def stats(self, _rest: str) -> None:
        """Show the statistics of the last answer."""
        stats = self.session.stats
        dim("there is no answer yet" if stats is None else "\n".join(f"{k}: {v}" for k, v in asdict(stats).items()))


def _path(command: str, rest: str) -> Path:
    """The path that a command was given, ~ and ~user replaced. Raises YarnEdgeError for what can be no path here."""
    if not rest:
        raise YarnEdgeError(f"{command} needs a path")
    if "\0" in rest:
        raise YarnEdgeError(f"{command}: a path cannot hold a NUL")
    try:
        os.fsencode(rest)
        return Path(rest).expanduser()
    except RuntimeError:
        raise YarnEdgeError(f"{rest}: the folder of that user is not known; ./{rest} is a file of that name") from None
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise YarnEdgeError(
            f"{rest}: file names are {encoding} here, which lacks a character of it: set LC_ALL to a UTF-8 locale"
        ) from None


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

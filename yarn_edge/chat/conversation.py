"""What was said: a system prompt, turns of question and answer, and the documents that they are about. No model, no tokens.

A document belongs to the question that it was given with, and precedes it. When the oldest turns are dropped, their documents stay
and move to the next question.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yarn_edge.chat.template import Message
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.foreign_text import whole_characters
from yarn_edge.regular_file import read_file_or_pipe

FORMAT = "yarn-edge conversation 1"
MAX_FILE_BYTES = 64 << 20
# Outside of the texts. A file of brackets would become thirty times its size in memory.
MAX_STRUCTURE_BYTES, MAX_QUOTES = 8 << 20, 1 << 20
_STRING = re.compile(rb'"[^"]*(?:"|\Z)')


@dataclass(frozen=True)
class Document:
    """A text to talk about. name: for people; the model sees only the text."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    """A question with its documents, and its answer, None if it has none yet."""

    question: str
    answer: str | None = None
    documents: tuple[Document, ...] = ()

    @property
    def said(self) -> str:
        """The user's message: the documents, then the question."""
        return "\n\n".join(part.strip("\n") for part in (*(d.text for d in self.documents), self.question) if part)


@dataclass
class Conversation:
    """system: the system prompt, None for none. waiting: documents for the next question."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: tuple[Document, ...] = ()

    def messages(self) -> list[Message]:
        """The messages for a chat template."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.said})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def asked(self, question: str) -> Conversation:
        """A copy with one more question and the documents that waited for it."""
        return replace(self, turns=[*self.turns, Turn(question, documents=self.waiting)], waiting=())

    def without_oldest(self) -> Conversation:
        """A copy without the oldest turn; its documents move to the next question. There must be at least two turns."""
        oldest, following, *others = self.turns
        kept = replace(following, documents=(*oldest.documents, *following.documents))
        return replace(self, turns=[kept, *others])

    def without_all_but_last(self) -> Conversation:
        """A copy with only the last turn, and all documents."""
        shorter = self
        while len(shorter.turns) > 1:
            shorter = shorter.without_oldest()
        return shorter

    def documents(self) -> list[Document]:
        """All documents, in their order."""
        return [document for turn in self.turns for document in turn.documents] + list(self.waiting)

    def undo(self) -> Turn | None:
        """Remove and return the last turn; its documents wait for the next question. None if there is no turn."""
        if not self.turns:
            return None
        last = self.turns.pop()
        self.waiting = (*last.documents, *self.waiting)
        return last

    def clear(self) -> None:
        """Forget turns and documents; the system prompt stays."""
        self.turns.clear()
        self.waiting = ()

    def save(self, path: Path) -> None:
        """Write a JSON file, completely or not at all; an existing file is replaced. Any characters can be saved.

        Raises YarnEdgeError if the file cannot be written.
        """
        from yarn_edge.stdout import json_text
        from yarn_edge.writer import check_output, write_file

        def documents(items: tuple[Document, ...]) -> list[dict[str, str]]:
            return [vars(document) for document in items]

        turns = [{"question": t.question, "answer": t.answer, "documents": documents(t.documents)} for t in self.turns]
        data = {"format": FORMAT, "system": self.system, "turns": turns, "waiting": documents(self.waiting)}
        write_file(check_output(path, force=True), json_text(data, indent=1) + "\n", force=True)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises YarnEdgeError for anything else."""
        try:
            data = json.loads(_content(path))
        except (ValueError, RecursionError):
            raise YarnEdgeError(f"{path}: is not a saved conversation (not JSON)") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise YarnEdgeError(f"{path}: is not a saved conversation (its format is not {FORMAT!r})")
        try:
            system = None if data["system"] is None else _text(data["system"])
            return cls(system, [_turn(turn) for turn in _list(data["turns"])], _documents(data["waiting"]))
        except (KeyError, TypeError, AttributeError):
            raise YarnEdgeError(f"{path}: is a damaged conversation file") from None


def _content(path: Path) -> bytes:
    """The bytes of a file that may be a conversation: few enough beside its texts to become objects of Python."""
    data = read_file_or_pipe(path, MAX_FILE_BYTES)
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > MAX_QUOTES or len(_STRING.sub(b"", bare)) > MAX_STRUCTURE_BYTES:
        raise YarnEdgeError(f"{path}: is not a saved conversation (too much besides its texts)")
    return data


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return whole_characters(value)


def _list(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _turn(data: dict[str, Any]) -> Turn:
    return Turn(_text(data["question"]), _text(data["answer"]), _documents(data["documents"]))


def _documents(data: Any) -> tuple[Document, ...]:
    return tuple(Document(one_line(_text(item["name"])), _text(item["text"])) for item in _list(data))

"""What was said: a system prompt, turns of question and answer, and the documents that they are about. No model, no tokens.

A document belongs to the question that it was given with, and stands in front of it. When the oldest turns must go, their
documents stay: they move to the next question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yarn_edge.chat.template import Message
from yarn_edge.errors import YarnEdgeError, os_error

FORMAT = "yarn-edge conversation 1"
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Document:
    """A text to talk about. name: for people; the model sees the text alone."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    """A question with the documents in front of it, and its answer, None where it has none yet."""

    question: str
    answer: str | None = None
    documents: tuple[Document, ...] = ()

    @property
    def said(self) -> str:
        """The user's message."""
        return "\n\n".join(part.strip("\n") for part in (*(d.text for d in self.documents), self.question) if part)


@dataclass
class Conversation:
    """system: its prompt, None for none. waiting: documents for the next question."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: tuple[Document, ...] = ()

    def messages(self) -> list[Message]:
        """As a chat template sees them."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.said})
            if turn.answer is not None:
                found.append({"role": "assistant", "content": turn.answer})
        return found

    def asked(self, question: str) -> Conversation:
        """A copy with one more question, and the documents that waited for it."""
        return replace(self, turns=[*self.turns, Turn(question, documents=self.waiting)], waiting=())

    def without_oldest(self) -> Conversation:
        """A copy without the oldest turn; its documents stand before the next question. At least two turns are needed."""
        oldest, following, *others = self.turns
        kept = replace(following, documents=(*oldest.documents, *following.documents))
        return replace(self, turns=[kept, *others])

    def without_all_but_last(self) -> Conversation:
        """A copy with the last turn alone, and all documents."""
        found = self
        while len(found.turns) > 1:
            found = found.without_oldest()
        return found

    def documents(self) -> list[Document]:
        """All of them, in their order."""
        return [document for turn in self.turns for document in turn.documents] + list(self.waiting)

    def undo(self) -> Turn | None:
        """Take the last turn back; its documents wait for the next question. None where there is none."""
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
        """Write it as JSON, whole or not at all, over whatever is there. Raises YarnEdgeError."""
        from yarn_edge.writer import write_file

        def documents(found: tuple[Document, ...]) -> list[dict[str, str]]:
            return [vars(document) for document in found]

        turns = [{"question": t.question, "answer": t.answer, "documents": documents(t.documents)} for t in self.turns]
        data = {"format": FORMAT, "system": self.system, "turns": turns, "waiting": documents(self.waiting)}
        write_file(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n", force=True)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """What `save` wrote. Raises YarnEdgeError for anything else."""
        try:
            with path.open("rb") as file:
                data = json.loads(file.read(MAX_FILE_BYTES))
        except OSError as error:
            raise os_error(error, path) from error
        except (ValueError, RecursionError):
            raise YarnEdgeError(f"{path}: is no saved conversation (no JSON)") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise YarnEdgeError(f"{path}: is no saved conversation ({FORMAT!r} is not in it)")
        try:
            return cls(_text(data["system"]), [_turn(turn) for turn in data["turns"]], _documents(data["waiting"]))
        except (KeyError, TypeError, AttributeError):
            raise YarnEdgeError(f"{path}: is a damaged conversation") from None


def _text(value: Any, required: bool = False) -> Any:
    if not isinstance(value, str) and (required or value is not None):
        raise TypeError
    return value


def _turn(data: dict[str, Any]) -> Turn:
    return Turn(_text(data["question"], True), _text(data["answer"], True), _documents(data["documents"]))


def _documents(data: list[dict[str, Any]]) -> tuple[Document, ...]:
    return tuple(Document(_text(item["name"], True), _text(item["text"], True)) for item in data)

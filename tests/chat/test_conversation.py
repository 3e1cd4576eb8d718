"""Turns and documents: what the template sees, what is dropped, what a file keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.chat.conversation import FORMAT, Conversation, Document, Turn
from yarn_edge.errors import YarnEdgeError

BOOK, NOTE = Document("book.txt", "A long book.\n"), Document("note.md", "\nA note.")


def long_one() -> Conversation:
    found = Conversation("Be brief.", waiting=(BOOK,))
    for number in range(3):
        found = found.asked(f"Question {number}?")
        found.turns[-1] = Turn(found.turns[-1].question, f"Answer {number}.", found.turns[-1].documents)
    return found


def test_documents_stand_before_the_question_that_they_came_with() -> None:
    found = Conversation("Be brief.", waiting=(BOOK, NOTE)).asked("Why?")
    assert found.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A long book.\n\nA note.\n\nWhy?"},
    ]
    assert found.waiting == ()
    assert Conversation(waiting=(BOOK,)).asked("").messages() == [{"role": "user", "content": "A long book."}]


def test_the_oldest_turns_go_and_their_documents_stay() -> None:
    whole = long_one()
    shorter = whole.without_oldest()
    assert [turn.said for turn in shorter.turns] == ["A long book.\n\nQuestion 1?", "Question 2?"]
    assert [turn.answer for turn in shorter.turns] == ["Answer 1.", "Answer 2."]
    assert len(whole.turns) == 3  # a copy
    (last,) = whole.asked("And?").without_all_but_last().turns
    assert last.said == "A long book.\n\nAnd?"
    assert whole.documents() == shorter.documents() == [BOOK]


def test_undo_gives_the_document_back() -> None:
    found = Conversation(waiting=(BOOK,)).asked("Why?")
    turn = found.undo()
    assert turn is not None
    assert turn.question == "Why?"
    assert found.waiting == (BOOK,)
    assert found.undo() is None
    found.clear()
    assert found.documents() == []


def test_a_file_keeps_all_of_it(tmp_path: Path) -> None:
    path, found = tmp_path / "talk.json", long_one()
    found.waiting = (NOTE,)
    found.save(path)
    assert Conversation.load(path) == found
    found.undo()
    found.save(path)  # over itself
    assert Conversation.load(path) == found
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.json"]


GOOD: dict[str, Any] = {"format": FORMAT, "system": None, "turns": [], "waiting": []}
BROKEN = {
    "not JSON": ("{", "not JSON"),
    "another file": ('{"a": 1}', "is not a saved conversation"),
    "a list": ("[]", "is not a saved conversation"),
    "deep": ("[" * 100_000, "not JSON"),
    "another format": (json.dumps(GOOD | {"format": "yarn-edge conversation 99"}), "is not a saved conversation"),
    "no turns": (json.dumps({k: v for k, v in GOOD.items() if k != "turns"}), "damaged"),
    "a number for a system prompt": (json.dumps(GOOD | {"system": 3}), "damaged"),
    "a turn without an answer": (
        json.dumps(GOOD | {"turns": [{"question": "x", "answer": None, "documents": []}]}),
        "damaged",
    ),
    "turns of text": (json.dumps(GOOD | {"turns": "abc"}), "damaged"),
    "a document of numbers": (json.dumps(GOOD | {"waiting": [{"name": 1, "text": 2}]}), "damaged"),
}


@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(YarnEdgeError, match=message):
        Conversation.load(path)


def test_places_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(YarnEdgeError, match="No such file"):
        Conversation.load(tmp_path / "none.json")
    with pytest.raises(YarnEdgeError, match="no such folder"):
        long_one().save(tmp_path / "no" / "talk.json")

"""Fields of requests, and what is wrong with them, in messages that name the field as the client wrote it: messages[2].tool_calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from reprlib import Repr
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line

Accepted = Mapping[str, tuple[Any, ...]]  # field -> values that ask for what happens anyway
_SHORT = Repr()  # its work does not grow with the value
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def refuse_unknown(fields: Mapping[str, Any], accepted: Accepted, where: str = "", read: Collection[str] = ()) -> None:
    """Raise YarnEdgeError for a field whose value is neither empty nor accepted. where: goes before the field's name.

    read: fields that are read elsewhere, whatever their value.
    """
    for name, value in fields.items():
        if name not in read and not any(_is_same(value, other) for other in (*_EMPTY, *accepted.get(name, ()))):
            raise YarnEdgeError(f"{where}{one_line(name, 60)} is not supported by this server")


def brief(value: Any) -> str:
    """A value of a request, for a message."""
    return one_line(_SHORT.repr(value), 60)


def _is_same(value: Any, other: Any) -> bool:
    """Whether both are equal; 0 is not False, nor 1 True."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def is_json(content_type: str) -> bool:
    """Whether a Content-Type, with or without parameters, is JSON's."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def complaint(errors: Sequence[Mapping[str, Any]]) -> str:
    """pydantic's errors about a request in one line: the first field, and everything that it may be."""
    where, *_ = places = [str(next(iter(error["loc"]), "")) for error in errors]
    if not where:
        return "the request must be a JSON object"
    reasons = dict.fromkeys(str(error["msg"]) for error, place in zip(errors, places, strict=True) if place == where)
    return f"{where}: {', or '.join(reasons)}"

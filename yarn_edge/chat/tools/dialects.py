"""The forms in which models write calls, one row each, chosen by the text of the chat template.

In `call`, {name} and {arguments} stand for themselves, {id} for nine letters and digits, and ~ for white space that may be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Choice = str | Mapping[str, Any]  # none, auto, required; {"type": "function", "function": {"name": …}}
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CallDialect:
    """How the calls of a family of models look.

    marks: regular expressions, all of which the template's text has; call: one call; first, between, last: around several.
    starts: what begins a call in an answer; at_start: only where nothing but white space precedes it; before: what may stand
    before a call's own text; head: a regular expression of what precedes the arguments, with a group for the name, if that is no
    JSON; closers: what may stand between and after calls; again: what begins another call right after one. arguments: a JSON
    object, or a tag for each (xml). visible: control tokens whose text calls consist of, for `Asked.visible`. generic: the
    template has no part in it. channels: an answer has a part for reasoning, with or without tools.
    """

    name: str
    marks: tuple[str, ...]
    call: str
    starts: tuple[str, ...]
    before: tuple[str, ...] = ()
    head: str | None = None
    closers: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    first: str = ""
    between: str = "~"
    last: str = ""
    visible: tuple[str, ...] = ()
    arguments: Literal["json", "xml"] = "json"
    at_start: bool = False
    several: bool = True
    generic: bool = False
    channels: bool = False


_NAME = "(?P<name>[A-Za-z0-9_.-]+)"
_DEEPSEEK = {
    "first": "<｜tool▁calls▁begin｜>",
    "last": "~<｜tool▁calls▁end｜>",
    "starts": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    "before": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    "head": rf"(?:function<｜tool▁sep｜>)?{_NAME}(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*",
    "closers": ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "visible": (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
}
_HERMES = CallDialect(
    "hermes",
    ("<tool_call>", r'\{\\?"name\\?": ', "arguments"),
    call='<tool_call>~{~"name":~"{name}",~"arguments":~{arguments}~}~</tool_call>',
    starts=("<tool_call>",),
    before=("<tool_call>",),
    closers=("</tool_call>",),
    visible=("<tool_call>", "</tool_call>"),
)

DIALECTS: tuple[CallDialect, ...] = (
    CallDialect(
        "harmony",
        (r"<\|channel\|>", r"functions"),
        call="to=functions.{name}~<|constrain|>json<|message|>{arguments}",
        starts=(),
        several=False,
        channels=True,
        visible=("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"),
    ),
    CallDialect(
        "qwen3-coder",
        ("<function=", "<parameter=", "<tool_call>"),
        call="<tool_call>~<function={name}>~{arguments}</function>~</tool_call>",
        starts=("<tool_call>", "<function="),
        before=("<tool_call>",),
        closers=("</tool_call>",),
        visible=_HERMES.visible,
        arguments="xml",
    ),
    CallDialect(
        "deepseek-r1",
        ("<｜tool▁call▁begin｜>", "```json"),
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        **{**_DEEPSEEK, "closers": ("```", *_DEEPSEEK["closers"])},  # type: ignore[arg-type]
    ),
    CallDialect(
        "deepseek-v3.1",
        ("<｜tool▁call▁begin｜>",),
        call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        **_DEEPSEEK,  # type: ignore[arg-type]
    ),
    CallDialect(
        "mistral-small",
        (r"\[TOOL_CALLS\]", r"\[CALL_ID\]", r"\[ARGS\]"),
        call="[TOOL_CALLS]{name}[CALL_ID]{id}[ARGS]{arguments}",
        between="",
        starts=("[TOOL_CALLS]",),
        before=("[TOOL_CALLS]",),
        head=rf"{_NAME}(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*",
        visible=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    CallDialect(
        "ministral",
        (r"\[TOOL_CALLS\]", r"\[ARGS\]"),
        call="[TOOL_CALLS]{name}[ARGS]{arguments}",
        between="",
        starts=("[TOOL_CALLS]",),
        before=("[TOOL_CALLS]",),
        head=rf"{_NAME}\[ARGS\]\s*",
        visible=("[TOOL_CALLS]", "[ARGS]"),
    ),
    CallDialect(
        "mistral",
        (r"\[TOOL_CALLS\]",),
        call='{"name":~"{name}",~"arguments":~{arguments}(,~"id":~"{id}")}',
        first="[TOOL_CALLS]~[",
        between=",~",
        last="~]",
        starts=("[TOOL_CALLS]",),
        before=("[TOOL_CALLS]", "["),
        closers=(",", "]"),
        again=("{",),
        visible=("[TOOL_CALLS]",),
    ),
    CallDialect(
        "llama-3",
        (r'"parameters"', r"ipython|python_tag"),
        call='{"name":~"{name}",~"parameters":~{arguments}~}',
        starts=("{", "<|python_tag|>"),
        before=("<|python_tag|>",),
        at_start=True,
        several=False,
        visible=("<|python_tag|>",),
    ),
    _HERMES,
)
GENERIC_DIALECT = replace(_HERMES, name="generic", marks=(), generic=True)

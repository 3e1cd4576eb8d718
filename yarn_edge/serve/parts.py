"""Parts of requests that several interfaces have: contents in text parts, tools. Errors name the field as the client wrote it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import Accepted, brief, refuse_unknown
from yarn_edge.serve.question import JsonForm, Tools

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# Fields without an effect on the answer: hints for a cache.
HINTS = ("cache_control",)


def text_of(content: Any, where: str, kinds: Collection[str] = ("text",)) -> str:
    """The text of a message, given as text or as a list of parts, which are joined with line breaks. kinds: the names of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise YarnEdgeError(f"{where} is {brief(content)}, but must be text or a list of text parts")
    return "\n".join(text_part(part, f"{where}[{number}]", kinds) for number, part in enumerate(content))


def text_part(part: Any, where: str, kinds: Collection[str] = ("text",)) -> str:
    """The text of one part."""
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in kinds:
        raise YarnEdgeError(f"{where}: a part of type {brief(kind)} is not supported, only text")
    text = string(part, "text", where)
    refuse_unknown(part, {}, f"{where}.", ("type", "text", "logprobs", *HINTS))
    return text


def an_object(given: Any, where: str) -> dict[str, Any]:
    """A value that must be a JSON object."""
    if not isinstance(given, dict):
        raise YarnEdgeError(f"{where} is {brief(given)}, but must be an object")
    return given


def string(given: dict[str, Any], name: str, where: str) -> str:
    """A field that must be text."""
    value = given.get(name)
    if not isinstance(value, str):
        raise YarnEdgeError(f"{where}.{name} is {brief(value)}, but must be text")
    return value


def one_name(given: Any, names: Collection[str], where: str) -> str:
    """A value that must be one of these names."""
    if not isinstance(given, str) or given not in names:
        raise YarnEdgeError(f"{where} is {brief(given)}, but only {', '.join(names)} are supported")
    return given


def text_or_tokens(given: Any, where: str) -> str | list[int]:
    """A text, or the tokens of one."""
    if isinstance(given, str) or (isinstance(given, list) and all(type(token) is int for token in given)):
        return given
    raise YarnEdgeError(f"{where} is {brief(given)}, but must be a text or a list of tokens")


@dataclass(frozen=True)
class ToolWords:
    """How an interface names the parts of a tool. kinds: of tools that it takes (None: the kind is left out); inside: the field that
    holds the others, "" for none; schema: that of the arguments' JSON schema.
    """

    kinds: tuple[str | None, ...]
    inside: str
    schema: str


_OF_TOOLS: Accepted = {
    "strict": (True, False),
    "defer_loading": (False,),
    "eager_input_streaming": (True, False),
    "allowed_callers": (["direct"],),
}


def tools_of(given: Any, words: ToolWords) -> tuple[dict[str, Any], ...]:
    """The field `tools` in the form that chat templates read. Raises YarnEdgeError that names what is wrong with it."""
    if given is None:
        return ()
    if not isinstance(given, list):
        raise YarnEdgeError(f"tools is {brief(given)}, but must be a list of tools")
    if len(given) > MAX_TOOLS:
        raise YarnEdgeError(f"tools: {len(given)} were given, at most {MAX_TOOLS} are allowed")
    return tuple(_tool(tool, f"tools[{number}]", words) for number, tool in enumerate(given))


def _tool(given: Any, where: str, words: ToolWords) -> dict[str, Any]:
    tool = an_object(given, where)
    kind = tool.get("type")
    if not (kind is None or isinstance(kind, str)) or kind not in words.kinds:
        raise YarnEdgeError(f"{where}.type: a tool of type {brief(kind)} is not supported by this server")
    if words.inside:
        _refuse_others(tool, ("type", words.inside), where)
        tool, where = an_object(tool.get(words.inside), f"{where}.{words.inside}"), f"{where}.{words.inside}"
    name, schema = string(tool, "name", where), tool.get(words.schema)
    if not _NAME.fullmatch(name):
        raise YarnEdgeError(f"{where}.name is {brief(name)}, but must be 1 to 128 letters, digits, and _ . : -")
    function: dict[str, Any] = {"name": name}
    if tool.get("description") is not None:
        function["description"] = string(tool, "description", where)
    empty = {"type": "object", "properties": {}}
    function["parameters"] = empty if schema is None else an_object(schema, f"{where}.{words.schema}")
    _refuse_others(tool, ("type", "name", "description", words.schema), where)
    return {"type": "function", "function": function}


def _refuse_others(given: dict[str, Any], read: Collection[str], where: str) -> None:
    refuse_unknown(given, _OF_TOOLS, f"{where}.", (*read, *HINTS))


def chosen_tools(tools: Any, choice: Any, parallel: bool | None, words: ToolWords) -> Tools:
    """Tools and a choice among them as OpenAI's interfaces give it: a word, or a function by its name."""
    function, where = "", "tool_choice"
    if isinstance(choice, dict) and choice.get("type") == "function":
        if words.inside:
            choice, where = an_object(choice.get(words.inside), f"{where}.{words.inside}"), f"{where}.{words.inside}"
        function, choice = string(choice, "name", where), "required"
    if choice not in (None, "auto", "none", "required"):
        raise YarnEdgeError(f"tool_choice is {brief(choice)}, but must be none, auto, required or a function")
    return Tools(tools_of(tools, words), choice or "auto", function, parallel is not False)


def json_form(given: Any, where: str, inside: str = "") -> JsonForm | None:
    """The JSON that an answer must be; None for text. inside: the field that holds the schema's."""
    if given is None:
        return None
    form = an_object(given, where)
    kind, described = form.get("type"), ("name", "description", "schema", "strict")
    if kind in ("text", "json_object"):
        _refuse_others(form, ("type",), where)
        return None if kind == "text" else JsonForm({}, where)
    if kind != "json_schema":
        raise YarnEdgeError(f"{where}.type is {brief(kind)}, but must be text, json_object or json_schema")
    if inside:
        _refuse_others(form, ("type", inside), where)
        form, where = an_object(form.get(inside), f"{where}.{inside}"), f"{where}.{inside}"
    _refuse_others(form, ("type", *described), where)
    return JsonForm(an_object(form.get("schema"), f"{where}.schema"), f"{where}.schema")


def effort_of(given: Any, where: str) -> dict[str, dict[str, Any]]:
    """How much the model is to think, as the options and hints of a question. "none" is what happens anyway where it cannot think."""
    if given is None:
        return {"options": {}, "hints": {}}
    if not isinstance(given, str):
        raise YarnEdgeError(f"{where} is {brief(given)}, but must be text")
    effort = {"reasoning_effort": given}
    if given == "none":
        return {"options": {}, "hints": {**effort, "enable_thinking": False}}
    return {"options": effort, "hints": {}}

"""Grammars of calls: a form's own text around arguments that are held to the schema of the function."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from yarn_edge.chat.reasoning import TAGS
from yarn_edge.chat.tools.dialects import CallDialect, Choice, Tools
from yarn_edge.engine.constraint import Constraint
from yarn_edge.engine.grammar.rules import GrammarRules, literal
from yarn_edge.engine.grammar.schema import SchemaGrammar
from yarn_edge.engine.grammar.values import SchemaError
from yarn_edge.errors import YarnEdgeError, one_line

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PLACES = re.compile(r"(\{name\}|\{arguments\}|\{id\}|~|\(.*\))")
_SPACE = "[ \\n]{0,8}"
_ID = "[a-zA-Z0-9]{9}"
_PARAMETER_END = "\n</parameter>"


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function that a tool describes."""
    inside = tool.get("function", tool)
    return inside if isinstance(inside, Mapping) else {}


def tool_names(tools: Tools) -> list[str]:
    """The names of functions. Raises YarnEdgeError for one that no form can write, or that two have."""
    if len(tools) > MAX_TOOLS:
        raise YarnEdgeError(f"tools has {len(tools)} functions, at most {MAX_TOOLS} are possible")
    names: list[str] = []
    for n, tool in enumerate(tools):
        name = function_of(tool).get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise YarnEdgeError(f"tools[{n}].function.name is not 1 to 64 of the characters A-Z a-z 0-9 _ . -")
        if name in names:
            raise YarnEdgeError(f"tools[{n}].function.name {name!r} appears twice")
        names.append(name)
    return names


def call_constraint(
    form: CallDialect, tools: Tools, choice: Choice, opened: str | None, several: bool
) -> Constraint | None:
    """`ToolForm.constraint`."""
    names = tool_names(tools)
    chosen, forced = _chosen(names, choice)
    if not chosen:
        return None
    rules = GrammarRules()
    calls = [_Call(form, rules, tools[n], n, forced).rule() for n in range(len(tools)) if names[n] in chosen]
    call = rules.add(" | ".join(calls))
    again = f"({_text(form.between)} {call}){{0,15}}" if several else ""
    root = rules.add(" ".join(filter(None, [_text(form.first), call, again, _text(form.last)])))
    if form.channels:
        return _in_channels(form, rules, root, forced)
    if forced:
        if opened is not None:
            root = rules.until(opened, rules.add(f"{_SPACE} {root}"))
        return Constraint(rules.text(root), visible=form.visible + ((opened,) if opened else ()), ways=rules.ways)
    edge = r"\A\s*" if form.at_start else ""
    begin = form.first.partition("~")[0]
    starts = [begin] if begin else [start for start in form.starts if form.call.startswith(start)]
    if form.at_start:
        starts = ['{"name"']
    triggers = tuple(f"{edge}({re.escape(start)})" for start in starts)
    skipped = (*TAGS, *([("", opened)] if opened else ()))
    return Constraint(rules.text(root), triggers, form.visible, skipped, rules.ways)


def _in_channels(form: CallDialect, rules: GrammarRules, root: str, forced: bool) -> Constraint:
    """Harmony: the recipient stands in the header of a message."""
    if not forced:
        return Constraint(
            rules.text(root), (r"(?:assistant|commentary)\s?(?=to)(to=functions\.)",), form.visible, ways=rules.ways
        )
    call = rules.add(f"{literal('<|channel|>commentary ')} {root}")
    return Constraint(_maybe_after_analysis(rules, call), visible=form.visible, ways=rules.ways)


def in_final_channel(form: CallDialect, answer: Constraint) -> Constraint:
    """`ToolForm.framed`."""
    rules = GrammarRules("c")
    final = rules.add(f"{literal('<|channel|>final<|message|>')} answer")
    grammar = _maybe_after_analysis(rules, final) + answer.grammar.replace("root ::=", "answer ::=", 1)
    return Constraint(grammar, visible=form.visible, ways=answer.ways)


def _maybe_after_analysis(rules: GrammarRules, message: str) -> str:
    """The grammar of an answer that is this message, or the analysis and then this message."""
    after = rules.add(f"{literal('<|start|>assistant')} {message}")
    analysis = f"{literal('<|channel|>analysis<|message|>')} {rules.until('<|end|>', after)}"
    return rules.text(rules.add(f"{message} | {analysis}"))


def _chosen(names: list[str], choice: Choice) -> tuple[list[str], bool]:
    """(the functions that may be called, whether one must)."""
    if isinstance(choice, Mapping):
        name = function_of(choice).get("name")
        if name not in names:
            raise YarnEdgeError(f"tool_choice names {one_line(repr(name), 80)}, which is not among tools")
        return [str(name)], True
    if choice not in ("none", "auto", "required"):
        raise YarnEdgeError("tool_choice is not none, auto, required, or a function")
    if choice == "required" and not names:
        raise YarnEdgeError("tool_choice is required, but there are no tools")
    return ([] if choice == "none" else names), choice == "required"


class _Call:
    """A call of one function. Its arguments are held to the schema as far as a grammar can say it; to all of it if forced or strict."""

    def __init__(
        self, form: CallDialect, rules: GrammarRules, tool: Mapping[str, Any], number: int, forced: bool
    ) -> None:
        function = function_of(tool)
        self.form, self.rules, self.name = form, rules, str(function["name"])
        self.at = f"tools[{number}].function.parameters"
        schema = function.get("parameters")
        self.schema: Mapping[str, Any] = schema if isinstance(schema, Mapping) and schema else {"properties": {}}
        if schema is not None and not isinstance(schema, Mapping):
            raise SchemaError(self.at, "is not a schema (an object)")
        self.grammar = SchemaGrammar(rules, relaxed=not forced and function.get("strict") is not True)

    def rule(self) -> str:
        """The name of its rule."""
        return self.rules.add(self._written(self.form.call))

    def _written(self, call: str) -> str:
        parts = []
        for part in _PLACES.split(call):
            if part == "{name}":
                parts.append(literal(self.name))
            elif part == "{arguments}":
                parts.append(self._tags() if self.form.arguments == "xml" else self._object())
            elif part.startswith("(") and part.endswith(")"):
                parts.append(f"({self._written(part[1:-1])})?")
            elif part:
                parts.append(_text(part))
        return " ".join(parts)

    def _object(self) -> str:
        schema = self.schema
        if not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
            schema = {**schema, "type": "object"}
        return self.grammar.value(schema, self.at)

    def _tags(self) -> str:
        """An argument a line: <parameter=name>, its value, </parameter>."""
        self._object()  # refuses what it must
        for keyword in sorted(self.schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}):
            raise SchemaError(f"{self.at}.{keyword}", "is not supported in this model's form of calls: list properties")
        required = self.schema.get("required", ())
        properties, more = self.schema.get("properties", {}), self.schema.get("additionalProperties", True)
        parts = []
        for name, schema in {**properties, **{n: more for n in required if n not in properties}}.items():
            if not _NAME.fullmatch(name):
                raise SchemaError(
                    f"{self.at}.properties", f"has a name that this model cannot write: {one_line(repr(name), 80)}"
                )
            value = self._tag_value(schema, f"{self.at}.properties.{name}")
            tag = self.rules.add(f"{literal(f'<parameter={name}>')} [\\n]? {value} [\\n]")
            parts.append(tag if name in required else f"{tag}?")
        return " ".join(parts) or '""'

    def _tag_value(self, schema: Any, at: str) -> str:
        end = self.rules.add('""')
        kinds = schema.get("type") if isinstance(schema, Mapping) else None
        if kinds != "string":
            return f"{self.grammar.value(schema, at, self.schema)} {literal(_PARAMETER_END)}"
        if isinstance(schema.get("enum"), list) and all(isinstance(v, str) for v in schema["enum"]):
            ways = " | ".join(literal(value) for value in schema["enum"])
            return f"({ways}) {literal(_PARAMETER_END)}"
        for keyword in sorted(schema.keys() & {"pattern", "format", "minLength", "maxLength", "const"}):
            self.grammar.cannot(f"{at}.{keyword}", "is not supported in this model's form of calls")
        return self.rules.until(_PARAMETER_END, end)


def _text(text: str) -> str:
    """A form's own text: ~ is white space that may be there, {id} an identifier."""
    parts = {"~": _SPACE, "{id}": _ID}
    pieces = re.split(r"(~|\{id\})", text)
    return " ".join(parts.get(piece) or literal(piece) for piece in pieces if piece)


def arguments_value(text: str, schema: Any) -> Any:
    """The value of an argument that is written as bare text: itself if it is to be a string, else what it is as JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text

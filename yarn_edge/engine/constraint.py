"""What an answer must look like: a grammar of llama.cpp (GBNF), from the first token on or after a trigger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yarn_edge.engine.grammar.rules import GrammarRules
from yarn_edge.engine.grammar.schema import SchemaGrammar
from yarn_edge.errors import YarnEdgeError

MAX_GRAMMAR_CHARS = 2 << 20


@dataclass(frozen=True)
class Constraint:
    """A grammar with the root rule "root", which ends an answer where it ends.

    triggers: regular expressions of Python; the grammar begins at the first group of the first one that is found in the answer,
    or where its match begins. Without them it begins with the answer. visible: names of control tokens that it may consist of;
    others never appear under it. skipped: blocks in which no trigger counts if the answer begins with one, by their opening and
    closing tags; an opening of "" says that the answer begins inside. ways: in how many ways the next character of a text can be
    read somewhere.
    """

    grammar: str
    triggers: tuple[str, ...] = ()
    visible: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    ways: int = 1

    def __post_init__(self) -> None:
        if not re.search("^root ::= ", self.grammar, re.MULTILINE):
            raise YarnEdgeError("the grammar has no rule named root")
        if len(self.grammar) > MAX_GRAMMAR_CHARS or "\0" in self.grammar:
            raise YarnEdgeError(f"the grammar has over {MAX_GRAMMAR_CHARS} characters, or a NUL")
        for trigger in self.triggers:
            re.compile(trigger)


def json_schema_constraint(schema: Mapping[str, Any] | bool, *, after: str | None = None) -> Constraint:
    """Only JSON that the schema accepts. after: a tag up to which anything may precede it, such as </think>.

    Raises SchemaError (`yarn_edge.engine.grammar.values`) that names the keyword which cannot be held to.
    """
    grammar = SchemaGrammar(GrammarRules())
    return _constraint(grammar, grammar.value(schema), after)


def json_object_constraint(*, after: str | None = None) -> Constraint:
    """Only a JSON object, of whatever members, up to eight levels deep."""
    grammar = SchemaGrammar(GrammarRules())
    return _constraint(grammar, grammar.any_object(), after)


def _constraint(grammar: SchemaGrammar, value: str, after: str | None) -> Constraint:
    rules = grammar.rules
    if after is None:
        return Constraint(rules.text(value), ways=rules.ways)
    begun = rules.add(f"[ \\n]{{0,4}} {rules.add(value)}")
    return Constraint(rules.text(rules.until(after, begun)), visible=(after,), ways=rules.ways)

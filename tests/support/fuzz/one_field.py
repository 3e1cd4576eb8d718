"""Whole requests for every route, and the same with one value, at any depth, replaced by another."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]

_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^a+$"},
        "b": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 5}, "minItems": 1, "maxItems": 2},
        "e": {"type": "string", "minLength": 1, "maxLength": 3},
        "c": {"anyOf": [{"const": 1}, {"enum": [None, "x"]}, {"$ref": "#/$defs/d"}]},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"d": {"type": "null"}},
}
_HI = [{"role": "user", "content": "Hi"}]
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "r"},
]
_FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _SCHEMA}}
_NUMBERS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repeat_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "seed": 1,
}
_CHAT = {
    "messages": _TALK,
    "max_tokens": 2,
    "tools": [_FUNCTION],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": True,
    "logit_bias": {"5": 1},
    "prompt_cache_key": "k",
    "stream": False,
    "stream_options": {"include_usage": True},
    "stop": ["x"],
    "n": 1,
    "logprobs": True,
    "top_logprobs": 1,
    "continue_final_message": False,
    "add_generation_prompt": True,
    "reasoning_effort": "none",
    "model": "m",
    **_NUMBERS,
}
_FORM = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": _SCHEMA}}
_ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "x", "status": "completed"},
    {"type": "function_call_output", "call_id": "1", "output": "a"},
]
_RESPONSES = {
    "input": _ITEMS,
    "instructions": "Be brief.",
    "max_output_tokens": 2,
    "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "reasoning": {"effort": "none", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "top_logprobs": 1,
    "store": False,
    "truncation": "disabled",
}
_BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "h", "signature": "unsigned"},
            {"type": "text", "text": "Hm"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}], "is_error": False}
        ],
    },
]
_MESSAGES = {
    "max_tokens": 2,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": _BLOCKS,
    "tools": [{"name": "f", "input_schema": _SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "none"},
    "stop_sequences": ["x"],
}
WHOLE_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {"messages": _HI, "max_tokens": 2, "response_format": _FORM}),
    (
        "/v1/completions",
        {"prompt": "Hi", "max_tokens": 2, "n": 1, "logprobs": 1, "stop": "x", "echo": False, "best_of": 1},
    ),
    ("/v1/responses", _RESPONSES),
    ("/v1/messages", _MESSAGES),
    ("/v1/messages/count_tokens", {"system": "x", "messages": _HI, "tools": [{"name": "f", "input_schema": {}}]}),
    ("/v1/embeddings", {"input": "Hi", "encoding_format": "float"}),
    ("/tokenize", {"text": "Hi"}),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, 1.5, 1e308),
    *("", "x", "\x00", "</s>", "a" * 3000, "\u202e\x1b[31m"),
    *([], [None], [[]], [{}], ["a"] * 200, {}, {"a": 1}, {"type": "x"}, {"type": None}, {"type": []}),
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}],
    [{"type": "text", "text": 5}],
    {"\u202e\x1b[31m": 1},
)


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where a value has values: the keys and numbers that lead to each."""
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*place, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy with another value in one place."""
    if not place:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


def one_field(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of a whole request in which one value is another."""
    path, whole = rng.choice(WHOLE_REQUESTS)
    return path, json.dumps(replaced(whole, rng.choice([*places(whole)]), rng.choice(VALUES))).encode()

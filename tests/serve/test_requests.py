"""Fields of requests: read, empty, without an effect, or refused by their name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from yarn_edge.chat.tools.forms import GENERIC
from yarn_edge.engine.constraint import json_schema_constraint
from yarn_edge.engine.grammar.values import SchemaError
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.app import INTERFACES, OTHER_REQUESTS
from yarn_edge.serve.question import Question
from yarn_edge.serve.requests import CheckedRequest, Sampled, biases, parsed
from yarn_edge.serve.surfaces.chat import ChatRequest
from yarn_edge.serve.surfaces.completions import CompletionRequest
from yarn_edge.serve.surfaces.embeddings import EmbeddingsRequest

from support import depth
from support.fuzz.one_field import VALUES, WHOLE_REQUESTS, Place, places, replaced

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


READ: dict[str, tuple[dict[str, Any], str]] = {
    "text": (USER, "Hello"),
    "no words": ({"role": "user", "content": ""}, ""),
    "a part": ({"role": "user", "content": [text("a")]}, "a"),
    "parts": ({"role": "user", "content": [text("a"), text("b\n"), text("c")]}, "a\nb\n\nc"),
    "a hint for a cache": ({"role": "user", "content": [text("a", cache_control={"type": "ephemeral"})]}, "a"),
    "an empty list in a part": ({"role": "user", "content": [text("a", annotations=[])]}, "a"),
    "all of an SDK's fields": (
        {**ASSISTANT, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        "Hi",
    ),
    "no tools were called": ({**ASSISTANT, "tool_calls": []}, "Hi"),
    "nothing was said": ({"role": "assistant", "content": []}, ""),
    "no prefix": ({**ASSISTANT, "prefix": False}, "Hi"),
    "no name": ({**USER, "name": ""}, "Hello"),
    "a developer": ({"role": "developer", "content": "Be brief."}, "Be brief."),
}


@pytest.mark.parametrize("message, expected", READ.values(), ids=READ)
def test_messages_that_are_read(message: dict[str, Any], expected: str) -> None:
    said = ChatRequest(messages=[message]).as_messages()
    assert said == [{"role": message["role"], "content": expected}]


def test_calls_and_results() -> None:
    """In Hugging Face's form; two messages of the assistant stay two."""
    result = {"role": "tool", "tool_call_id": "1", "content": [text("5"), text("6")], "name": "f"}
    thought = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]}
    messages = ChatRequest(messages=[USER, ASSISTANT, thought, result, ASSISTANT]).as_messages()
    assert messages[2] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}],
    }
    assert messages[3] == {"role": "tool", "tool_call_id": "1", "name": "f", "content": "5\n6"}
    assert len(messages) == 5


UNREAD: dict[str, tuple[Any, str]] = {
    "calls of a user": ({**USER, "tool_calls": [CALL]}, "messages[2].tool_calls is not supported by this server"),
    "a call that is none": ({**ASSISTANT, "tool_calls": [5]}, "messages[2].tool_calls[0] is 5, but must be an object"),
    "calls that are none": ({**ASSISTANT, "tool_calls": 5}, "messages[2].tool_calls is 5, but must be a list"),
    "a call of no function": (
        {**ASSISTANT, "tool_calls": [{**CALL, "type": "custom"}]},
        "messages[2].tool_calls[0].type is 'custom'",
    ),
    "a call without id": ({**ASSISTANT, "tool_calls": [{**CALL, "id": None}]}, "messages[2].tool_calls[0].id is None"),
    "arguments that are no JSON": (
        {**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1"}}]},
        "messages[2].tool_calls[0].function.arguments is '[1', but must be the text of a JSON object",
    ),
    "arguments that are no object": (
        {**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]},
        "messages[2].tool_calls[0].function.arguments is '[1]'",
    ),
    "function_call": ({**ASSISTANT, "function_call": {"name": "f"}}, "messages[2].function_call is"),
    "prefix": ({**ASSISTANT, "prefix": True}, "messages[2].prefix is"),
    "partial": ({**ASSISTANT, "partial": True}, "messages[2].partial is"),
    "prefix 0": ({**ASSISTANT, "prefix": 0}, "messages[2].prefix is"),
    "images of Ollama": ({**USER, "images": ["aGk="]}, "messages[2].images is"),
    "audio": ({**ASSISTANT, "audio": {"id": "a"}}, "messages[2].audio is"),
    "refusal": ({"role": "assistant", "content": None, "refusal": "No."}, "messages[2].refusal is"),
    "annotations": ({**ASSISTANT, "annotations": [{"type": "url_citation"}]}, "messages[2].annotations is"),
    "name": ({**USER, "name": "Ann"}, "messages[2].name is"),
    "thoughts of a user": ({**USER, "reasoning_content": "Hm."}, "messages[2].reasoning_content is"),
    "another field": ({**USER, "weight": 0}, "messages[2].weight is"),
    "a field of two lines": ({**USER, "a\nb": 1}, "messages[2].a b is"),
    "a result of nothing": (
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        "messages[2].tool_call_id is '1', but no tool call before it has that id",
    ),
    "a result without an id": ({"role": "tool", "content": "5"}, "messages[2].tool_call_id is None"),
    "function": ({"role": "function", "name": "f", "content": "5"}, "messages[2].role is 'function'"),
    "no role": ({"content": "x"}, "messages[2].role is None"),
    "a list as role": ({"role": ["user"], "content": "x"}, "messages[2].role is ['user']"),
    "no content": ({"role": "user"}, "messages[2].content is None, but must be text or a list of text parts"),
    "content null": ({"role": "system", "content": None}, "messages[2].content is None"),
    "content empty": ({"role": "user", "content": []}, "messages[2].content is []"),
    "content a number": ({"role": "user", "content": 7}, "messages[2].content is 7"),
    "content a table": ({"role": "assistant", "content": {"text": "x"}}, "messages[2].content is {'text': 'x'}"),
    "image_url": (
        {"role": "user", "content": [text("a"), {"type": "image_url", "image_url": {"url": "data:"}}]},
        "messages[2].content[1]: a part of type 'image_url' is not supported, only text",
    ),
    "input_audio": (
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        "messages[2].content[0]: a part of type 'input_audio'",
    ),
    "file": (
        {"role": "user", "content": [{"type": "file", "file": {}}]},
        "messages[2].content[0]: a part of type 'file'",
    ),
    "refusal part": (
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        "messages[2].content[0]: a part of type 'refusal'",
    ),
    "input_text": (
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        "messages[2].content[0]: a part of type 'input_text'",
    ),
    "no type": ({"role": "user", "content": [{"text": "a"}]}, "messages[2].content[0]: a part of type None"),
    "text as a part": ({"role": "user", "content": ["a"]}, "messages[2].content[0]: a part of type 'a'"),
    "a part without text": (
        {"role": "user", "content": [{"type": "text"}]},
        "messages[2].content[0].text is None, but must be text",
    ),
    "a part with more": (
        {"role": "user", "content": [text("a", image_url="x")]},
        "messages[2].content[0].image_url is",
    ),
    "not an object": ("Hello", "messages[2] is not an object with role and content"),
}


@pytest.mark.parametrize("message, reason", UNREAD.values(), ids=UNREAD)
def test_messages_that_are_refused(message: Any, reason: str) -> None:
    request = ChatRequest(messages=[USER, ASSISTANT, message])
    request.check()
    with pytest.raises(YarnEdgeError) as caught:
        request.as_messages()
    assert str(caught.value).startswith(reason)


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "echo": False,
    "suffix": "",
    "tools": [],
    "functions": None,
    "tool_choice": "none",
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "model": "any",
    "service_tier": "auto",
    "reasoning_effort": None,
    "parallel_tool_calls": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "stop": None,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "cache_prompt": True,
}
ASKING: dict[str, Any] = {
    "best_of": 3,
    "echo": True,
    "suffix": "x",
    "functions": [CALL],
    "function_call": {"name": "f"},
    "modalities": ["audio"],
    "store": True,
    "service_tier": "flex",
    "web_search_options": {"a": 1},
    "prediction": {"a": 1},
    "audio": {"voice": "a"},
    "grammar": "root ::= x",
    "repetition_penalty": 1.2,
    "dimensions": 5,
}
# Of one interface only.
ASKING_COMPLETIONS = {
    "tools": [TOOL],
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "enable_thinking": False,
    "top_logprobs": 2,
    "continue_final_message": True,
}


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_top_level_fields(kind: type[ChatRequest] | type[CompletionRequest]) -> None:
    asked: dict[str, Any] = {"messages": [USER]} if kind is ChatRequest else {"prompt": "a"}
    neutral = (
        NEUTRAL
        if kind is ChatRequest
        else {
            n: v
            for n, v in NEUTRAL.items()
            if n
            not in (
                "response_format",
                "top_logprobs",
                "tool_choice",
                "add_generation_prompt",
                "continue_final_message",
                "parallel_tool_calls",
            )
        }
    )
    request = kind(**asked, **neutral)
    request.check()
    assert request.question(Sampling()).n == 1
    refused = {**ASKING, **(ASKING_COMPLETIONS if kind is CompletionRequest else {})}
    for name, value in refused.items():
        with pytest.raises(YarnEdgeError, match=f"^{name} is not supported by this server$"):
            kind(**asked, **{name: value}).check()
    for name, value in {"echo": 0, "best_of": True}.items():  # equal only to Python
        with pytest.raises(YarnEdgeError, match=f"^{name} is not supported"):
            kind(**asked, **{name: value}).check()
    with pytest.raises(YarnEdgeError, match=r"^stream_options.continuous_usage_stats is not supported"):
        kind(**asked, stream_options={"continuous_usage_stats": True}).check()


def question(**fields: Any) -> Question:
    request = ChatRequest(messages=[USER], **fields)
    request.check()
    return request.question(Sampling())


UNASKABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a tool of another kind": (
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        "tools[0].type: a tool of type 'custom'",
    ),
    "no list of tools": ({"tools": {"f": 1}}, "tools is {'f': 1}, but must be a list of tools"),
    "129 tools": ({"tools": [TOOL] * 129}, "tools: 129 were given, at most 128"),
    "two of a name": ({"tools": [TOOL, TOOL]}, "tools: two have the same name"),
    "a name with spaces": (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name is 'a b'",
    ),
    "parameters that are no schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
        "tools[0].function.parameters is [1], but must be an object",
    ),
    "more about a tool": ({"tools": [{**TOOL, "weight": 1}]}, "tools[0].weight is not supported"),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice: a call is required, but there are no tools"),
    "a choice of another": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice: there is no tool 'g'",
    ),
    "a choice of some": (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
        "tool_choice is {'type': 'allowed_",
    ),
    "a list as choice": ({"tools": [TOOL], "tool_choice": ["auto"]}, "tool_choice is ['auto']"),
    "a form of answer": ({"response_format": {"type": "grammar"}}, "response_format.type is 'grammar'"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is None"),
    "tools and JSON": (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        "tools are not supported together",
    ),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    "21 top_logprobs": (
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs is 21, but must be a whole number from 0",
    ),
    "half a top_logprob": ({"logprobs": True, "top_logprobs": 1.5}, "top_logprobs is 1.5"),
    "nothing to continue": ({"continue_final_message": True}, "continue_final_message: the last message is not"),
}


@pytest.mark.parametrize("fields, reason", UNASKABLE.values(), ids=UNASKABLE)
def test_questions_that_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(YarnEdgeError) as caught:
        question(**fields)
    assert str(caught.value).startswith(reason)


def test_how_much_to_think() -> None:
    """ "none" matters only to templates that can think; anything else must be read."""
    assert question(reasoning_effort="low").options == {"reasoning_effort": "low"}
    none = question(reasoning_effort="none", enable_thinking=False, chat_template_kwargs={"date": "today"})
    assert none.options == {"enable_thinking": False, "date": "today"}
    assert none.hints == {"enable_thinking": False, "reasoning_effort": "none"}


def test_biases() -> None:
    assert biases({"5": -100, "0": 0.5}) == ((5, -100.0), (0, 0.5))
    wrong: dict[str, Any] = {
        "logit_bias is [], but must be an object": [],
        "logit_bias: '-1' is not a token id": {"-1": 1},
        "logit_bias: 'x' is not a token id": {"x": 1},
        "logit_bias.5 is True, but must be a number from -100 to 100": {"5": True},
        "logit_bias.5 is 101": {"5": 101},
        "logit_bias: 1025 tokens were given": {str(n): 1 for n in range(1025)},
    }
    for reason, given in wrong.items():
        with pytest.raises(YarnEdgeError) as caught:
            biases(given)
        assert str(caught.value).startswith(reason)


def test_two_limits_that_differ() -> None:
    ChatRequest(messages=[USER], max_tokens=5, max_completion_tokens=5).check()
    with pytest.raises(YarnEdgeError, match="max_tokens and max_completion_tokens differ"):
        ChatRequest(messages=[USER], max_tokens=5, max_completion_tokens=6).check()


@pytest.mark.parametrize(
    "given, expected",
    [(-1, None), (None, None), (0, 0), (7, 7), (2**32 - 2, 2**32 - 2), (2**32 + 6, 7), (-2, 2**32 - 3), (2**64 - 1, 0)],
)
def test_seeds(given: int | None, expected: int | None) -> None:
    """-1 is a new one; what llama.cpp's 32 bits (without the one that means a new seed) do not hold is reduced to them."""
    assert ChatRequest(messages=[USER], seed=given).sampling(Sampling()).seed == expected


def test_sampling_is_named_as_in_the_request() -> None:
    assert CompletionRequest(prompt="a", top_k=-1).sampling(Sampling()).top_k == 0
    assert CompletionRequest(prompt="a").sampling(Sampling(top_k=3)).top_k == 3
    for name, value in {
        "temperature": -1,
        "top_p": 1.5,
        "min_p": -0.5,
        "repeat_penalty": 0,
        "presence_penalty": 3,
    }.items():
        with pytest.raises(YarnEdgeError, match=f"^{name} is "):
            CompletionRequest(prompt="a", **{name: value}).sampling(Sampling())  # type: ignore[arg-type]
    for fields in ({"top_k": -2}, {"seed": 2**64}, {"seed": 10**4000}, {"seed": 1.5}):
        with pytest.raises(ValidationError):
            CompletionRequest(prompt="a", **fields)  # type: ignore[arg-type]


KINDS = {**{path: interface.request for path, interface in INTERFACES.items()}, **OTHER_REQUESTS}


def read(kind: type[CheckedRequest], body: dict[str, Any]) -> None:
    """A request as far as it is checked without a model."""
    request = parsed(kind, json.dumps(body).encode())
    if isinstance(request, EmbeddingsRequest):
        request.inputs()
    if not isinstance(request, Sampled):
        return
    question = request.question(Sampling())
    GENERIC.constraint(question.tools.usable, question.tools.choice)
    if question.form is not None and question.form.schema:
        try:
            json_schema_constraint(question.form.schema)
        except SchemaError as error:
            raise YarnEdgeError(f"{question.form.field}.{error.at}: {error.fact}") from None


@pytest.mark.parametrize("path, whole", WHOLE_REQUESTS, ids=[path for path, _whole in WHOLE_REQUESTS])
def test_a_value_of_another_kind_is_read_or_refused_by_its_name(path: str, whole: dict[str, Any]) -> None:
    """Any value of a whole request, at any depth, replaced by any other: one line that begins with the field's name."""
    read(KINDS[path], whole)
    refused = 0
    for place in places(whole):
        for value in VALUES[number_of_others(place) :: 1 if depth.full else 4]:
            try:
                read(KINDS[path], replaced(whole, place, value))
            except YarnEdgeError as error:
                refused += 1
                message = str(error)
                assert message.isprintable(), (place, value)
                assert len(message) < 400
                assert re.split(r"\W", message)[0] in whole, (place, value, message)
    assert refused > 5


def number_of_others(place: Place) -> int:
    """Which of the values, of which each place gets a quarter without --full, is its first."""
    return 0 if depth.full else sum(map(ord, "".join(map(str, place)))) % 4

"""Fields of requests: read, empty, without an effect, or refused by their name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.messages import chat_message
from yarn_edge.serve.requests import ChatRequest, CompletionRequest

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


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
    "our own thoughts": ({**ASSISTANT, "reasoning_content": "Hm."}, "Hi"),
    "thoughts alone": ({"role": "assistant", "content": None, "reasoning_content": "Hm."}, ""),
    "nothing was said": ({"role": "assistant", "content": []}, ""),
    "no prefix": ({**ASSISTANT, "prefix": False}, "Hi"),
    "no name": ({**USER, "name": ""}, "Hello"),
    "a developer": ({"role": "developer", "content": "Be brief."}, "Be brief."),
}


@pytest.mark.parametrize("message, expected", READ.values(), ids=READ)
def test_messages_that_are_read(message: dict[str, Any], expected: str) -> None:
    roles = {"developer": "system"}
    role = message["role"]
    assert chat_message(message, "messages[0]") == {"role": roles.get(role, role), "content": expected}


UNREAD: dict[str, tuple[Any, str]] = {
    "tool_calls": ({**ASSISTANT, "tool_calls": [CALL]}, "messages[2].tool_calls is not supported by this server"),
    "tool_calls alone": ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "messages[2].tool_calls is"),
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
    "tool": (
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        "messages[2].role is 'tool', but only system, developer, user, assistant are supported",
    ),
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
    "stop": None,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "cache_prompt": True,
}
ASKING: dict[str, Any] = {
    "n": 2,
    "best_of": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "echo": True,
    "suffix": "x",
    "tools": [CALL],
    "functions": [CALL],
    "tool_choice": "required",
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
    "modalities": ["audio"],
    "store": True,
    "service_tier": "flex",
    "reasoning_effort": "low",
    "web_search_options": {"a": 1},
    "prediction": {"a": 1},
    "grammar": "root ::= x",
    "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": False,
    "repetition_penalty": 1.2,
}


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_top_level_fields(kind: type[ChatRequest] | type[CompletionRequest]) -> None:
    asked: dict[str, Any] = {"messages": [USER]} if kind is ChatRequest else {"prompt": "a"}
    kind(**asked, **NEUTRAL).check()
    for name, value in ASKING.items():
        with pytest.raises(YarnEdgeError, match=f"^{name} is not supported by this server$"):
            kind(**asked, **{name: value}).check()
    for name, value in {"logprobs": 0, "n": True, "top_logprobs": False, "echo": 0}.items():  # equal only to Python
        with pytest.raises(YarnEdgeError, match=f"^{name} is not supported"):
            kind(**asked, **{name: value}).check()
    with pytest.raises(YarnEdgeError, match=r"^stream_options.continuous_usage_stats is not supported"):
        kind(**asked, stream_options={"continuous_usage_stats": True}).check()


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

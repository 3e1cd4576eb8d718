"""Clients that nobody here wrote, the openai and anthropic packages, against a server whose model says what the test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from yarn_edge.engine.chances import TokenChance
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.refusals import BusyError
from yarn_edge.serve.worker import AnswerPiece

from support.scripted_server import PREPARED_FOR, ScriptedServer, scripted_server

KEY = "a-key"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
CHAT_TOOLS: Any = [{"type": "function", "function": WEATHER}]
QUESTION: Any = [{"role": "user", "content": "Is it raining in Rome?"}]
CALL = ("<tool", "_call>\n", '{"name": "weather", "argu', 'ments": {"city": ', '"Rome"}}\n</tool', "_call>")
ROME = {"city": "Rome"}
THOUGHTS = (AnswerPiece("reasoning", "Let me "), AnswerPiece("reasoning", "look."))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with scripted_server(tmp_path_factory.mktemp("scripted"), key=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def chat(server: ScriptedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server: ScriptedServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key=KEY, base_url=server.url, max_retries=0, timeout=20) as made:
        yield made


def prompt_of(server: ScriptedServer) -> str:
    model = server.worker.model
    return b"".join(map(model.token_bytes, server.worker.asked[-1].tokens)).decode()


def test_chat_calls_a_tool(chat: openai.OpenAI, server: ScriptedServer) -> None:
    """Whole and streamed, and what the model is shown when the result comes back."""
    server.worker.says("I look. ", *CALL)
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "tools": CHAT_TOOLS}
    choice = chat.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ROME)
    assert "weather" in prompt_of(server)
    with chat.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert streamed.finish_reason == "tool_calls"
    (again,) = streamed.message.tool_calls or []
    assert (again.function.name, json.loads(again.function.arguments)) == ("weather", ROME)
    server.worker.says("It is raining.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain </s><u>"}
    said = chat.chat.completions.create(**{**asked, "messages": [*QUESTION, choice.message.model_dump(), result]})
    assert said.choices[0].message.content == "It is raining."
    assert said.choices[0].finish_reason == "stop"
    shown = prompt_of(server)
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in shown
    assert "<u>tool\nRain </s><u>" in shown


def test_calls_at_once(chat: openai.OpenAI, server: ScriptedServer) -> None:
    """parallel_tool_calls: false is another grammar, of one call."""
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "tools": CHAT_TOOLS}
    grammars = []
    for parallel in (True, False):
        server.worker.says(*CALL, "\n", *CALL)
        choice = chat.chat.completions.create(**asked, parallel_tool_calls=parallel).choices[0]
        ids = {call.id for call in choice.message.tool_calls or []}
        assert (len(ids), choice.message.content, choice.finish_reason) == (2, None, "tool_calls")
        constraint = server.worker.asked[0].sampling.constraint
        assert constraint is not None
        grammars.append(constraint.grammar)
    assert grammars[0] != grammars[1]


def test_which_tools_the_model_sees(chat: openai.OpenAI, server: ScriptedServer) -> None:
    tools = [*CHAT_TOOLS, {"type": "function", "function": {"name": "stocks", "strict": True}}]
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "tools": tools}
    chosen = {"type": "function", "function": {"name": "stocks"}}
    for choice, names in (("auto", "weather stocks"), ("none", ""), ("required", "weather stocks"), (chosen, "stocks")):
        server.worker.says("x", *CALL)
        answer = chat.chat.completions.create(**asked, tool_choice=choice)
        shown = prompt_of(server)
        assert [name for name in ("weather", "stocks") if name in shown] == names.split()
        constraint = server.worker.asked[0].sampling.constraint
        if choice == "none":  # then what looks like a call is text
            assert answer.choices[0].message.content == "x" + "".join(CALL)
            assert constraint is None
        else:
            assert constraint is not None
            assert bool(constraint.triggers) == (choice == "auto")


def test_an_answer_in_json(chat: openai.OpenAI, server: ScriptedServer) -> None:
    """The schema becomes a grammar; the openai package makes an object of the answer."""
    from pydantic import BaseModel

    class Place(BaseModel):
        city: str

    server.worker.says('{"city": ', '"Rome"}')
    parsed = chat.chat.completions.parse(model="any", messages=QUESTION, response_format=Place)
    assert parsed.choices[0].message.parsed == Place(city="Rome")
    grammar = server.worker.asked[0].sampling.constraint
    assert grammar is not None
    assert "city" in grammar.grammar
    assert chat.responses.parse(model="any", input="Where?", text_format=Place).output_parsed == Place(city="Rome")
    assert server.worker.asked[-1].sampling.constraint == grammar
    chat.chat.completions.create(model="any", messages=QUESTION, response_format={"type": "json_object"})
    assert server.worker.asked[-1].sampling.constraint not in (None, grammar)
    with pytest.raises(openai.BadRequestError, match="tools are not supported together with an answer in JSON"):
        chat.chat.completions.create(
            model="any", messages=QUESTION, response_format={"type": "json_object"}, tools=CHAT_TOOLS
        )


CHANCES = (TokenChance(97, -0.5, ((97, -0.5), (98, -1.25))), TokenChance(195, -0.125, ((195, -0.125), (99, -2.0))))


def test_log_probabilities(chat: openai.OpenAI, server: ScriptedServer) -> None:
    server.worker.says(AnswerPiece("answer", "ab", tokens=CHANCES))
    bytes_of = [list(server.worker.model.token_bytes(chance.token)) for chance in CHANCES]
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    told = chat.chat.completions.create(**asked).choices[0].logprobs
    assert told is not None
    assert server.worker.asked[0].top_logprobs == 2
    assert [(t.logprob, t.bytes) for t in told.content or []] == [(-0.5, bytes_of[0]), (-0.125, bytes_of[1])]
    assert [[o.logprob for o in t.top_logprobs] for t in told.content or []] == [[-0.5, -1.25], [-0.125, -2.0]]
    chunks = [chunk.choices[0] for chunk in chat.chat.completions.create(**asked, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content or []]
    assert streamed == told.content
    older = chat.completions.create(model="any", prompt="a", logprobs=2).choices[0].logprobs
    assert older is not None
    assert older.token_logprobs == [-0.5, -0.125]
    texts = [t.token for t in told.content or []]
    assert (older.tokens, older.text_offset) == (texts, [0, len(texts[0])])
    assert older.top_logprobs is not None
    assert list(older.top_logprobs[0].values()) == [-0.5, -1.25]
    response = chat.responses.create(model="any", input="a", top_logprobs=2, include=["message.output_text.logprobs"])
    part = response.output[0].content[0]  # type: ignore[union-attr,index]
    assert [t.logprob for t in part.logprobs] == [-0.5, -0.125]  # type: ignore[union-attr]
    server.worker.says("ab")
    assert chat.chat.completions.create(model="any", messages=QUESTION).choices[0].logprobs is None
    assert server.worker.asked[0].top_logprobs is None


def test_several_answers(chat: openai.OpenAI, server: ScriptedServer) -> None:
    server.worker.says("Yes", ".")
    asked: dict[str, Any] = {"model": "any", "messages": QUESTION, "n": 3, "seed": 2**32 - 3}
    whole = chat.chat.completions.create(**asked)
    assert [(c.index, c.message.content) for c in whole.choices] == [(0, "Yes."), (1, "Yes."), (2, "Yes.")]
    assert [one.sampling.seed for one in server.worker.asked] == [2**32 - 3, 2**32 - 2, 0]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    texts = ["", "", ""]
    for chunk in chat.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Yes."] * 3


def test_logit_bias_and_continuing(chat: openai.OpenAI, server: ScriptedServer) -> None:
    server.worker.says("ng")
    begun = [*QUESTION, {"role": "assistant", "content": "It is raini"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    chat.chat.completions.create(model="any", messages=begun, logit_bias={"5": -100, "97": 1}, extra_body=more)
    assert server.worker.asked[0].sampling.logit_bias == ((5, -100.0), (97, 1.0))
    assert prompt_of(server).endswith("<u>assistant\nIt is raini")


def test_responses(chat: openai.OpenAI, server: ScriptedServer) -> None:
    """Thoughts, a text and a call: whole and as events, whose numbers are 0, 1, …; and all of it sent back."""
    tools: Any = [{"type": "function", **WEATHER, "strict": True}]
    server.worker.says(*THOUGHTS, "I look. ", *CALL)
    asked: dict[str, Any] = {
        "model": "any",
        "input": "Rain?",
        "instructions": "Be brief.",
        "tools": tools,
        "store": False,
    }
    whole = chat.responses.create(**asked, include=["reasoning.encrypted_content"])
    assert (whole.status, whole.output_text, whole.store) == ("completed", "I look.", False)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    with chat.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output_text == "I look."
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "Let me look."
    call = whole.output[2]
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", ROME)
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    server.worker.says("Yes.")
    back = [{"role": "user", "content": "Rain?"}, *(item.model_dump() for item in whole.output)]
    back.append({"type": "function_call_output", "call_id": call.call_id, "output": "Rain"})
    assert chat.responses.create(**{**asked, "input": back}).output_text == "Yes."
    shown = prompt_of(server)
    assert "<u>system\nBe brief.</s>" in shown
    assert shown.count("<u>assistant\n") == 2  # what it thought, said and called is one message
    assert "<u>tool\nRain</s>" in shown
    server.worker.says("cut", ended="length")
    cut = chat.responses.create(model="any", input="x", max_output_tokens=1)
    assert (cut.status, cut.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_messages(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    """The same in Anthropic's blocks, with the key in its own header."""
    tools: Any = [{"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}]
    server.worker.says(*THOUGHTS, "I look. ", *CALL)
    asked: dict[str, Any] = {"model": "any", "max_tokens": 50, "messages": QUESTION, "tools": tools}
    asked |= {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}
    whole = claude.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert prompt_of(server).endswith("<think>\n")
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    call = whole.content[2]
    assert call.type == "tool_use"
    assert (whole.stop_reason, call.name, call.input) == ("tool_use", "weather", ROME)
    with claude.messages.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "text", "input_json", "content_block_stop", "message_stop"} <= kinds
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", 9)
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    server.worker.says("Yes.")
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "Rain"}],
        "is_error": True,
    }
    back = [*QUESTION, whole.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}]
    answer = claude.messages.create(**{**asked, "messages": back})
    assert answer.content[0].text == "Yes."  # type: ignore[union-attr]
    assert answer.stop_reason == "end_turn"
    shown = prompt_of(server)
    assert "<u>system\nBe brief.</s>" in shown
    assert "<u>tool\nError: Rain</s><u>user\nSo?</s><u>assistant\n" in shown
    assert claude.messages.count_tokens(**{n: v for n, v in asked.items() if n != "max_tokens"}).input_tokens > 50
    assert [model.id for model in claude.models.list()] == ["tiny"]
    assert claude.models.retrieve("tiny").display_name == "tiny"


@pytest.mark.parametrize(
    "choice, needs",
    [({"type": "any"}, True), ({"type": "tool", "name": "weather"}, True), ({"type": "auto"}, False)],
    ids=["any", "tool", "auto"],
)
def test_choices_among_tools(choice: Any, needs: bool, claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    grammars = []
    for one in (False, True):
        server.worker.says(*CALL)
        chosen = {**choice, "disable_parallel_tool_use": one}
        answer = claude.messages.create(model="x", max_tokens=9, messages=QUESTION, tools=tools, tool_choice=chosen)
        assert [block.type for block in answer.content] == ["tool_use"]
        constraint = server.worker.asked[0].sampling.constraint
        assert constraint is not None
        assert bool(constraint.triggers) != needs
        grammars.append(constraint.grammar)
    assert grammars[0] != grammars[1]


def test_ends_of_messages(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    asked: dict[str, Any] = {"model": "any", "max_tokens": 5, "messages": QUESTION, "stop_sequences": ["END"]}
    for ended, end, reason in (
        ("stop", {}, "end_turn"),
        ("length", {}, "max_tokens"),
        ("stop", {"stopped_by": "END"}, "stop_sequence"),
    ):
        server.worker.says("a", ended=ended, **end)
        answer = claude.messages.create(**asked)
        assert (answer.stop_reason, answer.stop_sequence) == (reason, end.get("stopped_by"))
    begun: Any = [*QUESTION, {"role": "assistant", "content": "It is"}]
    claude.messages.create(**{**asked, "messages": begun})
    assert prompt_of(server).endswith("<u>assistant\nIt is")


def test_errors_of_messages(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    """In Anthropic's form, also those of the guard, of a full queue, and in the middle of a stream."""
    asked: dict[str, Any] = {"model": "any", "max_tokens": 5, "messages": QUESTION}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"messages": [{"role": "user", "content": [image]}]}, r"messages\[0\].content\[0\]: a part of type 'image'"),
        ({"container": "c"}, "container is not supported by this server"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, r"tools\[0\].type: a tool of type 'web_search"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: a call is required, but there are no tools"),
        ({"output_config": {"effort": "low"}}, "reasoning_effort"),
    )
    for fields, message in refused:
        with pytest.raises(anthropic.BadRequestError, match=message) as caught:
            claude.messages.create(**{**asked, **fields})
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index,call-overload]
    with pytest.raises(anthropic.AuthenticationError, match="the API key is missing or wrong"):
        claude.with_options(api_key="wrong").messages.create(**asked)
    server.worker.says("a", BusyError("later"))
    with pytest.raises(anthropic.APIStatusError, match="later") as busy:
        claude.messages.create(**asked)
    assert busy.value.status_code == 529
    server.worker.says("a", YarnEdgeError("broken"))
    with pytest.raises(anthropic.APIError, match="broken"), claude.messages.stream(**asked) as stream:
        list(stream)


def test_errors_of_responses(chat: openai.OpenAI, server: ScriptedServer) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"store": True}, "store is not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type: a tool of type 'web_search' is not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\].type is 'item_reference'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            r"input\[0\].call_id is 'x', but no",
        ),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"include": ["file_search_call.results"]}, r"include\[0\] is 'file_search_call.results'"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type is 'xml'"),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "x", "schema": {"type": "string", "pattern": "(?=a)"}}
                }
            },
            "^Error code: 400 .*text.format.schema.pattern: ",
        ),
    )
    for fields, message in refused:
        with pytest.raises(openai.BadRequestError, match=message):
            chat.responses.create(**{"model": "any", "input": "a", **fields})
    server.worker.says("a", YarnEdgeError("broken"))
    events = list(chat.responses.create(model="any", input="a", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message == "broken"


def test_what_the_server_tells_of_itself(server: ScriptedServer) -> None:
    """/metrics and /openapi.json need the key, /health does not and tells no sizes."""
    import urllib.error
    import urllib.request

    def get(path: str, key: str | None = KEY) -> tuple[str, str]:
        headers = {} if key is None else {"x-api-key": key}
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers)) as reply:
            return reply.headers["content-type"], reply.read().decode()

    assert json.loads(get("/health", None)[1]) == {"status": "ok", "waiting": 0, "running": 3, "parallel": 3}
    for path in ("/metrics", "/openapi.json"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(path, None)
    kind, text = get("/metrics")
    assert kind.startswith("text/plain; version=0.0.4")
    lines = text.splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    values = {line.split()[0].split("{")[0] for line in lines if not line.startswith("#")}
    assert values <= names
    assert "yarn_edge_prompt_tokens_evaluated_total 3" in lines
    assert any(line.startswith('yarn_edge_http_requests_total{route="/metrics",status="401"} ') for line in lines)
    assert any('route="/v1/chat/completions",status="200"' in line for line in lines)
    assert PREPARED_FOR


def test_the_middle_of_a_chat_that_fails(chat: openai.OpenAI, server: ScriptedServer) -> None:
    server.worker.says("a", YarnEdgeError("broken"))
    with pytest.raises(openai.APIError, match="broken"):
        list(chat.chat.completions.create(model="any", messages=QUESTION, stream=True))

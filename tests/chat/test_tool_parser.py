"""Calls are read from a stream however it is cut, and what is no call stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.chat.tools.forms import FORMS, GENERIC, ToolForm
from yarn_edge.chat.tools.said import CallArguments, CallBegun, CallEnded, ReasoningSaid, Said, TextSaid

TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"properties": {"text": {"type": "string"}, "n": {}}}},
    },
    {"type": "function", "function": {"name": "now"}},
]
BY_NAME = {form.name: form for form in (*FORMS, GENERIC)}
FIND = {"text": 'a "b" {c} </d>\n\u00e9\u20ac\U0001f9f5', "n": [1, {"k": None}]}
PLAIN = {"text": "x\ny", "n": [1, {"k": None}]}


def written(form: ToolForm, *calls: tuple[str, Any]) -> str:
    """Calls as a model of that family writes them."""
    dumped = [(name, json.dumps(value, ensure_ascii=len(value) == 1)) for name, value in calls]
    match form.name:
        case "harmony":
            (name, text), *_ = dumped
            return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>"
        case "qwen3-coder":

            def tags(value: dict[str, Any]) -> str:
                shown = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
                return "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in shown.items())

            return "\n".join(f"<tool_call>\n<function={n}>\n{tags(v)}</function>\n</tool_call>" for n, v in calls)
        case "deepseek-r1":
            inside = "\n".join(
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{t}\n```<｜tool▁call▁end｜>"
                for n, t in dumped
            )
            return f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>"
        case "deepseek-v3.1":
            inside = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{t}<｜tool▁call▁end｜>" for n, t in dumped)
            return f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>"
        case "mistral":
            inside = ", ".join(
                f'{{"name": "{n}", "arguments": {t}, "id": "abcdefgh{i}"}}' for i, (n, t) in enumerate(dumped)
            )
            return f"[TOOL_CALLS][{inside}]"
        case "mistral-small":
            return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdefgh1[ARGS]{t}" for n, t in dumped)
        case "ministral":
            return "".join(f"[TOOL_CALLS]{n}[ARGS]{t}" for n, t in dumped)
        case "llama-3":
            (name, text), *_ = dumped
            return f'{{"name": "{name}", "parameters": {text}}}'
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {t}}}\n</tool_call>' for n, t in dumped)


def parse(form: ToolForm, pieces: list[str], tools: Any = TOOLS) -> list[Said]:
    parser = form.parser(tools)
    said = [event for piece in pieces for event in parser.feed(piece)]
    return said + parser.end()


def gathered(said: list[Said]) -> list[tuple[str, Any]]:
    """Texts and calls, whatever the pieces; checks the order of a call's events."""
    found: list[tuple[str, Any]] = []
    is_open = False
    for event in said:
        if isinstance(event, (TextSaid, ReasoningSaid)):
            assert not is_open
            kind = "text" if isinstance(event, TextSaid) else "reasoning"
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + event.text)
            else:
                found.append((kind, event.text))
            continue
        calls = sum(kind not in ("text", "reasoning") for kind, _ in found)
        if isinstance(event, CallBegun):
            assert not is_open
            assert event.index == calls
            assert len(event.id) == 9
            assert event.id.isalnum()
            found.append((event.name, ""))
            is_open = True
            continue
        assert is_open
        assert event.index == calls - 1
        if isinstance(event, CallArguments):
            found[-1] = (found[-1][0], found[-1][1] + event.text)
        else:
            assert isinstance(event, CallEnded)
            is_open = False
    assert not is_open
    return found


def read(form: ToolForm, text: str, tools: Any = TOOLS) -> list[tuple[str, Any]]:
    """What is told of a text: the same in one piece, by characters and in threes."""
    whole = gathered(parse(form, [text], tools))
    assert gathered(parse(form, list(text), tools)) == whole
    assert gathered(parse(form, [text[n : n + 3] for n in range(0, len(text), 3)], tools)) == whole
    return whole


def values(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(kind, text if kind in ("text", "reasoning") else json.loads(text)) for kind, text in found]


@pytest.mark.parametrize("form", BY_NAME.values(), ids=BY_NAME)
def test_a_call_is_told(form: ToolForm) -> None:
    value = PLAIN if form.arguments == "xml" else FIND
    assert values(read(form, written(form, ("find", value)))) == [("find", value)]
    assert values(read(form, written(form, ("now", {})))) == [("now", {})]


@pytest.mark.parametrize("form", [f for f in BY_NAME.values() if f.several], ids=lambda form: form.name)
def test_several_calls_are_told_in_order(form: ToolForm) -> None:
    calls = [("find", {"text": "\u20ac1"}), ("now", {}), ("find", {"n": 2})]
    assert values(read(form, written(form, *calls))) == calls
    assert values(read(form, "Let me see. \n\n" + written(form, *calls))) == [("text", "Let me see."), *calls]


@pytest.mark.parametrize("form", [f for f in BY_NAME.values() if f.several], ids=lambda form: form.name)
def test_text_after_a_call_stays(form: ToolForm) -> None:
    found = read(form, f"before {written(form, ('now', {}))}\nafter it")
    assert values(found) == [("text", "before"), ("now", {}), ("text", "after it")]


@pytest.mark.parametrize("form", BY_NAME.values(), ids=BY_NAME)
def test_an_unknown_function_is_text(form: ToolForm) -> None:
    text = written(form, ("other", {"text": "a"}))
    found = read(form, text)
    assert [kind for kind, _ in found] == ["text"]
    assert found[0][1] == (text if not form.channels else '{"text": "a"}')
    assert read(form, "plain, {and} <such>") == [("text", "plain, {and} <such>")]


@pytest.mark.parametrize("form", [f for f in BY_NAME.values() if not f.channels], ids=lambda form: form.name)
def test_nothing_is_a_call_without_tools(form: ToolForm) -> None:
    text = " " + written(form, ("find", {"text": "a"})) + " \n"
    assert read(form, text, []) == [("text", text)]


@pytest.mark.parametrize("form", BY_NAME.values(), ids=BY_NAME)
def test_a_call_that_is_cut_ends(form: ToolForm) -> None:
    """By the token limit, at each place: whole calls before it are told, and nothing is told twice."""
    text = written(form, ("find", {"text": "ab cd"}))
    for n in range(len(text)):
        found = read(form, text[:n])
        named = [kind for kind, _ in found if kind not in ("text", "reasoning")]
        assert named in ([], ["find"])
        if named and form.arguments == "json":
            arguments = next(said for kind, said in found if kind == "find")
            assert '{"text": "ab cd"}'.startswith(arguments) or arguments == '{"text": "ab cd"}'
        if not named and not form.channels:
            assert "".join(said for _, said in found) == text[:n]


BROKEN = {
    "a tag in prose": ("Write <tool_call> and then more.", [("text", "Write <tool_call> and then more.")]),
    "no object": ("<tool_call>\n[1]</tool_call>", [("text", "<tool_call>\n[1]</tool_call>")]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', [("text", '<tool_call>{"arguments": {}}</tool_call>')]),
    "a call in a broken one": (
        '<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [("text", "<tool_call>"), ("now", "{}")],
    ),
    "no comma": ('<tool_call>{"name": "now" "arguments": {}}', [("now", ""), ("text", '"arguments": {}}')]),
    "arguments first": ('<tool_call>{"arguments": {"n": 1}, "name": "find"}</tool_call>', [("find", '{"n": 1}')]),
    "arguments in a text": (
        '<tool_call>{"name": "find", "arguments": "{\\"n\\": 1}"}</tool_call>',
        [("find", '{"n": 1}')],
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', [("now", "{}")]),
    "escapes in the name": ('<tool_call>{"name": "\\u006eow", "arguments": {}}</tool_call>', [("now", "{}")]),
    "tags in arguments": (
        '<tool_call>{"name": "find", "arguments": {"text": "</tool_call>{"}}</tool_call>.',
        [("find", '{"text": "</tool_call>{"}'), ("text", ".")],
    ),
    "a closing tag that is cut": ('<tool_call>{"name": "now"}\n</tool_c', [("now", "{}")]),
    "white space stays in text": (" a \n\n b ", [("text", " a \n\n b ")]),
}


@pytest.mark.parametrize("text, expected", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_lost_nowhere(text: str, expected: list[tuple[str, str]]) -> None:
    assert read(GENERIC, text) == expected


HARMONY = {
    "an answer": ("<|channel|>final<|message|>Hi", [("text", "Hi")]),
    "reasoning, then an answer": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        [("reasoning", "Hm."), ("text", "Hi")],
    ),
    "reasoning, a preamble, a call": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
        '<|start|>assistant to=functions.find<|channel|>commentary json<|message|>{"n": 1}<|call|>',
        [("reasoning", "Hm."), ("text", "Looking."), ("find", '{"n": 1}')],
    ),
    "no header": ("Hello <|x|>", [("text", "Hello <|x|>")]),
    "a header that is cut": ("<|channel|>fin", []),
    "reasoning that is cut": ("<|channel|>analysis<|message|>Hm<|en", [("reasoning", "Hm<|en")]),
}


@pytest.mark.parametrize("text, expected", HARMONY.values(), ids=HARMONY)
def test_channels(text: str, expected: list[tuple[str, str]]) -> None:
    assert read(BY_NAME["harmony"], text) == expected


def test_llamas_json_is_a_call_only_at_the_beginning() -> None:
    form = BY_NAME["llama-3"]
    call = '{"name": "now", "parameters": {}}'
    assert read(form, f" \n{call}") == [("now", "{}")]
    assert read(form, f"<|python_tag|>{call}") == [("now", "{}")]
    assert read(form, f"As {call}") == [("text", f"As {call}")]
    assert read(form, '{"city": "Rome"}') == [("text", '{"city": "Rome"}')]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_cut_says_the_same(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(list(BY_NAME.values())), "form")
    call = written(form, ("find", {"text": "a"}))
    scraps = [
        *form.starts,
        *form.closers,
        *form.visible,
        *form.again,
        call,
        call[:-3],
        "{",
        '"name"',
        "}",
        "\n",
        "a",
        "find",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(scraps), max_size=9), "text"))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=9), "cuts"))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert gathered(parse(form, pieces)) == gathered(parse(form, [text]))

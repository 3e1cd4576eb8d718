"""Answers keep to their form, whatever the model; nothing that is asked for ends the process."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from yarn_edge.chat.tools.forms import FORMS, GENERIC, ToolForm
from yarn_edge.chat.tools.said import CallArguments, CallBegun, TextSaid
from yarn_edge.engine.constrained import ConstrainedSampler, control_ids
from yarn_edge.engine.constraint import Constraint, json_object_constraint, json_schema_constraint
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.sampling import Sampling, SamplingError
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import depth, smol, tiny_gguf
from support.gbnf import Texts
from support.gguf_files import BYTE_TOKENIZER, write_gguf
from support.made_once import Shelf

EOS = 259
PROMPT = [*range(40, 60)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Random layers; tokens are bytes, ab, abc and control tokens <s> </s> <u> <v>."""
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def generation(tiny: Model) -> Iterator[Generation]:
    with Context(tiny, ContextSettings(n_ctx=512, n_batch=64, kv_type="f32", threads=1)) as made:
        yield Generation(made)


def said(generation: Generation, constraint: Constraint | None, most: int = 300, **sampling: Any) -> str:
    asked = Sampling(**{"temperature": 1.5, "seed": 1, **sampling}, constraint=constraint)
    with closing(generation.generate(PROMPT, asked, most)) as pieces:
        return "".join(pieces)


SHORT = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^[x\u20ac]{2}$"},
        "b": {"enum": [1, None]},
        "c": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["a", "b", "c"],
}


@pytest.mark.parametrize("more", [{"temperature": 0}, {}, {"top_k": 0}, {"repeat_penalty": 1.3}, {"top_k": 1}], ids=str)
def test_an_answer_is_of_the_schema(generation: Generation, more: dict[str, Any]) -> None:
    for seed in range(3):
        jsonschema.validate(json.loads(said(generation, json_schema_constraint(SHORT), seed=seed, **more)), SHORT)
        assert generation.stats is not None
        assert generation.stats.finish_reason == "stop"


def test_the_choice_is_that_of_llama_cpps_own_grammar(tiny: Model, generation: Generation) -> None:
    """Greedy: as if the grammar had seen every token, which it has not."""
    constraint = json_schema_constraint({"type": "string", "maxLength": 12})
    api = tiny.api
    ours = said(generation, constraint, temperature=0)
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    api.llama_sampler_chain_add(chain, api.llama_sampler_init_grammar(tiny.vocab, constraint.grammar.encode(), b"root"))
    api.llama_sampler_chain_add(
        chain, api.llama_sampler_init_logit_bias(tiny.n_vocab, 4, _never(api, (258, 260, 261, 257)))
    )
    api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
    context = generation.context
    context.clear()
    generation.cached.forget()
    context.evaluate(PROMPT, 0, 1)
    tokens: list[int] = []
    while (token := context.sample(chain)) != EOS:
        tokens.append(token)
        context.evaluate([token], len(PROMPT) + len(tokens) - 1, 1)
    api.llama_sampler_free(chain)
    context.clear()
    free = said(generation, None, 20, temperature=0)
    assert ours == b"".join(map(tiny.token_bytes, tokens)).decode()
    assert ours != free


def _never(api: Any, tokens: tuple[int, ...]) -> Any:
    biases = (api.llama_logit_bias * len(tokens))()
    for item, token in zip(biases, tokens, strict=True):
        item.token, item.bias = token, float("-inf") if token != 257 else 0.0
    return biases


def test_control_tokens_are_no_text_under_a_grammar(generation: Generation) -> None:
    """`<u>` fits into a JSON string by its text, but would be left out of the answer."""
    likely = tuple((t, 50.0) for t in (258, 260, 261))
    text = said(
        generation, json_schema_constraint({"type": "string", "minLength": 3, "maxLength": 6}), logit_bias=likely
    )
    assert 3 <= len(json.loads(text)) <= 6
    shown = Constraint('root ::= "<u>" "a"', visible=("<u>",))
    assert said(generation, shown, logit_bias=likely) == "a"  # drawn as one token, whose text this stream leaves out


def test_a_dead_end_is_an_error_not_the_end_of_the_process(generation: Generation) -> None:
    with pytest.raises(YarnEdgeError, match="needs a text that this model's vocabulary does not have"):
        said(generation, Constraint('root ::= "x" nothing\nnothing ::= [\\x00]'))
    assert said(generation, None, 3) is not None  # and goes on
    forbidden = tuple((t, float("-inf")) for t in range(262))
    with pytest.raises(YarnEdgeError, match="vocabulary does not have"):
        said(generation, json_object_constraint(), logit_bias=forbidden)


@pytest.mark.parametrize(
    "grammar", ["root ::= (", "root ::= a", "root ::= root", 'root ::= "a"{5000}', "root ::= [", "a ::= b"], ids=str
)
def test_a_broken_grammar_is_an_error(grammar: str, generation: Generation, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(YarnEdgeError, match=r"^(llama.cpp refuses the grammar|the grammar has no rule named root)"):
        said(generation, Constraint(grammar))
    capfd.readouterr()  # llama.cpp shows the grammar


def test_a_grammar_whose_states_double_ends_in_time(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from yarn_edge.engine import constrained

    monkeypatch.setattr(constrained, "MOST_CPU_S", 0.05)
    expression = {
        "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/e"}, "maxItems": n} for n in (5, 6)] + [{"type": "null"}]
    }
    constraint = json_schema_constraint({"$ref": "#/$defs/e", "$defs": {"e": expression}})
    held = ConstrainedSampler(tiny, constraint, 1)
    accept = held._callbacks["accept"]
    bracket = tiny.tokenize("[", add_special=False, parse_special=False)[0]
    for _ in range(40):
        accept(None, bracket)
        if held.failure:
            break
    held.close()
    assert held.failure is not None
    assert "for one token: simplify it" in held.failure


def feed(tiny: Model, constraint: Constraint, text: str) -> ConstrainedSampler:
    held = ConstrainedSampler(tiny, constraint, 1)
    for token in tiny.tokenize(text, add_special=False, parse_special=True):
        held._accept(token)
    return held


CALLS = Constraint('root ::= "<c>" [0-9] "</c>"', (r"(<c>)",), skipped=(("<think>", "</think>"),))
TRIGGERS = {
    "nothing yet": ("some text", True),
    "half of it": ("text <c", True),
    "it": ("text <c>", False),
    "it, and more": ("text <c>4</c", False),
    "it inside reasoning": ("<think> <c>", True),
    "it after reasoning": (" <think> <c> </think><c>", False),
    "it after what may become reasoning": ("<thi", True),
    "it after what was none": ("<thing><c>", False),
}


@pytest.mark.parametrize("text, waits", TRIGGERS.values(), ids=TRIGGERS)
def test_a_grammar_begins_at_its_trigger(text: str, waits: bool, tiny: Model) -> None:
    held = feed(tiny, CALLS, text)
    assert (held._waiting, held.failure) == (waits, None)
    held.close()


def test_what_goes_on_unlike_a_call_is_text(tiny: Model) -> None:
    """The token abc completes the trigger and says more than the grammar allows: llama.cpp's lazy grammar would end the process."""
    held = feed(tiny, Constraint('root ::= "a" [0-9]', (r"(a)",)), "xabc")
    assert (held._waiting, held.failure) == (True, None)
    for token in tiny.tokenize("a", add_special=False, parse_special=False):
        held._accept(token)
    assert not held._waiting
    held.close()
    held = feed(tiny, Constraint('root ::= "bc" "!"', (r"(bc)",)), "xabc")  # begins inside the token
    assert (held._waiting, held.failure) == (False, None)
    held.close()


def test_a_token_against_the_grammar_is_a_failure(tiny: Model) -> None:
    held = feed(tiny, Constraint('root ::= "abc"'), "ax")
    assert held.failure == "an answer does not keep to its form"
    held.close()


def test_logit_bias(generation: Generation) -> None:
    always = said(generation, None, 5, temperature=0, logit_bias=((69, 100.0),))
    assert always == generation.context.model.token_bytes(69).decode() * 5
    without = ((69, float("-inf")), (70, 90.0))
    assert (
        said(generation, None, 1, temperature=0, logit_bias=without)
        == generation.context.model.token_bytes(70).decode()
    )
    with pytest.raises(SamplingError, match=r"^logit_bias names token 999, the vocabulary has 262$"):
        said(generation, None, logit_bias=((999, 1.0),))
    with pytest.raises(SamplingError, match=r"^logit_bias has a value that is not a number"):
        Sampling(logit_bias=((1, float("nan")),))


def test_a_vocabulary_without_an_end_has_no_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Model, "is_end_in_llama_cpp", lambda *_: False)
    path = write_gguf(tmp_path / "endless.gguf", "llama", {**BYTE_TOKENIZER, "llama.block_count": 0})
    with Model(path, vocab_only=True) as loaded:
        with pytest.raises(YarnEdgeError, match=r"endless.gguf: no token ends an answer for llama.cpp"):
            ConstrainedSampler(loaded, json_object_constraint(), None)
        assert control_ids(loaded, ("<u>", "<v>", "a", "no token")) == {260, 261}


TOOL = {
    "type": "function",
    "function": {
        "name": "add_event",
        "description": "Adds an event to the calendar.",
        "parameters": {
            "type": "object",
            "properties": {
                "title": {"type": "string", "minLength": 1, "maxLength": 24},
                "date": {"type": "string", "format": "date"},
                "minutes": {"type": "integer", "minimum": 5, "maximum": 480},
                "kind": {"enum": ["meeting", "call", "trip"]},
                "guests": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"}, "maxItems": 3},
            },
            "required": ["title", "date", "minutes"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = TOOL["function"]["parameters"]  # type: ignore[index]
CODED = {
    **TOOL,
    "function": {
        **TOOL["function"],
        "parameters": {
            "properties": {"n": {"type": "integer", "maximum": 9}, "t": {"type": "string"}},
            "required": ["n"],
        },
    },
}  # type: ignore[dict-item]


def called(form: ToolForm, text: str, tools: Any) -> list[tuple[str, Any]]:
    parser = form.parser(tools)
    events = parser.feed(text) + parser.end()
    found: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegun):
            found.append((event.name, ""))
        elif isinstance(event, CallArguments):
            found[-1] = (found[-1][0], found[-1][1] + event.text)
    return [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_a_forced_call_is_read_by_its_forms_parser(form: ToolForm) -> None:
    """Random texts of each form's grammar."""
    tools = [CODED] if form.arguments == "xml" else [TOOL, {"type": "function", "function": {"name": "stop"}}]
    for choice in ("required", {"type": "function", "function": {"name": "add_event"}}):
        constraint = form.constraint(tools, choice, several=False)
        assert constraint is not None
        assert not constraint.triggers
        draw, of = random.Random(0), Texts(constraint.grammar)
        for _ in range(25):
            ((name, arguments),) = called(form, of.one(draw), tools)
            if name == "stop":
                assert choice == "required"
                assert arguments == {}
            else:
                jsonschema.validate(arguments, tools[0]["function"]["parameters"])


@pytest.mark.parametrize("form", [form for form in FORMS if form.arguments == "xml"], ids=lambda form: form.name)
def test_an_argument_in_tags_may_refer_to_any_part_of_its_schema(form: ToolForm) -> None:
    parameters = {
        "properties": {"n": {"$ref": "#/definitions/d"}, "m": {"type": "array", "items": {"$ref": "#/properties/n"}}},
        "required": ["n", "m", "not_described"],
        "definitions": {"d": {"type": "integer", "minimum": 1}},
    }
    tools: Any = [{"type": "function", "function": {"name": "count", "parameters": parameters}}]
    constraint = form.constraint(tools, "required", several=False)
    assert constraint is not None
    draw, of = random.Random(0), Texts(constraint.grammar)
    for _ in range(10):
        ((_name, arguments),) = called(form, of.one(draw), tools)
        jsonschema.validate(arguments, parameters)
    tools[0]["function"]["parameters"] = {**parameters, "allOf": [{"required": ["n"]}]}
    with pytest.raises(
        YarnEdgeError, match=r"^tools\[0\].function.parameters.allOf: is not supported in this model's form"
    ):
        form.constraint(tools, "auto")


@pytest.mark.parametrize("form", [*FORMS, GENERIC], ids=lambda form: form.name)
def test_a_call_that_is_free_begins_at_what_its_grammar_begins_with(form: ToolForm) -> None:
    constraint = form.constraint([CODED], "auto")
    assert constraint is not None
    draw, of = random.Random(0), Texts(constraint.grammar)
    for _ in range(5):
        text = ("<|channel|>commentary " if form.channels else "") + of.one(draw)
        found = next(match for trigger in constraint.triggers if (match := re.search(trigger, text)))
        assert found.start(1) == len(text) - len(text.removeprefix("<|channel|>commentary "))
    assert form.constraint([CODED], "none") is None
    assert form.constraint([], "auto") is None


def test_with_channels_an_answer_of_a_schema_is_the_final_one() -> None:
    harmony = next(form for form in FORMS if form.channels)
    answer = json_schema_constraint({"type": "integer"})
    draw, of = random.Random(0), Texts(harmony.framed(answer).grammar)
    for _ in range(20):
        parser = harmony.parser([])
        *_reasoning, last = parser.feed(of.one(draw))
        assert isinstance(last, TextSaid)
        assert isinstance(json.loads(last.text), int)
    assert GENERIC.framed(answer) is answer


WRONG = {
    "an unknown function": ([TOOL], {"function": {"name": "x"}}, "^tool_choice names 'x', which is not among tools$"),
    "no tools": ([], "required", "^tool_choice is required, but there are no tools$"),
    "another choice": ([TOOL], "any", "^tool_choice is not none, auto, required, or a function$"),
    "a name": ([{"function": {"name": "a b"}}], "auto", r"^tools\[0\].function.name is not 1 to 64"),
    "a name twice": ([TOOL, TOOL], "auto", r"^tools\[1\].function.name 'add_event' appears twice$"),
    "too many": ([TOOL] * 129, "auto", "^tools has 129 functions"),
    "a strict schema": (
        [{"function": {"name": "a", "strict": True, "parameters": {"properties": {"n": {"multipleOf": 3}}}}}],
        "auto",
        r"^tools\[0\].function.parameters.properties.n.multipleOf: is not supported$",
    ),
}


@pytest.mark.parametrize("tools, choice, expected", WRONG.values(), ids=WRONG)
def test_a_tool_that_cannot_be_held_to_is_refused(tools: Any, choice: Any, expected: str) -> None:
    with pytest.raises(YarnEdgeError, match=expected):
        GENERIC.constraint(tools, choice)


SUBJECTS = (
    "a meeting with Ann",
    "lunch",
    "a call to Berlin",
    "the dentist",
    "a trip to Rome",
    "a review",
    "yoga",
    "a talk",
    "rent",
    "a party",
)
DAYS = ("tomorrow", "on Friday", "next week", "on 3 May", "tonight")


@pytest.fixture(scope="module")
def small_real(shelf: Shelf) -> Iterator[Generation]:
    path = smol.quants(shelf, depth.smol_layers())["Q8_0"]
    with Model(path) as model, Context(model, ContextSettings(n_ctx=512, n_batch=64)) as context:
        yield Generation(context)


def test_every_answer_of_a_real_model_is_a_call_of_a_real_tool(small_real: Generation) -> None:
    """50 prompts with --full, else 4."""
    prompts = [f"Please add {subject} {day}." for subject in SUBJECTS for day in DAYS]
    constraint = GENERIC.constraint([TOOL], "required", several=False)
    model = small_real.context.model
    for number, prompt in enumerate(prompts if depth.full else prompts[::13]):
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        tokens = model.tokenize(text, add_special=False, parse_special=True)
        sampling = Sampling(temperature=(0, 0.8)[number % 2], seed=number, constraint=constraint)
        answer = "".join(small_real.generate(tokens, sampling, 400))
        ((name, arguments),) = called(GENERIC, answer, [TOOL])
        assert name == "add_event"
        jsonschema.validate(arguments, SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        assert small_real.stats is not None
        assert small_real.stats.finish_reason == "stop"


@pytest.mark.parametrize(
    "pattern, ways", {"^" + "a?" * 40 + "$": 40, "^a*a*b$": 2, "ab": 2, "^a{0,400}$": 1, "^[ab]+c$": 1}.items()
)
def test_a_text_that_can_be_read_in_many_ways(pattern: str, ways: int) -> None:
    """Long tokens would take a grammar hours then: each character multiplies the steps."""
    assert json_schema_constraint({"type": "string", "pattern": pattern}).ways == ways


def test_many_ways_take_no_time(small_real: Generation) -> None:
    """With a real vocabulary, in which there are tokens of many equal characters."""
    constraint = json_schema_constraint({"type": "string", "pattern": "^" + "-?" * 40 + "a$"})
    began = time.process_time()
    model = small_real.context.model
    answer = "".join(
        small_real.generate(
            model.tokenize("A line: ", add_special=True, parse_special=False), Sampling(constraint=constraint), 12
        )
    )
    assert time.process_time() - began < 5
    assert re.fullmatch('"-{0,40}(a"?)?', answer)

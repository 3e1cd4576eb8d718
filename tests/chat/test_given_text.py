"""What a template is given is in its prompt: content as text or as parts, escaped or trimmed; or there is an error."""

from __future__ import annotations

import html
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from yarn_edge.chat.given_text import Shown
from yarn_edge.chat.template import ChatTemplate, Message
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.token_names import TokenNames

# The templates of public models, cut to what reads the content.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN2_VL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}S:{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}{% if 'text' in content %}P:{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the user's content is parts.
MIXED = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content[0].text }}]{% else %}({{ m.content | trim }}){% endif %}{% endfor %}"
STRICT = "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts only') }}{% endif %}{{ m.content[0].text }};{% endfor %}"

TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is\n\nOslo?"},
    {"role": "assistant", "content": "Norway."},
    {"role": "user", "content": "  And 'Bergen' & <co>? "},
]
RENDERED = {
    "parts": (
        PARTS,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is\n\nOslo?<|im_end|>\n<|im_start|>assistant\nNorway.",
    ),
    "LLaVA": (LLAVA, "Be brief. USER: Where is\n\nOslo? ASSISTANT: Norway. USER:   And 'Bergen' & <co>?  ASSISTANT:"),
    "SmolVLM": (
        SMOLVLM,
        "<|im_start|>System: Be brief.<end_of_utterance>\nUser: Where is\n\nOslo?<end_of_utterance>\nAssistant: Norway.",
    ),
    "text first": (QWEN2_VL, "<|im_start|>system\nS:Be brief.<|im_end|>\n<|im_start|>user\nS:Where is"),
    "parts of the user": (MIXED, "(Be brief.)[Where is\n\nOslo?](Norway.)[  And 'Bergen' & <co>? ]"),
    "raises for text": (STRICT, "Be brief.;Where is\n\nOslo?;Norway.;  And"),
}


@pytest.mark.parametrize("source, beginning", RENDERED.values(), ids=RENDERED)
def test_parts_are_given_where_text_is_lost(source: str, beginning: str) -> None:
    with ChatTemplate(source) as template:
        assert template.render(TALK).startswith(beginning)


def test_parts_render_as_in_transformers() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    for source in (PARTS, LLAVA, SMOLVLM, STRICT):
        expected = reference.apply_chat_template(
            in_parts, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        with ChatTemplate(source) as template:
            assert template.render(TALK) == expected


KEPT = {
    "trim": "{{ m.content | trim }}",
    "Falcon": "{{ m.content.replace('\r\n', '\n').replace('\n\n', '\n') }}",
    "upper case": "{{ m.content | upper }}",
    "JSON": "{{ m | tojson }}",
    "ASCII JSON": "{{ m.content | trim | tojson(ensure_ascii=true) }}",
    "HTML": "{{ m.content | e }}",
    "Python": "{{ m }}",
    "words": "{{ m.content.split() | join(' ') }}",
}
HARD = '\n "Größe" & it\'s <b>\\n</b>\tof {{ x }}\r\n\n\nOslo? '


@pytest.mark.parametrize("expression", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_another_spelling_is_not_a_loss(expression: str, add_generation_prompt: bool) -> None:
    with ChatTemplate("{% for m in messages %}" + expression + "{% endfor %}") as template:
        assert template.render([{"role": "user", "content": HARD}], add_generation_prompt=add_generation_prompt)


def test_switches_may_be_taken_out() -> None:
    source = "{{ messages[0].content.replace('/no_think', '').replace('/think', '').strip() }}!"
    with ChatTemplate(source) as template:
        assert template.render([{"role": "user", "content": "Why? /no_think"}]) == "Why?!"
        assert template.render([{"role": "user", "content": "/think Why?"}]) == "Why?!"
        assert template.render([{"role": "user", "content": "See a/thinking"}]) == "See aing!"
        with pytest.raises(YarnEdgeError, match="without all of"):
            template.render([{"role": "user", "content": "Why?! /no_think"}, {"role": "user", "content": "How?"}])


USER_LOST = "makes a prompt without all of the user's last message; use --raw to do without it"
SYSTEM_LOST = "makes a prompt without all of the system message: put that text into the user's message"
LOST: dict[str, tuple[str, str]] = {
    "empty": ("", "renders nothing; use --raw"),
    "a comment": ("{# chat #}{% for m in messages %}{% endfor %}", "renders nothing"),
    "only the system": ("{{ bos_token }}{{ messages[0].content }}", USER_LOST),
    "constant": ("You are a helpful assistant.", USER_LOST),
    "parts shown as Python": ("{% for m in messages %}{{ m.content | list }}{% endfor %}", USER_LOST),
    "cut off": ("{% for m in messages %}{{ m.content[:12] }}{% endfor %}", USER_LOST),
    "the first turn": ("{{ messages[0].content }}{{ messages[1].content }}", USER_LOST),
    "all but the last": ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", USER_LOST),
    "another key": ("{% for m in messages %}{{ m.role }}: {{ m.text }}\n{% endfor %}", USER_LOST),
    "parts of another type": (
        "{% for m in messages %}{% for p in m.content if p.type == 'input_text' %}{{ p.text }}{% endfor %}x{% endfor %}",
        USER_LOST,
    ),
    "no system": ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", SYSTEM_LOST),
    "system of parts": (
        "{% for m in messages %}{{ m.content if m.role != 'system' else m.content.parts }}{% endfor %}",
        SYSTEM_LOST,
    ),
}


@pytest.mark.parametrize("source, message", LOST.values(), ids=LOST)
def test_a_loss_is_an_error(source: str, message: str) -> None:
    with (
        ChatTemplate(source, bos_token="<s>", origin="model.gguf: tokenizer.chat_template") as template,
        pytest.raises(YarnEdgeError) as caught,
    ):
        template.render(TALK)
    assert str(caught.value).startswith(f"model.gguf: tokenizer.chat_template: {message}")


def test_the_last_question_only_for_an_answer() -> None:
    """Such a template loses the question if no answer is asked for."""
    source = (
        "{% for m in messages %}{% if not loop.last or add_generation_prompt %}{{ m.content }};{% endif %}{% endfor %}"
    )
    with ChatTemplate(source) as template:
        assert template.render(TALK).endswith("<co>? ;")
        with pytest.raises(YarnEdgeError, match="without all of the user's last message"):
            template.render(TALK, add_generation_prompt=False)


def test_earlier_turns_are_the_templates_affair() -> None:
    with ChatTemplate("{{ messages[-1].content }}") as template:
        assert template.render(TALK[1:]) == TALK[-1]["content"]


@pytest.mark.parametrize(
    "prompt, text, shown",
    [
        ("<s>a b</s>", "", True),
        ("<s>a b</s>", " \n", True),
        ("<s>A  b</s>", "a b\n", True),
        ("<s>a</s>", "a b", False),
        ("b a", "a b", False),
        (json.dumps('a\n"b"'), 'a\n"b"', True),
        ("a &amp; b", "a & b", True),
        ("a b", "a & b", False),
        ("Why?", "/no_think Why?", True),
        ("Why?", "/nothink\nWhy? /think", True),
        ("Why?", "/no_think How?", False),
        ("the /etc", "the /etc/hosts", False),
    ],
)
def test_shows(prompt: str, text: str, shown: bool) -> None:
    assert Shown(prompt).has(text) is shown


def test_markup_in_a_text_of_parts() -> None:
    """Names of control tokens stay text where the content is parts; a template may also take them out."""
    seen: list[tuple[str, bool]] = []

    class Recorder:
        control_names = TokenNames(["<|im_end|>"])

        def tokenize(self, text: str, *, add_special: bool, parse_special: bool, **limits: None) -> list[int]:
            assert not add_special
            assert limits == {"at_most": None, "until": None}
            seen.append((text, parse_special))
            return [1]

        def literal(self, text: str, _is_end: object) -> list[int]:
            seen.append((text, False))
            return [1]

    recorder = Recorder()
    model: Any = SimpleNamespace(
        tokenizer=recorder, tokenize=recorder.tokenize, is_end=lambda _token: False, add_bos=False, bos=-1
    )
    said: list[Message] = [{"role": "user", "content": "Read <|im_end|> here"}]
    for source, expected in (
        (
            PARTS,
            [
                ("<|im_start|>user\nRead ", True),
                ("<|im_end|>", False),
                (" here<|im_end|>\n<|im_start|>assistant", True),
            ],
        ),
        ("{{ messages[0].content.replace('<|im_end|>', '') }}", [("Read  here", True)]),
    ):
        seen.clear()
        with ChatTemplate(source) as template:
            template.tokens(model, said)
        assert seen == expected


def test_texts_in_any_order() -> None:
    """What is found tells nothing of what is looked for next: the same text, an earlier one, one written in another way."""
    shown = Shown(r"one two &lt;three&gt; \"four\" FIVE  six")
    for text in ("five six", "one", "two", "one", "one two", "<three>", '"four"', "six", "one", "<three>"):
        assert shown.has(text), text
    assert not shown.has("seven")
    assert shown.has("six")
    assert not shown.has("two one")


@pytest.mark.parametrize(
    "written", ["message  {} of many", "message {} of many", "<message {}>"], ids=["bare", "exact", "escaped"]
)
def test_a_thousand_messages_take_no_time(written: str) -> None:
    texts = [written.format(number) for number in range(20_000)]
    prompt = "".join(f"<system>{html.escape(' '.join(text.split()))}</system>" for text in texts)
    began = time.process_time()
    shown = Shown(prompt)
    assert all(map(shown.has, texts))
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("<|im_start|>user\nassistant\n", ["user"]),
        ("<|im_start|>user\nassistant\n", ["a"]),
        ("{% for m in messages[:-1] %}{{ m.content }};{% endfor %}", ["yes", "ok", "yes"]),
        ("{% for m in messages[:-1] %}{{ m.content }};{% endfor %}", ["I say no", "ok", "no"]),
    ],
)
def test_words_that_are_elsewhere_in_the_prompt_are_lost_all_the_same(source: str, said: list[str]) -> None:
    roles = ("user", "assistant")
    messages: list[Message] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    with ChatTemplate(source) as template, pytest.raises(YarnEdgeError, match="without all of the user's last message"):
        template.render(messages)
    with ChatTemplate("{% for m in messages %}{{ m.content }};user{% endfor %}") as template:
        assert template.render(messages)

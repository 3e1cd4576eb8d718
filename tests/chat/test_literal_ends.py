"""Whatever type a file gives to the token that ends a turn, a message cannot contain that token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.chat.template import ChatTemplate
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model

from support.gguf_files import BYTE_TOKENIZER, write_gguf

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}END{% endfor %}<s>"
UNKNOWN_NAMES = ("<|turn_end|>", "ab", "abc")  # llama.cpp does not know them; two are made by merges
TYPES = {"normal": 1, "unknown": 2, "control": 3, "user defined": 4, "unused": 5}


def with_end(folder: Path, name: str, kind: int, slot: str = "eos_token_id", **keys: Any) -> Path:
    """A vocabulary in which `name` ends a turn and has that type."""
    tokens = list(BYTE_TOKENIZER["tokenizer.ggml.tokens"])
    types = list(BYTE_TOKENIZER["tokenizer.ggml.token_type"])
    if name in tokens:
        types[tokens.index(name)] = kind
    else:
        tokens.append(name)
        types.append(kind)
    own = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ends = {slot if slot.startswith("yarn_edge") else f"tokenizer.ggml.{slot}": tokens.index(name)}
    ends = {k: [v] if k.startswith("yarn_edge") else v for k, v in ends.items()}
    template = {"tokenizer.chat_template": TEMPLATE.replace("END", name), "llama.block_count": 0}
    return write_gguf(folder / "end.gguf", "llama", {**BYTE_TOKENIZER, **own, **template, **ends, **keys})


@pytest.fixture(
    params=[
        *((name, kind, "eos_token_id") for name in ("<|im_end|>", *UNKNOWN_NAMES) for kind in TYPES),
        ("<|turn_end|>", "normal", "eot_token_id"),
        ("<|turn_end|>", "user defined", "yarn_edge.eog_token_ids"),
    ],
    ids=" ".join,
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Model, str]]:
    name, kind, slot = request.param
    with Model(with_end(tmp_path, name, TYPES[kind], slot), vocab_only=True) as loaded:
        yield loaded, name


def test_a_message_holds_no_token_that_ends_a_turn(model: tuple[Model, str]) -> None:
    loaded, name = model
    said = f"x{name}y <s>{name}{name}"
    with ChatTemplate.of(loaded) as template:
        tokens = template.tokens(loaded, [{"role": "user", "content": said}])
        harmless = template.tokens(loaded, [{"role": "user", "content": "x y"}])
    assert sum(map(loaded.is_end, tokens)) == sum(map(loaded.is_end, harmless)) <= 1
    rendered = b"".join(map(loaded.token_bytes, tokens)).decode()
    assert rendered.startswith(f"<s>{said}")  # the template's own end has no text if it is unused
    assert rendered.endswith("<s>")


def test_an_end_of_one_character_cannot_be_said(tmp_path: Path) -> None:
    with Model(with_end(tmp_path, "Z", 1), vocab_only=True) as loaded, ChatTemplate.of(loaded) as template:
        with pytest.raises(YarnEdgeError, match=r"'Z' ends an answer, so no message can contain it"):
            template.tokens(loaded, [{"role": "user", "content": "from A to Z"}])
        assert template.tokens(loaded, [{"role": "user", "content": "from A to"}])


def test_markup_of_other_types_is_text_too(tmp_path: Path) -> None:
    """Control tokens that end nothing, such as the one that starts a turn."""
    with Model(with_end(tmp_path, "<|turn_end|>", 3), vocab_only=True) as loaded, ChatTemplate.of(loaded) as template:
        tokens = template.tokens(loaded, [{"role": "user", "content": "<s><u><v>"}])
    assert tokens.count(258) == 2
    assert 260 not in tokens
    assert 261 not in tokens

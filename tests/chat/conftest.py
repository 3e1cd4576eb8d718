"""What tests of chat templates compare with: transformers' own rendering, and a real vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.chat.template import Message
from yarn_edge.runtime.model import Model

from support.jinja_templates import BOS, EOS


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' own rendering, with a tokenizer that knows nothing but its special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({BOS: 0, EOS: 1, "?": 2}, unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS, eos_token=EOS)

    def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = False, **options: Any) -> str:
        options = {**options, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))

    return render


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(package_gguf(), vocab_only=True) as loaded:
        yield loaded

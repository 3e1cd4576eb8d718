"""A tiny model to chat with: random weights, 262 tokens, a chat template."""

from __future__ import annotations

from pathlib import Path

from . import tiny_gguf
from .gguf_files import BYTE_TOKENIZER, random_tensors, write_gguf

TEMPLATE = "{% for m in messages %}<u>{{ m.role }}\n{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<u>assistant\n{% endif %}"
# Renders for hours what begins with "slow".
SLOW = "{% if messages[0].content.startswith('slow') %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
LONGEST = 64  # bytes of the longest token


def tiny_chat_model(path: Path, template: str = TEMPLATE) -> Path:
    """Its longest token lets the server tokenize texts of 64 times the context: it refuses longer ones by their length."""
    words = [*BYTE_TOKENIZER["tokenizer.ggml.tokens"][:-1], f"<|{'v' * (LONGEST - 4)}|>"]
    keys = {f"llama.{name}": value for name, value in tiny_gguf.model_keys("llama").items()}
    more = {"tokenizer.ggml.tokens": words, "tokenizer.chat_template": template}
    return write_gguf(path, "llama", BYTE_TOKENIZER | keys | more, random_tensors(tiny_gguf.tensor_shapes("llama")))

"""The small real model with another chat template."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.gguf.read import read_gguf

from support.gguf_bytes import edit_key


def with_template(path: Path, source: str) -> Path:
    """Writes the model to `path`; a comment after `source` makes it as long as the model's own template."""
    own = read_gguf(package_gguf()).metadata["tokenizer.chat_template"]
    assert isinstance(own, str)
    comment = len(own.encode()) - len(source.encode()) - 4
    assert comment >= 0
    path.write_bytes(package_gguf().read_bytes())
    edit_key(path, "tokenizer.chat_template", f"{source}{{#{'-' * comment}#}}")
    return path

"""What chat templates read as bos_token and eos_token.

llama.cpp needs ids of both, so a GGUF may have them although the checkpoint's tokenizer names none. Templates of such a checkpoint
read "" in transformers; `yarn_edge.unnamed_tokens`, which convert writes, says so to yarn-edge.
"""

from __future__ import annotations

import re

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.vocabulary_rules import BYTE_PAIRS, TOKENIZERS

ROLES = ("bos", "eos")
UNNAMED = "yarn_edge.unnamed_tokens"


def roles_read(template: str | None) -> tuple[str, ...]:
    """Those of ROLES of which a template's source mentions the token."""
    return tuple(role for role in ROLES if re.search(rf"\b{role}_token\b", template or ""))


def unnamed_roles(file: GGUFFile) -> frozenset[str]:
    """Those of ROLES that templates read as "": by the file's own key, or because llama.cpp would take an arbitrary id (11).

    Raises YarnEdgeError if the key holds anything but ROLES.
    """
    value = file.metadata.get(UNNAMED, [])
    if not isinstance(value, list) or not all(role in ROLES for role in value):
        raise YarnEdgeError(
            f"{file.path}: {UNNAMED} is {one_line(repr(value), 60)}, expected some of {', '.join(ROLES)}: "
            "convert the checkpoint again"
        )
    model = file.metadata.get("tokenizer.ggml.model")
    arbitrary = isinstance(model, str) and TOKENIZERS.get(model) is BYTE_PAIRS
    absent = [role for role in ROLES if arbitrary and f"tokenizer.ggml.{role}_token_id" not in file.metadata]
    return frozenset([*value, *absent])

"""The GGUF that is exported: its positions in a context of one size, its sampling defaults, and how llama.cpp can run them.

Nothing is written for a program that would run other positions: the error says by how much, and what helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.declared import open_attention_factor
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions

SAMPLING = "general.sampling."  # llama.cpp's keys for what generation_config.json says
CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class ExportSubject:
    """A file, and the size of the context in tokens that the program is to open.

    Raises YarnEdgeError for a size beyond the file's, and for a name that no text for a program can hold.
    """

    file: GGUFFile
    n_ctx: int

    def __post_init__(self) -> None:
        longest = self.file.required_int("context_length")
        if self.n_ctx > longest:
            raise YarnEdgeError(f"{self.file.path}: --ctx {self.n_ctx} is beyond the {longest} tokens of its context")
        for path in self.shards:
            name = str(path.absolute())
            if not name.isprintable() or name.strip() != name:
                raise YarnEdgeError(
                    f"{one_line(name)}: other programs cannot be given this name: rename the file or its folders"
                )

    @cached_property
    def positions(self) -> FilePositions:
        """The file's positions in that context. Raises YarnEdgeError if the file leaves open what they are."""
        factor = open_attention_factor(self.file)
        if factor is not None:
            raise YarnEdgeError(
                f"{self.file.path}: {self.file.architecture}.rope.scaling.yarn_attn_factor is {factor:.7g}, whose meaning is open: "
                "say what A is with yarn-edge patch MODEL.gguf -o FIXED.gguf --yarn-attention-factor A"
            )
        return FilePositions(self.file, self.n_ctx)

    @property
    def shards(self) -> tuple[Path, ...]:
        """All files of the model, in order."""
        return self.file.shards or (self.file.path,)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file says how a conversation is written."""
        return bool(self.file.metadata.get(CHAT_TEMPLATE))

    @property
    def sampling(self) -> dict[str, float]:
        """The file's own sampling defaults by llama.cpp's names (temp, top_k, …). Raises YarnEdgeError for one that is no number."""
        values: dict[str, float] = {}
        for key in sorted(k for k in self.file.metadata if k.startswith(SAMPLING)):
            value, name = self.file.metadata[key], key.removeprefix(SAMPLING)
            if name == "sequence":  # the order of samplers, a text
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise self.file.wrong(key, "expected a finite number")
            values[name] = value
        return values

    def arguments(self, program: str, takes_arguments: bool) -> RuntimeArguments:
        """What llama.cpp inside `program` must be given: nothing, or every scaling value.

        Raises YarnEdgeError if the program has no parameter for what is missing, or if no argument helps.
        """
        positions = self.positions
        error = positions.error(FROM_MODEL)
        if not error.any_difference:
            return FROM_MODEL
        arguments = positions.explicit_arguments
        helps = positions.live is None and not positions.error(arguments).any_difference
        if helps and takes_arguments:
            return arguments
        why = f"{program} has no parameter for them" if helps else "no argument of llama.cpp gives them"
        ours = "positions need yarn-edge" if positions.canonical is not None else "positions need a repair or yarn-edge"
        raise YarnEdgeError(
            f"{self.file.path}: {ours}: {why}, and it would run {error} (yarn-edge inspect shows them and the remedy)"
        )


def shortest(value: float) -> str:
    """A number of a GGUF as text: the fewest digits that are this float32, and whole numbers as they are."""
    return str(value) if isinstance(value, int) else str(np.float32(value))

"""How long the sequences were that a checkpoint was trained on, as far as the files beside its config say so.

Trainers leave their own settings there: a YAML file, or a model card with one. Only lines `key: number` of keys that mean exactly this
are believed, and only if they agree. Nothing is executed: training_args.bin, a pickle, is never opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions.scaling import MAX_CONTEXT
from yarn_edge.regular_file import read_regular

MAX_FILES, MAX_BYTES = 16, 1 << 20
# A trainer's key for the longest sequence, in tokens; a longer text is cut or left out.
TRAINERS = {
    "sequence_len": "axolotl",
    "cutoff_len": "LLaMA-Factory",
    "max_seq_length": "TRL, Unsloth",
    "max_total_sequence_length": "NeMo RL",
    "max_seq_len": "torchtune",
}
_LINE = re.compile(rf"^[ \t]*(?:train\.)?({'|'.join(TRAINERS)}):[ \t]*(\d{{1,10}})[ \t]*(?:#.*)?\r?$", re.MULTILINE)
_BLOCK = re.compile(r"^```ya?ml\r?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class TrainedLength:
    """tokens: of the longest sequence in training. source: the file and the key. trainer: whose key that is."""

    tokens: int
    source: str
    trainer: str


def trained_length(folder: Path) -> TrainedLength | None:
    """What the files in `folder` say; None if they say nothing, or contradict each other."""
    found: list[TrainedLength] = []
    cards = [path for path in (folder / "README.md",) if path.is_file()]
    settings = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    for path in [*settings[:MAX_FILES], *cards]:
        try:
            text = read_regular(path, MAX_BYTES).decode("utf-8")
        except (YarnEdgeError, UnicodeDecodeError):
            continue  # not a trainer's
        texts = _BLOCK.findall(text) if path.name == "README.md" else [text]
        for key, digits in (match for part in texts for match in _LINE.findall(part)):
            if 0 < int(digits) <= MAX_CONTEXT:
                found.append(TrainedLength(int(digits), f"{path.name}: {key} {int(digits)}", TRAINERS[key]))
    return found[0] if found and len({one.tokens for one in found}) == 1 else None

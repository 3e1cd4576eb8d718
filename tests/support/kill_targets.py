"""The commands that `support.kills` ends: every one that writes, on models so small that a run takes about a second."""

from __future__ import annotations

import atexit
import csv
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.chat.conversation import Conversation, Turn
from yarn_edge.cli import ignore_signals, main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.imatrix.matrix import read_imatrix
from yarn_edge.sample_text import sample_text

# Imported once, before any command is forked off. Not this module: Python 3.11 does not tell the server where to find it.
PRELOAD = [
    "yarn_edge.convert.hf_to_gguf",
    "yarn_edge.chat.command",
    "yarn_edge.convert.imatrix.command",
    "yarn_edge.convert.quantize",
    "yarn_edge.convert.patch",
    "yarn_edge.inspect.command",
    "yarn_edge.bench.quality.perplexity",
    "yarn_edge.bench.speed.command",
    "yarn_edge.report.pictures",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "llama_cpp",
]


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    checkpoint: Path
    model: Path
    shards: Path
    text: Path
    conversation: Path


def write_inputs(folder: Path) -> Inputs:
    """A checkpoint of 2 layers, the GGUFs made from it, a text, a conversation."""
    from support import tiny  # needs torch, which the commands do not
    from support.gguf_files import split

    checkpoint = tiny.write_checkpoint(folder / "ck")
    (model,) = convert(checkpoint, str(folder / "tiny.gguf"), "F32")
    text, conversation = folder / "t.txt", folder / "c.json"
    text.write_text(sample_text()[:1200], encoding="utf-8")
    Conversation("be brief", [Turn(f"question {i}", "answer " * 200) for i in range(200)]).save(conversation)
    return Inputs(checkpoint, model, split(model, folder / "split.gguf", 8)[0], text, conversation)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are equal."""
    return a.read_bytes() == b.read_bytes()


def same_imatrix(a: Path, b: Path) -> bool:
    """Sums that went through a file of progress are rounded to float32."""
    one, two = read_imatrix(a), read_imatrix(b)
    return one.entries.keys() == two.entries.keys() and all(
        np.array_equal(x.counts, two.entries[name].counts) and np.allclose(x.sums, two.entries[name].sums, rtol=1e-5)
        for name, x in one.entries.items()
    )


def same_scores(a: Path, b: Path) -> bool:
    """Scores that were begun in another batch differ in their last bits."""
    with np.load(a) as one, np.load(b) as two:
        return bool(np.allclose(one["nll"], two["nll"], rtol=1e-4))


def whole_page(a: Path, _b: Path) -> bool:
    """A page tells when it was made, so no two are equal."""
    return a.read_text(encoding="utf-8").rstrip().endswith("</html>")


def whole_table(a: Path, b: Path) -> bool:
    """Times differ, names and numbers of cells do not."""
    one, two = (path.read_text(encoding="utf-8").splitlines() for path in (a, b))
    return one[0] == two[0] and [line.count(",") for line in one] == [line.count(",") for line in two]


def _read_scores(path: Path) -> None:
    with np.load(path, allow_pickle=False) as scores:
        json.loads(str(scores["header"]))
        np.asarray(scores["nll"])


def _read_progress(path: Path) -> None:
    read_imatrix(path)


def _save_conversation(words: list[str]) -> int:
    """What /save does, forty times over, under `main`'s handling of signals."""
    from yarn_edge import cli

    class Saving:
        """Stands in for a command's module."""

        @staticmethod
        def add_arguments(_parser: Any) -> None:
            pass

        @staticmethod
        def run(_args: Any) -> int:
            conversation = Conversation.load(Path(words[0]))
            for _ in range(40):
                conversation.save(Path(words[1]))
            return 0

    sys.modules["saving_a_conversation"] = Saving  # type: ignore[assignment]
    cli.COMMANDS = {"save": ("saving_a_conversation", "save a conversation")}
    return main(["save"])


def _read_rows(path: Path) -> None:
    """Interrupted, `bench` writes the rows that it has, if any."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not reader.fieldnames or any(None in row.values() for row in reader):
            raise ValueError("a row has fewer cells than the first")


@dataclass(frozen=True)
class Target:
    """A command. words: with {checkpoint}, {model}, {shards}, {text}, {conversation}, and {out} for the folder of its outputs.

    settings: (module, name) -> value while it runs. same: how an output equals the undisturbed run's, by suffix (default: its
    bytes). unfinished: how a file that holds an unfinished run is read, by suffix; it may lie there after a signal. resume: words
    with which the next run continues from it. replace: words with which a run replaces what the one before has finished.
    replaces: not None if the outputs of another run are there already, made with these words at the end. prints_result: what is
    printed is a result, too.
    """

    words: str
    run: Callable[[list[str]], int] = main
    settings: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    same: Mapping[str, Callable[[Path, Path], bool]] = field(default_factory=dict)
    unfinished: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    resume: tuple[str, ...] = ()
    replace: tuple[str, ...] = ("--force",)
    replaces: tuple[str, ...] | None = None
    prints_result: bool = False

    def words_for(self, inputs: Inputs, out: Path) -> list[str]:
        """The command with its paths."""
        return [word.format(**vars(inputs), out=out) for word in self.words.split()]


def start(name: str, words: list[str], folder: Path) -> None:
    """The body of the process: redirect its output, apply the settings, run, end."""
    target = TARGETS[name]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ["TMPDIR"] = str(folder / "tmp")
    for (module, setting), value in target.settings.items():
        setattr(importlib.import_module(module), setting, value)
    code = 70
    try:
        code = target.run(words)
        ignore_signals()
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter: temporary folders go
        os._exit(code)


_PATCH = "-o {out}/o.gguf --sync --yarn-factor 8 --yarn-orig-ctx 256"
_SAVE_OFTEN = {
    ("yarn_edge.bench.quality.score_file", "SAVE_SECONDS"): 0.0,
    ("yarn_edge.bench.quality.score_file", "CACHE_SECONDS"): 0.0,
    ("yarn_edge.bench.quality.score_file", "_CACHE_SHARE"): 0,
    ("yarn_edge.bench.scoring.evaluate", "MAX_BATCH"): 64,
}

TARGETS: dict[str, Target] = {
    "convert": Target("convert {checkpoint} -o {out}/o-{{quant}}.gguf --quant F16,Q8_0"),
    "quantize": Target("quantize {model} -o {out}/o.gguf --quant Q8_0 --kernels ggml"),
    "quantize over old files": Target(
        "quantize {model} -o {out}/o-{{quant}}.gguf --quant Q8_0,F16 --kernels ggml",
        replaces=("--tensor-type", "ffn_down=f16", "--output-type", "f32"),
    ),
    "patch": Target("patch {model} " + _PATCH),
    "patch shards": Target("patch {shards} " + _PATCH),
    "patch shards over old ones": Target("patch {shards} " + _PATCH, replaces=("--yarn-factor", "2")),
    "imatrix": Target(
        "imatrix {model} --text {text} -o {out}/m.gguf --ctx 32 --batch 32 --threads 1",
        settings={("yarn_edge.convert.imatrix.command", "SAVE_SECONDS"): 0.0},
        same={".gguf": same_imatrix},
        unfinished={".progress": _read_progress},
        resume=("--resume", "--force"),
    ),
    "inspect --plot": Target("inspect {model} --plot {out}/p.png", prints_result=True),
    "perplexity --save": Target(
        "perplexity {model} --text {text} --save {out}/s.npz --ctx 1000 --threads 1",
        settings=_SAVE_OFTEN,
        same={".npz": same_scores},
        unfinished={".npz": _read_scores, ".cache": lambda _path: None},
        resume=("--resume",),
    ),
    "perplexity --plot --report": Target(
        "perplexity {model} --text {text} --ctx 256 --threads 1 --plot {out}/p.png --report {out}/p.html",
        same={".html": whole_page},
    ),
    "chat --cache": Target(
        "chat {model} -p what? --file {text} --cache {out}/states --raw --temperature 0 --max-tokens 2 --ctx 2048 --threads 1",
        settings={("yarn_edge.engine.sequences", "KEEP_TOKENS"): 64},
        replace=(),
        prints_result=True,
    ),
    "/save": Target("{conversation} {out}/saved.json", run=_save_conversation, replace=()),
    "bench --csv": Target(
        "bench {model} -p 16 -n 2 --repeat 1 --backend cpu --csv {out}/b.csv",
        same={".csv": whole_table},
        unfinished={".csv": _read_rows},
        resume=("--force",),
    ),
}

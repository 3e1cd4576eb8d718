"""A length in tokens is written in the same way in every flag of every command."""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Iterator

import pytest

import yarn_edge.bench.peers
from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.bench.lm_eval.arguments import parse_arguments
from yarn_edge.bench.scoring.variants import parse_variant
from yarn_edge.cli import COMMANDS
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import length, length_from, parse_length

from support.documented import parser_of_command, parser_of_module

RACES = [f"yarn_edge.bench.peers.{module.name}" for module in pkgutil.iter_modules(yarn_edge.bench.peers.__path__)]
# Numbers whose help speaks of tokens, though they count something else.
OTHERS = {"--top-k", "--chunks", "--seed", "--documents"}


def length_flags() -> Iterator[tuple[str, argparse.Action]]:
    """(command, flag) for numbers of tokens."""
    parsers = {name: parser_of_command(name) for name in COMMANDS}
    parsers |= {name: made for name in RACES if (made := parser_of_module(name)) is not None}
    for command, parser in parsers.items():
        for action in parser._actions:
            flags = set(action.option_strings)
            counts_tokens = "token" in (action.help or "") and action.metavar in ("N", "S", "LIST", "N,…")
            if action.type and (counts_tokens or "--ctx" in flags) and not OTHERS & flags:
                yield f"{command} {action.option_strings[-1]}", action


FLAGS = dict(length_flags())
EXPECTED = {
    "chat --ctx",
    "chat --max-tokens",
    "serve --ctx",
    "perplexity --ctx",
    "perplexity --max-tokens",
    "perplexity --stride",
    "perplexity --bucket",
    "compare --ctx",
    "sweep --ctx",
    "sweep --dynamic-step",
    "imatrix --ctx",
    "imatrix --batch",
    "verify --tokens",
    "bench --depth",
    "bench --ctx",
    "bench --batch",
    "bench --prompt-tokens",
    "demo --tokens",
    "fit --ctx",
    "convert --yarn-orig-ctx",
    "patch --yarn-orig-ctx",
    "inspect --freeze-at",
    "yarn_edge.bench.peers.perplexity --ctx",
}


def test_every_command_is_looked_at() -> None:
    assert FLAGS.keys() >= EXPECTED


@pytest.mark.parametrize("flag", FLAGS)
def test_lengths_are_read_alike(flag: str) -> None:
    read = FLAGS[flag].type
    assert callable(read)
    assert read("1k") in (1024, [1024])
    assert read("1K") == read("1024")
    for text in ("many", "1kk", "k", "1.5", "1x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of tokens, such as 4096 or 4k"):
            read(text)


def test_lengths_outside_a_flag() -> None:
    path = str(package_gguf())
    given = parse_arguments({"path": path, "ctx": "1k", "batch": "2K"})
    assert (given.ctx, given.batch) == (1024, 2048)
    scaled = parse_variant(f"{path}@yarn-factor=2,yarn-orig-ctx=4k")
    assert scaled.arguments is not None
    assert scaled.arguments.yarn_orig_ctx == 4096
    with pytest.raises(YarnEdgeError, match="ctx is '4x', not a whole number"):
        parse_arguments({"path": path, "ctx": "4x"})


def test_limits() -> None:
    assert [length_from(0)("0"), length_from(1)("1"), length("2"), parse_length("2k")] == [0, 1, 2, 2048]
    for read, text, message in (
        (length, "1", "1 is not from 2 to 2147483647"),
        (length, "2097152k", "2097152k is not from 2 to"),
        (length_from(16, 4096), "5k", "5k is not from 16 to 4096"),
        (length_from(1), "-1k", "-1k is not from 1 to"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            read(text)

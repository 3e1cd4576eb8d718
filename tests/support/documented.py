"""What the docs say can be typed: the commands of their code blocks and of their inline code, and what is wrong with each.

A command is checked by the parser that would read it: the command's own, or the one that `python -m yarn_edge.…` makes when it starts.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

from yarn_edge.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
HARNESS = "yarn_edge.bench.lm_eval.harness"  # its flags are those of lm_eval
_OPERATORS = "|&;<>"


class _Made(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@cache
def parser_of_command(name: str) -> argparse.ArgumentParser:
    """As yarn_edge.cli makes it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    for flag in ("--quiet", "--debug"):
        parser.add_argument(flag, action="store_true")
    return parser


@cache
def parser_of_module(name: str) -> argparse.ArgumentParser | None:
    """The parser that `python -m NAME` makes; None if it cannot be run. One that takes no arguments gets an empty one."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is not None and spec.submodule_search_locations is not None:
        return parser_of_module(f"{name}.__main__")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).read_text(encoding="utf-8")
    started = [
        part for part in ast.parse(source).body if isinstance(part, ast.If) and "__main__" in ast.dump(part.test)
    ]
    if not started:
        return None
    if "argparse" not in source:
        return argparse.ArgumentParser()

    def made(self: argparse.ArgumentParser, *_arguments: object) -> None:
        raise _Made(self)

    names = dict(vars(importlib.import_module(name)))
    with mock.patch.object(argparse.ArgumentParser, "parse_args", made):
        try:
            exec(compile(ast.Module(started[0].body, []), name, "exec"), names)
        except _Made as reached:
            return reached.parser
    raise AssertionError(f"{name} parses nothing")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a shell line as their words, without redirections, variables and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if redirected:
            redirected = False
        elif not set(word) <= set(_OPERATORS):
            if words or not re.match(r"\w+=|(time|\$)$", word):
                words.append(word)
        elif set(word) <= set("<>"):
            redirected = True
        else:
            if words:
                yield words
            words = []


def typed(page: str) -> Iterator[list[str]]:
    """The commands of a page's code blocks: lines that are indented, or fenced."""
    text = re.sub(r"^```python\n.*?^```$", "", page, flags=re.M | re.S).replace("\\\n", " ")
    lines = [block for fence in re.findall(r"^```.*?\n(.*?)^```$", text, re.M | re.S) for block in fence.splitlines()]
    lines += re.findall(r"^    (.+)$", text, re.M)
    variables: dict[str, str] = {}
    for line in lines:
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
            variables[f"${assigned[1]} "] = f"{assigned[2]} "
        for name, value in variables.items():
            line = line.replace(name, value)
        if "yarn-edge " in line or "python -m " in line:
            yield from (words for words in simple_commands(line) if is_ours(words))


def inline(page: str) -> Iterator[list[str]]:
    """The commands of a page's inline code, which may be without their arguments."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page):
        if "yarn-edge " in code or "python -m " in code:
            yield from (words for words in simple_commands(code) if is_ours(words))


def is_ours(words: Sequence[str]) -> bool:
    """A command or a module of ours, but one that is named as `yarn_edge.bench.…`."""
    if words[0] == "yarn-edge":
        return True
    return words[:2] == ["python", "-m"] and words[2].startswith(("yarn_edge", "support.")) and "…" not in words[2]


def problem(words: Sequence[str], *, whole: bool) -> str | None:
    """What is wrong with a command, None if nothing is. whole: it is to be read as it stands, unless it has an ellipsis."""
    name, rest = words[0], list(words[1:])
    if name == "python":
        name, rest = words[2], list(words[3:])
        if name in ("yarn_edge", "yarn_edge.chat"):
            name, rest = "yarn-edge", [*(["chat"] if name == "yarn_edge.chat" else []), *rest]
    if name == "yarn-edge":
        if not rest or rest[0] in ("COMMAND", "--help"):
            return None
        name, rest = rest[0], rest[1:]
        if name not in COMMANDS:
            return f"there is no yarn-edge {name}"
        parser: argparse.ArgumentParser | None = parser_of_command(name)
    else:
        parser = parser_of_module(name)
    if parser is None:
        return f"python -m {name} cannot be run"
    if name == HARNESS or "--help" in rest:
        return None
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[A-Za-z]", word) and "…" not in word}
    if given - flags_of(parser):
        return f"{name} has no {', '.join(sorted(given - flags_of(parser)))}"
    if not whole or any("…" in word for word in rest):
        return None
    with refusals() as said:
        parser.parse_args(rest)
    return said[0] if said else None


@contextmanager
def refusals() -> Iterator[list[str]]:
    """argparse's complaint, if it leaves."""
    said: list[str] = []
    complaint = StringIO()
    with redirect_stderr(complaint):
        try:
            yield said
        except SystemExit:
            said.append(complaint.getvalue().strip().splitlines()[-1])
        except Exception as error:
            said.append(str(error))

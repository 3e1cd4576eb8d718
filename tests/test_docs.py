"""The docs agree with the code: docs/commands.md is what --help says, and what the pages name exists.

UPDATE_DOCS=1 pytest tests/test_docs.py rewrites docs/commands.md.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from yarn_edge.cli import COMMANDS, main
from yarn_edge.verify.logits import KL_LIMIT_OTHERS, KL_LIMITS

from support.documented import PAGES, flags_of, inline, parser_of_command, parser_of_module, problem, typed

ROOT = Path(__file__).parent.parent
COMMANDS_PAGE = ROOT / "docs" / "commands.md"
IDS = [page.name for page in PAGES]
ROOMS = sorted(path.parent for top in ("yarn_edge", "convert", "bench") for path in (ROOT / top).rglob("__init__.py"))
# Flags that the pages name of other programs.
OTHERS_FLAGS = {
    "--in-file": "llama-imatrix", "--kl-divergence": "llama-perplexity", "--truncate": "the authors' perplexity.py",
    "--no-cache-dir": "pip", "--model": "lm_eval", "--model_args": "lm_eval", "--apply_chat_template": "lm_eval",
    "--use_cache": "lm_eval", "--cache_requests": "lm_eval", "--batch_size": "lm_eval", "--device": "lm_eval",
    "--hf-overrides": "vLLM", "--max-model-len": "vLLM", "--merge": "llama-gguf-split",
    "--samples": "what bench.peers.bench had once",
}  # fmt: skip


def help_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("NO_COLOR", "1")
    parts = [
        "# Commands\n\nEach is also `python -m yarn_edge COMMAND …`; chat is also `python -m yarn_edge.chat MODEL`.\n"
    ]
    for words in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        title = " ".join(["yarn-edge", *words])
        parts.append(f"## {title}\n\n```text\n{capsys.readouterr().out.rstrip()}\n```\n")
    return "\n".join(parts)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse words its help differently from 3.13 on")
def test_the_commands_page_is_what_help_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = help_page(capsys, monkeypatch)
    if os.environ.get("UPDATE_DOCS"):
        COMMANDS_PAGE.write_text(page, encoding="utf-8")

    def words(text: str) -> list[str]:  # terminals break lines differently
        return text.split()

    assert words(COMMANDS_PAGE.read_text(encoding="utf-8")) == words(page), "UPDATE_DOCS=1 pytest tests/test_docs.py"


def test_every_room_says_what_it_may_import() -> None:
    assert len(ROOMS) > 20
    for room in ROOMS:
        told = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert told, room
        assert room == ROOT / "yarn_edge" or "\n\nMay import: " in told, room


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert not re.search(r"^[A-Z]{4,}$|TODO|TBD", page.read_text(encoding="utf-8"), re.M), page


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_docs_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                path, _, anchor = target.partition("#")
                there = page.parent / path if path else page
                assert there.exists(), (page.name, target)
                assert not anchor or anchor in anchors(there), (page.name, target)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    if page == COMMANDS_PAGE:
        return  # it is --help itself
    text = page.read_text(encoding="utf-8")
    wrong = [(words, problem(words, whole=True)) for words in typed(text)]
    wrong += [(words, problem(words, whole=False)) for words in inline(text)]
    assert not [item for item in wrong if item[1] is not None]


@pytest.mark.parametrize(
    "line, told",
    [
        ("yarn-edge fit model.gguf --nope 3", "fit has no --nope"),
        ("yarn-edge nothing model.gguf", "there is no yarn-edge nothing"),
        ("yarn-edge fit model.gguf --backend gpu", "invalid choice"),
        ("cat x | python -m yarn_edge.chat", "required: MODEL"),
        ("python -m yarn_edge.bench.speed_peers m.gguf > out", "cannot be run"),
        ("python -m yarn_edge.errors", "cannot be run"),
        ("python -m yarn_edge.bench.evidence.curves a.json --nope", "has no --nope"),
        ("python -m yarn_edge.bench.evidence.curves a.json", "required: -o"),
        ("python -m yarn_edge.bench.evidence.matrix x", "unrecognized arguments: x"),
        ("time yarn-edge fit a && yarn-edge fit b --ctx many  # why", "is no"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, told: str) -> None:
    found = [problem(words, whole=True) for words in typed(f"    {line}\n")]
    assert told in (found[-1] or ""), found


def test_every_flag_that_a_page_names_exists() -> None:
    """In inline code; of any command or module of ours that is named somewhere."""
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    modules = {words[2] for text in pages.values() for words in (*typed(text), *inline(text)) if words[0] == "python"}
    parsers = [parser_of_command(name) for name in COMMANDS]
    parsers += [parser for name in modules if (parser := parser_of_module(name)) is not None]
    known = set(OTHERS_FLAGS).union(*map(flags_of, parsers))
    for page, text in pages.items():
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w…-])", code))
            assert flags <= known or "llama" in code, (page.name, code, flags - known)


def test_every_path_and_module_that_a_page_names_exists() -> None:
    rooms = "|".join(room.name for room in ROOMS if room.parent == ROOT / "yarn_edge") + "|convert|bench"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.-])(?:yarn_edge|convert|bench|tests|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), (page.name, path)
        for name in re.findall(rf"\byarn_edge\.(?:{rooms})(?:\.\w+)*\b", text):
            assert importlib.util.find_spec(name) is not None, (page.name, name)


def test_the_limits_in_the_docs_are_those_of_the_code() -> None:
    types = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q5_K_M": 17, "Q2_K": 10}
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    for name, ftype in types.items():
        row = re.search(rf"^\| {name} \|.*\| ([^|]+) \|$", page, re.M)
        assert row is not None, name
        assert float(row[1]) == KL_LIMITS.get(ftype, KL_LIMIT_OTHERS), name

"""The docs agree with the code: docs/commands.md is what --help says, and the README names every file and command.

UPDATE_DOCS=1 pytest tests/test_docs.py writes docs/commands.md anew.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from yarn_edge.cli import COMMANDS, main
from yarn_edge.verify.logits import KL_LIMIT_OTHERS, KL_LIMITS

ROOT = Path(__file__).parent.parent
COMMANDS_PAGE = ROOT / "docs" / "commands.md"


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


def test_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("yarn_edge", "convert", "bench"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in readme, path


def test_no_placeholder_is_left() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"^[A-Z]{4,}$|TODO|TBD", page.read_text(encoding="utf-8"), re.M), page


def test_every_link_of_the_docs_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_the_limits_in_the_docs_are_those_of_the_code() -> None:
    types = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q5_K_M": 17, "Q2_K": 10}
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    for name, ftype in types.items():
        row = re.search(rf"^\| {name} \|.*\| ([^|]+) \|$", page, re.M)
        assert row is not None, name
        assert float(row[1]) == KL_LIMITS.get(ftype, KL_LIMIT_OTHERS), name

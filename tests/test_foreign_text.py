"""Whatever strangers write into names and files, a terminal gets nothing that it obeys, and JSON stays JSON."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeBug, YarnEdgeError, as_ours
from yarn_edge.foreign_text import harmless, harmless_json, whole_characters
from yarn_edge.progress import bar, note
from yarn_edge.report.deliver import report_text
from yarn_edge.report.report import Report, Table
from yarn_edge.stdout import json_text, write_data, write_text

from support import tiny
from support.gguf_bytes import edit_key

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = "\x1b[777m\x00\r\x08\x07\x9b7\u202e\u2028\x7f\n! fake: "


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\x1b[2J\x07\x9b31m\r\x00b\n\tc 👩‍🚀 é", "a[2J31mb\n\tc 👩‍🚀 é"),
        ("\x1b]52;c;aGk=\x07", "]52;c;aGk="),
        ("\x9d8;;http://x\x9chere", "8;;http://xhere"),
        ("done\rfake", "donefake"),
        ("safe\x08\x08\x08\x08evil", "safeevil"),
        ("txt.\u202eexe", "txt.exe"),
        ("\u2066a\u2069\u2028b\u2029", "a\nb\n"),
        ("half \ud800 \udcff", "half \ufffd \ufffd"),
        ("می‌خواهم e\u0301 日本 \u200f", "می‌خواهم e\u0301 日本 \u200f"),
    ],
)
def test_harmless(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert harmless(harmless(text)) == shown


def test_a_sequence_in_pieces_is_as_harmless_as_a_whole_one() -> None:
    sequence = "a\x1b]52;c;aGk=\x1b\\\x9b31m\u202eb"
    assert "".join(map(harmless, sequence)) == harmless(sequence)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_keeps_its_values(ascii_only: bool) -> None:
    values = {HOSTILE: [HOSTILE, "\\\x9b", {"\u2029": "é"}]}
    text = harmless_json(json.dumps(values, ensure_ascii=ascii_only))
    assert OBEYED.search(text) is None
    assert json.loads(text) == values
    assert OBEYED.search(json_text(values, "ascii" if ascii_only else "utf-8")) is None


def test_half_a_character_is_replaced() -> None:
    assert whole_characters("a\ud83d b\udcff 😀") == "a\ufffd b\ufffd 😀"


def test_text_is_for_people_and_data_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    write_text("a\x1b[31mb\n")
    write_data("a\x1b[31mb\n")
    assert capsys.readouterr().out == "a[31mb\na\x1b[31mb\n"


def test_notes_and_errors_stay_on_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    note(f"{HOSTILE}.gguf: a note")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert OBEYED.search(error) is None
    assert str(YarnEdgeError(HOSTILE)).isprintable()


@pytest.mark.parametrize(
    "error, message",
    [
        (YarnEdgeError("ours"), "ours"),
        (OSError(28, "No space left on device", "a\nb"), "a b: No space left on device"),
        (MemoryError(), "out of memory"),
        (KeyError("\x1b[777m"), "a bug in yarn-edge, please report it: KeyError: '\\x1b[777m' (--debug shows where)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_exception_is_one_line(error: Exception, message: str) -> None:
    assert str(as_ours(error)) == message
    assert isinstance(as_ours(error), YarnEdgeBug) == isinstance(error, KeyError)


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_label_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := _Screen())
    with bar("Loading \x1b[777m\x9b777m\n.gguf", 2) as advance:
        advance(1, "\x1b]0;title\x07")
    shown = screen.getvalue()
    assert "Loading" in shown
    assert re.search(r"\x1b\[777|\x9b|\x1b\]|\x07", shown) is None


def test_cells_and_sentences() -> None:
    table = Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 1),), note=HOSTILE)
    shown = report_text(Report("r", (HOSTILE,), (table,)))
    assert OBEYED.search(shown) is None
    assert shown.count("\n") == 6  # title, columns, row, note, empty, sentence


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with a long name and a template, in a folder of its own."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = tiny.write_checkpoint(folder / ("m" * 40))
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return convert(checkpoint, str(folder / "made.gguf"), "F32")[0]


def filled(n_bytes: int) -> str:
    """Hostile text of so many bytes."""
    text = ""
    for character in itertools.cycle(HOSTILE):
        if len((text + character).encode()) > n_bytes:
            return text + "x" * (n_bytes - len(text.encode()))
        text += character
    raise AssertionError


STRINGS = (
    "general.architecture",
    "general.type",
    "general.name",
    "yarn_edge.version",
    "yarn_edge.rope.method",
    "yarn_edge.rope.form",
    "yarn_edge.rope.provenance",
    "rope.scaling.type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.chat_template",
)
COMMANDS = (
    ("inspect", "{}"),
    ("inspect", "{}", "--json"),
    ("patch", "{}", "-o", "{}.out", "--yarn-factor", "8", "--force"),
    ("patch", "{}", "-o", "{}.out", "--repair", "--json", "--force"),
    ("quantize", "{}", "-o", "{}.out", "--quant", "F16", "--dry-run"),
    ("fit", "{}", "--ctx", "512", "--memory", "1GiB"),
)


def shown_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """stdout and stderr of a command, which may not be obeyed."""
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code in (0, 1, 2), err
    assert OBEYED.search(out) is None
    assert OBEYED.search(err) is None
    if code == 2:
        assert err.splitlines()[-1].startswith("yarn-edge: error: ")
    elif "--json" in words:
        json.loads(out)
    return out, err


@pytest.mark.parametrize("key", STRINGS)
def test_strings_of_a_gguf(key: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from yarn_edge.gguf.read import read_gguf

    path = tmp_path / "hostile.gguf"
    shutil.copy(made, path)
    key = f"llama.{key}" if key.startswith("rope.") else key
    old = read_gguf(path).metadata[key]
    edit_key(path, key, filled(len(old.encode())))
    for words in COMMANDS:
        out, _err = shown_by(capsys, *(word.format(path) for word in words))
        assert "\n! fake" not in out


def test_names_of_files(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the model, the output and what is missing."""
    folder = tmp_path / "a\x1b[777m\nfolder"
    folder.mkdir()
    path = folder / "esc\x1b]0;t\x07\n! fake: \u202e.gguf"
    shutil.copy(made, path)
    for words in (
        *COMMANDS,
        ("inspect", "{}.missing"),
        ("chat", "{}.missing", "-p", "x"),
        ("convert", "{}", "-o", "x"),
    ):
        out, err = shown_by(capsys, *(word.format(path) for word in words))
        assert "\n! fake" not in out + err


@pytest.mark.parametrize(
    "words",
    [
        ("\x1b[777m",),
        ("inspect", "x", "--\x1b[777m"),
        ("chat", "x", "--ctx", "\x1b[777m\n1"),
        ("inspect", "no\x1b[777m\r\nsuch"),
        ("convert", "x", "-o", "y", "--quant", "\x9b777m"),
        ("--debug", "inspect", "no\x1b[777m\u202esuch"),
    ],
    ids=repr,
)
def test_arguments_that_errors_repeat(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    _out, err = shown_by(capsys, *words)
    assert "--debug" in words or err.count("\n") == 1


CHANGES: dict[str, Callable[[Path], object]] = {
    "model_type": lambda f: _edit(f / "config.json", model_type=HOSTILE),
    "architectures": lambda f: _edit(f / "config.json", architectures=[HOSTILE]),
    "rope type": lambda f: _edit(f / "config.json", rope_scaling={"type": HOSTILE}),
    "a key of the block": lambda f: _edit(
        f / "config.json", rope_scaling={**tiny.YARN["rope_scaling"], HOSTILE: HOSTILE}
    ),
    "a token": lambda f: (f / "added_tokens.json").write_text(json.dumps({HOSTILE: 300})),
    "a pad token": lambda f: _edit(f / "tokenizer_config.json", pad_token=HOSTILE),
    "a template": lambda f: _edit(f / "tokenizer_config.json", chat_template=HOSTILE),
    "a quantization": lambda f: _edit(f / "config.json", quantization_config={"quant_method": HOSTILE}),
    "a file beside it": lambda f: (f / "adapter_model\x1b[777m\n.bin").write_bytes(b""),
    "an end": lambda f: (f / "generation_config.json").write_text(json.dumps({"eos_token_id": HOSTILE})),
}


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_strings_of_a_checkpoint(
    change: Callable[[Path], object], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ck"
    shutil.copytree(made.parent / ("m" * 40), folder)
    change(folder)
    shown_by(capsys, "inspect", str(folder))
    shown_by(capsys, "inspect", str(folder), "--json")
    _out, err = shown_by(capsys, "convert", str(folder), "-o", str(tmp_path / "o.gguf"), "--quant", "F16", "--dry-run")
    assert "\n! fake" not in err
    shown_by(capsys, "patch", str(made), "-o", str(tmp_path / "p.gguf"), "--from", str(folder))


def test_a_picture_with_a_hostile_title_is_xml(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[777m<&>\x00".replace("\x00", "\x9b")
    shutil.copy(made, path)
    assert main(["inspect", str(path), "--plot", str(tmp_path / "p.svg"), "--quiet"]) == 0
    words = "".join(ET.parse(tmp_path / "p.svg").getroot().itertext()) + (tmp_path / "p.svg").read_text()
    assert OBEYED.search(words) is None


def test_the_page_of_serve_writes_no_markup() -> None:
    """Answers and names become text: nothing in the page's program makes markup of a string."""
    page = Path(__file__).parent.parent / "yarn_edge" / "serve" / "page"
    script = (page / "page.js").read_text()
    assert "textContent" in script
    assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script) is None


def test_a_panic_of_a_library_is_not_heard(tmp_path: Path) -> None:
    """The tokenizers library panics at merges shorter than the prefix of words' later parts, and says so on stderr itself."""
    folder = tiny.write_checkpoint(tmp_path / "ck")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["continuing_subword_prefix"] = "\x1b[777m--"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-m", "yarn_edge", "convert", str(folder), "-o", str(tmp_path / "o.gguf"), "--quant", "F16"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"yarn-edge: error: ")
    assert b"the tokenizers library refuses it" in done.stderr
    assert done.stderr.count(b"\n") == 1

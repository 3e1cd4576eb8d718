"""What is read is a regular file of bounded size, wherever it is read: a pipe, a device or a socket in its place is one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from yarn_edge.bench.evidence.curves import line_of
from yarn_edge.bench.scoring.documents import documents_of
from yarn_edge.bench.speed.timed_rows import read_rows
from yarn_edge.chat.conversation import Conversation
from yarn_edge.chat.documents import read_document
from yarn_edge.checkpoint.chat_template import MAX_TEMPLATE_BYTES, chat_template
from yarn_edge.checkpoint.config_file import MAX_JSON_BYTES, read_config
from yarn_edge.cli import main
from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.imatrix.matrix import read_imatrix
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.regular_file import open_regular, path_of, read_file_or_pipe, read_regular
from yarn_edge.runtime.model import Model
from yarn_edge.source_file import SourceFile
from yarn_edge.text_file import read_text
from yarn_edge.verify.tokenizer import reference_encoder
from yarn_edge.verify.transformers_reference import reference_logits

from support import tiny

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has neither pipes nor devices with names")

SHORT_S = 5.0


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for a pipe fails at once, and is not ended by the suite's limit."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("regular") / "ck")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/ptmx")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "blobs" / "gone")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


# What stands in place of the file, and what is said of it.
INTRUDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "is not a regular file but a pipe"),
    "zeros": (zeros, "is not a regular file but a device"),
    "terminal": (terminal, "is not a regular file but a device"),
    "folder": (folder, "is not a regular file but a folder|is a folder"),
    "socket": (listening, "is not a regular file but a socket"),
    "link to nothing": (link_to_nothing, "is a link to a file that is not there"),
    "loop": (loop, "symbolic links"),
}

# Readers of one file, given its path.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gguf": ("m.gguf", read_gguf),
    "model": ("m.gguf", Model),
    "weights": ("w.bin", SourceFile),
    "imatrix": ("m.dat", read_imatrix),
    "bytes": ("any", lambda path: read_regular(path, 100)),
}
# Members of a checkpoint folder, given the folder.
MEMBERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "params.json": read_config,
    "model.safetensors": open_checkpoint,
    "model.safetensors.index.json": open_checkpoint,
    "tokenizer.json": reference_encoder,
    "tokenizer_config.json": reference_encoder,
    "special_tokens_map.json": reference_encoder,
    "chat_template.jinja": lambda path: chat_template(path, {}),
    "chat_template.json": lambda path: chat_template(path, {}),
}
# What a user names, where a pipe is read, too.
NAMED: dict[str, Callable[[Path], object]] = {
    "--text of imatrix": read_text,
    "--text of perplexity": lambda path: documents_of(path)[0].read(),
    "--file of chat": read_document,
    "/load": Conversation.load,
    "bench compare": read_rows,
    "curves": lambda path: line_of(str(path)),
}


def refused(read: Callable[[], object], told: str) -> None:
    start = time.monotonic()
    with pytest.raises(YarnEdgeError, match=told) as caught:
        read()
    assert time.monotonic() - start < SHORT_S
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("reader", READERS)
def test_in_place_of_a_file(reader: str, intruder: str, tmp_path: Path) -> None:
    (name, read), (place, told) = READERS[reader], INTRUDERS[intruder]
    place(tmp_path / name)
    refused(lambda: read(tmp_path / name), f"{name}: .*({told})")


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("member", MEMBERS)
def test_in_place_of_a_member_of_a_checkpoint(member: str, intruder: str, checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name != member:
            (tmp_path / path.name).symlink_to(path)
    place, told = INTRUDERS[intruder]
    place(tmp_path / member)
    refused(lambda: MEMBERS[member](tmp_path), f"{member}: .*({told})")


@pytest.mark.parametrize("intruder", sorted(INTRUDERS.keys() - {"pipe"}))
@pytest.mark.parametrize("reader", NAMED)
def test_in_place_of_what_a_user_names(reader: str, intruder: str, tmp_path: Path) -> None:
    place, told = INTRUDERS[intruder]
    place(tmp_path / "t.txt")
    if (reader, intruder) == ("--text of perplexity", "folder"):
        told = "contains no documents"
    refused(lambda: NAMED[reader](tmp_path / "t.txt"), told)


@pytest.mark.parametrize("reader", NAMED)
def test_a_pipe_that_nobody_writes_to(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.regular_file.WRITER_WAIT_S", 0.1)
    pipe(tmp_path / "p")
    refused(lambda: NAMED[reader](tmp_path / "p"), "p: is a pipe that no program writes to")


def written(path: Path, *parts: bytes, wait_s: float = 0.0) -> threading.Thread:
    def write() -> None:
        time.sleep(wait_s)
        with path.open("wb", buffering=0) as file, suppress(BrokenPipeError):
            for part in parts:
                time.sleep(wait_s)
                file.write(part)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("wait_s", [0.0, 0.2])
def test_a_text_from_a_pipe_is_read_to_its_end(wait_s: float, tmp_path: Path) -> None:
    """Also where the program that writes is slow to begin and slow to go on."""
    pipe(tmp_path / "p")
    writer = written(tmp_path / "p", b"some ", b"words" * 50_000, b"\n", wait_s=wait_s)
    assert read_text(tmp_path / "p") == "some " + "words" * 50_000
    writer.join()


def test_a_slow_writer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.regular_file.WRITER_WAIT_S", 0.1)
    pipe(tmp_path / "p")
    hold = os.open(tmp_path / "p", os.O_RDWR)  # the pipe has a writer, who is silent
    timer = threading.Timer(0.4, lambda: (os.write(hold, b"at last"), os.close(hold)))
    timer.start()
    assert read_file_or_pipe(tmp_path / "p", 100) == b"at last"
    timer.join()


def test_a_pipe_has_a_limit(tmp_path: Path) -> None:
    pipe(tmp_path / "p")
    writer = written(tmp_path / "p", b"x" * 300_000)
    refused(lambda: read_file_or_pipe(tmp_path / "p", 1000), "p: is larger than 1000 bytes")
    writer.join()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="has no /dev/fd")
def test_process_substitution() -> None:
    code = "import sys; from pathlib import Path; from yarn_edge.text_file import read_text; print(read_text(Path(sys.argv[1])))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" <(sleep 0.2; echo some words)'],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "some words\n"


@pytest.mark.parametrize("layout", ["relative", "absolute", "two steps"])
def test_the_hubs_cache_is_links_to_files(layout: str, checkpoint: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/HASH, and a snapshot that is itself a link."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = blobs / f"{number:040}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob if layout == "absolute" else Path("../../blobs") / blob.name)
    if layout == "two steps":
        (tmp_path / "main").symlink_to(snapshot)
        snapshot = tmp_path / "main"
    (output,) = convert(snapshot, str(tmp_path / "out.gguf"), "F16")
    assert len(read_gguf(output).tensors) == 21


@pytest.mark.parametrize("name, limit", [("config.json", MAX_JSON_BYTES), ("chat_template.jinja", MAX_TEMPLATE_BYTES)])
def test_a_file_that_is_huge_but_for_its_blocks(name: str, limit: int, checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    refused(lambda: MEMBERS[name](tmp_path), f"{name}: is larger than {limit >> 20} MiB")
    os.truncate(tmp_path / name, limit + 1)
    refused(lambda: read_regular(tmp_path / name, limit), "is larger than")


def test_a_pipe_among_the_files_that_transformers_opens(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    pipe(tmp_path / "generation_config.json")
    refused(lambda: reference_logits(tmp_path, [1, 2]), "generation_config.json: is not a regular file but a pipe")


def test_a_file_that_becomes_a_pipe_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("words")
    real = os.open

    def swapped(name: str, flags: int) -> int:
        path.unlink()
        pipe(path)
        monkeypatch.setattr(os, "open", real)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    refused(lambda: open_regular(path), "is not a regular file but a pipe")


def test_links_can_be_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    (tmp_path / "link").symlink_to("file")
    refused(lambda: open_regular(tmp_path / "link", follow_links=False), "is not a regular file but a link")


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="has no /dev/fd")
def test_the_path_of_an_open_file_stays_that_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("checked")
    with open_regular(path) as file:
        path.rename(tmp_path / "g")
        path.write_text("swapped")
        assert path_of(file, path).read_text() == "checked"
        assert path_of(file, path).read_text() == "checked"  # from its beginning


COMMANDS = {
    "convert": lambda path: ["convert", str(path), "-o", str(path / "o.gguf")],
    "inspect": lambda path: ["inspect", str(path)],
    "inspect a file": lambda path: ["inspect", str(path / "config.json")],
    "quantize": lambda path: ["quantize", str(path / "config.json"), "-o", str(path / "o.gguf")],
    "imatrix": lambda path: ["imatrix", str(path / "config.json"), "--text", "t", "-o", str(path / "o.gguf")],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(tmp_path / "config.json")
    (tmp_path / "t").write_text("words")
    words = [str(tmp_path / "t") if word == "t" else word for word in COMMANDS[command](tmp_path)]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "config.json: is not a regular file but a pipe" in told[0]

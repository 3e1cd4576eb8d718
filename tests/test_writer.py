"""Two runs with one output, planted links, partial files of dead runs, permissions: what has the final name is always one run's."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from yarn_edge import writer
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import Terminated, YarnEdgeError, raise_terminated
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.edit_shards import partial_files, publish_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.writer import (
    beside,
    check_space,
    one_at_a_time,
    open_output,
    partial_file,
    partial_folder,
    publish,
    publish_folder,
    remove_stale,
    scratch_folder,
    write_file,
)

from support import tiny, tiny_gguf
from support.gguf_files import split

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and modes are POSIX's")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of the test is number 1, as the first of each container is."""
    monkeypatch.setattr(os, "getpid", lambda: 1)


@pytest.mark.usefixtures("same_number")
def test_two_runs_with_one_number_never_share_a_file(tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with partial_file(output) as one, partial_file(output) as two:
        assert one != two
        one.write_bytes(b"1" * 5000)
        two.write_bytes(b"2" * 3000)
        publish(two, output, force=True)
        publish(one, output, force=True)
    assert output.read_bytes() == b"1" * 5000
    assert names(tmp_path) == ["out.gguf"]


@pytest.mark.usefixtures("same_number")
def test_two_runs_of_one_split_output_leave_one_models_shards(tmp_path: Path) -> None:
    outputs = [tmp_path / f"out-0000{i}-of-00002.gguf" for i in (1, 2)]
    with partial_files(outputs) as one, partial_files(outputs) as two:
        for partials, text in ((one, "1"), (two, "2")):
            for partial in partials:
                partial.write_text(text)
        publish_files(one, outputs, force=True)
        publish_files(two, outputs, force=True)
    assert {path.read_text() for path in outputs} == {"2"}
    assert names(tmp_path) == [path.name for path in outputs]


def test_shards_of_two_runs_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run that comes while the first gives its shards their names waits, and says so after a while."""
    outputs = [tmp_path / f"out-0000{i}-of-00002.gguf" for i in (1, 2)]
    monkeypatch.setattr("yarn_edge.writer._OTHERS_WAIT_S", 0.1)
    with partial_files(outputs) as partials:
        for partial in partials:
            partial.write_text("1")
        with one_at_a_time(tmp_path), pytest.raises(YarnEdgeError, match="another program has locked this folder"):
            publish_files(partials, outputs, force=True)
        assert not any(path.exists() for path in outputs)
        publish_files(partials, outputs, force=True)
    assert all(path.exists() for path in outputs)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a small file": lambda output: write_file(output, "ours", force=True),
    "a picture or a page": lambda output: write_file(output, b"ours", force=True),
    "a patched model": lambda output: patch(model_in(output.parent), output, overrides=ScalingOverrides(4.0, 256)),
    "a converted model": lambda output: convert(
        tiny.write_checkpoint(output.parent / "ck"), str(output), "F16", force=True
    ),
}


def model_in(folder: Path) -> Path:
    return tiny_gguf.write(folder / "in.gguf", "llama")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_planted_at_the_old_partial_name_is_not_followed(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    for number in {os.getpid(), 1}:
        (tmp_path / f"out.gguf.{number}.partial").symlink_to(victim)
    WRITERS[kind](tmp_path / "out.gguf")
    assert victim.read_text() == "theirs"
    assert not (tmp_path / "out.gguf").is_symlink()


def test_a_link_put_in_place_of_the_partial_file_is_an_error(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")

    with partial_file(tmp_path / "out") as partial:
        partial.unlink()
        partial.symlink_to(victim)
        with pytest.raises(OSError, match="symbolic links"):
            open_output(partial)
    assert victim.read_text() == "theirs"
    assert names(tmp_path) == ["victim"]


def test_a_name_that_is_taken_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["00000000", "00000000", "11111111"])
    monkeypatch.setattr("yarn_edge.writer.secrets.token_hex", lambda _n: next(drawn))
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (tmp_path / "out.00000000.partial").symlink_to(victim)
    with partial_file(tmp_path / "out") as partial:
        assert partial.name == "out.11111111.partial"
    assert victim.read_text() == "theirs"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_link_planted_at_the_final_name_is_not_followed(force: bool, target: str, tmp_path: Path) -> None:
    """After the output was checked: with force it is replaced, without it is in the way."""
    (tmp_path / "victim").write_text("theirs")
    output = tmp_path / "out"
    with partial_file(output) as partial:
        partial.write_text("ours")
        output.symlink_to(tmp_path / target)
        if force:
            publish(partial, output, force)
            assert not output.is_symlink()
            assert output.read_text() == "ours"
        else:
            with pytest.raises(YarnEdgeError, match="out: exists already; --force overwrites it"):
                publish(partial, output, force)
    assert (tmp_path / "victim").read_text() == "theirs"
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_is_swapped_gets_nothing(tmp_path: Path) -> None:
    there, other, elsewhere = tmp_path / "there", tmp_path / "other", tmp_path / "elsewhere"
    there.mkdir()
    other.mkdir()
    with partial_file(there / "out") as partial:
        partial.write_text("ours")
        there.rename(elsewhere)
        there.symlink_to(other)
        with pytest.raises(FileNotFoundError):
            publish(partial, there / "out", force=True)
    assert names(other) == []
    assert (elsewhere / partial.name).exists()


HOLDER = """
import sys, time
from pathlib import Path
from yarn_edge import writer
with getattr(writer, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "inside" if partial.is_dir() else partial).write_text("half")
    print(partial.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["partial_file", "partial_folder"])
def test_what_a_killed_run_left_goes_with_the_next(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, kind, str(output)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    held = child.stdout.readline().strip()
    write_file(output, "ours", force=True)
    assert held in names(tmp_path)  # it still runs
    child.send_signal(signal.SIGKILL)
    child.communicate()
    write_file(tmp_path / "out2", "another output's", force=True)
    assert held in names(tmp_path)
    write_file(output, "ours again", force=True)
    assert names(tmp_path) == ["out", "out2"]


@pytest.mark.parametrize(
    "name", ["out.download.partial", "out.123.partial", "out.partial", "other.0123abcd.partial", "out.0123abcd.part"]
)
def test_files_of_other_programs_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("theirs")
    write_file(tmp_path / "out", "ours", force=False)
    assert names(tmp_path) == sorted(["out", name])


def test_a_stale_name_that_is_a_link_or_a_pipe_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("theirs")
    (tmp_path / "out.0123abcd.partial").symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / "out.4567abcd.partial")
    remove_stale(tmp_path, lambda _name: True)
    assert len(names(tmp_path)) == 3


def test_where_there_are_no_locks_nothing_is_taken_for_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_descriptor: int, _how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / "out.0123abcd.partial").write_text("perhaps somebody's")
    write_file(tmp_path / "out", "ours", force=False)
    assert names(tmp_path) == ["out", "out.0123abcd.partial"]


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("kind", WRITERS)
def test_outputs_have_the_usual_permissions(kind: str, mask: int, expected: int, tmp_path: Path) -> None:
    with umask(mask):
        WRITERS[kind](tmp_path / "out.gguf")
    assert mode_of(tmp_path / "out.gguf") == expected


@pytest.mark.parametrize("before, after", [(0o600, 0o600), (0o640, 0o640), (0o666, 0o644), (0o755, 0o644)])
def test_what_replaces_a_private_file_is_private(before: int, after: int, tmp_path: Path) -> None:
    output = tmp_path / "conversation.json"
    output.touch()
    output.chmod(before)
    with umask(0o022):
        write_file(output, "ours", force=True)
    assert mode_of(output) == after


def test_shards_have_the_usual_permissions(tmp_path: Path) -> None:
    shards = split(model_in(tmp_path), tmp_path / "split.gguf", 20)
    with umask(0o027):
        outputs, _plan, _changes = patch(shards[0], tmp_path / "out.gguf", overrides=ScalingOverrides(4.0, 256))
    assert {mode_of(path) for path in outputs} == {0o640}
    assert read_gguf(outputs[0]).tensors.keys() == read_gguf(shards[0]).tensors.keys()


def test_a_folder_appears_whole_and_takes_the_place_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for text, force in (("1", False), ("2", True)):
        with partial_folder(folder) as partial:
            (partial / "config.json").write_text(text)
            assert text == "2" or not folder.exists()
            publish_folder(partial, folder, force)
    assert (folder / "config.json").read_text() == "2"
    with pytest.raises(YarnEdgeError, match="not empty"), partial_folder(folder) as partial:
        publish_folder(partial, folder, force=False)
    assert names(tmp_path) == ["checkpoint"]


def test_names_cannot_be_foreseen(tmp_path: Path) -> None:
    drawn = {beside(tmp_path / "out", ".partial") for _ in range(100)}
    assert len(drawn) == 100


@pytest.fixture
def terminated() -> Iterator[None]:
    """SIGTERM raises, as in a command."""
    before = signal.signal(signal.SIGTERM, raise_terminated)
    yield
    signal.signal(signal.SIGTERM, before)


# What happens when the signal comes: a file or folder gets its name, or is removed.
MOMENTS: dict[str, tuple[Callable[[Path], Any], Any, str]] = {
    "a file is made": (partial_file, writer, "beside"),
    "a folder is made": (partial_folder, writer, "beside"),
    "a file is removed": (partial_file, Path, "unlink"),
    "a folder is removed": (partial_folder, shutil, "rmtree"),
    "temporary files are removed": (lambda _path: scratch_folder("yarn-edge-"), shutil, "rmtree"),
}


@pytest.mark.usefixtures("terminated")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_the_wrong_moment(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, owner, step = MOMENTS[moment]
    real = getattr(owner, step)

    def interrupted(*args: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **named)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(Terminated), made(tmp_path / "out"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []


def test_temporary_files_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with umask(0), scratch_folder("yarn-edge-") as folder:
        assert mode_of(folder) == 0o700
    with umask(0), partial_folder(tmp_path / "scratch", mode=0o700) as folder:
        assert mode_of(folder) == 0o700


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_file_system_without_room_of_its_own() -> None:
    with pytest.raises(
        YarnEdgeError, match=r"^/proc: is on a file system of size 0, which cannot hold the output: choose"
    ):
        check_space(Path("/proc"), 10, "the output")

"""States on the disk: used for the same run and the same beginning alone, to the bit; whatever is wrong with one is a note."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.engine import sequences
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache, run_key
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.identity import model_identity
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny_gguf

GREEDY = Sampling(temperature=0)
N_BATCH, N_CTX = 32, 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "KEEP_TOKENS", 2 * N_BATCH)


def document(n_tokens: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 250, n_tokens)]


def answered(
    model: Model, tokens: list[int], states: StateCache | None, n_ctx: int = N_CTX, **made: Any
) -> tuple[str, Generation]:
    """A fresh context, one answer, and what was worth a file."""
    with Context(
        model, ContextSettings(n_ctx=n_ctx, n_batch=made.pop("n_batch", N_BATCH), threads=1, **made)
    ) as context:
        one = Generation(context, states)
        text = "".join(one.generate(tokens, GREEDY, 12))
        one.keep_on_disk()
        return text, one


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_was_read_is_not_read_again_and_says_the_same(model: Model, tmp_path: Path) -> None:
    states, text = StateCache(tmp_path / "states"), document(300)
    fresh, first = answered(model, text, states)
    assert first.stats is not None
    assert (first.stats.prompt_tokens_evaluated, first.stats.prompt_tokens_restored) == (300, 0)
    (path,) = files(tmp_path / "states")
    again, second = answered(model, text, states)
    assert again == fresh
    assert second.stats is not None
    assert (second.stats.prompt_tokens_evaluated, second.stats.prompt_tokens_restored) == (300 - 288, 288)
    other_end = text[:200] + document(60, 1)
    told, third = answered(model, other_end, states)
    assert told == answered(model, other_end, None)[0]
    assert third.stats is not None
    assert third.stats.prompt_tokens_restored == 192  # whole batches of what is common
    assert path in files(tmp_path / "states")
    assert oct((tmp_path / "states").stat().st_mode & 0o777) == "0o700"


def test_the_whole_prompt_is_kept_and_its_last_token_still_evaluated(model: Model, tmp_path: Path) -> None:
    states, text = StateCache(tmp_path), document(256)
    fresh, _one = answered(model, text, states)
    again, second = answered(model, text, states)
    assert again == fresh
    assert second.stats is not None
    assert second.stats.prompt_tokens_restored == 224  # not 256: the last token's logits are needed


def test_restored_and_fresh_are_the_same_to_the_bit(model: Model, tmp_path: Path) -> None:
    states, text = StateCache(tmp_path), document(300)
    answered(model, text, states)
    seen = []
    for kept in (None, states):
        with Context(model, ContextSettings(n_ctx=N_CTX, n_batch=N_BATCH, threads=1)) as context:
            one = Generation(context, kept)
            next(one.generate(text, GREEDY, 1), None)
            seen.append(context.logits())
    assert np.array_equal(seen[0], seen[1])


def test_another_run_is_another_key(model: Model, tmp_path: Path) -> None:
    states, text = StateCache(tmp_path / "states"), document(300)
    answered(model, text, states)
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama")
    data = bytearray(other.read_bytes())
    data[-100] ^= 1  # a weight
    other.write_bytes(data)
    with Model(other) as changed:
        assert model_identity(changed.gguf) != model_identity(model.gguf)
        _text, one = answered(changed, text, states)
        assert one.stats is not None
        assert one.stats.prompt_tokens_restored == 0
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.path.read_bytes())
    with Model(copy) as same:
        assert model_identity(same.gguf) == model_identity(model.gguf)
    with closing(Context(model, ContextSettings(n_ctx=N_CTX, n_batch=N_BATCH, threads=1))) as usual:
        theirs = replace(usual.arguments, yarn_orig_ctx=17)
        made: list[dict[str, Any]] = [{"kv_type": "f32"}, {"n_batch": 16}, {"arguments": theirs}]
        made += [{"kv_type": "f32/f16"}, {"kv_type": "f16/f32"}]
        keys = {run_key(usual)}
        for arguments in made:
            with Context(model, ContextSettings(n_ctx=N_CTX, threads=1, **{"n_batch": N_BATCH} | arguments)) as context:
                keys.add(run_key(context))
    assert len(keys) == 6
    with Context(
        model, ContextSettings(n_ctx=2 * N_CTX, n_batch=N_BATCH, threads=1)
    ) as longer:  # the size of the context does not matter
        assert run_key(longer) in keys


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "a byte":
        data[len(data) // 3] ^= 4
    elif how == "cut short":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    elif how == "noise":
        data[:] = np.random.default_rng(0).bytes(len(data))
    elif how == "a longer line":
        data[-24:-16] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["a byte", "cut short", "empty", "noise", "a longer line"])
def test_a_damaged_file_is_not_used(how: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states, text = StateCache(tmp_path), document(300)
    fresh, _one = answered(model, text, states)
    (path,) = files(tmp_path)
    damaged(path, how)
    again, one = answered(model, text, states)
    assert again == fresh
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0
    if how == "a byte":  # the others do not even look like a state
        assert "is damaged" in capsys.readouterr().err
    _again, healed = answered(model, text, states)
    assert healed.stats is not None
    assert healed.stats.prompt_tokens_restored == 288


def test_a_longer_state_than_the_context_is_left_alone(model: Model, tmp_path: Path) -> None:
    states = StateCache(tmp_path)
    answered(model, document(300), states)
    text = document(300)[:100]
    told, one = answered(model, text, states, n_ctx=256)
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0
    assert told == answered(model, text, None, n_ctx=256)[0]


def test_the_smallest_file_of_a_beginning_is_read(model: Model, tmp_path: Path) -> None:
    """A conversation that grew leaves several."""
    states, grown = StateCache(tmp_path), document(400)
    for length in (400, 100, 300, 200):
        answered(model, grown[:length], states)
    with Context(model, ContextSettings(n_ctx=N_CTX, n_batch=N_BATCH, threads=1)) as context:
        for length in (100, 200, 300, 400):
            entry = states.find(run_key(context), grown[:length], N_BATCH, N_CTX)
            assert entry is not None
            assert entry.usable == length // N_BATCH * N_BATCH
            assert len(entry.tokens) < length + 12  # with what was generated


def test_a_conversation_that_grows_is_one_file(model: Model, tmp_path: Path) -> None:
    states, grown = StateCache(tmp_path), document(400)
    other = [*grown[:200], *document(30, 5)]
    answered(model, other, states)
    for length in (200, 230, 270, 300):
        answered(model, grown[:length], states)
    assert len(files(tmp_path)) == 2
    with Context(model, ContextSettings(n_ctx=N_CTX, n_batch=N_BATCH, threads=1)) as context:
        for text, usable in ((other, 224), (grown[:300], 288)):
            entry = states.find(run_key(context), text, N_BATCH, N_CTX)
            assert entry is not None
            assert entry.usable == usable
    assert answered(model, [*other, 7], states)[0] == answered(model, [*other, 7], None)[0]


def test_a_file_that_another_process_removes_is_no_damage(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states, text = StateCache(tmp_path), document(200)
    told, _ = answered(model, text, states)
    find = states.find

    def found_and_removed(*args: object, **more: object) -> object:
        entry = find(*args, **more)  # type: ignore[arg-type]
        files(tmp_path)[0].unlink()
        return entry

    monkeypatch.setattr(states, "find", found_and_removed)
    again, one = answered(model, text, states)
    assert again == told
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0
    assert "damaged" not in capsys.readouterr().err


def test_the_least_recently_used_goes(model: Model, tmp_path: Path) -> None:
    states = StateCache(tmp_path)
    for seed in range(3):
        answered(model, document(200, seed), states)
        time.sleep(0.02)
    size = files(tmp_path)[0].stat().st_size
    before = set(files(tmp_path))
    answered(model, document(200, 0), states)  # used again
    states.limit_bytes = 3 * size + 1000
    answered(model, document(200, 9), states)
    kept = set(files(tmp_path))
    assert len(kept) == 3
    for seed, there in ((0, True), (1, False), (2, True), (9, True)):
        _told, one = answered(model, [*document(200, seed)[:128], 5], StateCache(tmp_path))
        assert one.stats is not None
        assert (one.stats.prompt_tokens_restored == 128) == there, seed
    assert len(before - kept) == 1
    StateCache(tmp_path, limit_bytes=2 * size + 1000)
    assert len(files(tmp_path)) == 2


def test_a_state_beyond_the_limit_is_a_note(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _one = answered(model, document(300), StateCache(tmp_path, limit_bytes=1000))
    assert text == answered(model, document(300), None)[0]
    assert "exceed the limit" in capsys.readouterr().err
    assert files(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_is_a_note(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_self: Context, path: Path, _tokens: object, _sequence: int) -> None:
        path.write_bytes(b"some")
        Path("/dev/full").write_bytes(bytes(1 << 16))

    monkeypatch.setattr(Context, "save_state", full)
    text, _one = answered(model, document(300), StateCache(tmp_path))
    monkeypatch.undo()
    assert "No space left" in capsys.readouterr().err
    assert files(tmp_path) == []
    assert text == answered(model, document(300), None)[0]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(YarnEdgeError):
        StateCache(tmp_path / "file" / "states")
    with pytest.raises(YarnEdgeError):
        StateCache(tmp_path / "file")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_killed_while_writing(model: Model, tmp_path: Path) -> None:
    """Nothing under a final name, and what was left half-written goes the next time."""
    code = f"""
import sys, time
from pathlib import Path
from yarn_edge.engine import generation, sequences, state_cache
from yarn_edge.engine.sampling import Sampling
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
sequences.KEEP_TOKENS = 64
def slow(*_args, **_named):
    print("writing", flush=True)
    time.sleep(600)
state_cache.publish = slow
with Model({str(model.path)!r}) as model, Context(model, ContextSettings(n_ctx=512, n_batch=32, threads=1)) as context:
    one = generation.Generation(context, state_cache.StateCache(Path({str(tmp_path)!r})))
    list(one.generate({document(300)!r}, Sampling(temperature=0), 2))
    one.keep_on_disk()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert b"writing" in child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    (left,) = files(tmp_path)
    assert left.name.endswith(".partial")
    states = StateCache(tmp_path)
    assert files(tmp_path) == []
    _text, one = answered(model, document(300), states)
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@POSIX
@pytest.mark.parametrize("before", [0o755, 0o777, 0o700, 0o770])
def test_the_folder_and_its_files_are_the_users_alone(before: int, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    folder.chmod(before)
    old = os.umask(0)
    try:
        answered(model, document(300), StateCache(folder))
    finally:
        os.umask(old)
    assert mode_of(folder) == 0o700
    assert [mode_of(path) for path in files(folder)] == [0o600]


@POSIX
def test_a_folder_with_other_files_keeps_its_mode(model: Model, tmp_path: Path) -> None:
    """`--cache .` does not lock others out of somebody's home; the states are private all the same."""
    (tmp_path / "index.html").touch()
    tmp_path.chmod(0o755)
    answered(model, document(300), StateCache(tmp_path))
    assert mode_of(tmp_path) == 0o755
    assert [mode_of(path) for path in tmp_path.glob("*.state")] == [0o600]


@POSIX
def test_older_states_that_others_could_read_become_private(model: Model, tmp_path: Path) -> None:
    answered(model, document(300), StateCache(tmp_path))
    (path,) = files(tmp_path)
    path.chmod(0o644)
    _text, one = answered(model, document(300), StateCache(tmp_path))
    assert mode_of(path) == 0o600
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 288


@POSIX
@pytest.mark.parametrize("how", ["others could write", "somebody else's", "a link"])
def test_a_state_that_others_may_have_made_is_not_used(
    how: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, text = StateCache(tmp_path / "states"), document(300)
    fresh, _one = answered(model, text, states)
    (path,) = files(tmp_path / "states")
    if how == "others could write":
        path.chmod(0o666)
    elif how == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    again, one = answered(model, text, states)
    assert again == fresh
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0
    if how != "somebody else's":  # it was written anew
        assert not path.is_symlink()
        assert mode_of(path) == 0o600


@POSIX
@pytest.mark.parametrize("what", ["pipe", "zeros", "folder", "loop"])
def test_what_is_no_file_in_the_folder_neither_hangs_nor_fills_memory(what: str, model: Model, tmp_path: Path) -> None:
    text = document(300)
    fresh, _one = answered(model, text, StateCache(tmp_path))
    (own,) = files(tmp_path)
    for path in (tmp_path / "planted.state", own):
        path.unlink(missing_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if what == "zeros" else path.name)
    start = time.monotonic()
    again, one = answered(model, text, StateCache(tmp_path))
    assert again == fresh
    assert time.monotonic() - start < 10
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 0


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="has no /dev/fd")
def test_what_is_loaded_is_what_was_checked(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes the checked one's name before llama.cpp opens it is not what llama.cpp opens."""
    states, text = StateCache(tmp_path), document(300)
    fresh, _one = answered(model, text, states)
    (path,) = files(tmp_path)
    real = Context.load_state

    def swapped(self: Context, name: Path, tokens: Any) -> bool:
        other = tmp_path / "other"
        other.write_bytes(bytes(1000))
        other.replace(path)
        return real(self, name, tokens)

    monkeypatch.setattr(Context, "load_state", swapped)
    again, one = answered(model, text, states)
    assert again == fresh
    assert one.stats is not None
    assert one.stats.prompt_tokens_restored == 288


@POSIX
def test_partial_files_of_others_than_states_stay(tmp_path: Path) -> None:
    (tmp_path / "model.gguf.0123abcd.partial").touch()
    (tmp_path / "0.state.0123abcd.partial").touch()
    StateCache(tmp_path)
    assert [path.name for path in files(tmp_path)] == ["model.gguf.0123abcd.partial"]


@pytest.mark.parametrize("name", ["format", "key", "tokens", "canonical", "state", "digest"])
def test_a_trailer_without_one_of_its_fields_is_no_state(model: Model, tmp_path: Path, name: str) -> None:
    states, text = StateCache(tmp_path), document(300)
    answered(model, text, states)
    (path,) = tmp_path.glob("*.state")
    data = path.read_bytes()
    path.write_bytes(data.replace(f'"{name}":'.encode(), f'"{name[::-1]}":'.encode()))
    assert path.read_bytes() != data
    assert answered(model, text, states)[1].stats.prompt_tokens_restored == 0

"""`convert hf:…`: the bytes of a conversion from a folder, whatever happens to the connection, and nothing else on the disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from yarn_edge.convert import conversion
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.hub import sha256 as sha256_module
from yarn_edge.hub.failures import HubError, HubUnreachableError
from yarn_edge.hub.ranges import RangeReader
from yarn_edge.hub.read_ahead import ReadAhead, StreamedFile
from yarn_edge.hub.reference import parse_reference
from yarn_edge.hub.repository import list_repository
from yarn_edge.hub.sha256 import Sha256

from support import depth
from support.hub_client import BLOCK_BYTES, START_BYTES, point_at
from support.hub_server import COMMIT, Hub, serving

NAME = "hf:org/tiny"
CUTS = 20 if depth.full else 3


@pytest.fixture(scope="module")
def local(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a folder gives, by type."""
    out = tmp_path_factory.mktemp("local")
    paths = convert(root / "org" / "tiny", str(out / "{quant}.gguf"), "F16,Q8_0")
    return {path.stem: path.read_bytes() for path in paths}


def weight_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "org" / "tiny").glob("*.safetensors"))


def headers(root: Path) -> int:
    return START_BYTES * len(list((root / "org" / "tiny").glob("*.safetensors")))


def in_cache(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}


def test_streamed_into_every_type_at_once(hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    paths = convert(NAME, str(tmp_path / "{quant}.gguf"), "F16,Q8_0", threads=1)
    assert {path.stem: path.read_bytes() for path in paths} == local
    assert not {name for name in in_cache(tmp_path) if name.endswith(".safetensors")}
    assert "config.json" in in_cache(tmp_path)
    assert hub.sent == weight_bytes(root) + headers(root)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "F16.gguf", "Q8_0.gguf"}


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.token = "hf_secret"
    with pytest.raises(HubError, match=r"does not exist, or is private.*HF_TOKEN"):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert convert(NAME, str(tmp_path / "a.gguf"), "F16")[0].read_bytes() == local["F16"]
    assert {token for _m, path, _r, token in hub.requests if path.startswith("/cdn/")} == {""}


def test_cuts_and_refusals_that_pass(hub: Hub, local: dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(3)
    hub.faults.statuses = [429, 503, 0, 0, 500]
    hub.faults.cuts = [chance.randrange(0, 9000) for _ in range(40)]
    assert convert(NAME, str(tmp_path / "a.gguf"), "F16")[0].read_bytes() == local["F16"]
    assert not hub.faults.cuts


@pytest.mark.parametrize("seed", range(CUTS))
def test_cut_for_good_and_run_again(hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    total, start = weight_bytes(root), headers(root)
    cut = random.Random(seed).randrange(start, start + total)
    hub.faults.down_after = cut
    output = str(tmp_path / "{quant}.gguf")
    with pytest.raises(HubUnreachableError, match="gave up after 7 tries"):
        convert(NAME, output, "F16,Q8_0")
    left = sorted(path.name for path in tmp_path.glob("*.partial"))
    assert len(left) in (0, 2)
    hub.faults.down_after, before = None, hub.sent
    paths = convert(NAME, output, "F16,Q8_0")
    assert {path.stem: path.read_bytes() for path in paths} == local
    assert not list(tmp_path.glob("*.partial"))
    if left:  # the headers, and what the first run did not have, to the blocks that it held
        assert hub.sent - before <= start + (start + total - cut) + 30 * BLOCK_BYTES


def test_another_job_does_not_go_on_with_what_is_left(
    hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.down_after = weight_bytes(root) * 9 // 10
    with pytest.raises(HubUnreachableError):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    (left,) = tmp_path.glob("*.partial")
    hub.faults.down_after = None
    convert(NAME, str(tmp_path / "a.gguf"), "Q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == local["Q8_0"]
    assert not left.exists()


def test_what_is_left_counts_as_room(
    hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.down_after = weight_bytes(root) * 9 // 10
    with pytest.raises(HubUnreachableError):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    hub.faults.down_after = None
    few = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: few)
    assert convert(NAME, str(tmp_path / "a.gguf"), "F16")[0].read_bytes() == local["F16"]


def test_two_at_once_do_not_share_a_file(hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    hub.faults.down_after = weight_bytes(root) * 9 // 10
    with pytest.raises(HubUnreachableError):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    hub.faults.down_after = None
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(convert, NAME, str(tmp_path / "a.gguf"), "F16", force=True) for _ in range(2)]
        assert [run.result()[0].read_bytes() for run in runs] == [local["F16"]] * 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_is_stopped_while_nothing_comes_ends_at_once(
    hub: Hub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.stall_after = headers(root) + 300_000

    def stop(*_args: object) -> None:
        while hub.sent < headers(root) + 300_000:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "check_tokens", stop)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    assert time.monotonic() - began < 5
    hub.faults.stall_after = None


def test_without_openssl_the_file_is_read_again_for_its_hash(
    hub: Hub, root: Path, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sha256_module, "_openssl", lambda: None)
    hub.faults.down_after = weight_bytes(root) * 9 // 10
    with pytest.raises(HubUnreachableError):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    hub.faults.down_after = None
    assert convert(NAME, str(tmp_path / "a.gguf"), "F16")[0].read_bytes() == local["F16"]


def test_a_hash_goes_on_in_another_object() -> None:
    import hashlib

    data = random.Random(1).randbytes(100_000)
    whole = Sha256()
    whole.update(data[:12345])
    state = whole.state
    assert state is not None
    assert whole.hexdigest() == hashlib.sha256(data[:12345]).hexdigest()
    other = Sha256(state)
    other.update(bytearray(data[12345:]))
    assert other.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("fault", ["a wrong hash", "other bytes"])
def test_what_is_not_the_hubs_file_is_not_written(hub: Hub, tmp_path: Path, fault: str) -> None:
    name = "model-00002-of-00002.safetensors"
    if fault == "a wrong hash":
        hub.faults.wrong[name] = "0" * 64
        message = "its SHA-256 is [0-9a-f]{64}, but the Hub states 0{64}"
    else:
        hub.faults.lying.add(name)
        message = "not a valid safetensors file|SHA-256|other bytes"
    with pytest.raises(YarnEdgeError, match=message):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize(
    "reference, message",
    [
        ("hf:org/none", "does not exist, or is private"),
        ("hf:org/tiny@nope", "has no such revision"),
        ("hf:org/tiny:Q8_0", "leave :Q8_0 out"),
        ("hf:tiny", "is not hf:ORG/NAME"),
        ("hf:org/../tiny", "is not hf:ORG/NAME"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_cannot_be_had_is_told(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(YarnEdgeError, match=message):
        convert(reference, str(tmp_path / "a.gguf"), "F16")


@pytest.mark.parametrize(
    "faults, message",
    [
        ({"gated": True}, "is gated: accept its terms"),
        ({"statuses": [429], "retry_after": "4000"}, "asks to wait 4000 s"),
        ({"statuses": [0, 0, 0, 0, 0, 418]}, "answered with status 418"),
        ({"no_ranges": True}, "does not send the range"),
    ],
    ids=["gated", "429 for an hour", "418", "no ranges"],
)
def test_refusals_that_do_not_pass(hub: Hub, tmp_path: Path, faults: dict[str, object], message: str) -> None:
    for name, value in faults.items():
        setattr(hub.faults, name, value)
    with pytest.raises(YarnEdgeError, match=message):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")


def test_a_cached_checkpoint_is_used_from_the_cache(
    hub: Hub, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    snapshot_download("org/tiny", cache_dir=tmp_path / "cache", endpoint=hub.url)
    sent = hub.sent
    assert convert(NAME, str(tmp_path / "a.gguf"), "F16")[0].read_bytes() == local["F16"]
    assert hub.sent == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert convert(f"{NAME}@{COMMIT}", str(tmp_path / "b.gguf"), "F16")[0].read_bytes() == local["F16"]
    blob = tmp_path / "cache" / "models--org--tiny" / "snapshots" / COMMIT / "model-00001-of-00002.safetensors"
    blob.unlink()
    with pytest.raises(YarnEdgeError, match=r"model-00001-of-00002\.safetensors: the shard is missing"):
        convert(NAME, str(tmp_path / "c.gguf"), "F16")


def test_offline_without_a_cache_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(YarnEdgeError, match=r"offline \(HF_HUB_OFFLINE\), and the cache .* does not have it"):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")
    assert hub.requests == []


def test_a_hub_that_is_away_says_so(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(root) as hub:
        point_at(monkeypatch, hub, tmp_path / "cache")
    with pytest.raises(YarnEdgeError, match=r"gave up after 4 tries: no connection.*the cache .* does not have it"):
        convert(NAME, str(tmp_path / "a.gguf"), "F16")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "kill"])
def test_a_killed_run_is_gone_on_with(hub: Hub, root: Path, tmp_path: Path, number: signal.Signals) -> None:
    if not depth.full:
        pytest.skip("two processes: --full")
    shutil.copytree(root / "org" / "tiny", tmp_path / "tiny")
    hub.faults.rate = 1e6
    words = [sys.executable, "-m", "yarn_edge", "convert", NAME, "-o", str(tmp_path / "a.gguf"), "--quant", "F16"]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    while hub.sent < weight_bytes(root) * 0.7 and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(number)
    run.communicate()
    hub.faults.rate = 0
    subprocess.run(words, env=env, check=True)
    convert(tmp_path / "tiny", str(tmp_path / "b.gguf"), "F16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("hub")
def test_bytes_that_an_earlier_run_used_must_come_again(root: Path) -> None:
    path = next(iter(sorted((root / "org" / "tiny").glob("*.safetensors"))))
    found = list_repository(parse_reference(NAME))
    reader = RangeReader(found, found.entries[path.name])
    files = [StreamedFile(reader, found.entries[path.name].sha256, b"")]
    first = ReadAhead(files)
    first.start()
    buffer = bytearray(3 * BLOCK_BYTES)
    first.read_into(buffer, 0)
    state = first.state_at(BLOCK_BYTES, 3 * BLOCK_BYTES)
    first.close()
    assert buffer == path.read_bytes()[: len(buffer)]
    assert state is not None
    assert (state.block, state.until) == (1, max(state.until, 3))
    again = ReadAhead(files)
    again.start(state)
    again.finish()
    assert state.until_hashed is not None
    wrong = ReadAhead(files)
    wrong.start(replace(state, until_hashed=bytes(len(state.until_hashed))))
    with pytest.raises(HubError, match="other bytes than in an earlier run"):
        wrong.finish()

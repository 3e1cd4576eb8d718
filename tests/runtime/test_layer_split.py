"""Flags and plans of a split model, without a device: which layers go where, and what is refused."""

from __future__ import annotations

import argparse

import pytest

from yarn_edge.addresses import check_network, host_and_port
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.parts import PartPlan, fullest_share
from yarn_edge.memory.splitting import first_counts, moved
from yarn_edge.runtime.ggml import Device
from yarn_edge.runtime.layer_split import LayerSplit, given_split
from yarn_edge.split_flags import NO_SPLIT, SplitRequest, add_split_flags, split_request

CPU = Device("CPU", "CPU", "cpu", "a processor", 0)
RPC = [Device(f"RPC{i}", "RPC", "gpu", f"127.0.0.1:5006{i}", 1 + i) for i in range(2)]
GPU = Device("Vulkan0", "Vulkan", "gpu", "llvmpipe", 3)
DEVICES = [CPU, *RPC, GPU]


@pytest.mark.parametrize(
    "text, cpu, parts",
    [
        ("cpu=10,rpc0=10,rpc1=10", 10, [(RPC[0], 10), (RPC[1], 10)]),
        ("rpc1=7,vulkan0=3", 20, [(RPC[1], 7), (GPU, 3)]),
        ("RPC0=30", 0, [(RPC[0], 30)]),
        ("cpu=30,rpc0=0", 30, []),
    ],
    ids=["all named", "the rest on the CPU", "capitals", "nothing"],
)
def test_layers_on(text: str, cpu: int, parts: list) -> None:
    assert given_split(text, 30, DEVICES, "m.gguf") == LayerSplit(cpu, tuple(parts))


@pytest.mark.parametrize(
    "text, why",
    [
        ("rpc2=3", "there is no device rpc2 here: there are cpu, rpc0, rpc1, vulkan0"),
        ("rpc0=31", "31 layers in all, but m.gguf has 30"),
        ("cpu=5,rpc0=5", "10 layers in all, but m.gguf has 30"),
    ],
    ids=["unknown", "too many", "too few"],
)
def test_layers_on_refused(text: str, why: str) -> None:
    with pytest.raises(YarnEdgeError) as refusal:
        given_split(text, 30, DEVICES, "m.gguf")
    assert str(refusal.value).startswith(f"--layers-on {text}: {why}")


def test_where_a_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.runtime.ggml.cpu_device", lambda: CPU)
    split = LayerSplit(2, ((RPC[0], 1), (GPU, 3)))
    assert [split.device_of(layer) for layer in range(7)] == [CPU, CPU, RPC[0], GPU, GPU, GPU, GPU]
    assert split.name == "cpu=2,rpc0=1,vulkan0=3"
    assert given_split(split.name, 6, DEVICES, "") == split


def parsed(*words: str) -> SplitRequest:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_split_flags(parser)
    return split_request(parser.parse_args(words))


def test_flags() -> None:
    assert not parsed()
    assert parsed() == NO_SPLIT
    both = parsed("--rpc", "127.0.0.1:1,box:2,box:2", "--layers-on", "rpc0=3", "--insecure-network")
    assert both == SplitRequest(("127.0.0.1:1", "box:2"), "rpc0=3", True)
    assert parsed(*both.flags()) == both
    with pytest.raises(YarnEdgeError, match="--insecure-network is about workers"):
        parsed("--insecure-network")


@pytest.mark.parametrize(
    "words, why",
    [
        (["--rpc", "box"], "'box' is not HOST:PORT"),
        (["--rpc", "box:0"], "'box:0' is not HOST:PORT"),
        (["--rpc", "::1:5"], "'::1:5' is not HOST:PORT"),
        (["--rpc", "127.0.0.1:50052, 127.0.0.1:50053"], "' 127.0.0.1:50053' is not HOST:PORT"),
        (["--rpc", "127.0.0.1:\u0665"], "is not HOST:PORT"),
        (["--layers-on", "cpu"], "'cpu' is not DEVICE=NUMBER"),
        (["--layers-on", "cpu=-1"], "'cpu=-1' is not DEVICE=NUMBER"),
        (["--layers-on", "cpu=1,CPU=2"], "CPU appears twice"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_flags_refused(words: list[str], why: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="argument --") as refusal:
        parsed(*words)
    assert why in str(refusal.value)


@pytest.mark.parametrize("host", ["10.0.0.2", "0.0.0.0", "box"])
def test_only_this_machine_unless_allowed(host: str) -> None:
    with pytest.raises(YarnEdgeError, match=r"no password and no encryption.*a tunnel.*--insecure-network"):
        check_network(host, False, "--rpc")
    check_network(host, True, "--rpc")
    check_network("127.0.0.1", False, "--rpc")
    assert host_and_port(f"{host}:50052") == (host, 50052)


def test_worker_refuses_an_open_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("yarn-edge: error: --host 0.0.0.0: llama.cpp's RPC has no password")


GIB = 2**30


@pytest.mark.parametrize(
    "room, near, counts",
    [
        ([8 * GIB, 8 * GIB], [False, False], [15, 15]),
        ([2 * GIB, 4 * GIB], [False, False], [10, 20]),
        ([4 * GIB, 10 * GIB], [False, True], [20, 10]),
        ([4 * GIB, 40 * GIB], [False, True], [0, 30]),
        ([0, 2 * GIB], [False, True], [0, 2]),
    ],
    ids=["alike", "by memory", "the GPU first", "the GPU alone", "no room"],
)
def test_first_counts(room: list[int], near: list[bool], counts: list[int]) -> None:
    assert first_counts(30, room, near, GIB) == counts


def test_layers_move_from_a_full_device() -> None:
    assert moved([10, 10], 0, [-1, 5], 3) == [9, 11]
    assert moved([10, 10], 0, [-1, 2], 3) == [9, 10]  # to the CPU
    assert moved([10], 0, [-1], 3) == [9]


def test_the_fullest_device_decides() -> None:
    parts = [PartPlan("CPU", "", 0, 50, 0, 0, 0), PartPlan("RPC0", "", 5, 60, 20, 10, 0)]
    assert fullest_share(parts, {"CPU": 1000, "RPC0": 90}) == 1090
    assert fullest_share(parts, {"CPU": 1000, "RPC0": 80}) > 1080
    assert fullest_share(parts, {}) == 140

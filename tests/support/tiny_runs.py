"""Running tiny files of one architecture and seeing their ropes, in processes of their own.

A failed assertion in llama.cpp ends the process; here it is a result like any other. Forked from a server that has not
computed anything, a process costs milliseconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.runtime import model as runtime
from yarn_edge.runtime.ggml import TensorPointer, function
from yarn_edge.runtime.rope_kernel import RopeArguments
from yarn_edge.verify import rope_nodes as tap

from support import tiny_gguf
from support.tiny_gguf import HEAD_DIM

YARN = {
    "rope.freq_base": 12345.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 256,
}
EVERY_KEY = {
    **YARN,
    "rope.freq_base_swa": 777.0,
    "rope.scaling.finetuned": True,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.yarn_ext_factor": 0.7,
    "rope.scaling.yarn_attn_factor": 1.3,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_log_multiplier": 0.5,
    "rope.scaling.alpha": 3.0,
}
PATTERN = [True, False, True, True, True, False, True]
LONGROPE = {**YARN, "rope.scaling.type": "longrope"}
# name -> (keys, which tensors of frequency factors)
FILES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "every key": (EVERY_KEY, ()),
    "yarn": (YARN, ()),
    "no key": ({}, ()),
    "not finetuned": ({**YARN, "rope.scaling.finetuned": False}, ()),
    "factors": (YARN, ("freqs",)),
    "long factors, yarn": (YARN, ("factors_long", "factors_short")),
    "long factors, long context": (
        {**LONGROPE, "rope.scaling.original_context_length": 32},
        ("factors_long", "factors_short"),
    ),
    "long factors, short context": (
        {**LONGROPE, "rope.scaling.original_context_length": 1024},
        ("factors_long", "factors_short"),
    ),
    "pattern": ({**EVERY_KEY, "attention.sliding_window_pattern": PATTERN}, ()),
    "sliding dims": ({**YARN, "rope.dimension_count_swa": 12}, ()),
    "half a head": ({**YARN, "rope.dimension_count": 8}, ()),
}
ARGUMENTS = {
    "every": RuntimeArguments(-1, 54321.0, 0.125, 0.6, 1.7, 24.0, 3.0, 128),
    "no ext": RuntimeArguments(yarn_ext_factor=0.0),
    "no ext, own factor": RuntimeArguments(yarn_ext_factor=0.0, yarn_attn_factor=1.7),
    "none": RuntimeArguments(rope_scaling_type=0),
    "linear": RuntimeArguments(rope_scaling_type=1),
}
TABLES = {"freqs": 1.5, "factors_long": 2.5, "factors_short": 3.5}  # the values of a table: this + 0, 1, 2, …


@dataclass(frozen=True)
class Node:
    """What the tests need of a RopeNode, small enough to be sent."""

    layer: int
    arguments: RopeArguments
    factor: float | None  # the first of its frequency factors


@dataclass(frozen=True)
class Seen:
    """One evaluation: its ropes, and the scale of each softmax of attention."""

    nodes: list[Node]
    softmax: set[float]


Observed = dict[tuple[str, str], Seen | str]  # (file, arguments) -> what was seen, or why nothing was


@dataclass(frozen=True)
class Ended:
    """A process that ended before its work was done."""

    code: int | None


class Recorder(tap._Recorder):
    """Sees the softmax of attention too."""

    last: Recorder

    def __init__(self) -> None:
        self.softmax: set[float] = set()
        Recorder.last = self
        super().__init__()
        self.soft_max_op = next(op for op in range(128) if function("ggml_op_name")(op) == b"SOFT_MAX")

    def see(self, address: int, asking: bool) -> bool:
        tensor = ctypes.cast(address, TensorPointer).contents
        if not asking and tensor.op == self.soft_max_op and tensor.name.startswith(b"kq_soft_max"):
            self.softmax.add(float(np.array(tensor.op_params, dtype=np.int32).view(np.float32)[0]))
        return super().see(address, asking)


def run(model: runtime.Model, arguments: RuntimeArguments) -> Seen | str:
    try:
        nodes = tap.record_ropes(model, list(range(5, 13)), [0], arguments, threads=1)
    except YarnEdgeError as error:
        return str(error)
    small = [Node(n.layer, n.arguments, None if n.factors is None else float(n.factors[0])) for n in nodes]
    return Seen(small, Recorder.last.softmax)


def child(connection: Connection, architecture: str, folder: Path, files: list[str]) -> None:
    """Files of one architecture, in its own process. Results are sent one by one, since any file may end the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tap._Recorder = Recorder  # type: ignore[misc]
    runtime.check_loadable = lambda _file: None  # type: ignore[assignment]  # it would keep from llama.cpp what is tried here
    rotated = tiny_gguf.model_keys(architecture).get("rope.dimension_count", HEAD_DIM)
    for name in files:
        keys, tables = FILES[name]
        tensors = {f"rope_{t}.weight": TABLES[t] + np.arange(rotated // 2, dtype=np.float32) for t in tables}
        path = tiny_gguf.write(folder / f"{architecture}.gguf", architecture, keys, tensors)
        try:
            with runtime.Model(path) as model:
                connection.send(((name, ""), run(model, FROM_MODEL)))
                for how, arguments in ARGUMENTS.items() if name == "every key" else ():
                    connection.send(((name, how), run(model, arguments)))
        except YarnEdgeError as error:
            connection.send(((name, ""), str(error)))
    connection.close()


def in_children(
    target: Callable[..., None], architecture: str, folder: Path, jobs: Sequence[str]
) -> Iterator[tuple[Any, Any]]:
    """What `target(connection, architecture, folder, jobs)` sends; where a job ends the process, another goes on with the next.

    A message is (key, value), its key the job or a tuple that begins with it; of a job that ended the process it is (job, Ended).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "llama_cpp", "gguf", "yarn_edge.verify.rope_nodes"])
    left = list(jobs)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(theirs, architecture, folder, left))
        process.start()
        theirs.close()
        try:
            while True:
                key, value = ours.recv()
                yield key, value
                job = key[0] if isinstance(key, tuple) else key
                left = [name for name in left if name != job]
        except EOFError:
            process.join()
        if left:
            yield left.pop(0), Ended(process.exitcode)


def observe(architecture: str, folder: Path) -> Observed:
    """Every file of one architecture."""
    found: Observed = {}
    for key, value in in_children(child, architecture, folder, list(FILES)):
        if isinstance(value, Ended):
            found[key, ""] = f"the process ended with {value.code}"
        else:
            found[key] = value
    return found

"""What we say of every layer, held against what the running library did with the same file: FilePositions.effective and layers.

The files and the observation are those of tiny_runs, with more files here in which layers differ; nothing is worked out
twice, the arguments of the live nodes are the oracle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import HONOURED, Honoured, Sliding
from yarn_edge.llama_rules.layers import layer_kinds, sliding_scaling
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.runtime.rope_kernel import RopeArguments, rope_arguments
from yarn_edge.verify.command import verify

from support import tiny_gguf, tiny_runs
from support.tiny_gguf import HEAD_DIM
from support.tiny_runs import ARGUMENTS, EVERY_KEY, PATTERN, TABLES, YARN, Observed, Seen, observe

BASES = {"rope.freq_base": 12345.0, "rope.freq_base_swa": 777.0, "rope.scaling.attn_factor": 1.2}
MORE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "window 0": ({**EVERY_KEY, "attention.sliding_window": 0}, ()),
    "period 2": ({**EVERY_KEY, "attention.sliding_window_pattern": 2}, ()),
    "period 0": ({**EVERY_KEY, "attention.sliding_window_pattern": 0}, ()),
    "sliding dims, layer 0 slides": (
        {**YARN, "rope.dimension_count_swa": 12, "attention.sliding_window_pattern": PATTERN},
        (),
    ),
    "sliding dims, layer 0 does not": (
        {**YARN, "rope.dimension_count_swa": 12, "attention.sliding_window_pattern": [*PATTERN[1:], True]},
        (),
    ),
    "linear": ({**BASES, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, ()),
    "none with a factor": ({**BASES, "rope.scaling.type": "none", "rope.scaling.factor": 4.0}, ()),
    "the factor's old key": ({**BASES, "rope.scaling.type": "yarn", "rope.scale_linear": 8.0}, ()),
    "factor 0": ({**YARN, "rope.scaling.factor": 0.0}, ()),
    "factor 1": ({**EVERY_KEY, "rope.scaling.factor": 1.0}, ()),
    "origin 0": ({**YARN, "rope.scaling.original_context_length": 0}, ()),
    "zeros": ({**EVERY_KEY, "rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.alpha": 0.0}, ()),
    "ext_factor 0": ({**EVERY_KEY, "rope.scaling.yarn_ext_factor": 0.0}, ()),
}
FILES = tiny_runs.FILES | MORE


def child(connection: Connection, architecture: str, folder: Path, files: list[str]) -> None:
    """tiny_runs.child in its own process, with the files of this module too."""
    tiny_runs.FILES = FILES
    tiny_runs.child(connection, architecture, folder, files)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Observed]]:
    """What an architecture's files showed; all are run, two at a time."""
    folder = tmp_path_factory.mktemp("layers")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(tiny_runs, "FILES", FILES)
        patch.setattr(tiny_runs, "child", child)
        futures = {name: pool.submit(observe, name, folder) for name in HONOURED}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def written(path: Path, architecture: str, name: str) -> Path:
    """The file that was run."""
    keys, tables = FILES[name]
    rotated = tiny_gguf.model_keys(architecture).get("rope.dimension_count", HEAD_DIM)
    tensors = {f"rope_{t}.weight": TABLES[t] + np.arange(rotated // 2, dtype=np.float32) for t in tables}
    return tiny_gguf.write(path, architecture, keys, tensors)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, GGUFFile]]:
    """The files of an architecture as we read them; the float32 tables are read from them later, so they stay."""
    folder = tmp_path_factory.mktemp("headers")
    known: dict[str, dict[str, GGUFFile]] = {}

    def read(architecture: str) -> dict[str, GGUFFile]:
        if architecture not in known:
            paths = {n: written(folder / f"{architecture} {n}.gguf", architecture, n) for n in FILES}
            known[architecture] = {n: read_gguf(path) for n, path in paths.items()}
        return known[architecture]

    return read


def same(seen: RopeArguments, said: RopeArguments) -> bool:
    """Whether they rotate alike: without ext_factor nothing of the ramp is used."""
    unused = set() if seen.ext_factor or said.ext_factor else {"beta_fast", "beta_slow", "n_ctx_orig"}
    alike = all(math.isclose(x, said.numbers[n], rel_tol=1e-5) for n, x in seen.numbers.items() if n not in unused)
    return alike and seen.sections == said.sections


def refusal(file: GGUFFile, arguments: RuntimeArguments) -> str:
    """Why we do not judge a file, "" where we do."""
    try:
        check_loadable(file)
        FilePositions(file).effective(arguments)
    except YarnEdgeError as error:
        return str(error)
    return ""


def disagreements(file: GGUFFile, arguments: RuntimeArguments, seen: Seen) -> list[str]:
    """Where our word on a layer is not what ran in it."""
    row, full = HONOURED[file.architecture], FilePositions(file).effective(arguments)
    kinds = layer_kinds(file, file.required_int("block_count"))
    said = {"full": full, "sliding": sliding_scaling(file, full)}
    told = []
    sections = tuple(map(int, file.numbers("rope.dimension_sections", 4))) if row.by_axes else ()
    rotated = {layer for layer, kind in enumerate(kinds) if kind != "unrotated"}
    if {n.layer for n in seen.nodes} != rotated:
        told.append(f"rotated are {sorted({n.layer for n in seen.nodes})}, not {sorted(rotated)}")
    for node in seen.nodes:
        scaling = said.get(kinds[node.layer])
        if scaling is None:
            told.append(f"layer {node.layer} is rotated, but it is {kinds[node.layer]}")
            continue
        want = rope_arguments(scaling, row.pairing, sections)
        if not same(node.arguments, want):
            told.append(f"layer {node.layer} ({kinds[node.layer]}) {node.arguments}, not {want}")
        first = None if scaling.frequency_factors is None else scaling.frequency_factors[0]
        if node.factor != first:
            told.append(f"layer {node.layer} has factors from {node.factor}, not {first}")
    return told


def runs(seen: Observed) -> Iterator[tuple[str, str, RuntimeArguments, Seen | str]]:
    for (name, how), result in seen.items():
        yield name, how, ARGUMENTS.get(how, FROM_MODEL), result


@pytest.mark.parametrize("architecture", HONOURED)
def test_every_layer_runs_what_we_say(
    architecture: str, observed: Callable[[str], Observed], headers: Callable[[str], dict[str, GGUFFile]]
) -> None:
    files, told = headers(architecture), []
    seen = observed(architecture)
    assert {name for name, _how in seen} == set(FILES)
    assert {how for name, how in seen if name == "every key"} == {"", *ARGUMENTS}
    for name, how, arguments, result in runs(seen):
        if isinstance(result, Seen) and not refusal(files[name], arguments):
            told += [f"{name} {how}: {line}" for line in disagreements(files[name], arguments, result)]
    assert told == []


LONG = ("long factors, yarn", "long factors, long context", "long factors, short context")
# What a refusal has to say -> the files of which it may be said although they run: what cannot be judged
REASONS: dict[str, tuple[str, ...]] = {
    "LongRoPE, whose frequencies depend on the requested context": LONG,
    "has rope_freqs.weight, which architecture .* does not load or does not use": ("factors",),
    "llama.cpp runs .* only if it (is|equals)": (
        "sliding dims, layer 0 does not",
    ),  # it would do with a pattern like this
    "llama.cpp runs afmoe only with a window": (),  # its graph asks for one whether or not there is one
    "llama.cpp then rotates nothing at all": (),
}


@pytest.mark.parametrize("architecture", HONOURED)
def test_what_does_not_run_is_refused_for_its_reason(
    architecture: str, observed: Callable[[str], Observed], headers: Callable[[str], dict[str, GGUFFile]]
) -> None:
    files, told = headers(architecture), []
    for name, how, arguments, result in runs(observed(architecture)):
        why, ran = refusal(files[name], arguments), isinstance(result, Seen)
        reason = next((r for r in REASONS if re.search(r, why)), None)
        if not why:
            told += [] if ran else [f"{name} {how}: judged, but {result}"]
        elif reason is None:
            told.append(f"{name} {how}: refused for another reason: {why}")
        elif ran and name not in REASONS[reason]:
            told.append(f"{name} {how}: runs, but {why}")
    assert told == []


@pytest.mark.parametrize("architecture", HONOURED)
def test_the_softmax_scale_is_ours(
    architecture: str, observed: Callable[[str], Observed], headers: Callable[[str], dict[str, GGUFFile]]
) -> None:
    """Over every set of arguments it is one unit, times what we say that the scaling multiplies it by."""
    file, seen = headers(architecture)["every key"], observed(architecture)
    units = []
    for how in ("", *ARGUMENTS):
        result = seen["every key", how]
        assert isinstance(result, Seen)
        (scale,) = result.softmax
        units.append(scale / FilePositions(file).effective(ARGUMENTS.get(how, FROM_MODEL)).softmax_factor)
    assert units == pytest.approx([units[0]] * len(units), rel=1e-5)


def others(rule: Sliding) -> dict[str, Sliding]:
    """Rules for layers with a sliding window that differ from `rule` in one fact each."""
    found = {
        "period": replace(rule, period=rule.period + 1),
        "first": replace(rule, dense_first=not rule.dense_first),
        "yarn": replace(rule, yarn=not rule.yarn),
        "always": replace(rule, always=not rule.always),
    }
    found |= {f"base {b}": replace(rule, base=b) for b in ("model", "file", "10000") if b != rule.base}  # type: ignore[arg-type]
    found |= {f"scale {s}": replace(rule, scale=s) for s in ("model", "file", "one") if s != rule.scale}  # type: ignore[arg-type]
    return found


def changed_rows() -> dict[str, tuple[str, Honoured]]:
    found = {}
    for name, row in HONOURED.items():
        if row.sliding is not None:
            found |= {f"{name}: {n}": (name, replace(row, sliding=s)) for n, s in others(row.sliding).items()}
            found[f"{name}: none slides"] = (name, replace(row, sliding=None))
        for which in {"", "every 4th", "full attention"} - {row.unrotated}:
            if row.sliding is not None:
                found[f"{name}: unrotated {which!r}"] = (name, replace(row, unrotated=which))  # type: ignore[arg-type]
    del found["afmoe: always"]  # without a window its graph ends the process: nothing could be seen
    return dict(sorted(found.items()))


CHANGED = changed_rows()


@pytest.mark.parametrize("case", CHANGED)
def test_another_rule_would_be_noticed(
    case: str,
    observed: Callable[[str], Observed],
    headers: Callable[[str], dict[str, GGUFFile]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    architecture, row = CHANGED[case]
    files, seen = headers(architecture), observed(architecture)
    monkeypatch.setitem(HONOURED, architecture, row)
    assert any(
        disagreements(files[name], arguments, result)
        for name, _how, arguments, result in runs(seen)
        if isinstance(result, Seen) and not refusal(files[name], arguments)
    )


VERIFIED = [("yarn", a) for a in HONOURED] + [("factors", a) for a, row in HONOURED.items() if row.frequency_factors]


@pytest.mark.parametrize("name, architecture", VERIFIED)
def test_a_plain_file_verifies(name: str, architecture: str, tmp_path: Path) -> None:
    checks = {c.name: c for c in verify(written(tmp_path / "x.gguf", architecture, name), threads=1)}
    judged = {n: checks[n] for n in ("metadata", "kernel", "live-graph")}
    assert {c.status for c in judged.values()} == {"pass"}, judged


def test_a_pattern_for_fewer_layers_is_an_error(tmp_path: Path) -> None:
    keys = {**YARN, "attention.sliding_window_pattern": [True, False]}
    file = read_gguf(tiny_gguf.write(tmp_path / "x.gguf", "olmo2", keys))
    with pytest.raises(YarnEdgeError, match="sliding_window_pattern has 2 layers"):
        layer_kinds(file, 4)

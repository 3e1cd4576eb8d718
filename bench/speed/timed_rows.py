"""Rows to compare, from a file of `yarn-edge bench --json` or of `llama-bench -o json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import read_file_or_pipe
from yarn_edge.runtime.kv_cache import join_kv_types

from .configuration import name_of_test
from .results import OK

MAX_BYTES = 1 << 30
MAX_SAMPLES = 1000
# What makes the configuration of a row, besides its model and test.
SETTINGS = ("backend", "type_k", "type_v", "flash_attn", "n_batch", "n_ubatch", "n_threads")


@dataclass(frozen=True)
class TimedRow:
    """One test that was measured. settings: the values of SETTINGS."""

    model: str
    test: str
    n: int
    depth: int
    settings: tuple[str | int, ...]
    samples_ns: tuple[float, ...]

    def setting(self, name: str) -> str | int:
        """One of the settings."""
        return self.settings[SETTINGS.index(name)]

    def key(self, with_model: bool) -> tuple[Any, ...]:
        """Equal for rows that measure the same. with_model: include the name of the file, for runs of several models."""
        return (Path(self.model).name if with_model else "", self.test, self.n, self.depth, *self.settings)

    def name(self) -> str:
        """The test as llama-bench writes it."""
        return name_of_test(self.test, self.n, self.depth)

    def label(self) -> str:
        """The test and what it ran on."""
        cache = join_kv_types(str(self.setting("type_k")), str(self.setting("type_v")))
        return f"{self.setting('backend')} {cache} {self.name()}, {self.setting('n_threads')} threads"

    def as_json(self) -> dict[str, Any]:
        """What names the row in --json."""
        test = {"model": self.model, "test": self.test, "n": self.n, "depth": self.depth}
        return test | dict(zip(SETTINGS, self.settings, strict=True))


def read_rows(path: Path) -> list[TimedRow]:
    """The rows of a file that have results. Raises YarnEdgeError for a file that holds no such rows."""
    try:
        data = read_file_or_pipe(path, MAX_BYTES)
        content = json.loads(data.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: is not JSON: {one_line(str(error), 120)}") from error
    records = [_from_llama_bench(record) for record in content] if isinstance(content, list) else _records_of(content)
    if not records or not all(isinstance(record, dict) for record in records):
        raise YarnEdgeError(f"{path}: has no rows of `yarn-edge bench --json` or `llama-bench -o json`")
    rows = []
    for number, record in enumerate(records, 1):
        problem = _problem(record)
        if problem:
            raise YarnEdgeError(f"{path}: row {number}: {problem}")
        if record["status"] == OK:
            rows.append(timed_row(record))
    return rows


def timed_row(record: Mapping[str, Any]) -> TimedRow:
    """A row from its columns, which have no `_problem`."""
    settings = tuple(record[key] for key in SETTINGS)
    samples = tuple(record["samples_ns"])
    return TimedRow(record["model"], str(record["test"]), record["n"], record["depth"], settings, samples)


def _records_of(content: Any) -> list[Any]:
    rows = content.get("rows") if isinstance(content, dict) else None
    return rows if isinstance(rows, list) else []


def _from_llama_bench(record: Any) -> Any:
    """llama-bench's rows have the same columns; what we add to them follows from those."""
    if not isinstance(record, dict) or not {"n_prompt", "n_gen", "n_depth", "samples_ns", "backends"} <= record.keys():
        return None
    reads, writes = record["n_prompt"], record["n_gen"]
    test = "pp" if reads and not writes else "tg" if writes and not reads else "pg"
    backend = str(record["backends"]).split(",")[0].lower()
    named = {"model": record.get("model_filename"), "backend": {"mtl": "metal"}.get(backend, backend)}
    size = {"test": test, "n": (reads or 0) + (writes or 0), "depth": record["n_depth"]}
    return record | named | size | {"status": OK}


def _problem(record: Mapping[str, Any]) -> str:
    """What keeps a row from being compared, "" if nothing does."""
    if not isinstance(record.get("status"), str):
        return "has no status"
    if record["status"] != OK:
        return ""
    missing = [key for key in ("test", "n", "depth", *SETTINGS) if not isinstance(record.get(key), (str, int))]
    if missing:
        return f"has no {missing[0]}"
    if not isinstance(record["n"], int) or record["n"] < 1 or not isinstance(record.get("model"), str):
        return "has no model, or no number of tokens"
    samples = record.get("samples_ns")
    numbers = isinstance(samples, list) and all(isinstance(t, (int, float)) and 0 < t < 1e18 for t in samples)
    if not samples or not numbers:
        return "has no samples_ns above 0"
    return f"has {len(samples)} samples, at most {MAX_SAMPLES} can be compared" if len(samples) > MAX_SAMPLES else ""

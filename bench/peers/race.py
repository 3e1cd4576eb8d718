"""One race: `python -m yarn_edge.bench.peers.NAME`. Shared by all: flags, the environment, the JSON object, exit codes.

A race measures into a dictionary of results and makes tables of it. How sides are timed is the race's choice: whole processes in
turns (`turns`), or timed runs within two processes (`lockstep`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import MAX_THREADS, count
from yarn_edge.progress import note
from yarn_edge.report.environment import environment, machine_state
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.stdout import write_json, write_text

from ..standalone import run_module

Results = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """A row of the harness.

    run: fills the results; those that are there when an error or Ctrl-C ends it are printed, too. passed: whether the results
    are within the race's limits. repeat: default of --repeat, None for a race without that flag. threads: whether it has --threads.
    """

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Results], None]
    tables: Callable[[Results], str]
    passed: Callable[[Results], bool] = lambda _results: True
    repeat: int | None = None
    threads: bool = True

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Print the tables, or JSON. Returns 0, 1 for results beyond the race's limits, 2 for bad input, 130 for Ctrl-C."""
        return run_module(f"peers.{self.name}", self.description, self._add_arguments, self._run, argv)

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
        self.add_arguments(parser)
        if self.repeat is not None:
            text = f"timed turns of each side (default: {self.repeat})"
            parser.add_argument("--repeat", type=count(1, 1000), default=self.repeat, metavar="N", help=text)
        if self.threads:
            cores, text = physical_threads(), "threads of each side (default: one per physical core)"
            parser.add_argument("--threads", type=count(1, MAX_THREADS), default=cores, metavar="N", help=text)
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    def _run(self, args: argparse.Namespace) -> int:
        state = machine_state()
        if state["busy"]:
            note(state["busy"])
        results: Results = {}
        try:
            self.run(args, results)
        except (YarnEdgeError, OSError, KeyboardInterrupt):
            if results:
                self._print(args, state, results, complete=False)
            raise
        self._print(args, state, results, complete=True)
        return int(not self.passed(results))

    def _print(self, args: argparse.Namespace, state: Results, results: Results, complete: bool) -> None:
        if args.json:
            env = environment([args.model] if "model" in args else []) | state
            write_json({"env": env, **results, "complete": complete})
        else:
            write_text(self.tables(results))


def add_folder_flag(parser: argparse.ArgumentParser) -> None:
    """--folder, for a race that writes large files."""
    text = "where to write the files (default: temporary folder)"
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help=text)

"""Where units run: the flags --on, --workers and --results, and the executor that they name."""

from __future__ import annotations

import argparse
import importlib
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import count
from yarn_edge.jobs.local import LocalExecutor
from yarn_edge.runtime.llama_api import physical_threads

MAX_WORKERS = 4096


@dataclass(frozen=True)
class Place:
    """A kind of workers that an extra of the same name installs. module, executor: what opens it; package: what is installed.

    calls: into how many calls per worker the units go; None for one call per unit.
    """

    module: str
    executor: str
    package: str
    calls: int | None = None


# A job of Slurm starts a process and loads the model, so one job computes many units.
PLACES = {
    "ray": Place("yarn_edge.jobs.ray_tasks", "RayExecutor", "Ray"),
    "dask": Place("yarn_edge.jobs.dask_client", "DaskExecutor", "Dask"),
    "slurm": Place("yarn_edge.jobs.slurm_jobs", "SlurmExecutor", "submitit", calls=4),
}


@dataclass(frozen=True)
class Crew:
    """Workers. place: local or a key of PLACES; address: of the cluster, "" for one on this machine; threads: of each worker;
    results: folder that keeps what finished units gave.
    """

    place: str = "local"
    address: str = ""
    n_workers: int = 1
    threads: int = 1
    results: Path | None = None

    @property
    def calls(self) -> int | None:
        """See `Place`."""
        return PLACES[self.place].calls if self.place in PLACES else None

    def open(self) -> Executor:
        """The executor. Raises YarnEdgeError if its package is missing or the cluster cannot be reached."""
        if self.place == "local":
            return LocalExecutor(self.n_workers)
        place = PLACES[self.place]
        try:
            module = importlib.import_module(place.module)
        except ImportError as error:
            raise YarnEdgeError(
                f"--on {self.place} needs {place.package}: pip install 'yarn-edge[{self.place}]' ({error})"
            ) from error
        executor: Executor = getattr(module, place.executor)(self.address, self.n_workers, self.threads)
        return executor


def parse_place(text: str) -> tuple[str, str]:
    """(place, address) of --on: local, ray, ray://HOST:PORT, ray:HOST:PORT, dask, dask:tcp://HOST:PORT, slurm, slurm:KEY=VALUE,…"""
    place, _, address = text.partition(":")
    if place == "ray" and address.startswith("//"):
        return place, text
    if place == "local" and address:
        raise argparse.ArgumentTypeError(f"{text!r}: local has no address")
    if place != "local" and place not in PLACES:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; known: local, {', '.join(PLACES)}")
    return place, address


def add_job_flags(parser: argparse.ArgumentParser, units: str) -> None:
    """--on, --workers and --results. units: what runs on the workers."""
    group = parser.add_argument_group(
        "many jobs", f"run {units} on several workers, with the same digits (docs/jobs.md)"
    )
    group.add_argument(
        "--on",
        type=parse_place,
        metavar="PLACE",
        help="local; ray, ray:HOST:PORT or ray://HOST:PORT; dask or dask:tcp://HOST:PORT; slurm or slurm:partition=NAME,time=MINUTES "
        "(without an address, ray and dask start on this machine)",
    )
    group.add_argument(
        "--workers",
        type=count(1, MAX_WORKERS),
        metavar="N",
        help="number of workers, each with --threads (default: as many as this machine's cores suffice for, with 1 thread each)",
    )
    group.add_argument(
        "--results",
        metavar="DIR",
        help="keep the results of finished units in DIR; the same command continues from them",
    )


def crew_of(args: argparse.Namespace) -> Crew | None:
    """The workers that the flags name; None without --on. Raises YarnEdgeError."""
    if args.on is None:
        if args.workers is not None or args.results is not None:
            raise YarnEdgeError(f"--{'results' if args.workers is None else 'workers'} needs --on, such as --on local")
        return None
    place, address = args.on
    cores = physical_threads()
    n_workers = args.workers or max(1, cores // (args.threads or 1))
    threads = args.threads or max(1, cores // n_workers)
    results = None if args.results is None else Path(args.results)
    if args.results == "":
        raise YarnEdgeError("--results is empty: it names a folder")
    if results is not None and results.exists() and not results.is_dir():
        raise YarnEdgeError(f"{one_line(str(results), 200)}: --results names a folder")
    return Crew(place, address, n_workers, threads, results)

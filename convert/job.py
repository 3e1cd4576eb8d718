"""A planned conversion: `convert` and `quantize` both make one, and then estimate it or carry it out.

The types are llama.cpp's own choice (`recipe`), the arithmetic is ggml's, even where it is done faster (`kernels`). Files are
complete and checked before they get their names, or they do not appear.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.edit_shards import publish_files
from yarn_edge.progress import bar, note, without_notes
from yarn_edge.runtime.ggml_types import GGMLType, requires_weights
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.stdout import write_json, write_text

from .file_plan import FilePlan, Source, plan_files, work_by_type
from .imatrix.matrix import ImportanceMatrix
from .importance import importance_weights
from .kernels.choose import Kernels
from .kernels.layout import LAYOUTS
from .moments.moments import FactorsOf, Moments
from .one_pass import Rounding, fill
from .output_file import Output
from .outputs import check_disk_room
from .partials import writing
from .proving import CalibrationProof, calibration_keys
from .recipe import QuantOptions

_SAMPLE_WIDTH, _SAMPLE_ROWS, _SAMPLE_SECONDS = 2048, 8, 0.05


@dataclass(frozen=True)
class QuantizationJob:
    """Files that are planned to the last byte.

    check: reads a written file back, and raises YarnEdgeError if it is wrong. check_header: the same for what only needs the
    file's header, which is written before its tensors: it runs while they are made. moments: of the inputs, for error feedback. proof:
    measures the files before they get their names. folder: of this job alone, from which another run goes on if this one is ended;
    None without.
    """

    source: Source
    files: Sequence[FilePlan]
    matrix: ImportanceMatrix | None
    check: Callable[[Path], None]
    force: bool
    check_header: Callable[[Path], None] = lambda _path: None
    moments: Moments | None = None
    proof: CalibrationProof | None = None
    folder: Path | None = None

    @property
    def kernels(self) -> Kernels:
        """The kernels that quantize; the same for all files."""
        return self.files[0].kernels

    def check_feedback(self) -> None:
        """Raise YarnEdgeError if error feedback would change nothing: no tensor becomes a K-quant."""
        if self.kernels.fast is None:
            names = ", ".join(plan.quant.name for plan in self.files)
            raise YarnEdgeError(
                f"--calibrate changes K-quants, and {names} has none here (their rows must be multiples of 256 weights): leave it out"
            )

    def calibrated(
        self, options: QuantOptions, moments: Moments, proof: CalibrationProof | None, allow_requantize: bool = False
    ) -> QuantizationJob:
        """The same files, planned again for error feedback, without notes: all else is read and checked. proof: of what it is worth.

        Raises YarnEdgeError as `plan_files` does.
        """
        matrix, paths = moments.importance(), {plan.path: plan.quant for plan in self.files}
        with without_notes():
            files = plan_files(self.source, paths, options, matrix, allow_requantize, calibration_keys(moments, proof))
        return replace(self, files=files, matrix=matrix, moments=moments, proof=proof)

    def estimate(self, threads: int) -> float:
        """Seconds of computing, measured on a sample of each type; reading and writing overlap it. Writes nothing.

        Raises YarnEdgeError if the disks have no room.
        """
        check_disk_room(self.files)
        work = work_by_type(self.source, [plan.recipe for plan in self.files])
        with bar("Measuring", 1):
            return sum(n / _weights_per_second(kind, self.kernels) for kind, n in work.items()) / threads

    def write(self, threads: int | None = None) -> list[Path]:
        """Write every file, check it, and give all of them their names, or none. Returns their paths."""
        check_disk_room(self.files)
        if self.proof is not None:
            self.proof.check_room(self.files)
        paths = [plan.path for plan in self.files]
        weights = importance_weights(self.source.tensors, self.matrix)
        with writing(self.source, self.files, weights, self.kernels, self.folder) as (partials, record):
            outputs = [plan.output(partial) for plan, partial in zip(self.files, partials, strict=True)]
            factors = [] if self.moments is None else [FactorsOf(self.moments)]
            label = ", ".join(plan.quant.name for plan in self.files)
            with bar(label, self.source.n_bytes, "bytes") as advance:
                advance(record.n_bytes)
                fill(
                    self.source.tensors,
                    outputs,
                    Rounding(weights, self.kernels, *factors),
                    threads or physical_threads(),
                    advance,
                    lambda: self._check_headers(partials),
                    record,
                )
            self.source.check_unchanged()
            record.complete()
            for output in outputs:
                _check_same_header(output)
            _each(self.check, partials)
            if self.proof is not None:
                self.proof.run(self.files, partials, self.matrix)
            publish_files(partials, paths, self.force)
        for plan in self.files:
            note(_summary(plan))
            if self.moments is not None:
                note(self._feedback_in(plan, self.moments))
            for line in [] if self.proof is None else self.proof.lines(plan):
                note(line)
        return paths

    def _feedback_in(self, plan: FilePlan, moments: Moments) -> str:
        """In how many tensors, and in how many experts not, there is error feedback."""
        tensors = [t for t in self.source.tensors if plan.recipe.types[t.name].name in LAYOUTS]
        with_it = few = experts = 0
        for tensor in tensors:
            n = tensor.n_rows // tensor.rows_per_matrix
            found = sum(moments.input_name(tensor.name, tensor.width, matrix) is not None for matrix in range(n))
            with_it += found > 0
            few, experts = (few + n - found, experts + n) if n > 1 else (few, experts)
        text = f"error feedback in {with_it} of {len(tensors)} tensors with K-quants, from {moments.tokens} tokens"
        if few:
            text += f"; {few} of {experts} matrices of experts saw too few for it (more --calibrate-tokens reach more)"
        return text

    def _check_headers(self, partials: Iterable[Path]) -> None:
        with collector_paused():
            _each(self.check_header, partials)

    def as_json(self, seconds: float, threads: int) -> dict[str, Any]:
        """The plan as data: the type and the size of every tensor of every file."""
        by_name = {t.name: t for t in self.source.tensors}
        return {
            "source": str(self.source.path),
            "source_bytes": self.source.n_bytes,
            "n_weights": self.source.n_weights,
            "threads": threads,
            "seconds": round(seconds, 2),
            "files": [
                {
                    "quant": plan.quant.name,
                    "output": str(plan.path),
                    "file_bytes": plan.layout.file_bytes,
                    "bits_per_weight": round(plan.bits_per_weight, 4),
                    "quantizer": plan.quantizer,
                    "fallbacks": [vars(f) for f in plan.recipe.fallbacks],
                    "tensors": [
                        {"name": name, "ne": list(by_name[name].ne), "type": kind.name, "from": by_name[name].kind.name}
                        for name, kind in plan.recipe.types.items()
                    ],
                    **({} if self.proof is None else {"calibration": self.proof.figures(plan)}),
                }
                for plan in self.files
            ],
        }

    def as_table(self, seconds: float, threads: int) -> str:
        """The plan for people: a line for each file, and one for each type in it."""
        lines: list[str] = []
        by_name = {t.name: t for t in self.source.tensors}
        for plan in self.files:
            lines.append(_summary(plan))
            tensors: Counter[GGMLType] = Counter(plan.recipe.types.values())
            weights: Counter[GGMLType] = Counter()
            for name, kind in plan.recipe.types.items():
                weights[kind] += by_name[name].n_rows * by_name[name].width
            for kind, n in sorted(weights.items(), key=lambda item: -item[1]):
                n_bytes = n // kind.block * kind.block_bytes
                sizes = f"{tensors[kind]:>5} tensors {n / 1e6:>10.2f} M weights {n_bytes / 1e6:>10.1f} MB"
                lines.append(f"  {kind.name:<8}{sizes}")
        total = sum(plan.layout.file_bytes for plan in self.files) / 1e6
        lines.append(
            f"{total:.1f} MB in total from one reading of {self.source.n_bytes / 1e6:.1f} MB, about {seconds:.0f} s of "
            f"computing with {threads} threads by {self.kernels.quantizer} (measured on a sample)"
        )
        return "\n".join(lines) + "\n"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collector: it would look for cycles in a vocabulary's 10^5 objects over and over, and find none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _each(check: Callable[[Path], None], paths: Iterable[Path]) -> None:
    for path in paths:
        check(path)


def _check_same_header(output: Output) -> None:
    """Raise YarnEdgeError unless the file still has the header that was checked while its tensors were made."""
    with output.path.open("rb") as file:
        if file.read(len(output.header)) != output.header:
            raise YarnEdgeError(f"{output.path}: its header is not the one that was written: check the disk")


def _summary(plan: FilePlan) -> str:
    size = plan.layout.file_bytes / 1e6
    return f"{one_line(str(plan.path))}: {plan.quant.name}, {size:.1f} MB, {plan.bits_per_weight:.2f} bits per weight"


def _weights_per_second(kind: GGMLType, kernels: Kernels) -> float:
    """Speed of one core on normally distributed rows, which weights resemble."""
    rows = np.random.default_rng(0).normal(0, 0.02, (_SAMPLE_ROWS, _SAMPLE_WIDTH)).astype(np.float32)
    weights = np.ones(_SAMPLE_WIDTH, np.float32) if requires_weights(kind) else None
    out = np.empty((_SAMPLE_ROWS, kind.row_bytes(_SAMPLE_WIDTH)), np.uint8)
    kernels.quantize_into(kind, rows[:1], out[:1], weights)  # ggml builds its tables in the first call
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _SAMPLE_SECONDS:
        kernels.quantize_into(kind, rows, out, weights)
        done += rows.size
    return done / took


def run_job(job: QuantizationJob, args: argparse.Namespace) -> int:
    """The end of both commands: estimate the job with --dry-run, else carry it out; --json prints it as data."""
    threads = args.threads or physical_threads()
    start = time.perf_counter()
    if args.dry_run:
        seconds = job.estimate(threads)
    else:
        job.write(threads)
        seconds = time.perf_counter() - start
    if args.json:
        write_json({**job.as_json(seconds, threads), "written": not args.dry_run})
    elif args.dry_run:
        write_text(job.as_table(seconds, threads))
    return 0

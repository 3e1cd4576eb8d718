"""`yarn-edge fit CHECKPOINT --text TEXT`: the best file for the memory there is.

Types of the weights, of K and of V share one budget with the context. What each costs is measured: of the cache by the 16-bit model at
that length, of the weights by their sensitivities (`convert.sizing`). What is chosen is then made and measured at that length, next to
the standard files (with an importance matrix) and caches that fit as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yarn_edge.averages import Mean
from yarn_edge.convert.calibration import Calibration
from yarn_edge.convert.hf_to_gguf import convert, convert_job
from yarn_edge.convert.imatrix.matrix import write_imatrix
from yarn_edge.convert.job import QuantizationJob
from yarn_edge.convert.kernels.choose import FAST
from yarn_edge.convert.moments.collect import CalibrationSettings
from yarn_edge.convert.moments.moments import Moments
from yarn_edge.convert.outputs import OutputOptions
from yarn_edge.convert.proving import CalibrationProof
from yarn_edge.convert.recipe import QuantOptions
from yarn_edge.convert.sizing.sensitivity import TensorCost, kinds_for
from yarn_edge.convert.sizing.sized import check_types, free_tensors, measured_costs, with_types
from yarn_edge.convert.weight_files import whole_folder
from yarn_edge.gguf.edit_shards import publish_files
from yarn_edge.memory.choice import DoesNotFitError, gib
from yarn_edge.memory.plan import MemoryPlan, Simulation
from yarn_edge.progress import note, without_notes
from yarn_edge.writer import check_output, check_space, scratch_folder

from ..quality.text_settings import TextSettings
from ..scoring.variants import parse_variant
from .cache_loss import KINDS, NO_LOSS, CacheLoss, cache_loss, losses_of
from .candidates import Candidate, fit_candidates, planned_file
from .frontier import Frontier, Planned
from .held_out import held_out
from .search import CACHE_TYPES, process_bytes_apart

START = "Q4_K_M"  # whose header the file has
_OPTIONS = QuantOptions(kernels=FAST)
_TRIES = 8


@dataclass(frozen=True)
class FileWanted:
    """texts: names and contents. memory: bytes. n_ctx: tokens, None for what the model was trained for. output: None for no file.
    moments: a file of the moments, read if it is there, else written; None without.
    """

    model: Path
    texts: Mapping[str, str]
    memory: int
    n_ctx: int | None = None
    output: Path | None = None
    moments: Path | None = None
    force: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class FittingFile:
    """A file with a cache, within the budget. quant: None for the one whose types were chosen, of which `expected` and
    `bits_per_weight` are known. kl: its divergence from the 16-bit model at length, once that is measured.
    """

    quant: str | None
    kv_type: str
    file_bytes: int
    plan: MemoryPlan
    expected: Planned | None = None
    bits_per_weight: float | None = None
    kl: Mean | None = None

    @property
    def nats(self) -> float:
        """The measured mean."""
        assert self.kl is not None
        return self.kl.mean


@dataclass(frozen=True)
class BestFile:
    """The result. chosen: the file whose types were chosen; standard: the others that fit. frontier: what is expected for other
    budgets. measured_ctx: tokens that were read at once. losses: of the caches.
    """

    wanted: FileWanted
    n_ctx: int
    measured_ctx: int
    losses: CacheLoss
    frontier: Sequence[Planned]
    chosen: FittingFile
    standard: Sequence[FittingFile]

    @property
    def best(self) -> FittingFile:
        """The one with the least divergence."""
        return min((self.chosen, *self.standard), key=lambda file: file.nats)


def best_file(wanted: FileWanted) -> BestFile:
    """Measure, choose, make and measure again; with `wanted.output`, the best file is written there.

    Raises YarnEdgeError if nothing fits, and for a model whose sensitivities cannot be measured.
    """
    if wanted.output is not None:
        check_output(wanted.output, wanted.force, [Path(name) for name in wanted.texts])
    wanted = replace(wanted, model=whole_folder(wanted.model))
    with fit_candidates(wanted.model) as standard, scratch_folder("yarn-edge-fit-") as scratch:
        output = wanted.output or scratch / "best.gguf"
        with without_notes():  # planning the standard files says the same
            job = convert_job(wanted.model, OutputOptions(str(output), START, True), _OPTIONS)
        start = planned_file(replace(job.files[0], path=scratch / "start.gguf"), "convert")
        apart = process_bytes_apart(start.file.path, wanted.threads)
        with Simulation(start.file.path, threads=wanted.threads, process_bytes=apart) as simulation:
            return _Budget(wanted, output, job, simulation).best(standard.plan())


class _Budget:
    """The work beside `output`. job: makes the file with the types of START, which `simulation` is of."""

    def __init__(self, wanted: FileWanted, output: Path, job: QuantizationJob, simulation: Simulation) -> None:
        self._wanted, self._output, self._job, self._simulation = wanted, output, job, simulation
        self._n_ctx = wanted.n_ctx or simulation.n_ctx_train
        self._free = free_tensors(job.source.tensors, job.files[0])

    def best(self, standard: Sequence[Candidate]) -> BestFile:
        """All of it, in the order of the docs."""
        unknown = [
            TensorCost(t.name, t.n_rows * t.width, 0.0, dict.fromkeys(kinds_for(t.width), 0.0)) for t in self._free
        ]
        kinds = [kind for kind in KINDS if self._simulation.refusal(f"{kind}/{kind}") is None]
        anything = self._frontier(unknown, CacheLoss(dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)))
        anything.best(self._wanted.memory)  # whether anything fits is said before anything is measured
        others = self._fitting(standard)
        kept = held_out(self._simulation.model, self._wanted.texts, self._n_ctx)
        settings = CalibrationSettings(kept.others, threads=self._wanted.threads)
        with Calibration(settings, self._wanted.moments).at_work(self._job.source, self._output, True) as work:
            whole = self._whole(work.folder / "whole.gguf")
            moments = work.with_gradients(work.moments(lambda: whole), self._wanted.model)
            assert moments.gradients is not None
            plan = self._job.files[0]
            costs = measured_costs(self._free, plan, moments, moments.gradients, work.folder / "costs.json")
            text = kept.written(work.folder / "held-out")
            all_fits = anything.most <= self._wanted.memory
            losses = NO_LOSS if all_fits else cache_loss(whole, kinds[1:], text, self._wanted.threads)
            frontier = self._frontier(costs, losses)
            proof = CalibrationProof.of(whole, kept.others, work.folder, self._wanted.threads)
            chosen, job = self._chosen(frontier, moments, proof, work.folder / "chosen.gguf")
            with without_notes():  # they name the scratch folder
                job.write(self._wanted.threads)
            for line in proof.lines(job.files[0]):
                note(line)
            paths = [job.files[0].path, *self._make(others, moments, work.folder)]
            chosen, *measured = self._measured(whole, [chosen, *others], paths, text)
            result = BestFile(self._wanted, self._n_ctx, kept.n_tokens, losses, frontier.points(), chosen, measured)
            if self._wanted.output is not None:
                place = [chosen, *measured].index(result.best)
                publish_files([paths[place]], [self._wanted.output], self._wanted.force)
        return result

    def _whole(self, path: Path) -> Path:
        """The checkpoint in 16 bits."""
        if not path.exists():
            check_space(path.parent, 2 * self._job.source.n_weights, "the model in 16 bits")
            with without_notes():
                convert(self._wanted.model, str(path), "BF16", threads=self._wanted.threads)
        return path

    def _frontier(self, costs: Sequence[TensorCost], losses: CacheLoss) -> Frontier:
        return Frontier(self._simulation, self._n_ctx, self._free, costs, self._job.files[0].recipe.types, losses)

    def _fitting(self, standard: Sequence[Candidate]) -> list[FittingFile]:
        """Of each standard file the best cache with which it fits, unless a better file fits with such a cache."""
        found: list[FittingFile] = []
        left: tuple[str, ...] = CACHE_TYPES
        for candidate in (c for c in standard if c.recommended):
            for kv_type in left:
                if self._simulation.refusal(kv_type) is not None:
                    continue
                plan = self._simulation.plan(self._n_ctx, kv_type, weights=candidate.weights)
                if plan.taken_bytes <= self._wanted.memory:
                    found.append(FittingFile(candidate.quant, kv_type, candidate.file.file_bytes, plan))
                    left = left[: left.index(kv_type)]
                    break
        return found

    def _chosen(
        self, frontier: Frontier, moments: Moments, proof: CalibrationProof, path: Path
    ) -> tuple[FittingFile, QuantizationJob]:
        """What is expected to lose least, and the job that makes it: planned to the byte, and made smaller until it fits."""
        budget, memory = self._wanted.memory, self._wanted.memory
        for _ in range(_TRIES):
            planned = frontier.best(budget)
            job = self._job_of(planned, moments, proof, path)
            with scratch_folder("yarn-edge-fit-") as folder:
                file = planned_file(replace(job.files[0], path=folder / "chosen.gguf"), "convert")
                plan = self._simulation.plan(self._n_ctx, planned.kv_type, weights=file.weights)
            if plan.taken_bytes <= memory:
                n_bytes = job.files[0].layout.file_bytes
                return FittingFile(None, planned.kv_type, n_bytes, plan, planned, job.files[0].bits_per_weight), job
            budget -= plan.taken_bytes - memory
        raise DoesNotFitError(f"{self._wanted.model}: no types were found that fit into {gib(memory)}")

    def _job_of(self, planned: Planned, moments: Moments, proof: CalibrationProof, path: Path) -> QuantizationJob:
        moments = replace(moments, method="error feedback, types by sensitivity")
        job = replace(self._job, files=[replace(self._job.files[0], path=path)])
        job = job.calibrated(with_types(_OPTIONS, planned.types), moments, proof)
        check_types(planned.types, job.files[0].recipe.types)
        return job

    def _make(self, files: Sequence[FittingFile], moments: Moments, folder: Path) -> list[Path]:
        """The standard files, with the importance matrix of the same reading."""
        if not files:
            return []
        imatrix, place = folder / "imatrix.gguf", folder / "standard"
        place.mkdir(exist_ok=True)
        write_imatrix(moments.importance(), imatrix)
        quants = [str(file.quant) for file in files]
        with without_notes():
            return convert(
                self._wanted.model,
                str(place / "{quant}.gguf"),
                ",".join(quants),
                options=QuantOptions(imatrix),
                force=True,
                threads=self._wanted.threads,
            )

    def _measured(
        self, whole: Path, files: Sequence[FittingFile], paths: Sequence[Path], text: TextSettings
    ) -> list[FittingFile]:
        """The files with their divergences from the 16-bit model."""
        runs = [parse_variant(f"{path}@kv={file.kv_type}") for file, path in zip(files, paths, strict=True)]
        found = losses_of(parse_variant(str(whole)), runs, text, self._wanted.threads)
        return [replace(file, kl=found[run.label]) for file, run in zip(files, runs, strict=True)]

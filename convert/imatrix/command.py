"""`yarn-edge imatrix`: evaluate a text with a model and record how much each input of its matrices is used.

The text is cut into chunks of --ctx tokens. Each is evaluated from position 0 on with the scaling that the file declares, so
the positions are those of the quantized model. The numbers are those of llama-imatrix (tools/imatrix/imatrix.cpp,
compute_imatrix), so the files are interchangeable.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yarn_edge.attention.choose import fastest_attention
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import add_attention_flag, add_threads_flag, add_trust_flag, count, length_from
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.identity import model_identity
from yarn_edge.graph.opening import open_context
from yarn_edge.jobs.crew import Crew, add_job_flags, crew_of
from yarn_edge.llama_rules.number_rules import MAX_CONTEXT
from yarn_edge.progress import Advance, bar, note
from yarn_edge.regular_file import is_named
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import MAX_SEQUENCES, Attention, ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.stdout import write_json, write_text
from yarn_edge.text_file import read_text
from yarn_edge.writer import check_output, check_space, partial_file, publish

from .activations import MIN_ROWS, OUTPUT_WEIGHT, ActivationTap, importances
from .chunks_on_workers import measure_on
from .matrix import Importance, ImportanceMatrix, write_imatrix
from .progress import ImatrixRun, added, load_progress, progress_path, save_progress, text_identity

BATCH, UBATCH = 2048, 512  # llama.cpp's defaults: tokens of one call, and of one graph
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class ImatrixSettings:
    """How to collect. ctx: tokens of a chunk. chunks: maximum number of them. threads: None for all physical cores.

    attention: "auto" is our kernels where they are faster, else llama.cpp's choice.
    """

    ctx: int = 512
    chunks: int | None = None
    batch: int = BATCH
    process_output: bool = False
    parse_special: bool = False
    threads: int | None = None
    attention: Attention = "auto"


@dataclass(frozen=True)
class ImatrixOutcome:
    """A finished matrix, and the tokens and seconds of evaluation in this process, without those of a resumed run."""

    matrix: ImportanceMatrix
    tokens: int
    seconds: float


def collect(
    model: str | Path,
    text: str | Path,
    output: str | Path,
    settings: ImatrixSettings = ImatrixSettings(),
    *,
    resume: bool = False,
    force: bool = False,
    crew: Crew | None = None,
) -> ImatrixOutcome:
    """Write the importance matrix of `model` over `text` to `output`.

    resume: continue an interrupted run with the same arguments, whose progress is beside the output. force: overwrite the
    output and, without resume, the progress. crew: workers; what they finish is kept in the crew's own folder. Raises
    YarnEdgeError for a text or a model that gives no matrix; then nothing is written under the output's name.
    """
    words, path = read_text(Path(text)), check_output(Path(output), force, [Path(model), Path(text)])
    progress = progress_path(path)
    if is_named(progress) and not (resume or force):
        raise YarnEdgeError(f"{progress}: is an unfinished run: --resume continues it, --force starts over")
    with Model(model, no_alloc=crew is not None) as loaded:
        chunks = chunks_of(loaded, words, settings, Path(text))
        run = ImatrixRun(
            model_identity(loaded.gguf),
            text_identity(words),
            settings.ctx,
            len(chunks),
            settings.batch,
            settings.process_output,
            settings.parse_special,
        )
        empty = ImportanceMatrix(None, {}, (str(text),), 0, settings.ctx)
        collection = _Collection(run, progress, load_progress(run, progress) if resume else empty)
        check_space(path.parent, 2 * matrix_bytes(loaded.gguf), "an importance matrix and its progress")
        tokens, seconds = collection.go_on(loaded, chunks, settings, crew)
    try:
        with partial_file(path) as partial:
            write_imatrix(collection.matrix, partial)
            publish(partial, path, force)
    except BaseException:
        with contextlib.suppress(YarnEdgeError):  # report only the first failure
            collection.save()
        raise
    progress.unlink(missing_ok=True)
    return ImatrixOutcome(replace(collection.matrix, path=path), tokens, seconds)


def matrix_bytes(file: GGUFFile) -> int:
    """The approximate size of a model's importance matrix on the disk."""
    weights = (t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1)
    return sum(4 * t.n_elements // t.shape[1] for t in weights)


def chunks_of(model: Model, words: str, settings: ImatrixSettings, source: Path) -> list[list[int]]:
    """Token ids, `settings.ctx` for each chunk; an incomplete last chunk is dropped. BOS replaces the first token of each."""
    ctx = settings.ctx
    if ctx > model.n_ctx_train:
        raise YarnEdgeError(f"{model.path}: its context is {model.n_ctx_train} tokens, --ctx {ctx} exceeds it")
    tokens = model.tokenize(words, add_special=True, parse_special=settings.parse_special)
    n_chunks = min(len(tokens) // ctx, settings.chunks or len(tokens))
    if not n_chunks:
        raise YarnEdgeError(f"{source}: has {len(tokens)} tokens, fewer than one chunk of {ctx}: use a smaller --ctx")
    chunks = [tokens[at : at + ctx] for at in range(0, n_chunks * ctx, ctx)]
    if model.add_bos:
        for chunk in chunks:
            chunk[0] = model.bos
    return chunks


def context_settings(model: Model, n_chunks: int, settings: ImatrixSettings) -> tuple[ContextSettings, bool]:
    """(the settings of a context for chunks side by side, whether output.weight is included)."""
    n_seq = max(1, min(settings.batch // settings.ctx, n_chunks, MAX_SEQUENCES))
    has_output = settings.process_output and OUTPUT_WEIGHT.decode() in model.gguf.tensors
    if settings.process_output and not has_output:
        note(
            "this model has no output.weight: it uses its token embeddings instead, which have no entry in llama.cpp either"
        )
    wanted = ContextSettings(
        n_ctx=settings.ctx, n_seq=n_seq, n_batch=settings.batch, n_ubatch=UBATCH, threads=settings.threads
    )
    attention = fastest_attention(wanted, model.gguf) if settings.attention == "auto" else settings.attention
    return replace(wanted, attention=attention), has_output


class _Collection:
    """One run and its progress. `matrix` always holds whole chunks."""

    def __init__(self, run: ImatrixRun, progress: Path, matrix: ImportanceMatrix) -> None:
        self.run, self.progress, self.matrix = run, progress, matrix
        self.saved = matrix.chunk_count

    def go_on(
        self, model: Model, chunks: Sequence[Sequence[int]], settings: ImatrixSettings, crew: Crew | None = None
    ) -> tuple[int, float]:
        """Evaluate the remaining chunks, saving at intervals and when a signal stops the run. Returns tokens and seconds."""
        left = chunks[self.matrix.chunk_count :]
        tokens = len(left) * settings.ctx
        if crew is not None:
            start = time.perf_counter()
            tokens = self._evaluate_on(crew, model, left, settings)
            return tokens, time.perf_counter() - start
        with bar("Importance matrix", tokens, "tokens") as advance:
            start = time.perf_counter()
            try:
                if left:
                    self._evaluate(model, left, settings, advance)
            except BaseException as reason:
                if not isinstance(reason, Exception):
                    self.save()
                    if self.matrix.chunk_count:
                        done = f"{self.matrix.chunk_count} of {len(chunks)} chunks"
                        note(f"{self.progress}: {done}; --resume continues from there")
                raise
        return tokens, time.perf_counter() - start

    def _evaluate(
        self, model: Model, chunks: Sequence[Sequence[int]], settings: ImatrixSettings, advance: Advance
    ) -> None:
        wanted, with_output = context_settings(model, len(chunks), settings)
        tap = ActivationTap(with_output=with_output)
        with open_context(model, wanted, tap=tap) as context:
            saved = time.monotonic()
            for at in range(0, len(chunks), wanted.n_seq):
                self._take_in(chunks[at : at + wanted.n_seq], tap, context, advance)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self._check(model)

    def _evaluate_on(self, crew: Crew, model: Model, chunks: Sequence[Sequence[int]], settings: ImatrixSettings) -> int:
        wanted, with_output = context_settings(model, len(chunks), replace(settings, threads=crew.threads))

        def take(new: Mapping[str, Importance], n_chunks: int) -> None:
            done = self.matrix.chunk_count + n_chunks
            self.matrix = replace(self.matrix, entries=added(self.matrix.entries, new), chunk_count=done)

        tokens = measure_on(crew, model.gguf, chunks, wanted, with_output, take)
        self._check(model)
        return tokens

    def _check(self, model: Model) -> None:
        if not self.matrix.entries:
            raise YarnEdgeError(f"{model.path}: no weight matrix was multiplied with {MIN_ROWS} or more tokens")

    def _take_in(self, part: Sequence[Sequence[int]], tap: ActivationTap, context: Context, advance: Advance) -> None:
        done = self.matrix.chunk_count + len(part)
        squares = tap.measure(context, part, lambda n: advance(n, f"chunk {done} of {self.run.n_chunks}"))
        self.matrix = replace(self.matrix, entries=added(self.matrix.entries, importances(squares)), chunk_count=done)

    def save(self) -> None:
        """Write the progress, if there is any since the last save."""
        if self.matrix.chunk_count > self.saved:
            save_progress(self.run, self.matrix, self.progress)
            self.saved = self.matrix.chunk_count


def unseen_experts(matrix: ImportanceMatrix) -> dict[str, list[int]]:
    """Experts that received no token, by weight."""
    unseen = {name: [int(i) for i in (e.counts == 0).nonzero()[0]] for name, e in sorted(matrix.entries.items())}
    return {name: experts for name, experts in unseen.items() if experts}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge imatrix`."""
    size = length_from(MIN_ROWS, MAX_CONTEXT)
    parser.add_argument("model", metavar="MODEL.gguf", help="the model to be quantized, in 16 or 32 bits")
    text = "calibration text, UTF-8, similar to what the model will be used for"
    parser.add_argument("--text", required=True, metavar="FILE", help=text)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="importance matrix to write (GGUF)")
    text = "tokens in a chunk, at most the model's context (default: 512)"
    parser.add_argument("--ctx", type=size, default=512, metavar="N", help=text)
    text = "maximum number of chunks (default: the whole text)"
    parser.add_argument("--chunks", type=count(1, MAX_CONTEXT), metavar="N", help=text)
    text = f"tokens evaluated side by side (default: {BATCH}; fewer need less memory)"
    parser.add_argument("--batch", type=size, default=BATCH, metavar="N", help=text)
    parser.add_argument("--process-output", action="store_true", help="include output.weight")
    parser.add_argument("--parse-special", action="store_true", help="read <|markup|> in the text as special tokens")
    text = "continue an interrupted run, whose progress is in FILE.progress"
    parser.add_argument("--resume", action="store_true", help=text)
    text = "overwrite an existing output; without --resume, also discard an unfinished run"
    parser.add_argument("--force", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_attention_flag(parser)
    add_threads_flag(parser)
    add_trust_flag(parser)
    add_job_flags(parser, "chunks")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge imatrix`."""
    settings = ImatrixSettings(
        args.ctx, args.chunks, args.batch, args.process_output, args.parse_special, args.threads, args.attention
    )
    crew = crew_of(args)
    if crew is not None and args.resume:
        raise YarnEdgeError("--resume is for a run in one process: with --on, --results DIR keeps what is finished")
    outcome = collect(args.model, args.text, args.output, settings, resume=args.resume, force=args.force, crew=crew)
    matrix, unseen = outcome.matrix, unseen_experts(outcome.matrix)
    report: dict[str, Any] = {
        "model": str(args.model),
        "output": str(args.output),
        "chunks": matrix.chunk_count,
        "ctx": matrix.chunk_size,
        "tokens": outcome.tokens,
        "entries": len(matrix.entries),
        "seconds": outcome.seconds,
        "tok_per_s": outcome.tokens / outcome.seconds,
        "experts_without_data": unseen,
    }
    if args.json:
        write_json(report)
    else:
        write_text(
            f"{one_line(str(args.output))}: {len(matrix.entries)} matrices, {matrix.chunk_count} chunks of {matrix.chunk_size}\n"
        )
    if unseen:
        total = sum(map(len, unseen.values()))
        note(
            f"{total} experts saw no token ({next(iter(unseen))} and {len(unseen) - 1} more matrices): use more text to reach them"
        )
    note(f"{outcome.tokens} tokens in {outcome.seconds:.1f} s, {report['tok_per_s']:.0f} tok/s")
    return 0

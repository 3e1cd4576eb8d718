"""What a model card may state: what was measured on the very files that are published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import bar, note
from yarn_edge.source_file import SourceFile
from yarn_edge.verify.checks import Check
from yarn_edge.verify.command import verify

from ..quality.functions import compare_models, measure_perplexity

_STEP_BYTES = 1 << 20
_FLOATS = {"F32", "BF16", "F16"}


@dataclass(frozen=True)
class MeasuredModel:
    """One model. sha256: by the name of each of its files. checks: of `verify`. portable: every llama.cpp program runs its positions.

    curve: perplexity by length. kld, top1: against the base; None without one.
    """

    gguf: GGUFFile
    sha256: dict[str, str]
    scaling: RopeScaling
    portable: bool
    checks: Sequence[Check]
    curve: Sequence[tuple[int, float]] = ()
    kld: float | None = None
    top1: float | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(path.stat().st_size for path in self.gguf.shards)

    @property
    def proved(self) -> str:
        """The checks that passed."""
        return ", ".join(check.name for check in self.checks if check.status == "pass")


@dataclass(frozen=True)
class Measurement:
    """How to measure. against: the checkpoint. base: the GGUF from which KL is measured, None to measure none. quality: whether to measure
    perplexity and KL at all.
    """

    against: str | None = None
    base: str | None = None
    text: str | None = None
    ctx: int | None = None
    max_tokens: int | None = None
    threads: int | None = None
    quality: bool = True


@dataclass
class OpenFiles:
    """The files that are published, held open from their first byte's hash to their upload."""

    files: list[SourceFile] = field(default_factory=list)

    def check_unchanged(self) -> None:
        """Raise YarnEdgeError if one has changed since it was measured."""
        for file in self.files:
            file.check_unchanged()

    def hashed(self, path: Path) -> str:
        """The SHA-256 of a file, which stays open."""
        file = SourceFile(path)
        self.files.append(file)
        digest = hashlib.sha256()
        for offset in range(0, file.size, _STEP_BYTES):
            digest.update(file.read(min(_STEP_BYTES, file.size - offset), offset))
        return digest.hexdigest()


def models_in(folder: Path) -> list[GGUFFile]:
    """The GGUFs of a folder; of a split one the first file stands for all. Raises YarnEdgeError if there are none."""
    if not folder.is_dir():
        raise YarnEdgeError(f"{folder}: no such folder")
    models: dict[Path, GGUFFile] = {}
    seen: set[Path] = set()
    for path in sorted(folder.glob("*.gguf")):
        if path not in seen:
            models[path] = read_gguf(path)
            check_loadable(models[path])
            seen |= set(models[path].shards)
    if not models:
        raise YarnEdgeError(f"{folder}: holds no GGUF to publish")
    return list(models.values())


def measure_models(models: Sequence[GGUFFile], how: Measurement, held: OpenFiles) -> list[MeasuredModel]:
    """Hash, verify and measure each model. Raises YarnEdgeError if one does not pass: it must not be published."""
    if how.quality and how.base is None:
        note("note: no file here has 16 bits or more, and there is no --base: the card states no KL divergence")
    with bar("Publishing", 3 * len(models)) as advance:
        return [_measured(model, how, held, lambda what: advance(1, what)) for model in models]


def _measured(model: GGUFFile, how: Measurement, held: OpenFiles, done: Any) -> MeasuredModel:
    sha256 = {path.name: held.hashed(path) for path in model.shards}
    done(f"{model.path.name}: hashed")
    checks = verify(model.path, how.against, threads=how.threads)
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        raise YarnEdgeError(f"{model.path}: {failed[0].name} fails: {failed[0].detail}: it is not published")
    done(f"{model.path.name}: verified")
    positions = FilePositions(model)
    curve: list[tuple[int, float]] = []
    kld: dict[str, Any] = {}
    if how.quality:
        text: dict[str, Any] = {"text": how.text, "ctx": how.ctx, "max_tokens": how.max_tokens, "threads": how.threads}
        curve = [(row["ctx"], row["ppl"]) for row in measure_perplexity(model.path, **text)["curve"]]
        if how.base is not None and Path(how.base).resolve() != model.path.resolve():
            (kld,) = compare_models(how.base, [model.path], **text)["models"]
    done(f"{model.path.name}: measured")
    return MeasuredModel(
        model,
        sha256,
        positions.wanted,
        not positions.error().any_difference,
        checks,
        curve,
        kld.get("kld_mean"),
        kld.get("top1"),
    )


def widest(models: Sequence[GGUFFile]) -> GGUFFile | None:
    """The model whose weights are floats, of several the one with the most bits; None if all are quantized."""
    floats = [model for model in models if {tensor.type_name for tensor in model.tensors.values()} <= _FLOATS]
    return max(floats, key=lambda model: sum(tensor.n_bytes for tensor in model.tensors.values()), default=None)

"""Plans, held against the library: random scalings are planned, written, run, and their rotations compared with float64.

Nothing of the plan but the scaling that was asked for enters the reference: queries and keys are read before and after the
rope of the live graph. Each architecture has a process of its own, for a failed assertion in llama.cpp ends it.
"""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import FROM_MODEL
from yarn_edge.llama_rules.honoured import HONOURED
from yarn_edge.llama_rules.layers import layer_kinds
from yarn_edge.llama_rules.planner import RopePlan, plan_rope
from yarn_edge.positions import error_budget as phase
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.runtime import model as runtime
from yarn_edge.verify import rope_nodes as tap

from support import tiny_gguf
from support.tiny_gguf import HEAD_DIM
from support.tiny_runs import Ended, in_children

ARCHITECTURES = [name for name in HONOURED if name in tiny_gguf.ARCHITECTURES]
TOKENS = list(range(5, 13))
BASES = [10000, 10000.0, 1e6, 11158840.0]
FACTORS = [1, 2, 4.0, 3.3, 8, 40.0, 64]


def yarn(r: random.Random, **fields: Any) -> dict[str, Any]:
    """A YaRN with the usual A and `fields`."""
    fields = {"factor": r.choice(FACTORS), "finetuned": r.choice([None, True, False]), **fields}
    return {"method": "yarn", "attention_factor": yarn_attention_factor(fields["factor"]), **fields}


def llama3(r: random.Random) -> dict[str, Any]:
    base, origin = r.choice(BASES), 8192
    return {
        "method": "llama3",
        "rope_theta": base,
        "original_context": origin,
        "table": (r.choice([8.0, 32.0]), 1.0, 4.0),
    }


# name -> fields of a RopeScaling, what is left open being random; "table" is Llama 3's (factor, low, high)
KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "plain": lambda _r: {"method": "none"},
    "yarn": yarn,
    "betas": lambda r: yarn(
        r, **dict(zip(("beta_fast", "beta_slow"), r.choice([(128, 2), (8.0, 2.0), (1.0, 1.0)]), strict=True))
    ),
    "ext_factor": lambda r: yarn(r, ext_factor=r.choice([0.5, 0.9, 0, 0.0])),
    "A": lambda r: yarn(r, attention_factor=r.choice([1, 1.0, 0.8, 1.35])),
    "truncate false": lambda r: yarn(r, factor=r.choice([4, 32.0]), truncate=False),
    "turns": lambda r: yarn(r, factor=4.0, ramp="turns"),
    "linear": lambda r: {
        "method": "linear",
        "factor": r.choice(FACTORS),
        "attention_factor": r.choice([1.0, 0.9, 1.2]),
    },
    "ntk": lambda r: {"method": "ntk", "factor": r.choice(FACTORS), "attention_factor": r.choice([1.0, 1.1])},
    "by parts": lambda r: {"method": "ntk-by-parts", "factor": r.choice(FACTORS)},
    "llama3": llama3,
    "theta above 2^24": lambda r: yarn(r, rope_theta=r.choice([16777217, 33554433])),
    "integer factor": lambda r: yarn(r, factor=r.choice([2, 16]), attention_factor=1),
}


def random_scaling(architecture: str, kind: str) -> RopeScaling:
    r = random.Random(f"{architecture} {kind}")
    dim = tiny_gguf.model_keys(architecture).get("rope.dimension_count", HEAD_DIM)
    if HONOURED[architecture].partial_rotation and dim == HEAD_DIM:
        dim = r.choice([HEAD_DIM, HEAD_DIM // 2])
    fields = {"rope_theta": r.choice(BASES), "original_context": r.choice([256, 1000, 4096, 8192])} | KINDS[kind](r)
    if table := fields.pop("table", None):
        factors = rope.llama3_factors(dim, fields["rope_theta"], fields["original_context"], *table)
        fields["frequency_factors"] = tuple(map(float, factors))
    return RopeScaling(dim=dim, **fields)


def may_be_refused(architecture: str, kind: str) -> bool:
    """Whether no file of this architecture can say it; to refuse anything else would be a loss."""
    row, scaling = HONOURED[architecture], random_scaling(architecture, kind)
    # deepseek2 and mistral4 put A and ln(factor) into the softmax too, and a key to undo it works with YaRN above 1 alone.
    no_key = scaling.method not in ("yarn", "ntk-by-parts") or not scaling.ext_factor or scaling.factor == 1
    divided = scaling.factor > 1 and scaling.method != "ntk"
    in_softmax = row.log_multiplier is not None and row.log_multiplier.in_softmax
    open_softmax = no_key and (divided or scaling.attention_factor != 1)
    return open_softmax and in_softmax


@dataclass(frozen=True)
class Outcome:
    """`of_budget`: the worst rotation by the error it may have; None with `why` where there was none to see."""

    form: str
    of_budget: float | None = None
    why: str = ""


def rotation(path: Path, scaling: RopeScaling, arguments: Any) -> float | None:
    """The worst rotation of the file's layers with full attention, at the start and at the end of the context."""
    row = HONOURED[(file := read_gguf(path)).architecture]
    # Where only layers with a window rotate, they are rotated by the scaling of the model.
    kinds = {"full", "sliding"} if row.unrotated else {"full"}
    with runtime.Model(path) as model:
        of_layers = layer_kinds(file, model.n_layer)
        starts = [0, max(1, scaling.extended_context - len(TOKENS))]
        nodes = tap.record_ropes(model, TOKENS, starts, arguments, threads=1)
    errors = [
        phase.rotation_error(n.x, n.y, n.positions, scaling, row.pairing).of_budget
        for n in nodes
        if of_layers[n.layer] in kinds
    ]
    return max(errors, default=None)


def write(plain: Path, plan: RopePlan, scaling: RopeScaling) -> Path:
    """The plan written into a copy of `plain`."""
    output = plain.with_suffix(".planned.gguf")
    architecture = plain.stem
    keys = {**plan.keys, f"{architecture}.context_length": scaling.extended_context}
    tensors = plan.tensors
    edit_gguf_files(read_gguf(plain), [output], set_keys=keys, set_tensors=tensors, flush=False)
    return output


def attempt(plain: Path, kind: str) -> Outcome:
    scaling = random_scaling(plain.stem, kind)
    try:
        plan = plan_rope(scaling, plain.stem)
    except YarnEdgeError as error:
        return Outcome("refused", why=str(error))
    try:
        return Outcome(plan.form, rotation(write(plain, plan, scaling), scaling, plan.arguments))
    except YarnEdgeError as error:
        return Outcome(plan.form, why=f"{scaling}: {error}")


def child(connection: Connection, architecture: str, folder: Path, kinds: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    plain = tiny_gguf.write(folder / f"{architecture}.gguf", architecture)
    for kind in kinds:
        connection.send((kind, attempt(plain, kind)))
    connection.close()


def observe(architecture: str, folder: Path) -> dict[str, Outcome]:
    """Every kind on one architecture."""
    found: dict[str, Outcome] = {}
    for kind, value in in_children(child, architecture, folder, list(KINDS)):
        ended = isinstance(value, Ended)
        found[kind] = Outcome("ended", why=f"the process ended with {value.code}") if ended else value
    return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Outcome]]:
    folder = tmp_path_factory.mktemp("planner")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(lambda name: observe(name, folder), ARCHITECTURES), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_planned_is_what_is_rotated(architecture, observed):
    seen = observed[architecture]
    assert seen.keys() == KINDS.keys()
    for kind, outcome in seen.items():
        if outcome.form == "refused":
            assert may_be_refused(architecture, kind), f"{kind}: {outcome.why}"
        else:
            assert outcome.of_budget is not None, f"{kind}, {outcome}"
            assert outcome.of_budget <= 1, f"{kind}, {outcome}"


def test_every_form_was_seen(observed):
    forms = Counter(outcome.form for seen in observed.values() for outcome in seen.values())
    assert forms.keys() == {"native", "baked", "arguments", "live", "refused"}, forms
    assert forms["refused"] <= sum(may_be_refused(name, kind) for name in ARCHITECTURES for kind in KINDS)
    assert min(n for form, n in forms.items() if form != "refused") > 20, forms


def off(name: str, by: float) -> Callable[[RopePlan], RopePlan]:
    """A plan with one key `by` times what it should be."""

    def spoil(plan: RopePlan) -> RopePlan:
        return replace(plan, keys={k: v * by if k.endswith(name) else v for k, v in plan.keys.items()})

    return spoil


YARN = RopeScaling("yarn", 10000.0, HEAD_DIM, 4096, 4.0, attention_factor=1.3)
BETAS = replace(YARN, beta_fast=8.0, beta_slow=2.0)
SPOILT: dict[str, tuple[str, RopeScaling, Callable[[RopePlan], RopePlan]]] = {
    "base": ("llama", YARN, off("rope.freq_base", 1.0001)),
    "attention factor": ("llama", YARN, off("scaling.attn_factor", 1.0001)),
    "factor": ("qwen2", YARN, off("scaling.factor", 1.001)),
    "original context": ("qwen2", YARN, off("original_context_length", 2)),
    "no table": ("llama", BETAS, lambda plan: replace(plan, factors=None)),
    "another table": ("llama", BETAS, lambda plan: replace(plan, factors=plan.factors * np.float32(1.0001))),
    "no arguments": ("qwen2", BETAS, lambda plan: replace(plan, arguments=FROM_MODEL)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_file_is_seen(name, tmp_path):
    architecture, scaling, spoil = SPOILT[name]
    plain = tiny_gguf.write(tmp_path / f"{architecture}.gguf", architecture)
    plan = plan_rope(scaling, architecture)
    assert rotation(write(plain, plan, scaling), scaling, plan.arguments) <= 1
    plan = spoil(plan)
    assert rotation(write(plain, plan, scaling), scaling, plan.arguments) > 2

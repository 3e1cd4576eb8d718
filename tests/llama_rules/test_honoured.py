"""The table of what llama.cpp honours, held against the running library: every row by the ropes of tiny files' live graphs.

`expected` works out what a row promises; a row with any one fact changed must promise something else than was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.effective import FROM_MODEL, ROPE_SCALING_TYPES, RuntimeArguments
from yarn_edge.llama_rules.honoured import (
    CHECKPOINT_ARCHITECTURES,
    GGUF_ARCHITECTURES,
    HONOURED,
    Honoured,
    LogMultiplier,
    Sliding,
    honoured,
)
from yarn_edge.runtime.rope_kernel import BY_AXES, ROPE_MODES, RopeArguments

from support import tiny_gguf
from support.tiny_gguf import HEAD_DIM
from support.tiny_runs import ARGUMENTS, EVERY_KEY, FILES, TABLES, Observed, Seen, observe


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Observed]]:
    """What an architecture's files showed; all are run, two at a time."""
    folder = tmp_path_factory.mktemp("honoured")
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(observe, name, folder) for name in HONOURED}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def is_sliding(row: Honoured, layer: int, keys: dict[str, Any]) -> bool:
    if row.sliding is None or layer < 0:
        return False
    if pattern := keys.get("attention.sliding_window_pattern"):
        return bool(pattern[layer])
    return layer % row.sliding.period != (0 if row.sliding.dense_first else row.sliding.period - 1)


def is_rotated(row: Honoured, layer: int, keys: dict[str, Any]) -> bool:
    if row.unrotated == "every 4th":
        return layer % 4 != 3
    if row.unrotated == "linear attention":
        return layer % 4 == 3
    return row.unrotated == "" or row.sliding is None or is_sliding(row, layer, keys)


def dimensions(row: Honoured, layer: int, keys: dict[str, Any]) -> int:
    """n_dims of a layer; `keys` with those of the architecture."""
    full = keys.get("rope.dimension_count", HEAD_DIM)
    decides = layer if row.sliding and row.sliding.own_dims else 0
    return int(keys.get("rope.dimension_count_swa", full) if is_sliding(row, decides, keys) else full)


def mscales(row: Honoured, keys: dict[str, Any]) -> tuple[float, float]:
    """mscale and mscale_all_dim as llama.cpp takes them from the file."""
    log = row.log_multiplier
    bottom = keys.get("rope.scaling.yarn_log_multiplier", 0.0) / log.unit if log else 0.0
    return (bottom if log and log.same_mscale and bottom else 1.0), bottom


def expected(
    row: Honoured, keys: dict[str, Any], arguments: RuntimeArguments, sliding: bool, rotated: int
) -> RopeArguments:
    """The arguments of ggml_rope_ext that the row promises, by the rules of src/llama-context.cpp."""

    def chosen(argument: float, name: str, read: bool, default: float) -> float:
        return argument if argument >= 0 else keys.get(f"rope.scaling.yarn_{name}", default) if read else default

    kind = ROPE_SCALING_TYPES.get(keys.get("rope.scaling.type", "linear"), 1)
    kind = arguments.rope_scaling_type if arguments.rope_scaling_type >= 0 else kind
    file_base = keys.get("rope.freq_base", 10000.0)
    if row.ntk_alpha and "rope.scaling.alpha" in keys:
        file_base *= keys["rope.scaling.alpha"] ** (HEAD_DIM / (HEAD_DIM - 2))
    file_scale = 1 / keys.get("rope.scaling.factor", 1.0)
    base, scale = arguments.rope_freq_base or file_base, arguments.rope_freq_scale or file_scale
    scale = 1.0 if kind == ROPE_SCALING_TYPES["none"] else scale
    ext = chosen(arguments.yarn_ext_factor, "ext_factor", row.ext_factor, -1.0)
    if ext < 0:
        ext = float(kind == ROPE_SCALING_TYPES["yarn"])
    if ext:
        top, bottom = (1 + 0.1 * m * math.log(1 / scale) for m in mscales(row, keys))
        attn = top / bottom / (1 + 0.1 * math.log(1 / scale))
    else:
        attn = chosen(arguments.yarn_attn_factor, "attn_factor", row.yarn_attn_factor, 1.0)
    attn *= keys.get("rope.scaling.attn_factor", 1.0)
    if sliding and row.sliding:
        own = keys.get("rope.freq_base_swa")
        base = {"model": base, "file": own or file_base, "10000": own or 10000.0}[row.sliding.base]
        scale = {"model": scale, "file": file_scale, "one": 1.0}[row.sliding.scale]
        ext, attn = (ext, attn) if row.sliding.yarn else (0.0, 1.0)
    return RopeArguments(
        n_dims=rotated,
        mode=BY_AXES if row.by_axes and row.pairing == "half" else ROPE_MODES[row.pairing],
        n_ctx_orig=arguments.yarn_orig_ctx or keys.get("rope.scaling.original_context_length", 1024),
        freq_base=base,
        freq_scale=scale,
        ext_factor=ext,
        attn_factor=attn,
        beta_fast=chosen(arguments.yarn_beta_fast, "beta_fast", row.betas, row.beta_fast),
        beta_slow=chosen(arguments.yarn_beta_slow, "beta_slow", row.betas, 1.0),
        sections=(3, 3, 2, 0) if row.by_axes else (),
    )


def same(a: RopeArguments, b: RopeArguments) -> bool:
    """Whether they rotate alike: without ext_factor the ramp's arguments are not used."""
    unused = set() if a.ext_factor or b.ext_factor else {"beta_fast", "beta_slow", "n_ctx_orig"}
    alike = all(math.isclose(x, b.numbers[n], rel_tol=1e-5) for n, x in a.numbers.items() if n not in unused)
    return alike and a.sections == b.sections


def softmax_gain(row: Honoured, keys: dict[str, Any], full: RopeArguments) -> float:
    """By what the softmax scale is multiplied, given the ropes of full attention."""
    if row.log_multiplier is None or not row.log_multiplier.in_softmax:
        return 1.0
    log_factor = math.log(1 / full.freq_scale)
    return (full.attn_factor * (1 + 0.1 * log_factor) * (1 + 0.1 * mscales(row, keys)[1] * log_factor)) ** 2


def disagreements(architecture: str, row: Honoured, seen: Observed) -> list[str]:
    """Where the row promises something else than what was seen."""
    shape = tiny_gguf.model_keys(architecture)
    layers = range(shape["block_count"])
    told = []
    for (file, how), result in seen.items():
        keys, tables = FILES[file]
        arguments = ARGUMENTS.get(how, FROM_MODEL)
        works = {
            "not finetuned": not row.finetuned_switch,
            "long factors, yarn": row.long_factors == "always",
            "long factors, long context": row.long_factors != "",
            "long factors, short context": row.long_factors != "",
            "factors": row.frequency_factors,
            "half a head": row.partial_rotation,
            "sliding dims": row.partial_rotation or dimensions(row, 0, shape | keys) == dimensions(row, 0, shape),
        }.get(file, True)
        if tables and not works:  # refused, or loaded and not used
            if isinstance(result, Seen) and any(n.factor for n in result.nodes):
                told.append(f"{file}: they are used")
            continue
        if isinstance(result, str) or not works:
            told += [] if isinstance(result, str) != works else [f"{file} {how}: {result}"]
            continue
        if {n.layer for n in result.nodes} - {-1} != {i for i in layers if is_rotated(row, i, keys)}:
            told.append(f"{file} {how}: the layers rotated are {sorted({n.layer for n in result.nodes})}")
        table = TABLES.get("factors_short" if "short" in file or file.endswith("yarn") else "factors_long")
        for node in result.nodes:
            wanted = expected(
                row, keys, arguments, is_sliding(row, node.layer, keys), dimensions(row, node.layer, shape | keys)
            )
            if not same(node.arguments, wanted):
                told.append(f"{file} {how}: layer {node.layer} {node.arguments}, not {wanted}")
            if node.factor != (None if not tables else TABLES["freqs"] if file == "factors" else table):
                told.append(f"{file} {how}: layer {node.layer} has factors {node.factor}")
    return told + softmax_disagreements(row, seen)


def softmax_disagreements(row: Honoured, seen: Observed) -> list[str]:
    """The softmax scale against that of the run without scaling: how it differs is the row's to say."""
    runs = {how: result for (file, how), result in seen.items() if file == "every key" and isinstance(result, Seen)}
    if runs.keys() != {"", *ARGUMENTS}:
        return [f"every key: seen are only {sorted(runs)}"]
    gains = {}
    for how, result in runs.items():
        full = expected(row, EVERY_KEY, ARGUMENTS.get(how, FROM_MODEL), False, HEAD_DIM)
        (scale,) = result.softmax
        gains[how] = (scale, softmax_gain(row, EVERY_KEY, full))
    unit = gains["none"][0] / gains["none"][1]
    return [
        f"every key {how}: softmax scale {scale}, not {gain * unit}"
        for how, (scale, gain) in gains.items()
        if not math.isclose(scale, gain * unit, rel_tol=1e-5)
    ]


@pytest.mark.parametrize("architecture", HONOURED)
def test_the_running_library_honours_what_the_row_says(architecture: str, observed: Callable[[str], Observed]) -> None:
    assert disagreements(architecture, HONOURED[architecture], observed(architecture)) == []


def alternatives(row: Honoured) -> dict[str, Honoured]:
    """Rows that differ from `row` in one fact each."""
    # whole_tables is about files that the planner writes: test_planner_live runs them.
    plain = [f for f in asdict(row) if isinstance(getattr(row, f), bool) and f != "whole_tables"]
    found = {f: replace(row, **{f: not getattr(row, f)}) for f in plain}
    found["pairing"] = replace(row, pairing="half" if row.pairing == "interleaved" else "interleaved")
    found["beta_fast"] = replace(row, beta_fast=row.beta_fast + 1)
    for value in {"", "longrope", "always"} - {row.long_factors}:
        found[f"long_factors {value!r}"] = replace(row, long_factors=value)  # type: ignore[arg-type]
    log = row.log_multiplier
    logs = [LogMultiplier(1.0), LogMultiplier(0.1, same_mscale=True), LogMultiplier(0.1, in_softmax=True)]
    if log:
        logs = [replace(log, unit=log.unit * 2), replace(log, in_softmax=not log.in_softmax), None]  # type: ignore[list-item]
        logs.append(replace(log, same_mscale=not log.same_mscale))
    found |= {f"log_multiplier {value}": replace(row, log_multiplier=value) for value in logs}
    slides = [Sliding(2, base="file"), Sliding(2, scale="one"), Sliding(2, yarn=False)]
    if row.sliding:
        slide = row.sliding
        slides = [replace(slide, period=slide.period + 1), replace(slide, dense_first=not slide.dense_first)]
        slides += [replace(slide, base=b) for b in ("model", "file", "10000") if b != slide.base]  # type: ignore[arg-type]
        slides += [replace(slide, scale=s) for s in ("model", "file", "one") if s != slide.scale]  # type: ignore[arg-type]
        slides += [replace(slide, yarn=not slide.yarn)]
        if not row.unrotated:  # else no layer with full attention shows its dimensions
            own = replace(slide, own_dims=not slide.own_dims)
            found["own_dims"] = replace(row, sliding=own, partial_rotation=True)
        found["no sliding"] = replace(row, sliding=None, unrotated="" if "full" in row.unrotated else row.unrotated)
    found |= {str(value): replace(row, sliding=value) for value in slides}
    for value in {"", "every 4th", "full attention"} - {row.unrotated}:
        if row.sliding or value != "full attention":
            found[f"unrotated {value!r}"] = replace(row, unrotated=value)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("architecture", HONOURED)
def test_a_row_with_one_fact_changed_is_noticed(architecture: str, observed: Callable[[str], Observed]) -> None:
    seen = observed(architecture)
    passed = [
        n for n, row in alternatives(HONOURED[architecture]).items() if not disagreements(architecture, row, seen)
    ]
    assert passed == []


def test_every_row_has_a_file_and_convert_stays_inside_the_table() -> None:
    assert list(HONOURED) == list(tiny_gguf.ARCHITECTURES)
    assert GGUF_ARCHITECTURES.items() <= CHECKPOINT_ARCHITECTURES.items()
    assert set(CHECKPOINT_ARCHITECTURES.values()) <= set(HONOURED)


# Checkpoints with code of their own, whose model_type transformers does not have.
REMOTE_CODE = {
    "bailing_moe_v2",
    "chatglm",
    "deepseek",
    "exaone",
    "internlm2",
    "internlm3",
    "kimi_k2",
    "minicpm",
    "nemotron-nas",
    "orion",
}


def test_the_model_types_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    assert set(CHECKPOINT_ARCHITECTURES) - set(CONFIG_MAPPING.keys()) <= REMOTE_CODE


def test_an_unknown_architecture_is_an_error_that_stays_short() -> None:
    with pytest.raises(
        YarnEdgeError, match="for architecture 'rwkv7' is not known yet; known: llama, mistral3, "
    ) as error:
        honoured("rwkv7")
    assert len(str(error.value)) < 300

"""Translates the harness's arguments: --model_args becomes a variant and numbers, gen_kwargs becomes a `Sampling`.

Unknown names are errors: with a misspelled kv_typ something else would be evaluated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS, MAX_THREADS, parse_length
from yarn_edge.llama_rules.number_rules import MAX_CONTEXT
from yarn_edge.runtime.context_settings import Attention

from ..scoring.variants import Variant, parse_variant

# argument -> key of a variant
_VARIANT = {"kv_type": "kv", "kv_k": "kv-k", "kv_v": "kv-v", "backend": "backend"} | {
    flag.removeprefix("--").replace("-", "_"): flag.removeprefix("--") for flag in FLAGS.values()
}
_OTHERS = ("path", "ctx", "batch", "threads", "flash_attention", "add_bos_token", "prefix_token_id")
_FLASH: dict[Any, Attention] = {None: "ggml", "auto": "ggml", "on": "flash", "off": "plain"}


@dataclass(frozen=True)
class Arguments:
    """--model_args, checked. None: the default of the model or the machine."""

    variant: Variant
    ctx: int | None
    batch: int
    threads: int | None
    flash_attention: Attention
    add_bos_token: bool | None
    prefix_token_id: int | None


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check --model_args (`yarn-factor` is `yarn_factor`, as after a variant's @). Raises YarnEdgeError."""
    words = {name.replace("-", "_"): value for name, value in given.items() if value is not None}
    for name in words:
        if name not in _VARIANT and name not in _OTHERS:
            raise YarnEdgeError(f"--model_args: {name!r} is unknown; known: {', '.join((*_OTHERS, *_VARIANT))}")
    if "path" not in words:
        raise YarnEdgeError("--model_args: path=MODEL.gguf is missing")
    path = str(words["path"])
    items = [f"{_VARIANT[name]}={value}" for name, value in words.items() if name in _VARIANT]
    if items:
        more = "," if "@" in path and not Path(path).exists() else "@"
        path += more + ",".join(items)
    bos = words.get("add_bos_token")
    if bos not in (None, True, False):
        raise YarnEdgeError(f"--model_args: add_bos_token is {bos!r}, must be True or False")
    flash = words.get("flash_attention")
    if flash not in _FLASH:
        raise YarnEdgeError(f"--model_args: flash_attention is {flash!r}, must be auto, on or off")
    return Arguments(
        variant=parse_variant(path),
        ctx=_whole(words, "ctx", 2, MAX_CONTEXT, parse_length),
        batch=_whole(words, "batch", 1, MAX_CONTEXT, parse_length) or 512,
        threads=_whole(words, "threads", 1, MAX_THREADS),
        flash_attention=_FLASH[flash],
        add_bos_token=None if bos is None else bool(bos),
        prefix_token_id=_whole(words, "prefix_token_id", 0, MAX_CONTEXT),
    )


def _whole(words: Mapping[str, Any], name: str, low: int, high: int, parse: Callable[[str], int] = int) -> int | None:
    value = words.get(name)
    if value is None:
        return None
    try:
        number = parse(str(value))
    except ValueError:
        raise YarnEdgeError(f"--model_args: {name} is {value!r}, not a whole number") from None
    if not low <= number <= high:
        raise YarnEdgeError(f"--model_args: {name} is {number}, must be from {low} to {high}")
    return number


@dataclass(frozen=True)
class GenerationRequest:
    """How one answer is generated: sampling, its maximum length, and the texts that end it."""

    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]


def parse_generation(gen_kwargs: Mapping[str, Any], max_tokens: int) -> GenerationRequest:
    """Read a task's generation_kwargs by the harness's own rules (greedy without do_sample and temperature).

    max_tokens: used if the task sets none. With do_sample: temperature (default 1), top_p and top_k. The seed comes from Python's
    `random`, which the harness seeds (--seed). Raises YarnEdgeError for any other name.
    """
    words = dict(normalize_gen_kwargs(dict(gen_kwargs), max_tokens))
    until, sampled = words.pop("until"), words.pop("do_sample")
    if until is None or until == [None]:
        until = []
    if not all(isinstance(text, str) for text in until):
        raise YarnEdgeError(f"generation_kwargs: until is {until!r}, must be strings")
    temperature = float(words.pop("temperature", 1.0))
    top_p, top_k = float(words.pop("top_p", None) or 1.0), int(words.pop("top_k", None) or 0)
    if words.get("num_beams") == 1:
        del words["num_beams"]
    length = int(words.pop("max_gen_toks"))
    if words:
        raise YarnEdgeError(
            f"generation_kwargs: {', '.join(words)}: not supported; supported: until, max_gen_toks, do_sample, temperature, "
            "top_p, top_k"
        )
    if length < 1:
        raise YarnEdgeError(f"generation_kwargs: max_gen_toks is {length}, must be above 0")
    stops = tuple(text for text in until if text)
    if not sampled:
        return GenerationRequest(Sampling(temperature=0), length, stops)
    seed = random.randrange(2**31)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0, seed=seed)
    return GenerationRequest(sampling, length, stops)

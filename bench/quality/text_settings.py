"""The text to measure on, and how to run a model over it: settings, flags and windows that the measuring commands share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import (
    BACKENDS,
    add_attention_flag,
    add_kv_flags,
    add_lora_flag,
    add_threads_flag,
    add_trust_flag,
    count,
    length_from,
)
from yarn_edge.llama_rules.number_rules import MAX_CONTEXT
from yarn_edge.memory.splitting import SplitNeeds, split_place
from yarn_edge.progress import note
from yarn_edge.runtime.kv_cache import with_kv_parts
from yarn_edge.runtime.lora import LoraFile
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import add_split_flags, split_request

from ..scoring.documents import documents_of, tokenized
from ..scoring.variants import Variant, on_devices, parse_variant, split_variant
from ..scoring.windows import PROTOCOLS, STRIDE, Cut, Window, tokens_needed, windows_of

# What ends a run early: whatever was measured up to there is still reported.
STOPPED = (KeyboardInterrupt, Terminated, YarnEdgeError, MemoryError)


@dataclass(frozen=True)
class TextSettings:
    """What to measure on. ctx: None for the model's own context; the other names are those of the flags."""

    text: str | None = None
    protocol: str = "curve"
    ctx: int | None = None
    stride: int = STRIDE
    chunks: int | None = None
    documents: int | None = None
    max_tokens: int | None = None
    field: str = "text"
    seed: int = 0


def plan_windows(model: Model, settings: TextSettings) -> tuple[list[Window], int]:
    """(windows, ctx): the documents, tokenized and cut into windows. Notes what a user might not expect. Raises YarnEdgeError."""
    ctx = settings.ctx or model.n_ctx_train
    cut = Cut(ctx, settings.stride, settings.chunks, model.bos if model.add_bos else None)
    if settings.protocol == "sliding" and settings.stride >= ctx:
        raise YarnEdgeError(f"--stride {settings.stride} must be below the context, {ctx} tokens")
    documents = documents_of(settings.text, field=settings.field, wanted=settings.documents, seed=settings.seed)
    tokens = tokenized(model, documents, tokens_needed(settings.protocol, cut), settings.max_tokens)
    windows = windows_of(settings.protocol, tokens, cut)
    longest = max(len(w.tokens) for w in windows)
    if longest < ctx:
        note(
            f"the longest text has {longest} tokens, fewer than the context of {ctx}: nothing is measured beyond token {longest}"
        )
    if longest > model.n_ctx_train:
        note(
            f"{model.path.name} declares a context of {model.n_ctx_train} tokens: it was not made for positions beyond them"
        )
    return windows, ctx


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """--text and how to read it: the same for every command that measures on text."""
    add = parser.add_argument
    add(
        "--text",
        metavar="PATH",
        help="a text file, a folder of text files, or JSON Lines (.jsonl), in UTF-8 (default: the bundled text of 15,000 tokens)",
    )
    add("--field", default="text", metavar="KEY", help="key that holds the text in JSON Lines (default: %(default)s)")
    add("--documents", type=count(1, 10**9), metavar="N", help="measure a random sample of N documents (default: all)")
    add(
        "--seed",
        type=count(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the sample that --documents draws (default: %(default)s)",
    )
    add("--ctx", type=length_from(2, MAX_CONTEXT), metavar="N", help="tokens per window (default: the model's context)")
    add(
        "--chunks",
        type=count(1, 10**9),
        metavar="N",
        help="maximum number of windows: in total for llama.cpp (default: all), "
        "per document for curve (default: 1) and sliding (default: all)",
    )
    add("--max-tokens", type=length_from(2, 10**12), metavar="N", help="maximum number of tokens over all documents")
    add(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="curve",
        help="curve: score every token once; llama.cpp: comparable with llama-perplexity; "
        "sliding and truncated: as in the YaRN paper (default: %(default)s)",
    )
    add(
        "--stride",
        type=length_from(1, MAX_CONTEXT),
        default=STRIDE,
        metavar="S",
        help="tokens by which sliding windows advance (default: %(default)s)",
    )


def add_bucket_flag(parser: argparse.ArgumentParser) -> None:
    """--bucket: the same for every command that reports by position."""
    parser.add_argument(
        "--bucket",
        type=length_from(1, MAX_CONTEXT),
        metavar="N",
        help="tokens per bucket of positions (default: a power of two that makes at most 32 buckets)",
    )


def text_settings(args: argparse.Namespace) -> TextSettings:
    """The settings that the flags of `add_text_flags` give."""
    return TextSettings(
        args.text,
        args.protocol,
        args.ctx,
        args.stride,
        args.chunks,
        args.documents,
        args.max_tokens,
        args.field,
        args.seed,
    )


def given_variant(args: argparse.Namespace, model: str, adapted: bool = True) -> Variant:
    """The model, or the variant of one, run as the flags of `add_running_flags` say. Raises YarnEdgeError.

    adapted: whether --lora is for it. A variant that names its own backend is not split.
    """
    loras = [LoraFile.parse(text) for text in args.lora] if adapted else []
    kv_type = with_kv_parts(args.kv_type, args.kv_k, args.kv_v)
    variant = parse_variant(model, kv_type=kv_type, backend=args.backend, loras=loras)
    request = split_request(args)
    own_backend = any(item.startswith("backend=") for item in split_variant(model)[1])
    if not request or own_backend:
        return variant
    if args.backend != "cpu":
        raise YarnEdgeError(
            f"--backend {args.backend} puts all layers on one device: leave it out, or --rpc and --layers-on"
        )
    needs = SplitNeeds(getattr(args, "ctx", None), variant.kv_type, None, args.threads, args.attention)
    return on_devices(variant, split_place(request, variant.path, needs, variant.gguf).split)


def add_running_flags(parser: argparse.ArgumentParser, adapted: str = "the model") -> None:
    """--kv-type and its parts, --backend, --attention, --lora, --threads, --trust: the same for every measuring command.

    adapted: what --lora is for.
    """
    add = parser.add_argument
    add_kv_flags(parser, "the KV cache", "f16")
    add("--backend", choices=tuple(BACKENDS), default="cpu", help="where to run the model (default: %(default)s)")
    add_split_flags(parser)
    add_attention_flag(parser)
    add_lora_flag(parser, adapted)
    add_threads_flag(parser)
    add_trust_flag(parser)

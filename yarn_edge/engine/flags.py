"""The flags that `chat` and `serve` share, and the engine settings that they set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.cache_folder import user_cache_folder
from yarn_edge.flags import (
    add_attention_flag,
    add_backend_flag,
    add_lora_flag,
    add_memory_flag,
    add_trust_flag,
    memory_size,
    number_or_auto,
)
from yarn_edge.split_flags import add_split_flags

MAX_PARALLEL = 64

if TYPE_CHECKING:
    from yarn_edge.engine.opened import EngineSettings


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `chat` and `serve` share: device, memory, the cache on disk, drafts, attention, scaling factor."""
    add_backend_flag(parser)
    add_split_flags(parser)
    add_memory_flag(parser)
    add_trust_flag(parser)
    parser.add_argument(
        "--cache", type=Path, nargs="?", const=Path(), metavar="DIR",
        help="keep evaluated documents on disk for next time (without DIR: in the user's cache folder)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-size",
        type=memory_size,
        default=8 << 30,
        metavar="SIZE",
        help="maximum size of the cache folder (default: 8GiB)",
    )
    parser.add_argument(
        "--lookup", choices=("auto", "on", "off"), default="auto",
        help="draft tokens by copying from the text so far; the model checks each draft. auto: if that is faster, and not at "
        "temperature 0, where batched evaluation could change the answer; on: always (default: auto)",
    )  # fmt: skip
    add_attention_flag(parser)
    add_lora_flag(parser)
    parser.add_argument(
        "--yarn-factor", type=number_or_auto, metavar="N|auto",
        help="YaRN factor to use instead of the file's; auto: the smallest factor that holds the context",
    )  # fmt: skip


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The settings from the flags of `add_engine_flags`."""
    from yarn_edge.engine.opened import EngineSettings
    from yarn_edge.runtime.lora import LoraFile

    loras = tuple(map(LoraFile.parse, args.lora))
    cache = args.cache if args.cache is None or args.cache.parts else user_cache_folder()
    return EngineSettings(cache, args.cache_size, args.lookup, args.yarn_factor, loras)

"""The flags that `chat` and `serve` share, and the engine settings that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.flags import add_backend_flag, add_memory_flag, memory_size, number_or_auto

if TYPE_CHECKING:
    from yarn_edge.engine.opened import EngineSettings


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """What `chat` and `serve` share: where it runs, what is kept on the disk, drafts, another factor."""
    add_backend_flag(parser)
    add_memory_flag(parser)
    parser.add_argument(
        "--cache", type=Path, nargs="?", const=Path(), metavar="DIR",
        help="keep what was read of documents on the disk, for the next time (without DIR: in the user's cache folder)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-size", type=memory_size, default=8 << 30, metavar="SIZE", help="of DIR at most (default: 8GiB)"
    )
    parser.add_argument(
        "--lookup", choices=("auto", "on", "off"), default="auto",
        help="draft what was said before in the text; the model checks it (default: auto, where it is faster)",
    )  # fmt: skip
    parser.add_argument(
        "--flash-attention", choices=("auto", "on", "off"), default="auto",
        help="(default: auto: off on a CPU with a cache in 16 bits, where it is slow)",
    )  # fmt: skip
    parser.add_argument(
        "--yarn-factor", type=number_or_auto, metavar="N|auto",
        help="another factor than the file's; auto: the smallest that holds the context (default: the file's)",
    )  # fmt: skip


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The flags of `add_engine_flags`."""
    from yarn_edge.engine.opened import EngineSettings, user_cache_folder

    cache = args.cache if args.cache is None or args.cache.parts else user_cache_folder()
    return EngineSettings(cache, args.cache_size, args.lookup, args.yarn_factor)

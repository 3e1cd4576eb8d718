"""`yarn-edge bench`: tokens per second over backend, depth, cache type, threads and batch; `bench compare` holds two runs together.

Each configuration is measured in a process of its own (`speed_child`), so that one that crashes, hangs or runs out of memory is a
row with its reason, and the others go on. A number stands only where weights and cache really were on the backend asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import BACKENDS, MAX_THREADS, count, length
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.progress import bar, note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.environment import environment, machine_state
from yarn_edge.runtime.devices import devices_of
from yarn_edge.runtime.kv_cache import KV_TYPES
from yarn_edge.runtime.llama_api import llama, physical_threads
from yarn_edge.writer import check_output

from ..scoring.variants import Variant, parse_variant, split_variant
from .rows import FLASH, Configuration, how_to_build, product_of
from .session import SpeedSession
from .tables import report_of, write_csv

MAX_TOKENS = 2**31 - 1
TIMEOUT_S = 3600


def is_built(backend: str) -> bool:
    """Whether llama.cpp has this backend's library, with or without a device for it."""
    from llama_cpp import _ggml

    libraries = Path(str(_ggml.libggml_base_path))
    return bool(devices_of(backend)) or any(libraries.glob(f"*ggml-{backend}*"))


def why_absent(backend: str) -> tuple[str, str]:
    """(status, remedy) of a backend without a device."""
    if is_built(backend):
        return "no device", f"llama.cpp has its library and finds no {backend} device: is the driver installed?"
    return "not built", how_to_build(backend, str(llama().__version__))


def chosen_backends(asked: Sequence[str] | None) -> list[str]:
    """--backend; "all" is every one that this build knows, the default every one with a device here."""
    if asked is None:
        return [name for name in BACKENDS if devices_of(name)]
    if "all" in asked:
        return [name for name in BACKENDS if name in asked or is_built(name)]
    return list(asked)


def plan(args: argparse.Namespace, session: SpeedSession) -> list[Configuration]:
    """Every configuration to measure; rows for backends that are not there. Raises YarnEdgeError for what cannot be asked."""
    found: list[Configuration] = []
    for model, (variant, file) in session.files.items():
        fixed = {item.partition("=")[0] for item in split_variant(model)[1]}
        backends = [variant.backend] if "backend" in fixed else chosen_backends(args.backend)
        for name in backends:
            if not devices_of(name):
                session.absent(model, name, *why_absent(name))
        found += product_of(
            model,
            backends=[name for name in backends if devices_of(name)],
            kv_types=[variant.kv_type] if "kv" in fixed else args.kv_type,
            flash=args.flash_attention,
            batches=args.batch,
            ubatches=args.ubatch,
            threads=args.threads or [physical_threads()],
            depths=args.depth,
            n_prompt=args.prompt_tokens,
            n_gen=args.gen_tokens,
            samples=args.repeat,
            n_ctx=args.ctx,
        )
        _check_lengths(args, file)
    return found


def _check_lengths(args: argparse.Namespace, file: GGUFFile) -> None:
    deepest = max(args.depth)
    needed = deepest + max(args.prompt_tokens, args.gen_tokens)
    if needed == 0:
        raise YarnEdgeError("nothing is asked for: --prompt-tokens, --gen-tokens and --depth are all 0")
    if args.ctx is not None and needed > args.ctx:
        raise YarnEdgeError(
            f"--ctx {args.ctx} does not hold {deepest} tokens of --depth and {needed - deepest} of a test: it needs {needed}"
        )
    if needed > MAX_TOKENS:
        raise YarnEdgeError(f"{needed} tokens: llama.cpp takes at most {MAX_TOKENS}")
    declared = file.required_int("context_length")
    if needed > declared:
        note(
            f"{file.path}: its context is {declared} tokens: what lies beyond is measured, and means nothing to the model"
        )


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas, each once, in their order."""

    def parse_all(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(item) for item in text.split(",")))

    return parse_all


def one_of(*names: str) -> Callable[[str], str]:
    """An argparse type: one of some words."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; known: {', '.join(names)}")
        return text

    return parse


def depth(text: str) -> int:
    """An argparse type: 0, or a number of tokens such as 4k."""
    return 0 if text == "0" else length(text)


def add_size_flags(parser: argparse.ArgumentParser, n_prompt: int, n_gen: int) -> None:
    """-p and -n, the tokens of a timed run, with their defaults; 0 leaves that test out."""
    for short, name, default, what in (
        ("-p", "--prompt-tokens", n_prompt, "read"),
        ("-n", "--gen-tokens", n_gen, "generate"),
    ):
        parser.add_argument(
            short, name, type=count(0, MAX_TOKENS), default=default, metavar="N", help=f"tokens to {what} (%(default)s)"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge bench`."""
    parser.usage = "yarn-edge bench MODEL.gguf… [flags]\n       yarn-edge bench compare A.json B.json [--json] [--report FILE.html]"
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL.gguf",
        help="also MODEL.gguf@kv=q8_0; `compare A.json B.json`: two runs of --json, or of llama-bench -o json",
    )
    add = parser.add_argument
    add(
        "--backend",
        type=listed(one_of(*BACKENDS, "all")),
        metavar="LIST",
        help=f"{', '.join(BACKENDS)}, or all that this build knows (default: those with a device here)",
    )
    add(
        "--depth",
        type=listed(depth),
        default=[0],
        metavar="LIST",
        help="tokens in the cache before: 0,4k,16k (default: 0)",
    )
    add_size_flags(parser, 512, 128)
    add(
        "--kv-type",
        type=listed(one_of(*KV_TYPES)),
        default=["f16"],
        metavar="LIST",
        help="types of the KV cache (default: f16)",
    )
    add(
        "--threads",
        type=listed(count(1, MAX_THREADS)),
        metavar="LIST",
        help="threads (default: as many as physical cores)",
    )
    add(
        "--batch",
        type=listed(count(1, MAX_TOKENS)),
        default=[512],
        metavar="LIST",
        help="tokens of one call (default: 512)",
    )
    add(
        "--ubatch",
        type=listed(count(1, MAX_TOKENS)),
        default=[512],
        metavar="LIST",
        help="tokens of one graph (default: 512)",
    )
    add(
        "--flash-attention",
        type=listed(one_of(*FLASH)),
        default=["auto"],
        metavar="LIST",
        help=f"{', '.join(FLASH)} (default: auto, llama.cpp's choice)",
    )
    add("--repeat", type=count(1, 1000), default=5, metavar="N", help="timed runs of each test (%(default)s)")
    add("--ctx", type=length, metavar="N", help="tokens that the cache holds (default: what the tests need)")
    add(
        "--timeout",
        type=count(1, 10**7),
        default=TIMEOUT_S,
        metavar="S",
        help="seconds that one configuration may take (%(default)s)",
    )
    add("--csv", metavar="FILE", help="all rows, with llama-bench's names for its own columns")
    add_output_flags(parser)
    parser.set_defaults(usual={a.dest: a.default for a in parser._actions})


def run(args: argparse.Namespace) -> int:
    """`yarn-edge bench`. Returns 1 where nothing was measured, or where a backend's rope kernel is wrong."""
    if args.models[0] == "compare" and not Path("compare").exists():
        from .compare import run as compare

        return compare(args)
    check_outputs(args)
    csv = None if args.csv is None else check_output(Path(args.csv), args.force)
    files = {model: _opened(model) for model in dict.fromkeys(args.models)}
    session = SpeedSession(files, args.timeout)
    configurations = plan(args, session)
    state = machine_state()
    if state["busy"]:
        note(f"{state['busy']}: numbers will be lower and spread wider")
    stopped: BaseException | None = None
    try:
        with bar("Measuring", sum(c.cost for c in configurations)) as advance:
            for configuration in configurations:
                session.measure(configuration, advance)
    except (KeyboardInterrupt, Terminated) as signalled:
        stopped = signalled
    session.finish()
    rows, paths = session.rows, [variant.path for variant, _file in files.values()]
    env = environment(paths) | state | {"read_bytes_per_s": session.ceilings.bytes_per_s}
    data = {"env": env, "rows": rows, "complete": stopped is None}
    try:
        if csv is not None:
            write_csv(rows, csv, args.force)
    finally:
        deliver(args, data, report_of(rows, env, stopped is None), paths)
    if stopped is not None:
        raise stopped
    for remedy in sorted({f"{row['backend']}: {row['status']}: {row['remedy']}" for row in rows if row.get("remedy")}):
        note(remedy)
    wrong = [row for row in rows if (row["rope_check"] or {}).get("status") == "fail"]
    for said in sorted({f"{row['backend']}: the rope kernel is wrong: {row['rope_check']['detail']}" for row in wrong}):
        note(said)
    return int(not any(row["status"] == "ok" for row in rows) or bool(wrong))


def _opened(model: str) -> tuple[Variant, GGUFFile]:
    """Read before anything is measured, so that a wrong name costs nothing."""
    variant = parse_variant(model)
    check_loadable(variant.gguf)
    return variant, variant.gguf

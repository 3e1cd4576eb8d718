"""`yarn-edge bench`: tokens per second by backend, depth, cache type, threads and batch; `bench compare` compares two runs.

Each configuration is measured in a process of its own (`child`), so that one that crashes, hangs or runs out of memory becomes a row
with its reason, and the others go on. A row has a number only if weights and cache really were on the requested backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import ATTENTION_CHOICES, BACKENDS, MAX_THREADS, add_trust_flag, count, length, length_from
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.progress import bar, note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.environment import environment, machine_state
from yarn_edge.runtime.devices import devices_of
from yarn_edge.runtime.kv_cache import KV_TYPES, join_kv_types, kv_types, with_kv_parts
from yarn_edge.runtime.llama_api import llama, physical_threads
from yarn_edge.split_flags import add_split_flags, split_request
from yarn_edge.writer import check_output

from ..scoring.variants import KV_KEYS, Variant, parse_variant, split_variant
from .configuration import Configuration, how_to_build, product_of
from .outcome import SpeedOutcome, write_csv
from .results import OK
from .session import SpeedSession

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
        return "no device", f"llama.cpp has the {backend} library but finds no device: is the driver installed?"
    return "not built", how_to_build(backend, str(llama().__version__))


def chosen_backends(asked: Sequence[str] | None) -> list[str]:
    """The backends that --backend names: "all" is every one that this build knows, the default every one with a device here."""
    if asked is None:
        return [name for name in BACKENDS if devices_of(name)]
    if "all" in asked:
        return [name for name in BACKENDS if name in asked or is_built(name)]
    return list(asked)


def chosen_kv_types(args: argparse.Namespace) -> list[str]:
    """Every type of --kv-type with every one of --kv-k and --kv-v, each once."""
    parts = product(args.kv_type, args.kv_k or [None], args.kv_v or [None])
    return list(dict.fromkeys(with_kv_parts(*types) for types in parts))


def plan(args: argparse.Namespace, session: SpeedSession) -> list[Configuration]:
    """Every configuration to measure; backends that are not available become rows. Raises YarnEdgeError for impossible requests."""
    configurations: list[Configuration] = []
    for model, (variant, file) in session.files.items():
        fixed = {item.partition("=")[0] for item in split_variant(model)[1]}
        request = split_request(args)
        split = bool(request) and "backend" not in fixed
        backends = [variant.backend] if "backend" in fixed else ["split"] if split else chosen_backends(args.backend)
        absent = [] if split else [name for name in backends if not devices_of(name)]
        for name in absent:
            session.absent(model, name, *why_absent(name))
        configurations += product_of(
            model,
            backends=[name for name in backends if name not in absent],
            kv_types=[variant.kv_type] if fixed & {*KV_KEYS} else chosen_kv_types(args),
            attention=args.attention,
            batches=args.batch,
            ubatches=args.ubatch,
            threads=args.threads or [physical_threads()],
            depths=args.depth,
            n_prompt=args.prompt_tokens,
            n_gen=args.gen_tokens,
            samples=args.repeat,
            n_ctx=args.ctx,
            split=(request.workers, request.layers_on, request.insecure) if split else None,
        )
        _check_lengths(args, file)
    return configurations


def _check_lengths(args: argparse.Namespace, file: GGUFFile) -> None:
    deepest = max(args.depth)
    needed = deepest + max(args.prompt_tokens, args.gen_tokens)
    if needed == 0:
        raise YarnEdgeError("nothing to measure: --prompt-tokens, --gen-tokens and --depth are all 0")
    if args.ctx is not None and needed > args.ctx:
        raise YarnEdgeError(
            f"--ctx {args.ctx} does not hold {deepest} tokens of --depth and {needed - deepest} tokens of a test: it must be {needed}"
        )
    if needed > MAX_TOKENS:
        raise YarnEdgeError(f"{needed} tokens: llama.cpp takes at most {MAX_TOKENS}")
    declared = file.required_int("context_length")
    if needed > declared:
        note(
            f"{file.path}: its context is {declared} tokens: the speed beyond it is measured, although the model was not made for it"
        )


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas, without repetitions, in their order."""

    def parse_all(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(item) for item in text.split(",")))

    return parse_all


def one_of(*names: str) -> Callable[[str], str]:
    """An argparse type: one of these words."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; known: {', '.join(names)}")
        return text

    return parse


def kv_type(text: str) -> str:
    """An argparse type: a type of the KV cache, or two as K/V."""
    try:
        return join_kv_types(*kv_types(text, ""))
    except YarnEdgeError as error:
        raise argparse.ArgumentTypeError(str(error).lstrip()) from None


def depth(text: str) -> int:
    """An argparse type: 0, or a number of tokens such as 4k."""
    return 0 if text == "0" else length(text)


def add_size_flags(parser: argparse.ArgumentParser, n_prompt: int, n_gen: int) -> None:
    """-p and -n, the tokens of a timed run, with their defaults."""
    for short, name, default, what in (
        ("-p", "--prompt-tokens", n_prompt, "read"),
        ("-n", "--gen-tokens", n_gen, "generate"),
    ):
        text = f"tokens to {what} in a timed run; 0 leaves this test out (default: %(default)s)"
        parser.add_argument(short, name, type=length_from(0, MAX_TOKENS), default=default, metavar="N", help=text)


# flag -> (type of an item, default, help)
_LISTS: dict[str, tuple[Callable[[str], Any], list[Any] | None, str]] = {
    "--backend": (
        one_of(*BACKENDS, "all"),
        None,
        f"backends to measure: {', '.join(BACKENDS)}, or all for every one in this build (default: those with a device here)",
    ),
    "--depth": (depth, [0], "tokens in the cache before each test, such as 0,4k,16k (default: 0)"),
    "--kv-type": (kv_type, ["f16"], "types of the KV cache, such as f16,q8_0,q8_0/q4_0 (default: f16)"),
    "--kv-k": (one_of(*KV_TYPES), None, "types of K in them (default: as --kv-type)"),
    "--kv-v": (one_of(*KV_TYPES), None, "types of V in them (default: as --kv-type)"),
    "--threads": (count(1, MAX_THREADS), None, "numbers of threads (default: one thread per physical core)"),
    "--batch": (length_from(1, MAX_TOKENS), [512], "maximum tokens per call of llama.cpp (default: 512)"),
    "--ubatch": (length_from(1, MAX_TOKENS), [512], "maximum tokens per compute graph (default: 512)"),
    "--attention": (
        one_of(*ATTENTION_CHOICES),
        ["auto"],
        f"any of {', '.join(ATTENTION_CHOICES)}: see `chat`; ggml is llama.cpp's own choice here (default: auto)",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge bench`."""
    parser.usage = "yarn-edge bench MODEL.gguf… [flags]\n       yarn-edge bench compare A.json B.json [--json] [--report FILE.html]"
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL.gguf",
        help="GGUFs, or a GGUF with another cache or scaling: MODEL.gguf@kv=q8_0; "
        "or the word compare and two files to compare, written with --json or by llama-bench -o json",
    )
    for flag, (kind, default, text) in _LISTS.items():
        add(flag, type=listed(kind), default=default, metavar="LIST", help=text)
    add_split_flags(parser)
    add_size_flags(parser, 512, 128)
    add("--repeat", type=count(1, 1000), default=5, metavar="N", help="timed runs of each test (default: %(default)s)")
    add("--ctx", type=length, metavar="N", help="size of the KV cache in tokens (default: what the tests need)")
    add(
        "--timeout",
        type=count(1, 10**7),
        default=TIMEOUT_S,
        metavar="S",
        help="maximum seconds for one configuration (default: %(default)s)",
    )
    add("--csv", metavar="FILE", help="also write all rows as CSV, with llama-bench's names for its own columns")
    add_trust_flag(parser)
    add_output_flags(parser)
    parser.set_defaults(usual={a.dest: a.default for a in parser._actions})


def run(args: argparse.Namespace) -> int:
    """`yarn-edge bench`. Returns 1 if nothing was measured, or if the rope kernel of a backend is wrong."""
    if args.models[0] == "compare" and not Path("compare").exists():
        from .compare import run as compare

        return compare(args)
    check_outputs(args)
    csv = None if args.csv is None else check_output(Path(args.csv), args.force)
    files = {model: _opened(model) for model in dict.fromkeys(args.models)}
    session = SpeedSession(files, args.timeout)
    configurations = plan(args, session)
    machine = machine_state()
    if machine["busy"]:
        note(f"{machine['busy']}: speeds will be lower and vary more")
    stopped: BaseException | None = None
    try:
        with bar("Measuring", sum(c.cost for c in configurations)) as advance:
            for configuration in configurations:
                session.measure(configuration, advance)
    except (KeyboardInterrupt, Terminated) as signalled:
        stopped = signalled
    session.finish()
    paths = [variant.path for variant, _file in files.values()]
    bandwidth = session.ceilings.bytes_per_s
    outcome = SpeedOutcome(session.rows, environment(paths), machine, bandwidth, complete=stopped is None)
    try:
        if csv is not None and outcome.rows:
            write_csv(outcome.rows, csv, args.force)
    finally:
        deliver(args, outcome.as_json(), outcome.report(), paths)
    if stopped is not None:
        raise stopped
    return _verdict(outcome)


def _verdict(outcome: SpeedOutcome) -> int:
    """The exit code; notes say what to do about what is missing or wrong."""
    for remedy in sorted({f"{row.backend}: {row.status}: {row.remedy}" for row in outcome.rows if row.remedy}):
        note(remedy)
    wrong = {(row.backend, row.rope.detail) for row in outcome.rows if row.rope and row.rope.status == "fail"}
    for backend, detail in sorted(wrong):
        note(f"{backend}: the rope kernel is wrong: {detail}")
    return int(not any(row.status == OK for row in outcome.rows) or bool(wrong))


def _opened(model: str) -> tuple[Variant, GGUFFile]:
    """Read before anything is measured, so that a wrong name costs nothing."""
    variant = parse_variant(model)
    check_loadable(variant.gguf)
    return variant, variant.gguf
